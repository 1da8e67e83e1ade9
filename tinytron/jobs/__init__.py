"""Runs jobs by name: options in YAML files, stages one after another, checkpoints by name."""
