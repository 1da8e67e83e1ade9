"""The console output of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from tinytron.metrics.clock import LONG_STEP_SECONDS
from tinytron.metrics.sinks.base import Record, RunInfo, Sink

LINE_SECONDS = 60.0  # between two lines about a long step, without a terminal


class Console(Sink):
    """Prints messages, validation and task results, the last training record of each report, and the progress within a
    long step. ``now`` returns the time in seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._bar: tqdm[Any] | None = None
        self._now = now

    def open(self, run: RunInfo) -> None:
        self._run = run
        self._start = self._now()
        self._step = run.first_step
        self._step_began = self._start
        self._spoke = -math.inf  # the time of the last printed line
        if sys.stderr.isatty():
            self._bar = tqdm(total=run.max_steps, initial=run.first_step, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def go_back(self, step: int) -> None:
        """Show this step, and estimate the remaining time from here on."""
        self._run, self._start = replace(self._run, first_step=step), self._now()
        self.advance(step)

    def advance(self, step: int) -> None:
        self._step = step
        if self._bar is not None:
            self._bar.set_description_str(None, refresh=False)
            self._bar.update(step - self._bar.n)

    def advance_within_step(self, done: int, microbatches: int) -> None:
        now = self._now()
        if done == 0:
            self._step_began = now
        if now - self._step_began < LONG_STEP_SECONDS:
            return
        text = f"micro-batch {done}/{microbatches}"
        if self._bar is not None:
            self._bar.set_description_str(text)
        elif now - self._spoke >= LINE_SECONDS:
            self._spoke = now
            self.say(f"{self._place(self._step + 1)} | {text}, {_hms(now - self._step_began)} so far")

    def write(self, records: Sequence[Record]) -> None:
        last = {record["stage"]: record for record in records}.get("train")
        for record in records:
            if record is last:
                step = record["step"]
                self.show(step, train_values(record, self._run.tokens_between(step - 1, step)))
            elif record["stage"] != "train":
                self.say(f"step {record['step']} | {shown(record)}")

    def show(self, step: int, values: dict[str, str]) -> None:
        """Show the newest values of training."""
        if self._bar is not None:
            self._bar.set_postfix(values)
            return
        run = self._run
        self._spoke = self._now()
        seconds = (self._spoke - self._start) / max(1, step - run.first_step) * (run.max_steps - step)
        text = " | ".join(f"{name} {value}" for name, value in values.items())
        self.say(f"{self._place(step)} | {text} | ETA {_hms(seconds)}")

    def _place(self, step: int) -> str:
        return f"step {step:>{len(str(self._run.max_steps))}}/{self._run.max_steps}"

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def train_values(record: Record, tokens_per_step: int) -> dict[str, str]:
    """The values of a training record to show, by name; for experts the largest load and smallest margin of any layer."""
    rate = record["tokens_per_second"]
    values = {
        "loss": f"{record['loss']:.4f}",
        "lr": f"{record['lr']:.2e}",
        "grad norm": f"{record['grad_norm']:.3f}",
        "ms": f"{1000 * tokens_per_step / rate:.0f}",
        "tok/s": f"{rate:,.0f}",
        "MFU": f"{record['mfu']:.1%}",
    }
    if record["skipped_steps"]:
        values["skipped"] = str(record["skipped_steps"])
    if "expert_load" in record:
        values["max load"] = f"{1 + max(layer['max_violation'] for layer in record['expert_load']):.2f}x"
    if "router_margin" in record:
        values["min margin"] = f"{min(layer['min'] for layer in record['router_margin']):.1e}"
    return values


def shown(record: Record) -> str:
    """A readable line for a validation or task record."""
    if record["stage"] == "val":
        bits = f" ({record['bits_per_byte']:.4f} bits per byte)" if "bits_per_byte" in record else ""
        more = [("accuracy", "accuracy"), ("averaged weights", "ema_loss")]
        parts = [f"{name} {record[key]:.4f}" for name, key in more if key in record]
        also = f", {', '.join(parts)}," if parts else ""
        return f"val loss {record['loss']:.4f}{bits}{also} over {record['tokens']:,} tokens"
    if "accuracy_stderr" not in record:
        scores = {k: v for k, v in record.items() if k not in ("step", "stage", "task")}
        return f"{record['task']}: " + ", ".join(
            f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in scores.items()
        )
    return (
        f"{record['task']}: accuracy {record['accuracy']:.4f} ± {record['accuracy_stderr']:.4f} "
        f"({record['accuracy_per_byte']:.4f} per byte) over {record['items']} items"
    )


def _hms(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"
