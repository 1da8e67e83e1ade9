"""Attention by tiles against the readable formula, and against torch's kernel where precision is concerned."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tinytron.kernels import attention_tiled as tiling
from tinytron.kernels.attention import attend
from tinytron.kernels.attention_tiled import can_tile, tiled_attention
from tinytron.kernels.choice import Backend, Kernels
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.recompute import Recompute
from tinytron.utils import matmul
from tinytron.utils.sequences import Documents, visible

H = 4
HEADS = [(4, 4), (4, 2), (3, 1)]  # MHA, GQA, MQA


def make_qkv(B: int, S: int, N: int, K: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(S)
    return [
        torch.randn(B, S, heads, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (N, K, K)
    ]


def outcome(out: torch.Tensor, qkv: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of a sum of it, weighted so that all of them count."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), qkv)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one group of pairs, the last one smaller, whatever the size."""
    monkeypatch.setattr(tiling, "_SCORES", 4000)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("N", "K"), HEADS)
@pytest.mark.parametrize("S", [1, 32, 61, 130, 192])
def test_equals_the_formula_with_gradients(S: int, N: int, K: int) -> None:
    qkv = make_qkv(3, S, N, K)
    mine, formula = outcome(tiled_attention(*qkv), qkv), outcome(attend(*qkv, backend="math"), qkv)
    torch.testing.assert_close(mine, formula, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("lengths", [None, [40, 90, 2, 58, 70]])  # of documents: none spans two of the two rows
def test_masks_are_those_of_documents_and_windows(lengths: list[int] | None, window: int) -> None:
    B, S = 2, 130
    documents = None
    if lengths is not None:
        documents = Documents(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths))
        assert documents.cu_seqlens[2] == S
    qkv = make_qkv(B, S, 4, 2)
    seen = visible(documents, window, B, S, torch.float64, torch.device("cpu"))
    mine = outcome(tiled_attention(*qkv, None if seen is None else seen.mask), qkv)
    torch.testing.assert_close(mine, outcome(attend(*qkv, backend="math", documents=documents, window=window), qkv))
    torch.testing.assert_close(mine, outcome(attend(*qkv, documents=documents, window=window), qkv))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_is_as_precise_as_torch(dtype: torch.dtype) -> None:
    qkv = make_qkv(2, 256, 4, 2, dtype)
    exact_qkv = [x.detach().double().requires_grad_() for x in qkv]
    exact = outcome(attend(*exact_qkv, backend="math"), exact_qkv)

    def errors(backend: Backend) -> list[float]:
        got = outcome(attend(*qkv, backend=backend), qkv)
        return [float((x.double() - y).norm() / y.norm()) for x, y in zip(got, exact, strict=True)]

    assert can_tile(qkv[0], 0.0)
    for mine, theirs in zip(errors("auto"), errors("sdpa"), strict=True):
        assert mine < 1.5 * theirs < (0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("S", range(1, 1200, 7))
def test_tiles_cover_the_rows(S: int) -> None:
    r = tiling._tile_length(S)
    assert S % r == 0
    assert r == S or 16 <= r <= 256


def test_torch_finds_no_fault_with_the_operation() -> None:
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.float64).masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf)
    for more in (None, mask):
        torch.library.opcheck(tiling._forward, (*make_qkv(2, 64, 4, 2), more))


def test_what_it_leaves_to_others() -> None:
    q = torch.zeros(1, 64, 2, H)
    assert can_tile(q, 0.0)
    assert not can_tile(q, 0.1)
    assert not can_tile(q.half(), 0.0)
    assert not can_tile(q[:, : tiling.SHORTEST - 1], 0.0)
    assert not can_tile(torch.zeros(1, tiling.LONGEST + 1, 1, 1), 0.0)
    assert not can_tile(torch.zeros(1, 64, 2, H, device="meta"), 0.0)


class Calls(TorchDispatchMode):
    """Counts our operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tinytron":
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "forwards"), [("none", 2), ("selective", 2), ("full", 4)])
def test_the_model_uses_it_and_selective_recomputation_keeps_it(recompute: Recompute, forwards: int) -> None:
    config = ModelConfig(
        block_size=32, vocab_size=17, num_layer=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16
    )
    ids = torch.arange(64).view(2, 32) % 17
    grads = {}
    for backend in ("auto", "sdpa"):
        model = GPT(config, dtype=torch.float64, kernels=Kernels(attention=backend), recompute=recompute)  # type: ignore[arg-type]
        with Calls() as calls:
            model(ids, ids).objective.backward()
        used = {"tinytron::tiled_attention": forwards, "tinytron::tiled_attention_backward": 2}
        assert calls.counts == (used if backend == "auto" else {})
        grads[backend] = [p.grad for p in model.parameters()]
    torch.testing.assert_close(grads["auto"], grads["sdpa"], rtol=1e-9, atol=1e-12)


def test_the_library_is_chosen_for_bf16_alone_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = matmul._SETTINGS.fp32_precision, []
    real = torch.baddbmm

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(matmul._SETTINGS.fp32_precision)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "baddbmm", spy)
    for dtype, expected in ((torch.bfloat16, "bf16"), (torch.float32, before)):
        tiled_attention(*make_qkv(1, 64, 2, 1, dtype))
        assert set(seen) == {expected}
        seen.clear()
    assert matmul._SETTINGS.fp32_precision == before
