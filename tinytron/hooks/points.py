"""Named points in the forward pass of a module, and functions that are attached to them.

Without functions a point is its tensor itself: it adds no operation, and compiled code has no trace of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
import torch.nn as nn

from tinytron.errors import ConfigError
from tinytron.utils.flags import nearest

# Gets the tensor at a point, and returns the one to continue with: the same, or another of its shape.
Tap = Callable[[torch.Tensor], torch.Tensor]


class HasPoints(nn.Module):
    """A module that calls ``self.point(name, tensor)`` for each of its ``points``, and continues with the result."""

    points: ClassVar[tuple[str, ...]] = ()
    taps: Mapping[str, Sequence[Tap]] | None = None  # by point, the oldest first; None if there are none

    def point(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """``x``, or what the functions attached to the point ``name`` make of it."""
        if self.taps is None:
            return x
        for tap in self.taps.get(name, ()):
            x = tap(x)
        return x


def points_of(model: nn.Module) -> dict[str, tuple[HasPoints, str]]:
    """All points of ``model`` by name, such as ``blocks.0.attn.q``: the module and the name it has there."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, HasPoints):
            found.update({f"{prefix}.{name}".lstrip("."): (module, name) for name in module.points})
    return found


def selected(model: nn.Module, patterns: Sequence[str], what: str = "hooks") -> list[str]:
    """The names of the points that match any of ``patterns`` (``blocks.*.post_mlp``), in the model's order. Raises:
    ConfigError, which begins with ``what``, for a model without points and for a pattern that matches none."""
    known = points_of(model)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not known:
        raise ConfigError(
            f"{what}: this {type(model).__name__} has no named points; use Tinytron's GPT, or build your modules on "
            "tinytron.hooks.HasPoints"
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            hint = nearest(pattern, known) or f"; use one such as {next(iter(known))}"
            raise ConfigError(f"{what}: {pattern} matches no point of this {type(model).__name__}{hint}")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]


@contextlib.contextmanager
def attached(model: nn.Module, taps: Mapping[str, Tap]) -> Iterator[None]:
    """Context in which the functions ``taps`` are attached to the points of ``model`` by name, after those that are there.
    Compiled modules that contain one of these points run uncompiled in it."""
    known = points_of(model)
    modules = {id(module): module for module, _ in (known[name] for name in taps)}.values()
    before = [module.taps for module in modules]
    with uncompiled(model, list(taps)):
        try:
            for name, tap in taps.items():
                module, own = known[name]
                others = module.taps or {}
                module.taps = {**others, own: (*others.get(own, ()), tap)}
            yield
        finally:
            for module, earlier in zip(modules, before, strict=True):
                module.taps = earlier
                if earlier is None:
                    del module.taps  # the class has it; compiled code looks where it is found


@contextlib.contextmanager
def uncompiled(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Context in which the modules that contain one of ``names`` (of submodules or points) run uncompiled."""
    prefixes = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."} | {"", *names}
    undo = contextlib.ExitStack()
    with undo:
        for name, module in model.named_modules():
            if name not in prefixes:
                continue
            if module._compiled_call_impl is not None:
                undo.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
                module._compiled_call_impl = None
            for method in getattr(module, "compiled_methods", ()):
                if method in module.__dict__:  # else it is uncompiled already, by an outer context
                    undo.callback(setattr, module, method, module.__dict__.pop(method))
        yield


def is_recomputing() -> bool:
    """True while a backward pass computes activations again: what was recorded in the forward pass comes a second time."""
    running: Any = torch._C._current_graph_task_id()
    return bool(running != -1)
