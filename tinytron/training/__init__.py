"""Floor 4: configuration, command line, and the trainer."""

from tinytron.training.arguments import build_config, parse_args
from tinytron.training.config import Config
from tinytron.training.trainer import Trainer

__all__ = ["Config", "Trainer", "build_config", "parse_args"]
