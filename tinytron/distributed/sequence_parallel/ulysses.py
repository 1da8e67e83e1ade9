"""Ulysses sequence parallelism (arXiv:2309.14509, section 3): the exchange between sequence parts and heads.

Letters: B batch, S whole sequence, s = S / P this rank's part, N query heads, K key/value heads, H head dimension, P ranks
in the group; n and k are the heads of one rank. One packed exchange moves queries, keys and values; another moves the
output back. ``sum_gradients`` is for optimizers that do not sum gradients themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.distributed.collectives import start_all_reduce
from tinytron.distributed.exchange import all_to_all
from tinytron.distributed.layout import divisors
from tinytron.distributed.zero1.buckets import plan_by_elements
from tinytron.errors import ConfigError


def check_sep_size(size: int, num_heads: int, num_kv_heads: int, seq_len: int = 0) -> None:
    """Check that ``size`` ranks can share these heads, and sequences of ``seq_len`` tokens (0: any length). Raises:
    ConfigError naming all sizes that work."""
    fitting = [p for p in divisors(num_heads) if (num_kv_heads % p == 0 or p % num_kv_heads == 0) and seq_len % p == 0]
    if seq_len % size:
        raise ConfigError(f"--sep_size {size} must divide --seq_len {seq_len}; use one of {fitting}")
    if size not in fitting:
        raise ConfigError(
            f"--sep_size {size} must divide --num_attention_heads {num_heads}, and divide or be a multiple of "
            f"--num_key_value_heads {num_kv_heads}; use one of {fitting}"
        )


@dataclass(frozen=True)
class HeadPlan:
    """The assignment of heads to the ranks of a group: pure arithmetic.

    Rank r has the query heads ``[r N/P, (r + 1) N/P)`` and the key/value heads they use. If P divides K, these are K/P
    heads of its own; if K divides P, it is one head, which it shares with P/K - 1 neighboring ranks (their gradients
    add up).
    """

    num_heads: int
    num_kv_heads: int
    size: int

    def __post_init__(self) -> None:
        check_sep_size(self.size, self.num_heads, self.num_kv_heads)

    @property
    def heads(self) -> int:
        """Query heads per rank, n."""
        return self.num_heads // self.size

    @property
    def kv_heads(self) -> int:
        """Key/value heads per rank, k."""
        return max(1, self.num_kv_heads // self.size)

    def pack(self, qkv_BsMH: torch.Tensor) -> torch.Tensor:
        """Arrange ``[q heads | k heads | v heads]`` by receiving rank: ``[B, s, N + 2K, H] -> [B, s, P, n + 2k, H]``."""
        N, K, P = self.num_heads, self.num_kv_heads, self.size
        q, k, v = qkv_BsMH.split((N, K, K), dim=2)
        if P > K:
            k, v = (t.repeat_interleave(P // K, dim=2) for t in (k, v))
        # Views instead of an index tensor, which would be copied to the device in every layer while the host waits.
        return torch.cat([t.unflatten(2, (P, -1)) for t in (q, k, v)], dim=3)


def seq_to_head(qkv_BsMH: torch.Tensor, plan: HeadPlan, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather all positions of this rank's heads: ``[B, s, N + 2K, H] -> [B, S, n + 2k, H]``. Collective over ``group``."""
    B, s, _, H = qkv_BsMH.shape
    m = plan.heads + 2 * plan.kv_heads
    qkv_PBsmH = plan.pack(qkv_BsMH).permute(2, 0, 1, 3, 4)
    qkv_PBsmH = all_to_all(qkv_PBsmH, group)  # dim 0: destination -> source
    return qkv_PBsmH.permute(1, 0, 2, 3, 4).reshape(B, plan.size * s, m, H)


def head_to_seq(out_BSnH: torch.Tensor, plan: HeadPlan, group: dist.ProcessGroup) -> torch.Tensor:
    """The inverse for the attention output: ``[B, S, n, H] -> [B, s, N, H]``. Collective over ``group``."""
    B, S, n, H = out_BSnH.shape
    out_BPsnH = out_BSnH.reshape(B, plan.size, S // plan.size, n, H)
    out_PBsnH = all_to_all(out_BPsnH.transpose(0, 1), group)
    return out_PBsnH.permute(1, 2, 0, 3, 4).reshape(B, S // plan.size, plan.num_heads, H)


def cut_sequence(whole_BS: torch.Tensor, group_rank: int, size: int) -> torch.Tensor:
    """This rank's part of the sequence dimension. Labels and positions must be computed before the cut, because a part does
    not contain its last label."""
    part = whole_BS.shape[1] // size
    return whole_BS[:, group_rank * part : (group_rank + 1) * part].contiguous()


@torch.no_grad()
def sum_gradients(params: Iterable[nn.Parameter], group: dist.ProcessGroup, bucket_size_mb: float = 64.0) -> None:
    """Sum the gradients of replicated parameters in place over ``group``; for optimizers without ``DistributedOptimizer``,
    which sums them itself.

    Call it after the last backward pass of a step, and leave out parameters that are cut over the group (experts).
    Gradients travel in flat buckets, in fp32 (fp64 for fp64 ones), which are all on their way before the first is waited
    for. A missing gradient counts as zero, because the other ranks may have one. Collective.
    """
    grads_by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for param in (p for p in params if p.requires_grad):
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        grads_by_dtype.setdefault(torch.promote_types(param.grad.dtype, torch.float32), []).append(param.grad)
    for dtype, grads in grads_by_dtype.items():
        layout = plan_by_elements([g.numel() for g in grads], 1, int(bucket_size_mb * 2**20) // dtype.itemsize)
        flat = torch.zeros(layout.numel, dtype=dtype, device=grads[0].device)
        places = [(grads[slot.index], flat[slot.start : slot.end]) for slot in layout.slots]
        for grad, place in places:
            place.copy_(grad.reshape(-1))
        for work in [start_all_reduce(flat[bucket.start : bucket.end], group) for bucket in layout.buckets]:
            work.wait()
        for grad, place in places:
            grad.copy_(place.view_as(grad))
