"""Metrics of one's own, in training and validation: timl's protocol.

A metric is a class with

    __init__(args)            once for every report, with the run's configuration
    update(outputs, inputs)   for every micro-batch: what the model returned, and its inputs by name
    gather()                  collective: combine this rank's numbers with those of the others
    to_dict()                 the values by name

In training, a metric sees the micro-batches of the steps that are reported, not of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.data import Batch
from tinytron.data.batch import counted
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError
from tinytron.model.protocols import CountsHits

TAKEN = {
    *("step", "stage", "loss", "lr", "grad_norm", "seconds", "tokens_per_second", "mfu", "skipped_steps"),
    *("perplexity", "tokens", "ema_loss", "bits_per_byte", "sources", "expert_load", "router_margin"),
    *("param_norm", "update_norm", "phases", "peak_memory_gib", "slowest_rank", "slowest_excess", "hidden_exchange"),
}


class Metric(Protocol):
    """The methods of a metric that the trainer calls; its class takes ``args``."""

    def update(self, outputs: Any, inputs: Mapping[str, Any]) -> None: ...
    def gather(self) -> None: ...
    def to_dict(self) -> dict[str, float]: ...


class MeanMetric:
    """A metric that is a sum over a count, summed over all micro-batches and ranks. A subclass calls ``add`` in
    ``update``."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self._sums: dict[str, torch.Tensor] = {}  # by name: sum and count

    def add(self, name: str, total: torch.Tensor, count: torch.Tensor | float) -> None:
        """Add ``total`` over ``count`` items to the mean ``name``; both stay on the device."""
        number = torch.as_tensor(count, dtype=torch.float64, device=total.device)
        pair = torch.stack([total.detach().double(), number])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def gather(self) -> None:
        """Sum over all ranks. A rank without a micro-batch adds nothing."""
        if not dist.is_initialized():
            return
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, [(name, str(pair.device)) for name, pair in self._sums.items()])
        for name, device in dict(item for of_rank in names for item in of_rank).items():
            zero = torch.zeros(2, dtype=torch.float64, device=torch.device(device).type)
            self._sums[name] = self._sums.get(name, zero)
            dist.all_reduce(self._sums[name])

    def to_dict(self) -> dict[str, float]:
        """The means; NaN where nothing was counted."""
        return {name: float(total / count) for name, (total, count) in self._sums.items()}


class NextTokenAccuracy(MeanMetric):
    """Share of the targets with a weight above 0 that are the likeliest token. The GPT counts them as part of its loss;
    the outputs of other models need ``logits``."""

    needs_hits: ClassVar[bool] = True  # a model with the protocol CountsHits counts them while this metric collects

    def update(self, outputs: Any, inputs: Mapping[str, Any]) -> None:
        """Add a micro-batch. Raises: ConfigError for outputs with neither ``hits`` nor ``logits``."""
        labels = inputs["labels"]
        counts = counted(labels, inputs.get("weights"))
        hits = getattr(outputs, "hits", None)
        if hits is None:
            logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
            if logits is None:
                raise ConfigError(
                    f"NextTokenAccuracy needs outputs with logits, but the model returned a {type(outputs).__name__}; "
                    "leave it out"
                )
            hits = ((logits.argmax(-1) == labels) & counts).sum()
        self.add("accuracy", hits, counts.sum())


def create_loss_metric_cls(key: str) -> type[MeanMetric]:
    """A metric class for the mean over micro-batches of the scalar ``outputs[key]`` or ``outputs.key``, such as
    ``aux_loss``."""

    class LossMetric(MeanMetric):
        def update(self, outputs: Any, inputs: Mapping[str, Any]) -> None:
            value = outputs.get(key) if isinstance(outputs, Mapping) else getattr(outputs, key, None)
            if value is None:
                raise ConfigError(f"the model's outputs have no {key}; a metric of it cannot be logged")
            self.add(key, torch.as_tensor(value), 1)

    LossMetric.__name__ = LossMetric.__qualname__ = f"Loss_{key}"
    return LossMetric


Metrics = type[Metric] | Sequence[type[Metric]] | None


class MetricSet:
    """The metrics of one stage, of ``model``. They collect between ``begin`` and ``end``."""

    def __init__(self, classes: Metrics, args: Any, state: ParallelState, model: nn.Module) -> None:
        listed = classes if isinstance(classes, Sequence) else [] if classes is None else [classes]
        self._classes, self._args, self._state, self._model = list(listed), args, state, model
        self._live: list[Metric] = []

    def begin(self) -> None:
        """Start from nothing."""
        self._live = [cls(self._args) for cls in self._classes]  # type: ignore[call-arg]
        self._count_hits(any(getattr(cls, "needs_hits", False) for cls in self._classes))

    def _count_hits(self, wanted: bool) -> None:
        if isinstance(self._model, CountsHits):
            self._model.counts_hits = wanted

    @property
    def collects(self) -> bool:
        """True between ``begin`` and ``end``, if there are metrics."""
        return bool(self._live)

    @torch.no_grad()
    def update(self, outputs: Any, batch: Batch) -> None:
        """Add a micro-batch, if ``begin`` was called."""
        for metric in self._live:
            metric.update(outputs, batch.as_inputs())

    def end(self) -> dict[str, float]:
        """The values by name, of all ranks together; empty without ``begin``. Collective; the host waits for the device.

        Raises: ConfigError, on every rank, for a name that the log uses itself or that two metrics have, and for values
        that differ between ranks, because ``gather`` did not combine them.
        """
        metrics, self._live = self._live, []
        self._count_hits(False)
        found: dict[str, float] = {}
        for metric in metrics:
            metric.gather()
            own = {name: float(value) for name, value in metric.to_dict().items()}
            kind = type(metric).__name__
            if taken := sorted(own.keys() & (TAKEN | found.keys())):
                raise ConfigError(f"the metric {kind} has a value {taken[0]}, which the log has already; rename it")
            self._check_agreement(kind, own)
            found |= own
        return found

    def record(self, step: int) -> dict[str, float]:
        """``end``, for a report of ``step``."""
        return self.end()

    def _check_agreement(self, kind: str, own: dict[str, float]) -> None:
        world = self._state.groups["world"]
        of_ranks: list[Any] = [None] * dist.get_world_size(world)
        dist.all_gather_object(of_ranks, own, group=world)
        for rank, theirs in enumerate(of_ranks):
            for name in sorted(own.keys() | theirs.keys()):
                if repr(of_ranks[0].get(name)) != repr(theirs.get(name)):
                    raise ConfigError(
                        f"the metric {kind} gives {name} {of_ranks[0].get(name)} on rank 0 and {theirs.get(name)} on rank "
                        f"{rank}; combine the ranks in gather(), or build on tinytron.metrics.custom.MeanMetric"
                    )
