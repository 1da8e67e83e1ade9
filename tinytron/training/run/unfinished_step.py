"""Lets a signal end a long step between two micro-batches: the run returns to the state before the step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn

from tinytron.utils.training import rng_state, set_rng_state


class StepDropped(Exception):  # noqa: N818  # not an error
    """All ranks leave the current step at the same micro-batch."""


class StepStart:
    """A copy of the state that a step's micro-batches change: the generators' states, the buffers of ``model`` and the sums
    in ``tensors``. It has no gradients, because there are none before a step, and no parameters, because only the optimizer
    changes them."""

    def __init__(self, model: nn.Module, tensors: Iterable[torch.Tensor] = ()) -> None:
        self._rng = rng_state()
        self._kept = [(tensor, tensor.detach().clone()) for tensor in (*model.buffers(), *tensors)]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        set_rng_state(self._rng)
        for tensor, kept in self._kept:
            tensor.copy_(kept)
