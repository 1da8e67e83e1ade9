"""Rotary positions against multiplication of complex numbers."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.rope import frequencies
from tinytron.kernels.rope import Rotation, rotate
from tinytron.model.modules.emb import RotaryEmbedding

B, S, N, H = 2, 12, 3, 8
THETA = 100.0


def table(dtype: torch.dtype = torch.float64, block_size: int = 64, head_dim: int = H) -> RotaryEmbedding:
    return RotaryEmbedding(frequencies(head_dim, THETA), block_size, dtype)


def turned(x_BSNH: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
    """``x[i] + 1j * x[i + H/2]`` times ``exp(1j * position * theta^(-2i/H))``, pair by pair."""
    out = torch.empty_like(x_BSNH)
    half = x_BSNH.shape[-1] // 2
    for i in range(half):
        angle = positions_BS.double() * THETA ** (-2 * i / x_BSNH.shape[-1])
        pair = torch.complex(x_BSNH[..., i], x_BSNH[..., i + half])
        pair = pair * torch.polar(torch.ones_like(angle), angle).unsqueeze(-1)
        out[..., i], out[..., i + half] = pair.real, pair.imag
    return out


def test_equals_complex_multiplication() -> None:
    x = torch.randn(B, S, N, H, dtype=torch.float64)
    positions = torch.arange(S).expand(B, S)
    torch.testing.assert_close(rotate(x, table()(0, S)), turned(x, positions), rtol=1e-12, atol=1e-12)


def test_positions_may_be_given_per_sequence_or_for_all() -> None:
    x = torch.randn(B, S, N, H, dtype=torch.float64)
    row = torch.randint(64, (S,))
    both = torch.stack([row, torch.randint(64, (S,))])
    torch.testing.assert_close(rotate(x, table()(0, S, row)), turned(x, row.expand(B, S)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotate(x, table()(0, S, both)), turned(x, both), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [0, 1, S, 64 - S])
def test_default_positions_count_from_the_first(first: int) -> None:
    rope = table()
    counted = torch.arange(first, first + S)
    assert all(torch.equal(a, b) for a, b in zip(rope(first, S), rope(0, S, counted), strict=True))
    x = torch.randn(B, S, N, H, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, rope(first, S)), turned(x, counted.expand(B, S)), rtol=1e-12, atol=1e-12)


def test_given_positions_are_taken_as_they_are() -> None:
    """They are this rank's already: ``first`` is not added."""
    rope, positions = table(), torch.randint(64, (B, S))
    assert all(torch.equal(a, b) for a, b in zip(rope(0, S, positions), rope(7, S, positions), strict=True))


def test_scores_depend_on_the_relative_position_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, H, dtype=torch.float64)
    rope = table()

    def score(at_q: int, at_k: int) -> float:
        turned_q = rotate(q, rope(0, 1, torch.tensor([at_q])))
        return float((turned_q * rotate(k, rope(0, 1, torch.tensor([at_k])))).sum())

    for offset in (0, 1, 5, 20):
        scores = [score(start + offset, start) for start in (0, 1, 7, 43)]
        assert scores == pytest.approx([scores[0]] * 4, rel=1e-12)
    assert score(1, 0) != pytest.approx(score(0, 0), rel=1e-3)
    assert score(1, 0) != pytest.approx(score(0, 1), rel=1e-3)


def test_norms_do_not_change() -> None:
    x = torch.randn(B, S, N, H, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, table()(0, S)).norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)


def test_gradient_is_the_inverse_rotation() -> None:
    x = torch.randn(B, S, N, H, dtype=torch.float64, requires_grad=True)
    out_grad = torch.randn(B, S, N, H, dtype=torch.float64)
    (grad,) = torch.autograd.grad(rotate(x, table()(0, S)), x, out_grad)
    torch.testing.assert_close(turned(grad, torch.arange(S).expand(B, S)), out_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_rotated_in_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(B, S, N, H).to(dtype)
    rotation = table(torch.float32)(0, S)
    out = rotate(x, rotation)
    assert out.dtype == dtype
    assert torch.equal(out, rotate(x.float(), rotation).to(dtype))  # one rounding, at the end


def test_table_is_exact_at_the_last_position() -> None:
    positions = torch.arange(4096, dtype=torch.float64)
    angles = torch.outer(positions, THETA ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64))
    rotation = table(torch.float32, block_size=4096, head_dim=64)(0, 4096)
    assert rotation.cos.dtype == torch.float32
    torch.testing.assert_close(rotation.cos.squeeze(1).double(), angles.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(rotation.sin.squeeze(1).double(), angles.sin(), rtol=0, atol=1e-7)


def test_table_is_not_saved() -> None:
    assert not table().state_dict()


def test_a_single_rotation_serves_queries_and_keys() -> None:
    q, k = torch.randn(B, S, N, H), torch.randn(B, S, 1, H)
    rotation: Rotation = table(torch.float32)(0, S)
    joined = rotate(torch.cat([q, k], dim=2), rotation)
    assert torch.equal(joined, torch.cat([rotate(q, rotation), rotate(k, rotation)], dim=2))
