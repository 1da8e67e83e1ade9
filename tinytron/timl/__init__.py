"""timl's Python interface: a ``Trainer`` around a model and data loader functions of one's own (docs/timl.md)."""

from tinytron.data.functions import data_loader as batch_loader_tokens
from tinytron.data.functions import data_loader_floats as batch_loader_floats
from tinytron.data.functions import get_num_tokens
from tinytron.metrics.custom import create_loss_metric_cls
from tinytron.timl.trainer import Trainer
from tinytron.timl.training_args import TrainingArguments

__all__ = [
    "Trainer",
    "TrainingArguments",
    "batch_loader_floats",
    "batch_loader_tokens",
    "create_loss_metric_cls",
    "get_num_tokens",
]
