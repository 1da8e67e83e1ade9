"""Recomputation: values that the backward pass computes again instead of keeping them (activation
checkpointing, arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tinytron.distributed import exchange  # noqa: F401  # makes an operator that is named below, as the next does
from tinytron.kernels import attention_tiled  # noqa: F401

T = TypeVar("T")
Recompute = Literal["none", "full", "selective"]


class ExpertParts(NamedTuple):
    """How each part of an expert layer is recomputed."""

    mixture: Recompute  # all of it, from dispatch to sum
    shared: Recompute  # the shared expert in it
    after_first_product: Recompute  # the experts' gate and second product


EXPERT_PARTS: dict[Recompute, ExpertParts] = {
    "none": ExpertParts(mixture="none", shared="none", after_first_product="none"),
    "selective": ExpertParts(mixture="none", shared="selective", after_first_product="full"),
    "full": ExpertParts(mixture="full", shared="none", after_first_product="none"),
}

# Selective recomputation keeps the outputs of matrix products, attention and exchanges, costly to compute again;
# norms, rotations and activations are cheap (Korthikanti et al., arXiv:2205.05198, section 5).
_ATTENTION_OPS = (
    "tinytron.tiled_attention",
    "torch_attn._varlen_attn",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
)
_OTHER_OPS = ("aten.mm", "aten.addmm", "tinytron.all_to_all")


@cache
def _operators(names: tuple[str, ...]) -> frozenset[Any]:
    from torch.nn.attention import varlen  # noqa: F401  # makes _varlen_attn, and loads torch's compiler

    packets = (name.split(".") for name in names)
    return frozenset(getattr(getattr(torch.ops, namespace), name).default for namespace, name in packets)


def _keep(kept: frozenset[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(partial(_keep, _operators(_OTHER_OPS + _ATTENTION_OPS)))


def _dropout_contexts() -> Any:
    """A kept attention would not draw its dropout again in recomputation, and all later draws would be others."""
    return create_selective_checkpoint_contexts(partial(_keep, _operators(_OTHER_OPS)))


# torch.compile caches a graph across processes if a text says what is kept.
_contexts.cache_hash = f"keep {_OTHER_OPS + _ATTENTION_OPS}"  # type: ignore[attr-defined]
_dropout_contexts.cache_hash = f"keep {_OTHER_OPS}"  # type: ignore[attr-defined]


def recomputed(how: Recompute, function: Callable[..., T], *args: Any, dropout: float = 0.0) -> T:
    """``function(*args)``; for the backward pass ``full`` keeps the arguments alone, ``selective`` also the
    outputs that are costly to compute again.

    ``dropout`` is the probability that ``function`` draws with. Without gradients nothing is recomputed.
    """
    if how == "none" or not torch.is_grad_enabled():
        return function(*args)
    contexts: dict[str, Any] = {}  # torch.compile cannot trace the default when it is passed
    if how == "selective":
        contexts["context_fn"] = _contexts if dropout == 0 else _dropout_contexts
    out: T = checkpoint(function, *args, use_reentrant=False, **contexts)
    return out
