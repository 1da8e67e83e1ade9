"""Floor 3: checkpoints. Each is either complete or absent, and loads on any number of processes."""

from tinytron.checkpoint.files import (
    CheckpointFiles,
    Retention,
    complete_checkpoints,
    find_checkpoints,
    newest_checkpoint,
)
from tinytron.checkpoint.load import first_undamaged, load_checkpoint
from tinytron.checkpoint.mirror import Mirror
from tinytron.checkpoint.model import load_model
from tinytron.checkpoint.save import CheckpointSaver

__all__ = [
    "CheckpointFiles",
    "CheckpointSaver",
    "Mirror",
    "Retention",
    "complete_checkpoints",
    "find_checkpoints",
    "first_undamaged",
    "load_checkpoint",
    "load_model",
    "newest_checkpoint",
]
