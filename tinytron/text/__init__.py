"""Floor 2: text to token ids to token shards, offline (``scripts/tokenize_dataset.py``), and the tokenizer of a run."""
