"""Plots of a model's or a trainer's own: ``plot(intermediates)`` is called after every validation."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tinytron import hooks
from tinytron.data import Batch
from tinytron.errors import ConfigError
from tinytron.metrics.plots import Plotter
from tinytron.model.modules.loss import LossSums

if TYPE_CHECKING:
    from tinytron.training.trainer import Trainer


class Plots:
    """Collects the intermediates of the first micro-batch of a validation, on the master, and has the trainer's ``plot``,
    or else the model's, make figures of them in a thread. Without such a method it does nothing.

    Intermediates are the activations at the trainer's ``plot_points``, if it has them (patterns, as in ``tinytron.hooks``),
    of whole sequences, and tensors with more than one value that ``forward`` returns as ``meta``; all on the host, in fp32
    or more.
    Raises: ConfigError for a pattern that matches no point.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Trainer = weakref.proxy(
            trainer
        )  # an ended run must be freed at once: it holds its folder's lock
        self._of_model = not callable(getattr(trainer, "plot", None))
        self._makes = not self._of_model or callable(getattr(trainer.raw_model, "plot", None))
        self._points: Sequence[str] = getattr(trainer, "plot_points", ())
        self._waits, self._values = False, dict[str, torch.Tensor]()
        if not self._makes:
            return
        if self._points:
            hooks.selected(trainer.raw_model, self._points, f"{type(trainer).__name__}.plot_points")
        reporter = weakref.proxy(trainer.reporter)  # which has the plotter
        self._plotter = Plotter(lambda *figure: reporter.figure(*figure), save=trainer.config.logging.save_plots)
        trainer.reporter.add(self._plotter)

    def watched(self, loss: Callable[[Batch], LossSums]) -> Callable[[Batch], LossSums]:
        """``loss`` for one validation, whose first call is plotted."""
        self._waits = self._makes
        return partial(self._first, loss) if self._makes else loss

    def add(self, meta: Mapping[str, Any]) -> None:
        """Keep the tensors of ``meta`` that have more than one value, if they are of the batch to plot."""
        if self._waits:
            self._values |= {
                name: value for name, value in meta.items() if torch.is_tensor(value) and value.numel() > 1
            }

    def _first(self, loss: Callable[[Batch], LossSums], batch: Batch) -> LossSums:
        if not self._waits:
            return loss(batch)
        trainer: Any = self._trainer
        recording: Any = contextlib.nullcontext({})
        if self._points:
            recording = hooks.on(trainer.raw_model, record=self._points, whole=True)
        with recording as seen:
            result = loss(batch)
        self._waits, found, self._values = False, {**seen, **self._values}, {}
        if trainer.master_process:
            copies = {name: _on_host(value) for name, value in found.items()}
            make = trainer.raw_model.plot if self._of_model else trainer.plot
            self._plotter.submit(trainer.step, partial(_figures, make, copies))
        return result


def _on_host(value: torch.Tensor) -> torch.Tensor:
    copied = value.detach().cpu().clone()
    return copied.float() if copied.is_floating_point() and copied.dtype != torch.float64 else copied


def _figures(make: Any, intermediates: dict[str, torch.Tensor]) -> Mapping[str, Any]:
    found = make(intermediates)
    if not isinstance(found, Mapping) or not all(hasattr(figure, "savefig") for figure in found.values()):
        raise ConfigError(f"plot() returned a {type(found).__name__}; return matplotlib figures by name")
    return found
