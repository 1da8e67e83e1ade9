"""Floor 3: checkpoints that are whole or absent, and load on any number of processes."""

from tinytron.checkpoint.files import CheckpointFiles, find_checkpoint, newest_checkpoint
from tinytron.checkpoint.load import load_checkpoint
from tinytron.checkpoint.save import save_checkpoint

__all__ = ["CheckpointFiles", "find_checkpoint", "load_checkpoint", "newest_checkpoint", "save_checkpoint"]
