"""Floor 3: models of Hugging Face in and out."""
