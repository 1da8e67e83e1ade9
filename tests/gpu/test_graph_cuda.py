"""Parts of a training step as a CUDA graph: captured once, replayed on other tokens, against the same eagerly. What stands
in the way of more is in docs/speed.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.gpu.device import DEVICE, GPU_TEST, REHEARSING, relative_error, sized
from tests.gpu.test_model_cuda import CONFIG
from tinytron.distributed import DistributedOptimizer
from tinytron.kernels.choice import Backend, Kernels
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
from tinytron.utils.sequences import Documents

pytestmark = GPU_TEST

B, S = 2, CONFIG.block_size
WARM_UP = sized(3, 2)


def tokens(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = torch.randint(CONFIG.vocab_size, (2, B, S), generator=torch.Generator().manual_seed(seed))
    labels[0, :5] = -100
    return ids.to(DEVICE), labels.to(DEVICE)


def captured(stream: torch.cuda.Stream, action: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``action`` as a graph, after it ran some times: libraries and optimizer states are made then."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            action()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's watchdog, may ask the device something meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        action()
    return graph


def loss_of(model: GPT, ids: torch.Tensor, labels: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
    sums = model(ids, labels, documents=documents)
    assert isinstance(sums, LossSums)
    return sums.objective / ids.numel()


@pytest.mark.parametrize(
    ("backend", "dtype", "recompute", "tolerance"),
    [
        ("sdpa", torch.float32, "none", 1e-5),
        ("sdpa", torch.bfloat16, "none", 1e-2),
        ("sdpa", torch.bfloat16, "selective", 1e-2),
        ("sdpa", torch.bfloat16, "full", 1e-2),
        ("varlen", torch.bfloat16, "selective", 1e-2),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_backward(
    backend: Backend, dtype: torch.dtype, recompute: str, tolerance: float, packed: bool
) -> None:
    """Documents may lie anywhere, as long as they are as many, and none is longer than what was captured."""
    model = GPT(CONFIG, dtype=dtype, device=DEVICE, kernels=Kernels(attention=backend), recompute=recompute)  # type: ignore[arg-type]
    (ids, labels), loss = tokens(0), torch.zeros((), device=DEVICE)
    boundaries = torch.tensor([0, S // 3, S, S + 20, 2 * S], dtype=torch.int32, device=DEVICE)
    documents = Documents(boundaries, S) if packed else None

    def forward_and_backward() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        mine = loss_of(model, ids, labels, documents)
        mine.backward()
        loss.copy_(mine.detach())

    graph = captured(torch.cuda.Stream(), forward_and_backward)
    made = {name: p.grad for name, p in model.named_parameters()}  # in the graph's memory: every replay writes there
    for seed in (1, 2):
        other_ids, other_labels = tokens(seed)
        ids.copy_(other_ids)
        labels.copy_(other_labels)
        boundaries.copy_(torch.tensor([0, 10 * seed, S, S + 9, 2 * S], dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        # The model's own gradients are the graph's memory, and stay as they are.
        expected = loss_of(model, other_ids, other_labels, documents)
        grads = torch.autograd.grad(expected, list(model.parameters()))
        assert relative_error(loss, expected) <= tolerance
        for (name, mine), theirs in zip(made.items(), grads, strict=True):
            assert relative_error(mine, theirs) <= tolerance, name


@pytest.fixture
def one_process() -> None:
    dist.init_process_group(
        "gloo" if REHEARSING else "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1
    )


@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("one_process")
def test_a_whole_step_of_one_process(dtype: torch.dtype, shard: bool) -> None:
    """Forward, backward, clipping and AdamW. The learning rate is a tensor, or every replay would use the captured one."""
    lr = torch.tensor(1e-3, device=DEVICE)
    models = [GPT(replace(CONFIG, num_layer=1), dtype=dtype, device=DEVICE) for _ in range(2)]
    captured_one, eager = (
        DistributedOptimizer(
            torch.optim.AdamW(m.parameters(), lr=lr.clone() if m is models[1] else lr, fused=True, capturable=True),
            shard=shard,
        )
        for m in models
    )

    def step(model: GPT, optimizer: DistributedOptimizer, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with optimizer.accumulate(last=True):
            loss_of(model, ids, labels).backward()
        norm = optimizer.step(max_norm=0.5)
        optimizer.zero_grad()
        return norm

    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    ids, labels = tokens(0)
    norm = torch.zeros((), device=DEVICE)
    graph = captured(torch.cuda.Stream(), lambda: norm.copy_(step(models[0], captured_one, ids, labels)))
    for _ in range(WARM_UP):
        step(models[1], eager, *tokens(0))
    for seed in (1, 2, 3):
        other_ids, other_labels = tokens(seed)
        ids.copy_(other_ids)
        labels.copy_(other_labels)
        lr.fill_(1e-3 / seed)
        graph.replay()
        for group in eager.param_groups:
            group["lr"].fill_(1e-3 / seed)
        expected = step(models[1], eager, other_ids, other_labels)
        assert relative_error(norm, expected) <= tolerance
    for (name, mine), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert relative_error(mine, theirs) <= tolerance, name
    for optimizer in (captured_one, eager):
        assert {float(state["step"]) for state in optimizer.inner.state.values()} == {WARM_UP + 3.0}
        assert float(optimizer.skipped_steps) == 0
