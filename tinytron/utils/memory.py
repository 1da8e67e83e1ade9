"""The memory of a machine, read without an additional package."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # cgroup versions 2 and 1
_USES = ("memory.current", "memory/memory.usage_in_bytes")


class Memory(NamedTuple):
    """Total and free bytes."""

    total: int
    free: int


def memory_of(device: torch.device) -> Memory | None:
    """The memory of a GPU or of the machine, or the smaller limit of a container; ``None`` if it is unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    found = _machine(Path("/proc/meminfo"))
    limit, use = (next((n for name in names if (n := _number(_CGROUP / name))), None) for names in (_LIMITS, _USES))
    if found is None or limit is None or limit >= found.total:
        return found
    return Memory(limit, min(found.free, max(0, limit - (use or 0))))


def _machine(file: Path) -> Memory | None:
    try:
        numbers = {
            name: 1024 * int(size) for name, size in re.findall(r"(\w+):\s+(\d+) kB", file.read_text(encoding="utf-8"))
        }
        return Memory(numbers["MemTotal"], numbers["MemAvailable"])
    except (OSError, KeyError):
        return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))  # "max" means unlimited
    except (OSError, ValueError):
        return None


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of tensors on a GPU, or of this process on a CPU (0 on Windows, which does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
