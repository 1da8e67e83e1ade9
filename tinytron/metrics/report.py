"""What is written, shown and kept of the steps since the last report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinytron.metrics.sources import SourceLoss
from tinytron.metrics.window import StepRecord


class Report:
    """``entries`` go to log.jsonl, one per step; ``shown`` is the console line; ``results`` the last step as numbers.

    ``seconds`` of training for ``tokens`` tokens at ``flops_per_token``, on devices of ``peak_flops`` per second in all.
    """

    def __init__(
        self,
        records: Sequence[StepRecord],
        *,
        seconds: float,
        tokens: int,
        flops_per_token: float,
        peak_flops: float,
        skipped: int,
    ) -> None:
        last, rate, step_seconds = records[-1], tokens / seconds, seconds / len(records)
        mfu = rate * flops_per_token / peak_flops
        self.results = {**last.fields(), "seconds": step_seconds, "tokens_per_second": rate, "mfu": mfu}
        self.shown = {
            "loss": f"{last.loss:.4f}", "lr": f"{last.lr:.2e}", "grad norm": f"{last.grad_norm:.3f}",
            "ms": f"{1000 * step_seconds:.0f}", "tok/s": f"{rate:,.0f}", "MFU": f"{mfu:.1%}",
        }  # fmt: skip
        if skipped:
            self.shown["skipped"] = str(skipped)
        extra = {"tokens_per_second": rate, "mfu": mfu, "skipped_steps": skipped}
        self.entries: list[dict[str, Any]] = [{**record.fields(), "stage": "train", **extra} for record in records]

    def add_expert_load(self, loads: list[dict[str, Any]]) -> None:
        """``load_statistics`` of all the steps."""
        self.entries[-1]["expert_load"] = loads
        self.shown["max load"] = f"{1 + max(load['max_violation'] for load in loads):.2f}x"

    def add_router_margin(self, margins: list[dict[str, Any]]) -> None:
        """``RoutingReport.report`` of the last micro-batch; nothing if it is not asked for."""
        if margins:
            self.entries[-1]["router_margin"] = margins
            self.shown["min margin"] = f"{min(margin['min'] for margin in margins):.1e}"

    def add_sources(self, losses: dict[str, SourceLoss], seen: dict[str, int]) -> None:
        """Loss and targets of every source of a mixture since the last report, and its tokens since the start."""
        self.entries[-1]["sources"] = {
            name: {**loss.fields(), "tokens_seen": seen.get(name)} for name, loss in losses.items()
        }
