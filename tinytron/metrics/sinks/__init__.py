"""Where the records of a run go. A new logger is a file here and its name in ``SINKS``."""

from __future__ import annotations

from tinytron.metrics.sinks.base import Record, RunInfo, Sink
from tinytron.metrics.sinks.console import Console
from tinytron.metrics.sinks.files import JsonLog, TextLog

# In the order in which they get the records.
SINKS: dict[str, type[Sink]] = {"text": TextLog, "jsonl": JsonLog, "console": Console}

__all__ = ["SINKS", "Console", "JsonLog", "Record", "RunInfo", "Sink", "TextLog"]
