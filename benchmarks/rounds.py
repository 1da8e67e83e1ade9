"""Rounds in which alternatives take turns, and what their figures come to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

WARM_UP = 3  # rounds that do not count: the first ones compile, and take memory


def median_ms(runs: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[float]:
    """Milliseconds of each on the device, by turns."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + WARM_UP):
        for run, seen in zip(runs, times, strict=True):
            taken = _elapsed_ms(run, device)
            if number >= WARM_UP:
                seen.append(taken)
    return [statistics.median(seen) for seen in times]


def _elapsed_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_rate(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes per second, read and written; ``nbytes``: size of one copy (default: 1 GiB on a GPU, 128 MiB on a CPU)."""
    count = (nbytes or (2**30 if device.type == "cuda" else 2**27)) // 4
    source, target = torch.randn(2, count, device=device)
    return 2 * source.nbytes / (median_ms([lambda: target.copy_(source)], 15, device)[0] / 1e3)


def spread(values: Sequence[float], form: str) -> str:
    """Median, and in brackets the smallest and the largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(own, base, strict=True))
