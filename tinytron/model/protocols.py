"""What the trainer asks of a model, beyond being a module that maps ``(input_ids, labels)`` to ``LossSums``.

Everything here is optional: a model has the members of a protocol, or goes without what they are for. ``param_specs()``
(see distributed/param_spec.py) is of this kind, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn as nn

from tinytron.errors import ConfigError
from tinytron.model.gpt import GPT, TracedBatch


@runtime_checkable
class EndsSteps(Protocol):
    """A model with something to do after every optimizer step."""

    def end_step(self, skipped: torch.Tensor | None = None) -> None:
        """Called on every rank, so it may be collective; ``skipped`` (1 or 0, on the device) says that the optimizer
        rejected the step."""


@runtime_checkable
class WaitsForParameters(Protocol):
    """A model that calls ``wait_for_params(module)`` before it uses a module's parameters. They may still be on their
    way from other ranks when its forward begins (``--overlap_param_gather``)."""

    wait_for_params: Callable[[nn.Module], None]


@runtime_checkable
class HasExperts(Protocol):
    """A model with expert layers, whose load and routers are logged; ``config.moe_layers`` are the numbers of their
    blocks. With ``--use_moe`` its forward is also given ``padding`` and ``routing_scale`` (``Batch``)."""

    config: Any
    moe_layers: Sequence[Any]
    recorded: TracedBatch | None

    def take_load(self) -> list[list[int]]:
        """Rows that each expert of each expert layer got since the last call, over all ranks."""


def require_gpt(model: nn.Module, uses: str, remedy: str) -> GPT:
    """``model``, if it is our GPT, whose weights can be converted. Raises: ConfigError saying what ``uses`` it, and the
    ``remedy``."""
    if not isinstance(model, GPT):
        raise ConfigError(f"{uses} our GPT, and this is a {type(model).__name__}; {remedy}")
    return model
