"""RMSNorm against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tinytron.model.modules.norm import RMSNorm

SIZE, EPS = 24, 1e-3


def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / ((x * x).sum(-1, keepdim=True) / SIZE + EPS) ** 0.5 * weight


def norm_with_random_weight(dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(SIZE, EPS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(SIZE, dtype=torch.float64))
    return norm


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])  # the small one sees eps
def test_equals_the_formula_with_gradients(scale: float) -> None:
    norm = norm_with_random_weight(torch.float64)
    x = (scale * torch.randn(3, 5, SIZE, dtype=torch.float64)).requires_grad_()
    out, expected = norm(x), formula(x, norm.weight)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out_grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, (x, norm.weight), out_grad)
    theirs = torch.autograd.grad(expected, (x, norm.weight), out_grad)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_starts_as_ones() -> None:
    assert torch.equal(RMSNorm(SIZE, EPS).weight, torch.ones(SIZE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_statistics_are_exact_to_a_rounding(dtype: torch.dtype) -> None:
    norm = norm_with_random_weight(dtype)
    x = torch.randn(64, SIZE).to(dtype)
    expected = formula(x.double(), norm.weight.double())
    out = norm(x)
    assert out.dtype == dtype
    # At most two roundings: statistics in 16 bits would add about sqrt(SIZE) more.
    assert ((out.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs()).all()


def test_large_sixteen_bit_inputs_do_not_overflow() -> None:
    out = RMSNorm(SIZE, EPS).half()(torch.full((1, SIZE), 6e4, dtype=torch.float16))  # its square is infinite in fp16
    torch.testing.assert_close(out.float(), torch.ones(1, SIZE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_as_precise_as_torch_has_them(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = norm_with_random_weight(dtype)
    x, out_grad = torch.randn(2, 64, SIZE).to(dtype).requires_grad_(), torch.randn(2, 64, SIZE).to(dtype)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    exact = torch.autograd.grad(formula(exact_x, exact_weight), (exact_x, exact_weight), out_grad.double())
    theirs = torch.autograd.grad(F.rms_norm(x, (SIZE,), norm.weight, EPS), (x, norm.weight), out_grad)
    mine = torch.autograd.grad(norm(x), (x, norm.weight), out_grad)
    for a, b, e in zip(mine, theirs, exact, strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).norm() <= 2 * (b.double() - e).norm()


def test_keeps_its_input_and_a_number_per_row() -> None:
    """On CPUs, where torch keeps fp32 copies."""
    norm = norm_with_random_weight(torch.bfloat16)
    x = torch.randn(4, SIZE).bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x)
    assert sorted(t.numel() for t in kept) == [4, SIZE, 4 * SIZE]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
