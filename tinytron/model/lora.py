"""Low-rank adapters of a model (LoRA, arXiv:2106.09685): adding them, and merging them into the weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn

from tinytron.errors import ConfigError
from tinytron.model.gpt import named_normal
from tinytron.model.modules.linear import PackedLinear
from tinytron.model.modules.lora import LowRank, add_low_rank
from tinytron.utils.flags import nearest

_CHILD = ".lora."  # in the names of an adapter's tensors


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters to add: their ``rank``, ``alpha`` (outputs are multiplied by alpha / rank), and the layers that get
    one. A target is one or more components of a layer's path, such as ``q_proj``, ``attn`` or ``blocks.0``."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()  # none: every linear layer except the head


def add_adapters(model: nn.Module, adapters: Adapters, seed: int) -> int:
    """Give the targets of ``model`` an adapter each, freeze everything else, and return the number of adapters. A is drawn
    as a function of (seed, name) from a normal distribution with the variance of PEFT's uniform one; B is zero.

    Projections that are packed into one matrix are targets of their own. Raises: ConfigError for a target that matches
    nothing.
    """
    found: dict[str, tuple[nn.Linear, list[int]]] = {}
    matched: set[str] = set()
    known: set[str] = set()
    for name, layer, block, paths in _projections(model):
        known.update(component for path in paths for component in path.split("."))
        hits = [target for target in adapters.targets if any(_matches(target, path) for path in paths)]
        matched.update(hits)
        if hits or not adapters.targets:
            found.setdefault(name, (layer, []))[1].append(block)
    for target in adapters.targets:
        if target not in matched:
            hint = nearest(target, known) or "; use names such as q_proj, attn or mlp"
            if target == "lm_head":
                hint = ", because the head has no adapter; drop it"
            raise ConfigError(f"--lora_targets {target} matches no linear layer of this model{hint}")
    if not found:
        raise ConfigError(
            f"--lora_rank {adapters.rank}: this model has no linear layer (nn.Linear) for an adapter; train it without "
            "adapters, or use a family such as llama"
        )
    for adapter in (module for module in model.modules() if isinstance(module, LowRank)):
        raise ConfigError(f"the model already has adapters of rank {adapter.rank}; add them once")
    model.requires_grad_(False)
    for name, (layer, blocks) in found.items():
        layer.lora = adapter = LowRank(layer, blocks, adapters.rank, adapters.alpha)
        if adapter.a.device.type != "meta":
            std = (3 * layer.in_features) ** -0.5
            with torch.no_grad():
                adapter.a.copy_(named_normal(f"{name}{_CHILD}a", tuple(adapter.a.shape), std, seed))
        layer.register_forward_hook(add_low_rank)
    return len(found)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Context in which ``model`` computes what it would without its adapters."""
    adapters = [module for module in model.modules() if isinstance(module, LowRank)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


def is_adapter(name: str) -> bool:
    """True for the name of an adapter's tensor in a ``state_dict``."""
    return _CHILD in name


def merged(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``weights`` with every adapter added to the weight that it adapts, computed in fp32 or better, and without the
    adapters. Tensors without one are returned as they are."""
    layers = [name.removesuffix(f"{_CHILD}a") for name in weights if name.endswith(f"{_CHILD}a")]
    if not layers:
        return weights
    plain = {name: weight for name, weight in weights.items() if not is_adapter(name)}
    for layer in layers:
        weight = plain[f"{layer}.weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        sum_ = weight.to(wide, copy=True)
        for rows, a, b in adapter_parts(weights, layer):
            sum_[rows] += float(weights[f"{layer}{_CHILD}scale"]) * (b.to(wide) @ a.to(wide))
        plain[f"{layer}.weight"] = sum_.to(weight.dtype)
    return plain


def adapter_parts(
    weights: Mapping[str, torch.Tensor], layer: str
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The rows of the ``layer``'s weight that each part of its adapter changes, and that part's A and B."""
    a, b, ranges = (weights[f"{layer}{_CHILD}{name}"] for name in ("a", "b", "ranges"))
    rank, used = b.shape[1], 0
    for i, (start, end) in enumerate(ranges.tolist()):
        height = end - start
        yield slice(start, end), a[i * rank : (i + 1) * rank], b[used : used + height]
        used += height


def _projections(model: nn.Module) -> Iterator[tuple[str, nn.Linear, int, tuple[str, ...]]]:
    """Every projection that can have an adapter: the name of its layer, the layer, its number in a packed one, and the
    paths under which it is known. The head has none, because it may be the embedding."""
    head: Any = getattr(model, "lm_head", None)
    if isinstance(theirs := getattr(model, "hf", None), nn.Module):
        head = theirs.get_output_embeddings()  # type: ignore[operator]
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        if not isinstance(layer, PackedLinear):
            yield name, layer, 0, (name,)
            continue
        parent = name.rpartition(".")[0]
        for block, own in enumerate(layer.names):
            yield name, layer, block, (name, f"{parent}.{own}")


def _matches(target: str, path: str) -> bool:
    return f".{target}." in f".{path}."
