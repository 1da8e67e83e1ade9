"""Loss on held-out data: every sample once, weighted by tokens, with the same result on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.data import Batch
from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.metrics import SourceLosses
from tinytron.metrics.sources import SourceLoss, bits_per_byte, bytes_of_labels, perplexity
from tinytron.model.modules.loss import LossSums, checked_sums

ACCURACY = "accuracy"  # share of the targets that count whose label is the likeliest token


class ValSums(NamedTuple):
    """Sums of a validation: the loss in ``nats``, its ``normalizer`` and the ``weight`` of the targets, the number of
    targets (``tokens``), their unweighted loss (``plain_nats``) and their ``text_bytes`` (0 if unknown); and for every
    auxiliary value (``aux``) its sum and its divisor."""

    nats: float
    normalizer: float
    weight: float
    tokens: float
    plain_nats: float
    text_bytes: float
    aux: Mapping[str, tuple[float, float]] = MappingProxyType({})

    def result(self, sources: Mapping[str, SourceLoss] = MappingProxyType({})) -> ValResult:
        """The means; NaN without targets."""
        some = self.weight and self.normalizer
        return ValResult(
            self.nats / self.weight * (self.tokens / self.normalizer) if some else math.nan,
            int(self.tokens),
            dict(sources),
            bits_per_byte(self.plain_nats, self.text_bytes),
            {name: value / max(count, 1.0) for name, (value, count) in self.aux.items()},
            self,
        )


def total(parts: Sequence[ValSums]) -> ValSums:
    """The sums of all ``parts`` together, as if their batches had been one validation. Bytes are known only if they are
    known for every part."""
    columns = zip(*(part[:6] for part in parts), strict=True)
    nats, normalizer, weight, tokens, plain_nats, text_bytes = (float(sum(column)) for column in columns)
    known = all(part.text_bytes for part in parts)
    aux: dict[str, tuple[float, float]] = {}
    for name, (value, count) in ((name, pair) for part in parts for name, pair in part.aux.items()):
        before = aux.get(name, (0.0, 0.0))
        aux[name] = (before[0] + value, before[1] + count)
    return ValSums(nats, normalizer, weight, tokens, plain_nats, text_bytes if known else 0.0, aux)


class ValResult(NamedTuple):
    """``loss`` in nats per token over ``tokens`` targets (weighted if they have weights), or per whatever else the
    objective counts; NaN without targets. ``bits_per_byte`` (unweighted) if the bytes of tokens are known. For a mixture,
    ``sources`` has the same for every source. ``aux``: the objective's auxiliary values by name, divided by their own
    counts or like the loss. ``sums`` are the sums behind these numbers."""

    loss: float
    tokens: int
    sources: dict[str, SourceLoss]
    bits_per_byte: float | None
    aux: Mapping[str, float]
    sums: ValSums

    def fields(self) -> dict[str, Any]:
        """The values that go into the log."""
        known: dict[str, Any] = {} if self.bits_per_byte is None else {"bits_per_byte": self.bits_per_byte}
        if self.sources:
            known["sources"] = {name: source.fields() for name, source in self.sources.items()}
        return {"loss": self.loss, "perplexity": perplexity(self.loss), "tokens": self.tokens, **known, **self.aux}


@torch.no_grad()
def validate(
    model: nn.Module,
    loss: Callable[[Batch], LossSums],
    batches: Iterable[Batch],
    state: ParallelState | None,
    sources: Sequence[str] = (),
    token_bytes_V: torch.Tensor | None = None,
    *,
    normalizer: Callable[[Batch], torch.Tensor] = Batch.targets,
) -> ValResult:
    """Sum ``loss`` over this rank's ``batches`` (on the device) and over the ranks, and divide by the sum of what
    ``normalizer`` counts (default: valid targets). Collective over the world; without a ``state`` this process is alone,
    and there are no ``sources``.

    ``token_bytes_V``, int64 ``[V]``: the number of bytes of every token id. A token without bytes (end of text)
    adds only loss.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device if state is None else state.device
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    aux: dict[str, torch.Tensor] = {}
    aux_counts: dict[str, torch.Tensor] = {}
    by_source = None if state is None else SourceLosses(sources, state, token_bytes_V)
    for batch in batches:
        losses = checked_sums(loss(batch))
        plain = losses.token if losses.per_token is None else losses.per_token.sum(dtype=torch.float64)
        size = batch.targets() * 0 if token_bytes_V is None else bytes_of_labels(batch.labels, token_bytes_V).sum()
        counts = (normalizer(batch), batch.target_weight(), batch.targets(), plain, size)
        sums += torch.stack([losses.token.double(), *(count.double() for count in counts)])
        real = 1 - batch.filling / len(batch.labels)  # a value without its own count may cover filling samples, too
        found, numbers = dict(losses.aux), dict(losses.counts)
        if losses.hits is not None and ACCURACY not in found:
            found[ACCURACY], numbers[ACCURACY] = losses.hits, batch.counted_targets()
        for name, value in found.items():
            aux[name] = aux.get(name, 0.0) + value.double() * (1 if name in numbers else real)
        for name, number in numbers.items():
            aux_counts[name] = aux_counts.get(name, 0.0) + number.double()
        if by_source is not None:
            by_source.add(batch, losses)
    model.train(was_training)
    if state is not None:
        sum_over(sums, state.groups["world"])
    nats, count, weight, tokens, plain_nats, text_bytes = sums.tolist()
    divisors = _sum_by_name(aux_counts, state)
    means = {name: (value, divisors.get(name, count)) for name, value in _sum_by_name(aux, state).items()}
    of_sources = by_source.flush() if sources and by_source is not None else {}
    return ValSums(nats, count, weight, tokens, plain_nats, text_bytes, means).result(of_sources)


def _sum_by_name(values: Mapping[str, torch.Tensor], state: ParallelState | None) -> dict[str, float]:
    """The values of all ranks together. Collective, except without a ``state``. A rank whose loader had no batch for it has
    no values, so the ranks first agree on the names."""
    if state is None:
        return {name: float(value) for name, value in values.items()}
    world = state.groups["world"]
    of_ranks: list[Any] = [None] * dist.get_world_size(world)
    dist.all_gather_object(of_ranks, list(values), group=world)
    if not (names := list(dict.fromkeys(name for mine in of_ranks for name in mine))):
        return {}
    zero = torch.zeros((), dtype=torch.float64, device=state.device)
    sums = sum_over(torch.stack([values.get(name, zero) for name in names]), world)
    return dict(zip(names, sums.tolist(), strict=True))
