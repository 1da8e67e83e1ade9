"""The token embedding against ``torch.nn.functional.embedding``, and that its gradient loses nothing to bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tinytron.model.modules.emb import TokenEmbedding

V, D = 11, 6


def make(dtype: torch.dtype) -> TokenEmbedding:
    generator = torch.Generator().manual_seed(0)
    embedding = TokenEmbedding(V, D, dtype=dtype)
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(V, D, generator=generator))
    return embedding


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2), (0,)])
def test_equals_the_plain_lookup(shape: tuple[int, ...]) -> None:
    embedding = make(torch.float64)
    ids = torch.randint(V - 1, shape, generator=torch.Generator().manual_seed(1))  # the last token never occurs
    out, expected = embedding(ids), F.embedding(ids, embedding.weight)
    assert torch.equal(out, expected)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found, theirs = (torch.autograd.grad(y, embedding.weight, cotangent)[0] for y in (out, expected))
    torch.testing.assert_close(found, theirs, rtol=1e-13, atol=1e-13)
    assert torch.equal(found[-1], torch.zeros(D, dtype=torch.float64))


def test_numerical_gradient() -> None:
    ids = torch.tensor([[0, 3, 3], [V - 1, 0, 3]])  # repeated; the first and the last row too
    embedding = make(torch.float64)

    def lookup(weight: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(embedding, {"weight": weight}, (ids,))
        return out.sin()

    assert torch.autograd.gradcheck(lookup, embedding.weight.detach().clone().requires_grad_())


@pytest.mark.parametrize("wide_gradient", [True, False])
def test_a_token_that_occurs_4096_times_counts_4096_times(wide_gradient: bool) -> None:
    """Summed in bf16, ones stop counting at 256."""
    embedding = make(torch.bfloat16)
    if wide_gradient:
        embedding.weight.grad_dtype = torch.float32  # as in the optimizer's buffers
    ids = torch.full((4096,), 3)
    ids[:100] = 5
    cotangent = torch.full((4096, D), 1.0, dtype=torch.bfloat16)
    embedding(ids).backward(cotangent)
    grad = embedding.weight.grad
    assert grad is not None
    assert grad.dtype == (torch.float32 if wide_gradient else torch.bfloat16)
    exact = 3996.0 if wide_gradient else 4000.0  # 3996 in bf16 is 4000
    assert grad[3].tolist() == [exact] * D
    assert grad[5].tolist() == [100.0] * D
    assert float(grad.double().abs().sum()) == D * (exact + 100)


def test_small_gradients_are_summed_before_they_are_rounded() -> None:
    embedding = make(torch.bfloat16)
    cotangent = torch.randn(4096, D, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    embedding(torch.zeros(4096, dtype=torch.long)).backward(cotangent)
    assert embedding.weight.grad is not None
    expected = cotangent.double().sum(0)
    torch.testing.assert_close(embedding.weight.grad[0].double(), expected, rtol=2**-8, atol=1e-3)
