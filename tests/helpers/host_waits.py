"""Host waits, counted where there is only a CPU: benchmarks/host_waits.py, which rehearsals of GPU scripts use too."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.host_waits import HostWaits
else:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    HostWaits = importlib.import_module("host_waits").HostWaits

__all__ = ["HostWaits"]
