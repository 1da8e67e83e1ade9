"""Running jobs by name: their options as YAML files, stages one after another, checkpoints by name."""
