"""The divergence of two heads equals torch's from whole logits, with its gradients, for any chunks; it is not a scaled
cross entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tinytron.kernels.kl_divergence import linear_kl_divergence

T, D, V = 11, 5, 17


def _inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, D), (V, D), (T, D), (V, D))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [*tensors, torch.tensor([1.0, 0.0, 0.5] * T, dtype=dtype)[:T]]


def _by_torch(hidden: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    other_hidden, other_weight, counted = others
    log_p, log_q = F.log_softmax(hidden @ weight.T, -1), F.log_softmax(other_hidden @ other_weight.T, -1)
    return (F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1) * counted).sum()


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, None])
def test_it_is_torchs_with_its_gradients(chunk_tokens: int | None) -> None:
    hidden, weight, *others = _inputs(torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = _by_torch(hidden, weight, *others)
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    found = linear_kl_divergence(hidden, weight, *others, chunk_tokens=chunk_tokens)
    got = torch.autograd.grad(3 * found, (hidden, weight))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-13)


def test_bf16_sums_in_fp32() -> None:
    inputs = _inputs(torch.bfloat16)
    found = linear_kl_divergence(*inputs)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(_by_torch(*(tensor.double() for tensor in inputs))), rel=0.03)


def test_the_same_model_is_at_distance_zero() -> None:
    hidden, weight, _, _, counted = _inputs(torch.float64)
    hidden.requires_grad_()
    found = linear_kl_divergence(hidden, weight, hidden, weight, counted)
    (grad,) = torch.autograd.grad(found, hidden)
    assert float(found.detach()) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(grad, torch.zeros_like(grad), atol=1e-12)


def test_it_can_be_differentiated_only_once() -> None:
    hidden, weight, *others = _inputs(torch.float64)
    hidden.requires_grad_()
    found = linear_kl_divergence(hidden, weight, *others)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        found.backward()
    with torch.no_grad():
        assert not linear_kl_divergence(hidden, weight, *others).requires_grad
