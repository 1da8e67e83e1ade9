"""Attention backends on a GPU against plain formulas, with and without documents and windows."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.device import DEVICE, GPU_TEST, no_host_waits, relative_error, sized
from tests.gpu.test_model_cuda import CONFIG
from tinytron.kernels.attention import attend
from tinytron.kernels.choice import Backend, Kernels
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
from tinytron.utils.sequences import Documents, documents_of

pytestmark = GPU_TEST

S, N, K, H = sized(128, 32), sized(8, 4), 2, sized(64, 8)
LENGTHS = sized([50, 78, 72, 56], [13, 19, 18, 14])  # of documents, in two rows


def made_documents() -> Documents:
    """The documents of LENGTHS, on the device."""
    boundaries = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Documents(boundaries.to(DEVICE), max(LENGTHS))


@pytest.mark.parametrize("window", [0, 1, 30, S], ids="window {}".format)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("sdpa", torch.bfloat16, 2e-2),
        ("varlen", torch.bfloat16, 2e-2),
        ("sdpa", torch.float32, 1e-4),
        ("flash", torch.bfloat16, 2e-2),
    ],
    ids=["sdpa", "varlen", "sdpa fp32", "flash"],
)
def test_backends_equal_explicit_scores(
    backend: Backend, packed: bool, window: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Values and gradients, against explicit scores in fp64."""
    if backend == "flash":
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    qkv = [torch.randn(2, S, heads, H, device=DEVICE, dtype=dtype, requires_grad=True) for heads in (N, K, K)]
    exact_qkv = [t.detach().double().requires_grad_() for t in qkv]
    documents = made_documents() if packed else None
    out = attend(*qkv, backend=backend, documents=documents, window=window)
    exact = attend(*exact_qkv, backend="math", documents=documents, window=window)
    assert out.dtype == dtype
    assert relative_error(out, exact) < tolerance
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, qkv, grad)
    theirs = torch.autograd.grad(exact, exact_qkv, grad.double())
    for name, one, other in zip("qkv", mine, theirs, strict=True):
        if window == 1 and name != "v":  # a token that sees itself alone has no choice: zero, and rounding
            assert float(one.double().norm()) < tolerance * float(theirs[2].norm())
        else:
            assert relative_error(one, other) < tolerance, name


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("sdpa", torch.float64, 1e-8),
        ("varlen", torch.bfloat16, 0.1),
        ("sdpa", torch.bfloat16, 0.1),
        ("flash", torch.bfloat16, 0.1),
    ],
)
def test_packed_documents_are_as_if_alone(backend: Backend, dtype: torch.dtype, tolerance: float) -> None:
    """Against each document by itself on the CPU in fp64. Rounding in bf16 costs a gradient up to 5%."""
    if backend == "flash":
        pytest.importorskip("flash_attn")
    lengths = sized([50, 206, 100, 100, 56], [7, 25, 12, 13, 7])
    model = GPT(CONFIG, dtype=dtype, device=DEVICE, kernels=Kernels(attention=backend))
    exact = GPT(CONFIG, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    shape = (2, 2, CONFIG.block_size)
    ids, labels = torch.randint(0, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths]).view(ids.shape)
    documents = documents_of(positions)
    on_device = documents._replace(cu_seqlens=documents.cu_seqlens.to(DEVICE))
    sums = model(ids.to(DEVICE), labels.to(DEVICE), positions.to(DEVICE), on_device)
    parts = zip(ids.flatten().split(lengths), labels.flatten().split(lengths), strict=True)
    alone = [exact(part[None], targets[None]) for part, targets in parts]
    assert isinstance(sums, LossSums)
    expected = torch.stack([losses.objective for losses in alone]).sum()
    assert relative_error(sums.objective, expected) < min(tolerance, 2e-3)
    (sums.objective / ids.numel()).backward()
    (expected / ids.numel()).backward()
    for (name, mine), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert relative_error(mine.grad, theirs.grad) < tolerance, name


def test_the_mask_of_documents_waits_for_nothing() -> None:
    documents = made_documents()
    with no_host_waits():
        documents.with_mask(2, S, torch.bfloat16)
