"""Floor 3: how much memory a configuration needs, before anything is allocated."""
