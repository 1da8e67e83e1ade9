"""The parts of a block, one file each."""
