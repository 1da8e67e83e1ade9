"""The mixture-of-experts layer against loops over tokens and experts; grouped products against one per expert."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.helpers.runs import ROOT
from tests.naive import moe as naive
from tinytron.kernels.grouped_gemm import grouped_linear, looped_linear
from tinytron.model import ModelConfig
from tinytron.model.modules.moe import Experts, MoE, MoEStats

B, S, D, F, E, K = 2, 5, 10, 6, 5, 2  # the widths differ, so that no transposed weight fits
SIZES: dict[str, Any] = {
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "hidden_size": D,
    "intermediate_size": 7,
    "use_moe": True,
    "num_experts": E,
    "num_experts_per_tok": K,
    "moe_intermediate_size": F,
}
BIAS = [0.5, -0.3, 0.0, 0.2, -0.5]


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> MoE:
    torch.set_default_dtype(dtype)
    try:
        layer = MoE(ModelConfig(**SIZES | changes), None)
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def run(layer: MoE, x_BSD: torch.Tensor) -> tuple[torch.Tensor, MoEStats]:
    """The layer as its block calls it."""
    out: tuple[torch.Tensor, MoEStats] = layer(x_BSD, layer.router(x_BSD.flatten(0, 1)))
    return out


def tokens(seed: int = 1, size: tuple[int, ...] = (B, S, D)) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def weights_of(layer: MoE) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}


VARIANTS = list(itertools.product(("softmax", "sigmoid"), (True, False), (0, 2), ("sequence", "batch"), (False, True)))


@pytest.mark.parametrize(("score", "norm_topk", "shared", "scope", "biased"), VARIANTS)
def test_output_losses_load_and_every_gradient_equal_the_loops(
    score: str, norm_topk: bool, shared: int, scope: str, biased: bool
) -> None:
    layer = make(moe_router_score=score, norm_topk_prob=norm_topk, num_shared_experts=shared, moe_aux_loss_scope=scope)
    bias = BIAS if biased else []
    layer.router.bias.copy_(torch.tensor(bias or [0.0] * E))
    rules = naive.Rules(K, score, norm_topk, layer.router.bias.tolist())
    x, theirs_x, weights = tokens(), tokens(), weights_of(layer)

    out, stats = run(layer, x)
    expected, decisions = naive.moe(theirs_x.flatten(0, 1), weights, rules)
    rows = [decisions[b * S : (b + 1) * S] for b in range(B)]
    balance = naive.balance(rows if scope == "sequence" else [decisions], E)
    z = torch.stack([d.log_partition**2 for d in decisions]).sum()
    torch.testing.assert_close(out.flatten(0, 1), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stats.balance, balance, rtol=1e-10, atol=0)
    torch.testing.assert_close(stats.z, z, rtol=1e-10, atol=0)
    assert stats.load_E.tolist() == naive.load(decisions, E)
    assert stats.load_E.dtype == torch.int64

    cotangent = tokens(seed=2).detach()
    objective = (out * cotangent).sum() + 0.7 * stats.balance + 0.3 * stats.z
    theirs = (expected * cotangent.flatten(0, 1)).sum() + 0.7 * balance + 0.3 * z
    names = [name for name, _ in layer.named_parameters()]
    found = torch.autograd.grad(objective, [x, *layer.parameters()])
    wanted = torch.autograd.grad(theirs, [theirs_x, *(weights[name] for name in names)])
    for name, mine, other in zip(["x", *names], found, wanted, strict=True):
        assert float(other.abs().max()) > 0, name
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_each_loss_alone_reaches_the_router(score: str) -> None:
    """Of the balance loss the probabilities carry gradient, the counts none."""
    layer, x = make(moe_router_score=score), tokens()
    weights = weights_of(layer)
    _, decisions = naive.moe(x.detach().flatten(0, 1), weights, naive.Rules(K, score))
    balance = naive.balance([decisions[:S], decisions[S:]], E)
    z = torch.stack([d.log_partition**2 for d in decisions]).sum()
    for mine, theirs in ((run(layer, x)[1].balance, balance), (run(layer, x)[1].z, z)):
        (found,) = torch.autograd.grad(mine, layer.router.weight)
        (wanted,) = torch.autograd.grad(theirs, weights["router.weight"], retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_two_scopes_differ_and_an_even_load_costs_one_per_token() -> None:
    x = tokens()
    sequence, batch = (run(make(moe_aux_loss_scope=scope), x)[1].balance for scope in ("sequence", "batch"))
    assert abs(float((sequence - batch).detach())) > 1e-3
    for scope in ("sequence", "batch"):
        layer = make(moe_aux_loss_scope=scope, num_experts_per_tok=E)  # every token to every expert
        assert float(run(layer, x)[1].balance.detach()) == pytest.approx(B * S, rel=1e-12)


def test_the_bias_moves_the_choice_but_not_the_weights() -> None:
    layer, x = make(norm_topk_prob=False), tokens().flatten(0, 1)
    plain = layer.router.choose(layer.router(x))
    layer.router.bias.copy_(torch.tensor([0.0, 0.0, 10.0, 0.0, 0.0]))
    routing = layer.router.choose(layer.router(x))
    assert (routing.expert_Tk[:, 0] == 2).all()
    assert not (plain.expert_Tk[:, 0] == 2).all()
    assert torch.equal(routing.prob_TE, plain.prob_TE)
    assert torch.equal(routing.weight_Tk, plain.prob_TE.gather(1, routing.expert_Tk))
    assert "bias" not in dict(layer.router.named_parameters())
    assert layer.router.bias.dtype == torch.float32
    assert "router.bias" in layer.state_dict()  # saved


def test_the_router_scores_in_fp32() -> None:
    """Logits that differ by less than bf16 can tell: the larger one wins, with the weight that fp32 gives."""
    layer = make(dtype=torch.bfloat16, num_experts_per_tok=1, norm_topk_prob=False)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1, :2] = layer.router.weight[3, 0] = torch.tensor(8.0)
    x = torch.zeros(1, 1, D, dtype=torch.bfloat16)
    x[..., 0], x[..., 1] = 1.0, 2**-10
    out, stats = run(layer, x)
    routing = layer.router.choose(layer.router(x.flatten(0, 1)))
    assert routing.expert_Tk.tolist() == [[1]]
    assert {t.dtype for t in (routing.weight_Tk, routing.prob_TE, routing.logits_TE)} == {torch.float32}
    assert stats.balance.dtype == stats.z.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    exact = torch.tensor([0, 8 + 8 * 2**-10, 0, 8, 0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(routing.prob_TE[0].double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_without_tokens_have_zero_gradients(dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8}
    layer = make(dtype=dtype, **sizes)
    layer.router.bias.copy_(torch.tensor([100.0, 50.0, 0.0, 0.0, 0.0]))  # all to the first two
    out, stats = run(layer, tokens(size=(B, S, 16)).to(dtype))
    assert stats.load_E.tolist() == [B * S, B * S, 0, 0, 0]
    out.square().sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad[2:], torch.zeros_like(parameter.grad[2:]))
        assert all(float(grad.abs().max()) > 0 for grad in parameter.grad[:2])


# One grouped product.

COUNTS = [[3, 2, 4], [0, 9, 0], [9, 0, 0], [0, 0, 9], [0, 0, 0], [1, 0, 8]]


def products(function: Any, dtype: torch.dtype, counts: list[int], width: int, out: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(counts))
    rows = torch.randn(sum(counts), width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), out, width, generator=generator).to(dtype).requires_grad_()
    cotangent = torch.randn(sum(counts), out, generator=generator).to(dtype)
    arguments = (rows, weight, torch.tensor(counts), counts) if function is grouped_linear else (rows, weight, counts)
    result = function(*arguments)
    assert result.dtype == dtype
    return [result.detach(), *torch.autograd.grad(result, (rows, weight), cotangent)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("width", "out"), [(16, 24), (12, 10), (16, 6), (5, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_grouped_products_equal_one_per_expert(dtype: torch.dtype, width: int, out: int, counts: list[int]) -> None:
    """Also for widths that torch's grouped kernel refuses: rows of other than whole 16 bytes."""
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    found = products(grouped_linear, dtype, counts, width, out)
    torch.testing.assert_close(
        found, products(looped_linear, dtype, counts, width, out), rtol=tolerance, atol=tolerance
    )
    for expert, count in enumerate(counts):
        if not count:
            assert torch.equal(found[2][expert], torch.zeros(out, width, dtype=dtype))


@pytest.mark.parametrize("counts", COUNTS)
def test_one_product_per_expert_written_out(counts: list[int]) -> None:
    result, rows_grad, weight_grad = products(looped_linear, torch.float64, counts, 5, 3)
    generator = torch.Generator().manual_seed(sum(counts))
    rows = torch.randn(sum(counts), 5, generator=generator).double()
    weight = torch.randn(len(counts), 3, 5, generator=generator).double()
    cotangent = torch.randn(sum(counts), 3, generator=generator).double()
    owner = [expert for expert, count in enumerate(counts) for _ in range(count)]
    expected = torch.zeros_like(weight)
    for row, expert in enumerate(owner):
        for f in range(3):
            assert float(result[row, f]) == pytest.approx(float((weight[expert, f] * rows[row]).sum()), rel=1e-10)
        torch.testing.assert_close(rows_grad[row], cotangent[row] @ weight[expert], rtol=1e-10, atol=1e-12)
        expected[expert] += torch.outer(cotangent[row], rows[row])
    torch.testing.assert_close(weight_grad, expected, rtol=1e-10, atol=1e-12)


def test_aligned_bf16_goes_through_the_grouped_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    for dtype, width in ((torch.bfloat16, 16), (torch.float32, 16), (torch.bfloat16, 12), (torch.float64, 16)):
        products(grouped_linear, dtype, [2, 1], width, 8)
    assert len(calls) == 2


@pytest.mark.parametrize("counts", [[5, 0, 33, 26], [0, 0, 0, 64], [32, 32, 32, 32], [1, 1, 1, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_see_few_numbers_of_rows_on_cpus(
    counts: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding changes no result, and every product has a multiple of 32 rows."""
    experts = Experts(4, 16, 8).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    rows = torch.randn(sum(counts), 16, generator=generator).to(dtype).requires_grad_()
    out_grad = torch.randn(sum(counts), 16, generator=generator).to(dtype)
    seen: list[int] = []
    real = torch.nn.functional.grouped_mm

    def spy(*args: Any, offs: torch.Tensor) -> torch.Tensor:
        seen.extend(offs.diff(prepend=offs.new_zeros(1)).tolist())
        return real(*args, offs=offs)

    inputs = [rows, *experts.parameters()]
    expected = experts._grouped(rows, torch.tensor(counts))
    expected_grads = torch.autograd.grad(expected, inputs, out_grad)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", spy)
    out = experts(rows, torch.tensor(counts), counts)
    assert len(seen) == 8
    assert all(size % 32 == 0 and size - count in range(32) for size, count in zip(seen, counts * 2, strict=True))
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, out_grad), expected_grads, rtol=0.03, atol=0.05)


@pytest.mark.parametrize("first", ["mlp", "moe"])
def test_the_layer_has_its_documented_place(first: str) -> None:
    """Both files import, in either order, and name the same class."""
    rest = {"mlp": "moe", "moe": "mlp"}[first]
    modules = "tinytron.model.modules"
    code = f"from {modules}.{first} import MoE as a; from {modules}.{rest} import MoE as b; assert a is b"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(ImportError, match="cannot import name 'MoEs'"):
        from tinytron.model.modules.mlp import MoEs  # noqa: F401
