"""Floor 3: a plan of the memory that a configuration needs, made before anything is allocated."""
