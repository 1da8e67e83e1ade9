"""Floor 2: from text in any of its forms to token shards, by all cores (``scripts/tokenize_dataset.py``)."""
