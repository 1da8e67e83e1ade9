"""Recording, replacing and perturbing activations: ``on``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.distributed.collectives import sum_over
from tinytron.errors import ConfigError
from tinytron.hooks.points import Tap, attached, is_recomputing, selected

Replace = Callable[[torch.Tensor], torch.Tensor]


class Seen(Mapping[str, torch.Tensor]):
    """The activations of the last forward pass by point, without gradient: ``seen["blocks.3.post_mlp"]``, ``[B, s, ...]``.
    ``gradient`` and ``gradient_norms`` give their gradients at the points that were perturbed in it."""

    def __init__(self, model: nn.Module, whole: bool) -> None:
        self._state: Any = getattr(model, "state", None)
        self._whole = whole and self._state is not None and self._state.layout.sep > 1
        self._values: dict[str, torch.Tensor] = {}
        self._zeros: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._values:
            known = ", ".join(self._values) or "none: no forward pass has reached a point of record"
            raise ConfigError(f"hooks: {name} was not recorded; recorded are {known}")
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """The activation, or ``default`` if the point was not recorded."""
        return self._values.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def gradient(self, name: str) -> torch.Tensor:
        """The gradient of what ``backward`` was called on with respect to the activation at the point ``name``. With
        ``whole`` it is collective over the ranks that share the sequences.

        Raises: ConfigError if the point was not perturbed, or no backward pass has reached it.
        """
        zero = self._zeros.get(name)
        if zero is None or zero.grad is None:
            missing = "was not perturbed in a forward pass" if zero is None else "has no gradient yet; call backward"
            known = ", ".join(name for name, zero in self._zeros.items() if zero.grad is not None) or "none"
            raise ConfigError(f"hooks: {name} {missing}. Points with a gradient: {known}")
        return gathered(zero.grad, self._state.groups["sep"]) if self._whole else zero.grad

    def gradient_norms(self) -> dict[str, float]:
        """``intermediate_grad_norms/<point>``: the norm of the gradient at every perturbed point, over all ranks.
        Collective over the world."""
        zeros = self._zeros.values()
        grads = [zero.detach() if zero.grad is None else zero.grad for zero in zeros]
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
        if not norms:
            return {}
        total = torch.stack(norms).double().square()
        if self._state is not None:
            total = sum_over(total, self._state.groups["world"])
        return {f"intermediate_grad_norms/{n}": v for n, v in zip(self._zeros, total.sqrt().tolist(), strict=True)}

    # The functions at the points.

    def keep(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Record ``x``."""
        if not is_recomputing():
            value = x.detach()
            self._values[name] = gathered(value, self._state.groups["sep"]) if self._whole else value
        return x

    def perturb(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Add a zero, whose gradient will be that of ``x``."""
        if not torch.is_grad_enabled():
            return x
        zero = torch.zeros_like(x, requires_grad=True)
        if not is_recomputing():
            self._zeros[name] = zero
        return x + zero

    def replace(self, name: str, function: Replace, x: torch.Tensor) -> torch.Tensor:
        """The result of ``function``, checked."""
        group = self._state.groups["sep"] if self._whole else None
        given = x if group is None else _Gather.apply(x, group)
        out: Any = function(given)
        if not torch.is_tensor(out) or (out.shape, out.dtype) != (given.shape, given.dtype):
            made = f"{list(out.shape)} {out.dtype}" if torch.is_tensor(out) else f"a {type(out).__name__}"
            raise ConfigError(
                f"hooks: the function for {name} returned {made}; return a tensor like the given one, "
                f"{list(given.shape)} {given.dtype}"
            )
        if group is None:
            return out
        s, first = x.shape[1], dist.get_rank(group) * x.shape[1]
        return out[:, first : first + s]


@contextlib.contextmanager
def on(
    model: nn.Module,
    *,
    record: Sequence[str] = (),
    replace: Mapping[str, Replace] | None = None,
    perturb: Sequence[str] = (),
    whole: bool = False,
) -> Iterator[Seen]:
    """Context in which the forward passes of ``model`` record, replace and perturb the activations at points.

        with hooks.on(model, record=["blocks.*.post_mlp"], replace={"blocks.3.attn.q": f}, perturb=["*.input"]) as seen:
            model(ids, labels).objective.backward()
        seen["blocks.1.post_mlp"], seen.gradient("blocks.0.input")

    A point is named by its module; patterns match many (``points_of`` lists all). At one point the order is: replace,
    perturb, record. A function of ``replace`` gets the activation and returns one of the same shape and type; with
    recomputation it is called twice, and must do the same twice. Perturbing adds a zero whose gradient is the activation's.

    Under sequence parallelism a rank sees its part of each sequence. With ``whole`` it sees all of it, ``[B, S, ...]``; the
    ranks that share a sequence must then be in the same context. It is not for generation, in which every rank has whole
    sequences anyway.
    Raises: ConfigError for a pattern that matches no point of the model.
    """
    seen, replace = Seen(model, whole), replace or {}
    record, perturb = ([one] if isinstance(one, str) else one for one in (record, perturb))
    taps: dict[str, list[Tap]] = {name: [] for name in selected(model, [*replace, *perturb, *record])}
    for pattern, function in replace.items():
        for name in selected(model, [pattern]):
            taps[name].append(partial(seen.replace, name, function))
    for name in selected(model, perturb):
        taps[name].append(partial(seen.perturb, name))
    for name in selected(model, record):
        taps[name].append(partial(seen.keep, name))
    with attached(model, {name: partial(_each, own) for name, own in taps.items()}):
        yield seen


def _each(taps: Sequence[Tap], x: torch.Tensor) -> torch.Tensor:
    for tap in taps:
        x = tap(x)
    return x


def gathered(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The whole sequences of which each rank has a part: ``[B, s, ...] -> [B, S, ...]``. Collective over ``group``."""
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=1)


class _Gather(torch.autograd.Function):
    """``gathered`` with a gradient: the sum over the ranks, each of which computes something with the whole sequence."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.s = group, part.shape[1]
        return gathered(part, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        first = dist.get_rank(ctx.group) * ctx.s
        return sum_over(grad.contiguous().clone(), ctx.group)[:, first : first + ctx.s], None
