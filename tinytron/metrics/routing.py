"""Reports on routing: statistics of the routers' margins, and a trace of each token's experts for comparing runs.

Both cover the last micro-batch before a report. Letters: L expert layers, B rows of this rank's micro-batch, s its part of
a sequence, T = B s its tokens, k choices per token, N tokens of all ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tinytron.distributed.parallel_state import ParallelState
from tinytron.metrics.sinks.files import keep_lines
from tinytron.model.gpt import TracedBatch
from tinytron.model.protocols import HasExperts

ROUTES = "routes_rank{}.jsonl"  # by rank, in the run's folder
THRESHOLDS = ("1e-3", "1e-4", "1e-5")


class RoutingReport:
    """Makes the routers of ``model`` record their decisions in every training forward pass. Recording takes a few
    element-wise kernels on the scores and no wait.

    ``micro_batches`` is the number per step. With ``trace`` each report appends lines to ``routes_rank<r>.jsonl`` in
    ``folder``, one per expert layer and token of this rank: step, layer (block), row in the step's global batch, position
    in the whole sequence, token id, experts (best first), their weights, margin. Row and position do not depend on the
    layout. Statistics and trace leave out padding.
    """

    def __init__(
        self, model: HasExperts, state: ParallelState, folder: Path, micro_batches: int, *, margins: bool, trace: bool
    ) -> None:
        self._model, self._state, self._micro_batches = model, state, micro_batches
        self._margins, self._path = margins, folder / ROUTES.format(state.rank) if trace else None
        self._layers = model.config.moe_layers
        for layer in model.moe_layers:
            layer.router.record = True

    def report(self, step: int) -> list[dict[str, Any]]:
        """The ``margin_statistics`` of every expert layer over all ranks' tokens; empty if margins are off. Also writes the
        trace if it is on. Collective; the host waits for the device."""
        recorded = self._model.recorded
        if recorded is None:  # a custom loss that never calls this model's own loss
            return []
        if self._path is not None:
            self._write(self._path, step, recorded)
        if not self._margins:
            return []
        own = [torch.stack([c.margin_T, weight_entropy(c.weight_Tk)]) for c in recorded.choices]
        if recorded.padding_Bs is not None:
            own = [values_2T[:, ~recorded.padding_Bs.flatten()] for values_2T in own]
        parts: list[Any] = [None] * self._state.layout.world_size
        # Gathered as objects, because a custom loader may give the ranks different numbers of rows.
        dist.all_gather_object(parts, torch.stack(own).double().cpu().numpy(), group=self._state.groups["world"])
        whole = np.concatenate(parts, axis=2)
        layers = zip(self._layers, whole, strict=True) if whole.size else ()  # all tokens may be padding
        return [{"layer": layer, **margin_statistics(*values_2N)} for layer, values_2N in layers]

    def record(self, step: int) -> dict[str, Any]:
        """The entries of ``report`` for the log; empty if margins are off. Collective."""
        margins = self.report(step)
        return {"router_margin": margins} if margins else {}

    def _write(self, path: Path, step: int, recorded: TracedBatch) -> None:
        B, s = recorded.input_ids_Bs.shape
        dp_rank, sep_rank = (self._state.group_rank(axis) for axis in ("dp", "sep"))
        first_row = (
            (self._micro_batches - 1) * self._state.layout.dp + dp_rank
        ) * B  # as GlobalBatchSampler deals them
        place_T = torch.arange(B * s)
        places = [first_row + place_T // s, sep_rank * s + place_T % s, recorded.input_ids_Bs.flatten()]
        kept = slice(None) if recorded.padding_Bs is None else ~recorded.padding_Bs.flatten()
        with open(path, "a", encoding="utf-8") as file:
            for layer, choice in zip(self._layers, recorded.choices, strict=True):
                file.write(route_lines(step, layer, [column.cpu()[kept] for column in [*places, *choice]]))


def route_lines(step: int, layer: int, columns: Sequence[torch.Tensor]) -> str:
    """The lines of one layer's tokens in the trace: what ``json_line`` would make of each, written column by column.
    ``columns`` are row, position and token, ``[N]``, experts and weights, ``[N, k]``, and margin, ``[N]``."""
    row_N, position_N, token_N, expert_Nk, weight_Nk, margin_N = columns
    slots = f"[{', '.join(['%s'] * expert_Nk.shape[1])}]"
    template = (
        f'{{"step": {step}, "layer": {layer}, "row": %s, "position": %s, "token": %s, "experts": {slots}, '
        f'"weights": {slots}, "margin": %s}}\n'
    )
    texts = map(_texts, (row_N, position_N, token_N, *expert_Nk.T, *weight_Nk.T, margin_N))
    return "".join(map(template.__mod__, zip(*texts, strict=True)))


def _texts(column_N: torch.Tensor) -> list[Any]:
    """The numbers of a column as Python's, whose text is that of JSON; those that JSON lacks as text in quotes."""
    values: list[Any] = column_N.tolist()
    if column_N.isfinite().all():
        return values
    return [value if math.isfinite(value) else f'"{value}"' for value in values]


def keep_traces_until(folder: Path, step: int) -> None:
    """Drop the lines after ``step`` from the traces of all ranks, including ranks that only an earlier run had."""
    for path in folder.glob(ROUTES.format("*")):
        keep_lines(path, lambda line: json.loads(line)["step"] <= step)


def margin_statistics(margin_N: np.ndarray[Any, Any], entropy_N: np.ndarray[Any, Any]) -> dict[str, float]:
    """Statistics of routing margins, in units of the scores: mean, minimum, and lower percentiles (without interpolation);
    the fractions of tokens with a margin of at most 1e-3, 1e-4 and 1e-5; and the mean entropy of the weights, in nats."""
    percentiles = {
        f"percentile_{q}": float(np.quantile(margin_N, float(q) / 100, method="lower")) for q in ("1", "0.1")
    }
    return {
        "mean": float(margin_N.mean()),
        "min": float(margin_N.min()),
        **percentiles,
        **{f"at_most_{bound}": float((margin_N <= float(bound)).mean()) for bound in THRESHOLDS},
        "weight_entropy": float(entropy_N.mean()),
    }


def weight_entropy(weight_Tk: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, ``[T]``, of each token's weights after they are normalized to sum to one: 0 for a single expert,
    ln k for k equal ones."""
    total_T1 = weight_Tk.sum(-1, keepdim=True).clamp(min=torch.finfo(weight_Tk.dtype).tiny)
    return torch.special.entr(weight_Tk / total_T1).sum(-1)
