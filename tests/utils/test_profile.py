"""Peak rates by device name, and which steps a trace holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tinytron.errors import ConfigError
from tinytron.utils import profile
from tinytron.utils.matmul import use_onednn
from tinytron.utils.phases import FORWARD, UPDATE
from tinytron.utils.profile import build_profiler, measured_matmul_rate, peak_flops

CUDA = torch.device("cuda")
NAMES = {  # as the drivers report them -> TFLOP/s in 16 bits and in fp8
    "NVIDIA H200": (989.0, 1979.0),
    "NVIDIA GH200 480GB": (989.0, 1979.0),
    "NVIDIA H100 80GB HBM3": (989.0, 1979.0),
    "NVIDIA H100 PCIe": (756.0, 1513.0),
    "NVIDIA H800": (989.0, 1979.0),
    "NVIDIA H20": (148.0, 296.0),
    "NVIDIA A100-SXM4-80GB": (312.0, None),
    "NVIDIA A40": (149.7, None),
    "NVIDIA A30": (165.0, None),
    "Tesla V100-SXM2-16GB": (125.0, None),
    "Tesla T4": (65.0, None),
    "NVIDIA L4": (121.0, 242.5),
    "NVIDIA L40": (181.0, 362.0),
    "NVIDIA L40S": (362.0, 733.0),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 728.5),
    "NVIDIA GeForce RTX 4090": (165.2, 330.3),
    "NVIDIA GeForce RTX 3090": (71.0, None),
}


@pytest.fixture
def device_name(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Set the name in place to pretend to have that GPU; 7 FLOP/s are what it measures."""
    name = [""]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name[0])
    monkeypatch.setattr(profile, "measured_matmul_rate", lambda device, dtype: 7.0)
    return name


@pytest.mark.parametrize(("name", "rates"), NAMES.items())
def test_known_gpus_have_their_own_rate(device_name: list[str], name: str, rates: tuple[float, float | None]) -> None:
    device_name[0] = name
    tflops, in_fp8 = rates
    if in_fp8 is None:
        with pytest.raises(ConfigError, match=f"no fp8 matmul rate is known for {name}; use torch.bfloat16"):
            peak_flops(CUDA, torch.float8_e4m3fn)
    else:
        assert peak_flops(CUDA, torch.float8_e5m2) == (in_fp8 * 1e12, "data sheet")
    assert peak_flops(CUDA, torch.bfloat16) == (tflops * 1e12, "data sheet")
    assert peak_flops(CUDA, torch.float16) == (tflops * 1e12, "data sheet")


@pytest.mark.parametrize("name", ["NVIDIA RTX A4000", "NVIDIA RTX A3000", "NVIDIA T400 4GB", "AMD Instinct MI300X"])
def test_unknown_gpus_are_measured_not_guessed_from_a_prefix(device_name: list[str], name: str) -> None:
    device_name[0] = name
    assert peak_flops(CUDA, torch.bfloat16) == (7.0, "measured")
    for device, unknown in ((CUDA, name), (torch.device("cpu"), "cpu")):
        with pytest.raises(ConfigError, match=f"no fp8 matmul rate is known for {unknown}"):
            peak_flops(device, torch.float8_e4m3fn)


def test_the_rate_is_known_with_onednn_too(device_name: list[str]) -> None:
    before = torch.get_float32_matmul_precision()
    use_onednn()
    try:
        assert peak_flops(torch.device("cpu"), torch.float32) == (7.0, "measured")
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    finally:
        torch.set_float32_matmul_precision(before)


def test_fp32_has_the_tf32_rate_unless_that_is_off(device_name: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    device_name[0] = "NVIDIA H200"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(CUDA, torch.float32) == (494.5e12, "data sheet")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert peak_flops(CUDA, torch.float32) == (7.0, "measured")
    assert peak_flops(CUDA, torch.float64) == (7.0, "measured")


def test_a_cpu_is_measured() -> None:
    rate = measured_matmul_rate(torch.device("cpu"), torch.float32, seconds=0.0)
    assert 1e8 < rate < 1e15


def traced_steps(first: int, last: int, run: int, trace: Path, done: int = 0) -> set[int]:
    """Numbers of the steps found in the trace of a run of ``run`` steps that continues after ``done``."""
    with build_profiler(first, last, trace, done=done) as profiler:
        for step in range(done + 1, run + 1):
            with torch.profiler.record_function(f"training step {step}"):
                torch.ones(2).sum()
            profiler.step()
    if not trace.exists():
        return set()
    names = {str(event.get("name")) for event in json.loads(trace.read_text())["traceEvents"]}
    steps = {int(name.split()[-1]) for name in names if name.startswith("training step ")}
    marked = {int(name.split("#")[1]) for name in names if name.startswith("ProfilerStep#")}
    assert marked - {run + 1} == steps  # a window that is cut off: the step after the last has begun
    return steps


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")  # there is no step before the first
@pytest.mark.parametrize(
    ("first", "last", "run", "expected"),
    [(3, 4, 8, {3, 4}), (1, 2, 4, {1, 2}), (2, 2, 2, {2}), (3, 9, 5, {3, 4, 5}), (4, 5, 3, set())],
)
def test_the_trace_holds_the_steps_of_the_window(
    tmp_path: Path, first: int, last: int, run: int, expected: set[int]
) -> None:
    assert traced_steps(first, last, run, tmp_path / "trace.json") == expected


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_a_resumed_run_counts_its_own_steps(tmp_path: Path, done: int) -> None:
    assert traced_steps(max(4, done + 1), 5, 6, tmp_path / "trace.json", done) == {4, 5} - {done}


def test_the_costliest_operations_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    with build_profiler(2, 3, tmp_path / "trace.json", say=said.append) as profiler:
        for _ in range(4):
            with torch.profiler.record_function(FORWARD):
                x = torch.ones(400, 400) @ torch.ones(400, 400)
            with torch.profiler.record_function(UPDATE):
                x.add_(1)
            profiler.step()
    assert said[0].startswith(f"profile written to {tmp_path / 'trace.json'}; ")
    shares = re.fullmatch(r"  forward (\d+)%, optimizer (\d+)%", said[1])
    assert shares
    assert int(shares[1]) > int(shares[2])
    assert said[2].split() == ["operation", "calls", "ms", "share"]
    assert said[3].split()[:2] == ["aten::mm", "2"]
    assert not any(line.split()[0] in (FORWARD, UPDATE) for line in said[3:])
