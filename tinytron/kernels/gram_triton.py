"""Products whose result is symmetric, for half the work: only tiles on and below the diagonal are computed, and each is
also written to its mirrored place. Needs the triton package. Two of the three products in a step of Muon (optim/muon.py)
are of this kind. Letters: m rows, n columns of each matrix.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

FEW_TILES = 128  # about the number of multiprocessors of a large GPU; below it, smaller tiles keep more of them busy


@triton.jit
def _tiles(
    x: tl.tensor,
    out: tl.tensor,
    m: int,
    n: int,
    b: float,
    c: float,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # The triangle of tiles is folded to a rectangle with tiles + 1 per row: row tiles - 1 - fold, then row `fold`.
    tiles = tl.cdiv(m, BLOCK)
    fold = tl.program_id(0) // (tiles + 1)
    along = tl.program_id(0) % (tiles + 1)
    longer = tiles - fold
    i = tl.where(along < longer, longer - 1, fold)
    j = tl.where(along < longer, along, along - longer)
    batch = tl.program_id(1).to(tl.int64)
    x += batch * m * n
    out += batch * m * m
    here = tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_K)
    first_i = (i * BLOCK).to(tl.int64)  # offsets within a tile fit in 32 bits, but the offset of a tile may not
    first_j = (j * BLOCK).to(tl.int64)
    in_i = first_i + here < m
    in_j = first_j + here < m
    x_i = x + first_i * n + (here[:, None] * n + depth[None, :])
    x_j = x + first_j * n + (here[:, None] * n + depth[None, :])
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, n, BLOCK_K):
        inside = start + depth < n
        p = tl.load(x_i, mask=in_i[:, None] & inside[None, :], other=0.0)
        q = tl.load(x_j, mask=in_j[:, None] & inside[None, :], other=0.0)
        total = tl.dot(p, tl.trans(q), total, input_precision=PRECISION)
        x_i += BLOCK_K
        x_j += BLOCK_K
    total *= c
    inside_ij = in_i[:, None] & in_j[None, :]
    if ADD:  # x is m x m
        base = tl.load(x + first_i * m + first_j + (here[:, None] * m + here[None, :]), mask=inside_ij, other=0.0)
        total += b * base.to(tl.float32)
    value = total.to(out.dtype.element_ty)
    tl.store(out + first_i * m + first_j + (here[:, None] * m + here[None, :]), value, mask=inside_ij)
    if i != j:
        mirrored = out + first_j * m + first_i + (here[:, None] * m + here[None, :])
        tl.store(mirrored, tl.trans(value), mask=in_j[:, None] & in_i[None, :])


def _launch(x: torch.Tensor, b: float, c: float, *, add: bool) -> torch.Tensor:
    """Compute ``b x + c x xᵀ`` (without ``add``, ``c x xᵀ``) for every matrix of ``[..., m, n]``."""
    m, n = x.shape[-2:]
    stack = math.prod(x.shape[:-2])
    out = x.new_empty(*x.shape[:-2], m, m)
    half = [tiles * (tiles + 1) // 2 for tiles in (triton.cdiv(m, 128), triton.cdiv(m, 64))]
    block, programs = (128, half[0]) if half[0] * stack >= FEW_TILES else (64, half[1])
    # torch's setting determines whether fp32 products may use TF32; other precisions have their own tensor cores.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _tiles[(programs, stack)](
            x.contiguous(), out, m, n, b, c,
            ADD=add, PRECISION="tf32" if tf32 else "ieee", BLOCK=block, BLOCK_K=128 // x.element_size(),
            num_warps=8 if block == 128 else 4, num_stages=3,
        )  # fmt: skip
    return out


def gram(x: torch.Tensor) -> torch.Tensor:
    """``x @ x.mT``: ``[..., m, n] -> [..., m, m]`` in the precision of ``x`` (bf16, fp16, fp32), summed in fp32.

    fp32 products use TF32 if torch's setting allows it, otherwise no tensor cores. Triton may truncate factors to TF32
    instead of rounding them (see its documentation of ``tl.dot``).
    """
    return _launch(x, 0.0, 1.0, add=False)


def plus_square(a: torch.Tensor, b: float, c: float) -> torch.Tensor:
    """``b a + c a @ a`` for symmetric ``a``: ``[..., m, m] -> [..., m, m]``, in the same precision as ``gram``, rounded
    once."""
    return _launch(a, b, c, add=True)
