"""ZeRO-1: optimizer states sharded over the ranks that hold the same parameters (arXiv:1910.02054, section 5)."""
