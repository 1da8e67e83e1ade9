"""The Triton kernels of the experts' rows against their eager twins, and a whole expert layer with them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.helpers.expert_rows import combine, dispatch
from tests.helpers.triton_interpreter import interpreted, near
from tinytron.distributed.expert_parallel import comm
from tinytron.kernels.choice import Kernels, TritonKernel
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.moe import MoE, MoEStats

expert_rows_triton = interpreted("expert_rows_triton")


def choices(T: int, k: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, comm.DispatchPlan]:
    """Rows, weights and routes of ``T`` tokens over 7 experts."""
    generator = torch.Generator().manual_seed(T * 100 + k * 10 + D)
    expert_Tk = torch.stack([torch.randperm(7, generator=generator)[:k] for _ in range(T)])
    rows = torch.randn(T * k, D, generator=generator).to(dtype)
    weight = torch.rand(T, k, generator=generator) + 0.1
    return rows.requires_grad_(), weight.requires_grad_(), comm.plan_dispatch(expert_Tk, 7, None)


KINDS: tuple[TritonKernel, ...] = ("torch", "triton")
SHAPES = [(1, 1, 1), (1, 4, 40), (9, 2, 33), (5, 3, 2500), (6, 1, 256), (4, 4, 4096)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "k", "D"), SHAPES)
def test_combine_equals_the_twin_in_fp64(T: int, k: int, D: int, dtype: torch.dtype) -> None:
    rows, weight, routes = choices(T, k, D, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in (rows, weight)]
    out = combine(rows, weight, routes, None, "triton")
    exact = combine(*exact_inputs, routes, None)
    assert out.dtype == dtype
    near(out, exact, ulps=2)
    grad = torch.randn(T, D, generator=torch.Generator().manual_seed(5)).to(dtype)
    mine = torch.autograd.grad(out, (rows, weight), grad)
    expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    assert [g.dtype for g in mine] == [dtype, torch.float32]
    near(mine[0], expected[0], ulps=2)
    near(mine[1], expected[1], ulps=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "k", "D"), SHAPES)
def test_the_gradient_of_dispatch_equals_the_twin_in_fp64(T: int, k: int, D: int, dtype: torch.dtype) -> None:
    rows, _, routes = choices(T, k, D, dtype)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(6)).to(dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    out, exact = dispatch(x, routes, None, "triton"), dispatch(exact_x, routes, None)
    assert torch.equal(out.double(), exact)
    (mine,) = torch.autograd.grad(out, x, rows.detach())
    assert mine.dtype == dtype
    near(mine, torch.autograd.grad(exact, exact_x, rows.detach().double())[0], ulps=2)


def test_gradients_and_weights_may_lie_anyhow() -> None:
    rows, weight, routes = choices(4, 2, 10, torch.float32)
    across = weight.detach().t().contiguous().t().requires_grad_()
    assert not across.is_contiguous()
    found = []
    for w, by in zip((weight, across), KINDS, strict=True):
        out = combine(rows, w, routes, None, by)
        found.append((out, *torch.autograd.grad(out.sum(), (rows, w))))  # an expanded gradient
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_rows_are_kept_as_they_are() -> None:
    """For backward: not in fp32."""
    rows, weight, routes = choices(6, 2, 50, torch.bfloat16)
    kept = []
    for by in KINDS:
        sizes: dict[int, int] = {}

        def keep(t: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            combine(rows, weight, routes, None, by)
        kept.append(max(sizes.values()))
    assert kept == [2 * rows.numel()] * 2


# A whole layer.

SIZES: dict[str, Any] = {
    "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 12, "intermediate_size": 7, "use_moe": True,
    "num_experts": 5, "moe_intermediate_size": 6, "num_shared_experts": 1,
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel runs."""
    counted: Counter[str] = Counter()
    for name in ("_sum_rows", "_spread"):
        kernel = getattr(expert_rows_triton, name)

        class Counting:
            def __init__(self, name: str, kernel: Any) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: Any) -> Any:
                counted[self.name] += 1
                return self.kernel[grid]

        monkeypatch.setattr(expert_rows_triton, name, Counting(name, kernel))
    return counted


def passed(layer: MoE, x: torch.Tensor) -> tuple[torch.Tensor, MoEStats, list[torch.Tensor]]:
    out, stats = layer(x, layer.router(x.flatten(0, 1)))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    objective = (out * grad).sum() + 0.1 * stats.balance
    return out, stats, list(torch.autograd.grad(objective, [x, *layer.parameters()]))


def layer_by(by: TritonKernel, k: int, dtype: torch.dtype) -> MoE:
    layer = MoE(ModelConfig(**SIZES, num_experts_per_tok=k), None, kernels=Kernels(expert_rows=by))
    generator = torch.Generator().manual_seed(k)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
        layer.router.bias[1] = -100  # nobody chooses the second expert
    layer.to(dtype).router.bias = layer.router.bias.to(torch.promote_types(dtype, torch.float32))
    return layer


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_the_same_function(tokens: int, k: int, dtype: torch.dtype, calls: Counter[str]) -> None:
    x = torch.randn(1, tokens, 12, generator=torch.Generator().manual_seed(k)).to(dtype).requires_grad_()
    plain = passed(layer_by("torch", k, dtype), x)
    assert not calls
    out, stats, grads = passed(layer_by("triton", k, dtype), x)
    assert calls == {"_sum_rows": 2, "_spread": 1}
    assert stats.load_E[1] == 0
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for one, other in zip([out, *grads], [plain[0], *plain[2]], strict=True):
        assert (one - other).norm() <= tolerance * other.norm() + 1e-7
        assert one.dtype == other.dtype


def test_fp64_stays_eager(calls: Counter[str]) -> None:
    passed(layer_by("triton", 2, torch.float64), torch.randn(1, 3, 12, dtype=torch.float64, requires_grad=True))
    assert not calls


def test_compiled_code_does_not_call_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("weighted_sum", "sum_choices"):
        monkeypatch.setattr(expert_rows_triton, name, None)
    rows, weight, routes = choices(5, 2, 8, torch.float32)
    x = torch.randn(5, 8, requires_grad=True)

    def round_trip(x: torch.Tensor, by: TritonKernel) -> torch.Tensor:
        return combine(dispatch(x, routes, None, by) * rows, weight, routes, None, by)

    found = []
    compiled = torch.compile(round_trip, backend="aot_eager", fullgraph=True)
    for function, by in zip((compiled, round_trip), reversed(KINDS), strict=True):
        out = function(x, by)
        found.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_hands_the_choice_to_its_expert_layers() -> None:
    sizes = SIZES | {"num_layer": 2, "first_k_dense": 1, "vocab_size": 31, "block_size": 8, "num_experts_per_tok": 2}
    for by in KINDS:
        model = GPT(ModelConfig(**sizes), kernels=Kernels(expert_rows=by))
        assert [layer.by for layer in model.moe_layers] == [by]
