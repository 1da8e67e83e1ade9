"""benchmarks/gpu/stand_in.py: its events, graphs and waits behave as a GPU's where a rehearsal relies on it."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.runs import ROOT


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("gpu.stand_in")
    module.install(monkeypatch.setattr)
    return module


def test_install_refuses_a_machine_with_a_gpu(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="this machine has a GPU"):
        stand_in.install()


def test_every_name_is_one_of_torch(monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> None:
    monkeypatch.undo()
    assert [name for name in stand_in.STAND_INS if not hasattr(torch.cuda, name)] == []


# Events and streams.


@pytest.mark.usefixtures("stand_in")
def test_events_tell_the_time_between_them() -> None:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.Stream(priority=-1)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        start.record()
        time.sleep(0.02)
        end.record(stream)
    end.synchronize()
    assert end.query()
    assert 20 <= start.elapsed_time(end) < 2000
    assert end.elapsed_time(start) == -start.elapsed_time(end)


@pytest.mark.usefixtures("stand_in")
def test_events_that_know_no_time_say_so() -> None:
    recorded = torch.cuda.Event(enable_timing=True)
    recorded.record()
    with pytest.raises(RuntimeError, match="need enable_timing=True"):
        recorded.elapsed_time(torch.cuda.current_stream().record_event())
    with pytest.raises(RuntimeError, match="must be recorded"):
        recorded.elapsed_time(torch.cuda.Event(enable_timing=True))


# Graphs.


def captured(action: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        action()
    return graph


@pytest.mark.usefixtures("stand_in")
def test_a_replay_computes_from_what_is_in_memory_then_into_the_same_memory() -> None:
    x, weight = torch.ones(3, 4), torch.full((4, 2), 2.0, requires_grad=True)
    seen: dict[str, torch.Tensor] = {}

    def step() -> None:
        weight.grad = None
        seen["out"] = (x @ weight).transpose(0, 1)[1:]
        seen["out"].square().sum().backward()

    graph = captured(step)
    out, grad = seen["out"], weight.grad
    assert grad is not None
    places = out.data_ptr(), grad.data_ptr()
    for value in (3.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert torch.equal(out, torch.full((1, 3), 8 * value))
        assert torch.equal(grad[:, 1], torch.full((4,), 2 * 8 * value * value * 3))
        assert not grad[:, 0].any()
    assert (out.data_ptr(), grad.data_ptr()) == places


@pytest.mark.usefixtures("stand_in")
def test_capturing_computes_nothing() -> None:
    total, param = torch.zeros(2), torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([param], lr=torch.tensor(0.1), fused=True, capturable=True)
    optimizer.step()
    before = param.detach().clone()

    def step() -> None:
        total.add_(1)
        optimizer.step()

    graph = captured(step)
    assert not total.any()
    assert torch.equal(param, before)
    for count in (1, 2):
        graph.replay()
        assert total.tolist() == [count] * 2
        assert float(optimizer.state[param]["step"]) == 1 + count
    assert not torch.equal(param, before)


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("stand_in", "_one_process")
def test_collectives_are_replayed_and_waited_for() -> None:
    x, total = torch.ones(4), torch.zeros(4)

    def step() -> None:
        summed = x.clone()
        dist.all_reduce(summed, async_op=True).wait()
        total.add_(summed)

    graph = captured(step)
    assert not total.any()
    for _ in range(50):
        graph.replay()
    assert total.tolist() == [50.0] * 4


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": torch.Tensor.item,
    "if": lambda x: 1 if x > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "mask": lambda x: x.view(1)[x.view(1) > 0],
    "synchronize": lambda x: torch.cuda.synchronize(),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", READS)
def test_a_capture_refuses_host_reads(name: str) -> None:
    x = torch.ones(())
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured(lambda: READS[name](x * 2))
    assert not torch.cuda.is_current_stream_capturing()
    READS[name](x)  # allowed again


@pytest.mark.usefixtures("stand_in")
def test_a_graph_that_captured_nothing_is_not_replayed() -> None:
    with pytest.raises(RuntimeError, match="captured nothing"):
        torch.cuda.CUDAGraph().replay()


# Waits.


@pytest.mark.usefixtures("stand_in")
def test_host_waits_raise_or_warn_when_asked_for() -> None:
    x = torch.ones(3)
    torch.cuda.set_sync_debug_mode("error")
    x.sum().mul_(2)
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        float(x.sum())
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="called a synchronizing CUDA operation"):
        assert x.tolist() == [1.0] * 3
    torch.cuda.set_sync_debug_mode("default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(x.sum()) == 3.0
    with pytest.raises(RuntimeError, match="invalid value"):
        torch.cuda.set_sync_debug_mode("loud")


# Memory.


@pytest.mark.usefixtures("stand_in")
def test_memory_is_what_is_resident() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = [torch.ones(2**24) for _ in range(4)]  # 256 MiB, of which earlier tests may have left some
    assert torch.cuda.memory_allocated() - before > 2**25
    assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated() - 2**23
    del made
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total
