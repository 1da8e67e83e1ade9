"""Floor 5: entry points."""
