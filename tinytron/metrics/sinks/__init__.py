"""Sinks, which receive the records of a run. To add a logger, add a file here and an entry in ``SINKS``."""

from __future__ import annotations

from tinytron.metrics.sinks.base import Record, RunInfo, Sink
from tinytron.metrics.sinks.console import Console
from tinytron.metrics.sinks.files import JsonLog, TextLog
from tinytron.metrics.sinks.messages import MessageLog

# Sinks get the records in this order.
SINKS: dict[str, type[Sink]] = {"text": TextLog, "jsonl": JsonLog, "messages": MessageLog, "console": Console}

__all__ = ["SINKS", "Console", "JsonLog", "MessageLog", "Record", "RunInfo", "Sink", "TextLog"]
