"""Sinks, which receive the records of a run. To add a logger, add a file here and an entry in ``SINKS``."""

from __future__ import annotations

from collections.abc import Sequence

from tinytron.metrics.sinks.background import Background
from tinytron.metrics.sinks.base import Record, RunInfo, Sink, SinkFailedError
from tinytron.metrics.sinks.console import Console
from tinytron.metrics.sinks.files import JsonLog, TextLog
from tinytron.metrics.sinks.messages import MessageLog
from tinytron.metrics.sinks.table import CsvLog
from tinytron.metrics.sinks.tensorboard import TensorBoard
from tinytron.metrics.sinks.wandb import WandB

# The values of --loggers. Sinks get the records in this order.
SINKS: dict[str, type[Sink]] = {
    "log": TextLog,
    "jsonl": JsonLog,
    "csv": CsvLog,
    "messages": MessageLog,
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "console": Console,
}
# A checkpoint must not be newer than the logs, and a message belongs before what follows it: these do not wait in a thread.
AT_ONCE = ("log", "jsonl", "csv", "messages", "console")


def make_sinks(names: Sequence[str]) -> list[Sink]:
    """New sinks of these names, in the order of ``SINKS``."""
    chosen = [(name, sink()) for name, sink in SINKS.items() if name in names]
    return [sink if name in AT_ONCE else Background(sink, name) for name, sink in chosen]


__all__ = [
    "AT_ONCE",
    "SINKS",
    "Background",
    "Console",
    "CsvLog",
    "JsonLog",
    "MessageLog",
    "Record",
    "RunInfo",
    "Sink",
    "SinkFailedError",
    "TensorBoard",
    "TextLog",
    "WandB",
    "make_sinks",
]
