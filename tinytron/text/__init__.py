"""Floor 2: text to token ids to token shards, offline (``scripts/tokenize_dataset.py``); the tokenizer of a run's data."""
