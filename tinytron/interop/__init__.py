"""Floor 3: models of Hugging Face in and out."""

from tinytron.interop.load import load_pretrained, model_options

__all__ = ["load_pretrained", "model_options"]
