"""Peak FLOP rates (for MFU) and the torch profiler."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from tinytron.errors import ConfigError
from tinytron.utils.phases import BACKWARD, EXCHANGE, FORWARD, UPDATE

PARTS = (FORWARD, BACKWARD, EXCHANGE, UPDATE)  # a step consists of these

# Dense TFLOP/s by a part of the device name, for (fp32, 16-bit, fp8). The 32-bit column is the TF32 tensor-core rate where
# the device has one, because that is what fp32 matmuls use unless --disable_tf32 is given. ``None``: no fp8 tensor cores.
# Sources: NVIDIA's data sheets, halved where they give rates with sparsity only (H100 3,958, L4 485, RTX 6000 Ada 1,457 in
# fp8), and its Ada GPU architecture paper for the RTX 4090, with sums in fp32.
# The first name that matches whole words is used, so a longer name comes before its prefix.
PEAK_TFLOPS: dict[str, tuple[float, float, float | None]] = {
    "GH200": (494.5, 989.0, 1979.0),
    "H200": (494.5, 989.0, 1979.0),
    "H100 PCIe": (378.0, 756.0, 1513.0),
    "H100": (494.5, 989.0, 1979.0),
    "H800": (494.5, 989.0, 1979.0),
    "H20": (74.0, 148.0, 296.0),
    "A100": (156.0, 312.0, None),
    "A40": (74.8, 149.7, None),
    "A30": (82.0, 165.0, None),
    "V100": (15.7, 125.0, None),
    "T4": (8.1, 65.0, None),
    "L40S": (183.0, 362.0, 733.0),
    "L40": (90.5, 181.0, 362.0),
    "L4": (60.0, 121.0, 242.5),
    "RTX 6000 Ada": (182.1, 364.2, 728.5),
    "RTX 4090": (82.6, 165.2, 330.3),
    "RTX 3090": (35.6, 71.0, None),
}

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The device's peak matmul rate in FLOP/s, and the source of the figure: ``"data sheet"`` or ``"measured"``. Raises:
    ConfigError for fp8 on a device for which the table has no such rate, because torch.mm cannot measure it."""
    column = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 1, **dict.fromkeys(FP8, 2)}.get(dtype)
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        column = None  # without TF32 the table does not apply
    if device.type == "cuda" and column is not None:
        name = torch.cuda.get_device_name(device)
        for part, rates in PEAK_TFLOPS.items():
            if re.search(rf"\b{part}\b", name):  # an RTX A4000 is not an A40
                rate = rates[column]
                if rate is not None:
                    return rate * 1e12, "data sheet"
                break
    if dtype in FP8:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ConfigError(f"no fp8 matmul rate is known for {name}; use torch.bfloat16")
    return measured_matmul_rate(device, dtype), "measured"


def measured_matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """The best FLOP/s of square matmuls within about ``seconds``, using this process's threads."""
    return matmul_rates(device, dtype, seconds)[0]


def matmul_rates(
    device: torch.device, dtype: torch.dtype, seconds: float, size: int | None = None
) -> tuple[float, float]:
    """The best and the median FLOP/s of ``size x size`` matmuls (default: 8192 on a GPU, 1536 on a CPU) within ``seconds``.

    The data are random, because GPUs multiply constants faster. They come from a separate generator, so measuring does not
    change a run's random numbers.
    """
    size = size or (8192 if device.type == "cuda" else 1536)
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    b = torch.randn(size, size, device=device, generator=generator).to(dtype)
    out = a @ b  # warm-up, and the output memory that the timed products reuse
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while not rates or time.perf_counter() < end:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _synchronize(device)
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return max(rates), statistics.median(rates)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_profiler(
    first_step: int, last_step: int, trace: Path, *, done: int = 0, say: Callable[[str], None] = print
) -> profile:
    """A profiler of the steps ``first_step..last_step`` (counted from 1, inclusive) for a run that has completed ``done``
    steps. It writes a Chrome trace, in which ``ProfilerStep#15`` is step 15, and reports the trace's path and the most
    expensive operations.

    Call ``step()`` after every training step; the trace is written when the window closes or, for a shorter run, when
    the profiler stops with at least one profiled step.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)

    def action(step: int) -> ProfilerAction:
        if first_step <= step <= last_step:
            return ProfilerAction.RECORD_AND_SAVE if step == last_step else ProfilerAction.RECORD
        return ProfilerAction.WARMUP if step == first_step - 1 else ProfilerAction.NONE

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(trace))
        say(f"profile written to {trace}; open it in https://ui.perfetto.dev or chrome://tracing")
        for line in costliest(profiler):
            say(line)

    profiler = profile(activities=activities, schedule=action, on_trace_ready=write)
    profiler.step_num = done + 1  # the current step; by itself the profiler would count from 0
    profiler.current_action = action(done + 1)  # type: ignore[assignment]  # mypy infers the first value's literal type
    return profiler


def costliest(profiler: profile, rows: int = 12) -> list[str]:
    """Lines of a table with the share of each marked part of a step (``PARTS``) in the profiled time, and the operations
    with the most self time, which excludes the operations they call. On a GPU it is device time."""
    averages = profiler.key_averages()
    on_device = torch.cuda.is_available()

    def whole(event: Any) -> float:  # in ms
        return float(event.device_time_total if on_device else event.cpu_time_total) / 1e3

    def own(event: Any) -> float:
        return float(event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e3

    parts = {part: max((whole(e) for e in averages if e.key == part), default=0.0) for part in PARTS}
    operations = [e for e in averages if e.key not in PARTS and not e.key.startswith("ProfilerStep")]
    total = sum(own(e) for e in operations) or 1.0
    marked = sum(parts.values()) or 1.0
    lines = ["  " + ", ".join(f"{part} {ms / marked:.0%}" for part, ms in parts.items() if ms)]
    lines.append(f"  {'operation':<44} {'calls':>7} {'ms':>10} {'share':>6}")
    for event in sorted(operations, key=own, reverse=True)[:rows]:
        lines.append(f"  {event.key[:44]:<44} {event.count:>7,} {own(event):>10,.1f} {own(event) / total:>6.1%}")
    return lines
