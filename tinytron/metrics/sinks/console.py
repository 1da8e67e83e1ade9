"""What a person watches: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from tinytron.metrics.sinks.base import Record, RunInfo, Sink


class Console(Sink):
    """Prints messages, results of validation and tasks, and of each report's training records the last one."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def open(self, run: RunInfo) -> None:
        self._run, self._start = run, time.perf_counter()
        if sys.stderr.isatty():
            self._bar = tqdm(total=run.max_steps, initial=run.first_step, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, records: Sequence[Record]) -> None:
        last = {record["stage"]: record for record in records}.get("train")
        for record in records:
            if record is last:
                self.show(record["step"], train_values(record, self._run.tokens_per_step))
            elif record["stage"] != "train":
                self.say(f"step {record['step']} | {shown(record)}")

    def show(self, step: int, values: dict[str, str]) -> None:
        """Show the newest values of training."""
        if self._bar is not None:
            self._bar.set_postfix(values)
            return
        run = self._run
        seconds = (time.perf_counter() - self._start) / max(1, step - run.first_step) * (run.max_steps - step)
        text = " | ".join(f"{name} {value}" for name, value in values.items())
        self.say(f"step {step:>{len(str(run.max_steps))}}/{run.max_steps} | {text} | ETA {_hms(seconds)}")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def train_values(record: Record, tokens_per_step: int) -> dict[str, str]:
    """A training record in short, by name; of experts the largest load and the smallest margin of any layer."""
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
    """A record of validation or of a task in a line for people."""
    if record["stage"] == "val":
        bits = f" ({record['bits_per_byte']:.4f} bits per byte)" if "bits_per_byte" in record else ""
        return f"val loss {record['loss']:.4f}{bits} over {record['tokens']:,} tokens"
    return (
        f"{record['task']}: accuracy {record['accuracy']:.4f} ± {record['accuracy_stderr']:.4f} "
        f"({record['accuracy_per_byte']:.4f} per byte) over {record['items']} items"
    )


def _hms(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"
