"""The Triton kernel of the loss against its eager twin in fp64, and the whole loss with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.triton_interpreter import interpreted, near
from tinytron.kernels import cross_entropy as eager
from tinytron.kernels.choice import Kernels, LossKernel
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.loss import LossSums, fused_linear_cross_entropy
from tinytron.utils.sequences import IGNORE_INDEX

cross_entropy_triton = interpreted("cross_entropy_triton")

KINDS: tuple[LossKernel, ...] = ("torch", "triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(t: int, V: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (some rows far from zero), labels and what they count: the third is ignored, the fourth has weight 0."""
    generator = torch.Generator().manual_seed(t * V)
    logits = 3 * torch.randn(t, V, generator=generator) + 20 * torch.randn(t, 1, generator=generator)
    label, weight = torch.randint(V, (t,), generator=generator), torch.rand(t, generator=generator) + 0.5
    label[2::5], weight[3::5] = IGNORE_INDEX, 0
    return logits.to(dtype), label, torch.where(label == IGNORE_INDEX, 0, weight)


def computed(
    function: Any,
    logits: torch.Tensor,
    label: torch.Tensor,
    counted: torch.Tensor,
    z_coef: float,
    gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropies, logarithms of sums, and what the logits have become."""
    logits, nll = logits.clone(), torch.empty(len(label), dtype=counted.dtype)
    lse = function(logits, label, counted, nll, z_coef, ignore_index=IGNORE_INDEX, gradient=gradient)
    return nll, lse, logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("z_coef", [0.0, 0.02])
@pytest.mark.parametrize(("t", "V"), [(1, 1), (1, 53), (6, 130), (5, 1030), (3, 4096), (7, 9001)])
def test_rows_equal_the_twin_in_fp64(t: int, V: int, z_coef: float, dtype: torch.dtype) -> None:
    logits, label, counted = rows(t, V, dtype)
    nll, lse, gradient = computed(cross_entropy_triton.cross_entropy_, logits, label, counted, z_coef)
    exact = computed(eager.cross_entropy_, logits.double(), label, counted.double(), z_coef)
    valid = label != IGNORE_INDEX
    assert nll.dtype == lse.dtype == torch.float32
    near(nll, exact[0], ulps=4)
    near(lse[valid], exact[1][valid], ulps=4)
    assert not lse[~valid].any()
    for row, exact_row in zip(gradient, exact[2], strict=True):
        near(row, exact_row, ulps=64)  # exponents of up to 60 in fp32
    assert not gradient[counted == 0].any()


def test_without_gradient_the_logits_stay() -> None:
    logits, label, counted = rows(7, 300, torch.float32)
    nll, lse, left = computed(cross_entropy_triton.cross_entropy_, logits, label, counted, 0.1, gradient=False)
    assert torch.equal(left, logits)
    for one, other in zip(
        (nll, lse), computed(cross_entropy_triton.cross_entropy_, logits, label, counted, 0.1), strict=False
    ):
        assert torch.equal(one, other)


def test_ignored_rows_are_not_read() -> None:
    logits, label, counted = torch.full((4, 70), float("nan")), torch.full((4,), IGNORE_INDEX), torch.zeros(4)
    for result in computed(cross_entropy_triton.cross_entropy_, logits, label, counted, 0.1):
        assert not result.any()


@pytest.mark.parametrize("wrong", [-1, 40, 10**12])
def test_a_label_that_is_no_token_makes_its_row_nan(wrong: int) -> None:
    logits, label, counted = rows(2, 40, torch.float32)
    right = computed(cross_entropy_triton.cross_entropy_, logits, label, counted, 0.0)
    label[1] = wrong
    nll, _, gradient = computed(cross_entropy_triton.cross_entropy_, logits, label, counted, 0.0)
    assert nll[1].isnan()
    assert gradient[1].isnan().all()
    assert torch.equal(nll[0], right[0][0])
    assert torch.equal(gradient[0], right[2][0])


# The whole loss.

T, D, V = 13, 16, 53


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, D, generator=generator).to(dtype).requires_grad_() for n in (T, V))
    labels, weights = torch.randint(V, (T,), generator=generator), torch.rand(T, generator=generator)
    labels[::4], weights[1::4] = IGNORE_INDEX, 0
    return hidden, weight, labels, weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_the_whole_loss_equals_the_one_in_fp64(chunk: int | None, weighted: bool, dtype: torch.dtype) -> None:
    hidden, weight, labels, weights_T = problem(dtype)
    weights = weights_T if weighted else None
    options: dict[str, Any] = {"weights_T": weights, "z_loss_coef": 0.01, "chunk_tokens": chunk}
    sums = fused_linear_cross_entropy(hidden, weight, labels, by="triton", **options)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = fused_linear_cross_entropy(*exact_inputs, labels, **options)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]  # logits are rounded
    for one, other in zip(sums, exact, strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == torch.float32
            assert (one.double() - other).norm() <= tolerance * other.norm()
    grads = torch.autograd.grad(sums.objective, (hidden, weight))
    for one, other in zip(grads, torch.autograd.grad(exact.objective, exact_inputs), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_hits_are_counted_before_the_logits_are_overwritten() -> None:
    hidden, weight, labels, weights = problem(torch.float32)
    labels[1::2] = (hidden @ weight.T).argmax(1)[1::2]
    options: dict[str, Any] = {"weights_T": weights, "chunk_tokens": 5, "count_hits": True}
    sums, exact = (fused_linear_cross_entropy(hidden, weight, labels, by=by, **options) for by in ("triton", "torch"))
    assert sums.hits is not None
    assert exact.hits is not None
    assert int(sums.hits) == int(exact.hits) > 0


def test_gradients_of_one_input_alone_and_of_none() -> None:
    hidden, weight, labels, _ = problem(torch.float32)
    both = fused_linear_cross_entropy(hidden, weight, labels, by="triton")
    grads = torch.autograd.grad(both.objective, (hidden, weight))
    for number, given in enumerate([(hidden, weight.detach()), (hidden.detach(), weight)]):
        sums = fused_linear_cross_entropy(*given, labels, by="triton")
        assert torch.equal(torch.autograd.grad(sums.objective, (hidden, weight)[number])[0], grads[number])
    with torch.no_grad():
        assert torch.equal(fused_linear_cross_entropy(hidden, weight, labels, by="triton").objective, both.objective)


class WideLogits(TorchDispatchMode):
    """Counts operations that return a matrix of fp32 with the vocabulary as its rows' width."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.shape[1:] == (V,)
        return out


def test_no_logits_in_fp32_are_made() -> None:
    hidden, weight, labels, weights = problem(torch.bfloat16)
    counts = []
    for by in KINDS:
        with WideLogits() as watch:
            fused_linear_cross_entropy(hidden, weight, labels, weights_T=weights, z_loss_coef=0.1, by=by)
        counts.append(watch.count)
    assert counts[0] > 5
    assert counts[1] == 0


def test_fp64_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy_triton, "cross_entropy_", None)
    hidden, weight, labels, _ = problem(torch.float64)
    sums = [fused_linear_cross_entropy(hidden, weight, labels, by=by) for by in KINDS]
    assert torch.equal(sums[0].objective, sums[1].objective)


SIZES: dict[str, Any] = {
    "num_layer": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16, "intermediate_size": 24,
    "block_size": 8, "vocab_size": 61, "init_std": 0.1,
}  # fmt: skip


def test_a_model_takes_it_unless_the_cut_loss_is_asked_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, kernel = [], cross_entropy_triton.cross_entropy_
    monkeypatch.setattr(
        cross_entropy_triton, "cross_entropy_", lambda *args, **more: calls.append(1) or kernel(*args, **more)
    )
    ids, labels = torch.randint(0, 61, (2, 2, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for by in KINDS:
        model = GPT(ModelConfig(**SIZES), kernels=Kernels(cross_entropy=by))
        sums = model(ids, labels)
        assert isinstance(sums, LossSums)
        sums.objective.backward()
        found.append((sums, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert calls == [1]
    torch.testing.assert_close(found[1][0].per_token, found[0][0].per_token, rtol=1e-5, atol=1e-6)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    both = Kernels.from_flags(use_triton_kernels=True, use_cut_cross_entropy=True)
    assert (both.cross_entropy, both.expert_rows, both.gram) == ("cut", "triton", "triton")
