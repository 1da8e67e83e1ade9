"""Optional interfaces between the trainer and a model. A model must only be a module that maps ``(input_ids, labels)`` to
``LossSums``.

A model that lacks the members of a protocol does without the feature that needs them. ``param_specs()`` (see
distributed/param_spec.py) is optional as well.
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
    """A model that does work after every optimizer step."""

    def end_step(self, skipped: torch.Tensor | None = None) -> None:
        """Finish a step. The trainer calls this on every rank, so it may be collective; ``skipped`` (a scalar on the
        device) is 1 if the optimizer rejected the step, else 0."""


@runtime_checkable
class WaitsForParameters(Protocol):
    """A model that calls ``wait_for_params(module)`` before it uses a module's parameters. With ``--overlap_param_gather``
    they may still be arriving from other ranks when the forward pass starts."""

    wait_for_params: Callable[[nn.Module], None]


@runtime_checkable
class HasExperts(Protocol):
    """A model with expert layers, whose load and routing are logged; ``config.moe_layers`` are the numbers of their
    blocks. With ``--use_moe`` its forward also gets ``padding`` and ``routing_scale`` (``Batch``)."""

    config: Any
    moe_layers: Sequence[Any]
    recorded: TracedBatch | None

    def take_load(self) -> list[list[int]]:
        """Rows that each expert of each expert layer got since the last call, over all ranks."""


@runtime_checkable
class CountsHits(Protocol):
    """A model whose loss sums have ``hits``: in evaluation always, in training while ``counts_hits`` is true."""

    counts_hits: bool


def require_gpt(model: nn.Module, uses: str, remedy: str) -> GPT:
    """``model``, checked to be Tinytron's GPT, whose weights can be converted. Raises: ConfigError that starts with
    ``uses``, a flag and a verb, and ends with ``remedy``."""
    if not isinstance(model, GPT):
        raise ConfigError(f"{uses} Tinytron's GPT, but this is a {type(model).__name__}; {remedy}")
    return model
