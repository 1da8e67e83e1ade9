"""Floor 3: checkpoints that are whole or absent, and load on any number of processes."""

from tinytron.checkpoint.files import CheckpointFiles, find_checkpoint, newest_checkpoint
from tinytron.checkpoint.load import load_checkpoint
from tinytron.checkpoint.mirror import Mirror
from tinytron.checkpoint.save import save_checkpoint

__all__ = ["CheckpointFiles", "Mirror", "find_checkpoint", "load_checkpoint", "newest_checkpoint", "save_checkpoint"]
