"""What the backward pass computes again instead of keeping it (activation checkpointing, arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch.nn.attention import varlen  # noqa: F401  # makes the operator that is named below, as the next two do
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tinytron.distributed import exchange  # noqa: F401
from tinytron.kernels import attention_tiled  # noqa: F401

T = TypeVar("T")
Recompute = Literal["none", "full", "selective"]

# What selective recomputation keeps: the outputs of matrix products, attention and exchanges, costly to compute again;
# norms, rotations and activations are cheap (Korthikanti et al., arXiv:2205.05198, section 5).
_ATTENTION_OPS = {
    torch.ops.tinytron.tiled_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
_OTHER_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.tinytron.all_to_all.default,
}


def _keep(kept: set[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(partial(_keep, _OTHER_OPS | _ATTENTION_OPS))


def _dropout_contexts() -> Any:
    """A kept attention would not draw its dropout again in recomputation, and all later draws would be others."""
    return create_selective_checkpoint_contexts(partial(_keep, _OTHER_OPS))


# torch.compile caches a graph across processes if a text says what is kept.
_contexts.cache_hash = f"keep {sorted(map(str, _OTHER_OPS | _ATTENTION_OPS))}"  # type: ignore[attr-defined]
_dropout_contexts.cache_hash = f"keep {sorted(map(str, _OTHER_OPS))}"  # type: ignore[attr-defined]


def recomputed(how: Recompute, function: Callable[..., T], *args: Any, dropout: float = 0.0) -> T:
    """``function(*args)``; ``full`` keeps the arguments alone for the backward pass, ``selective`` what is costly, too.

    ``dropout`` is what ``function`` draws with. Without gradients nothing is recomputed.
    """
    if how == "none" or not torch.is_grad_enabled():
        return function(*args)
    contexts: dict[str, Any] = {}  # torch.compile cannot trace the default when it is passed
    if how == "selective":
        contexts["context_fn"] = _contexts if dropout == 0 else _dropout_contexts
    out: T = checkpoint(function, *args, use_reentrant=False, **contexts)
    return out
