"""The parts of a block, one per file."""
