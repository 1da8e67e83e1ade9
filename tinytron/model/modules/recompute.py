"""Recomputation, also called activation checkpointing (arXiv:1604.06174): the backward pass recomputes values instead of
keeping them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tinytron.distributed import exchange  # noqa: F401  # registers an operator that is named below
from tinytron.kernels import attention_tiled  # noqa: F401  # registers an operator, too

T = TypeVar("T")
Recompute = Literal["none", "full", "selective"]


class ExpertParts(NamedTuple):
    """The kind of recomputation for each part of an expert layer."""

    mixture: Recompute  # the whole layer, from dispatch to sum
    shared: Recompute  # the shared expert in it
    after_first_product: Recompute  # the experts' gate and second product


EXPERT_PARTS: dict[Recompute, ExpertParts] = {
    "none": ExpertParts(mixture="none", shared="none", after_first_product="none"),
    "selective": ExpertParts(mixture="none", shared="selective", after_first_product="full"),
    "full": ExpertParts(mixture="full", shared="none", after_first_product="none"),
}

# Selective recomputation keeps the outputs of matrix products, attention and exchanges, which are expensive to recompute;
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
    from torch.nn.attention import varlen  # noqa: F401  # registers _varlen_attn; slow, because it loads torch's compiler

    packets = (name.split(".") for name in names)
    return frozenset(getattr(getattr(torch.ops, namespace), name).default for namespace, name in packets)


def _keep(kept: frozenset[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(partial(_keep, _operators(_OTHER_OPS + _ATTENTION_OPS)))


def _dropout_contexts() -> Any:
    """Contexts that also recompute attention: if its output were kept, recomputation would not redraw its dropout, and all
    later random draws would differ."""
    return create_selective_checkpoint_contexts(partial(_keep, _operators(_OTHER_OPS)))


# With this text, which identifies the kept operators, torch.compile can cache a graph across processes.
_contexts.cache_hash = f"keep {_OTHER_OPS + _ATTENTION_OPS}"  # type: ignore[attr-defined]
_dropout_contexts.cache_hash = f"keep {_OTHER_OPS}"  # type: ignore[attr-defined]


def recomputed(how: Recompute, function: Callable[..., T], *args: Any, dropout: float = 0.0) -> T:
    """Call ``function(*args)``. For the backward pass ``full`` keeps only the arguments; ``selective`` also keeps the
    outputs that are expensive to recompute.

    ``dropout`` is the dropout probability in ``function``. Without gradients nothing is recomputed.
    """
    if how == "none" or not torch.is_grad_enabled():
        return function(*args)
    contexts: dict[str, Any] = {}  # torch.compile cannot trace context_fn's default when it is passed explicitly
    if how == "selective":
        contexts["context_fn"] = _contexts if dropout == 0 else _dropout_contexts
    out: T = checkpoint(function, *args, use_reentrant=False, **contexts)
    return out
