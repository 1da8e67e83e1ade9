"""Resident memory of this process, in bytes (Linux only)."""

from __future__ import annotations

from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def is_measurable() -> bool:
    """Whether this system reports resident memory and lets a process reset its peak."""
    return _STATUS.exists() and _RESET.exists()


def resident() -> int:
    """Bytes resident now."""
    return _field("VmRSS")


def peak_resident() -> int:
    """The most that was resident since ``reset_peak`` (or since the process started)."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Start ``peak_resident`` again from what is resident now."""
    _RESET.write_text("5")


def _field(name: str) -> int:
    fields = dict(line.split(":") for line in _STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) * 1024
