"""The row-wise part of the fused head and loss: the work on a chunk's logits between the two matrix products of
cross_entropy.py, in two passes. Needs the triton package. Letters: t tokens of a chunk, V vocabulary.

Pass 1 keeps a running maximum and a running sum of exponentials (online softmax, arXiv:1805.02867). Pass 2 overwrites the
logits with the gradient. There is no fp32 copy of the logits in memory: fp32 values exist only in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_BLOCK = 4096  # logits in registers at a time: 16 per thread


@triton.jit
def _rows(
    z: tl.tensor,
    label: tl.tensor,
    counted: tl.tensor,
    nll: tl.tensor,
    lse: tl.tensor,
    V: int,
    z_loss_coef: float,
    IGNORE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # a chunk may have more than 2^31 logits
    z += row * V
    target = tl.load(label + row)
    ignored = target == IGNORE
    known = (target >= 0) & (target < V)
    unknown = float("nan")  # for a label outside the vocabulary: the loss becomes NaN instead of stopping the process
    target_z = tl.load(z + target, mask=known, other=unknown).to(tl.float32)
    read = tl.where(ignored, 0, V)  # ignored rows are only written
    column = tl.arange(0, BLOCK)
    top = -float("inf")
    total = 0.0
    for start in range(0, read, BLOCK):
        at = start + column
        x = tl.load(z + at, mask=at < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    top = tl.where(ignored, 0.0, top)
    total = tl.where(ignored, 1.0, total)
    log_sum = top + tl.log(total)  # zero for ignored rows
    tl.store(nll + row, tl.where(ignored, 0.0, log_sum - target_z))
    tl.store(lse + row, log_sum)
    if GRADIENT:
        count = tl.where(ignored, 0.0, tl.where(known, tl.load(counted + row), unknown))
        scale = (1.0 + 2.0 * z_loss_coef * log_sum) * count / total
        tl.debug_barrier()  # every warp must have read the label's logit before another warp overwrites it
        for start in range(0, V, BLOCK):
            at = start + column
            x = tl.load(z + at, mask=at < read, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - top) * scale
            gradient = tl.where(at == target, gradient - count, gradient)
            tl.store(z + at, gradient.to(z.dtype.element_ty), mask=at < V)


def cross_entropy_(
    logits_tV: torch.Tensor,
    label_t: torch.Tensor,
    counted_t: torch.Tensor,
    nll_t: torch.Tensor,
    z_loss_coef: float,
    *,
    ignore_index: int,
    gradient: bool,
) -> torch.Tensor:
    """Write the cross entropy of each row to ``nll_t`` (fp32; zero where the label is ``ignore_index``), and return the
    logsumexp of each row (fp32; also zero there).

    With ``gradient`` the logits (contiguous; bf16, fp16 or fp32) are overwritten with the gradient of the sum over rows of
    ``counted * (nll + z_loss_coef * lse²)``, rounded once. ``counted_t`` (fp32) is zero for ignored rows, which are not
    read. A label outside the vocabulary makes its row's loss and gradient NaN.
    """
    assert logits_tV.is_contiguous(), "the kernel writes in place"
    t, V = logits_tV.shape
    lse_t = torch.empty_like(nll_t)
    block = min(triton.next_power_of_2(V), MAX_BLOCK)
    with torch.cuda.device_of(logits_tV):  # Triton launches on the current device
        _rows[(t,)](
            logits_tV, label_t.contiguous(), counted_t, nll_t, lse_t, V, z_loss_coef,
            IGNORE=ignore_index, GRADIENT=gradient, BLOCK=block, num_warps=8 if block > 1024 else 4,
        )  # fmt: skip
    return lse_t
