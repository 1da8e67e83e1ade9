"""Rounds of training steps for step_time.py: variants that take turns, or follow one another where memory is short."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from step_report import Row
from step_variants import Case, Training, Variant
from step_weights import Weights

from tinytron.errors import first_line
from tinytron.utils.model import count_parameters

WARM_UP = 3  # steps before the first round
MODELS_SHARE = 0.5  # of a GPU's memory, for all variants together; the rest is for one's activations


def release(device: torch.device) -> None:
    """Free the memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fit_together(case: Case, variants: Sequence[Variant]) -> bool:
    """Whether all variants can be in memory at once, with room for the activations of one."""
    if case.device.type == "cpu":
        return True
    held = sum(variant.bytes_per_parameter for variant in variants) * count_parameters(case.config).total
    return held <= MODELS_SHARE * torch.cuda.get_device_properties(case.device).total_memory


def start(variant: Variant, case: Case, weights: Weights | None, batches: list[torch.Tensor], row: Row) -> Training:
    """Build and warm up, compilation included."""
    training = variant.make(case, weights)
    begin = time.perf_counter()
    row.first_loss = float(training.step(batches[0]))
    row.first_step = time.perf_counter() - begin
    for i in range(1, WARM_UP):
        training.step(batches[i % len(batches)])
    training.settle()
    synchronize(case.device)
    return training


def one_round(training: Training, batches: list[torch.Tensor], steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and processor seconds of all threads."""
    begin = time.perf_counter()
    cpu = time.process_time()
    for i in range(steps):
        training.step(batches[i % len(batches)])
    training.settle()
    synchronize(device)
    return (time.perf_counter() - begin) / steps, (time.process_time() - cpu) / steps


@dataclass
class Made:
    """A variant that is ready: ``held`` bytes of device memory are its own between steps."""

    training: Training
    row: Row
    held: int


class Round:
    """What all rounds of one table share."""

    def __init__(self, case: Case, weights: Weights, batches: list[torch.Tensor], steps: int) -> None:
        self.case, self.weights, self.batches, self.steps = case, weights, batches, steps
        self.on_gpu = case.device.type == "cuda"

    def allocated(self) -> int:
        """Bytes on a GPU; elsewhere 0."""
        return torch.cuda.memory_allocated(self.case.device) if self.on_gpu else 0

    def make(self, variant: Variant, row: Row) -> Made | None:
        """Build one; ``None`` if it does not fit, or a peer fails, as compilers may. Raises: errors of our own variant."""
        release(self.case.device)
        before = self.allocated()
        try:
            training = start(variant, self.case, self.weights, self.batches, row)
        except torch.OutOfMemoryError:
            row.failure = out_of_memory(self.case.device)
        except Exception as error:
            if variant.library == "tinytron":
                raise
            row.failure = f"failed: {first_line(error)}"
        else:
            print(f"  {row.name}: first step {row.first_step:.1f} s, loss {row.first_loss:.4f}", flush=True)
            return Made(training, row, self.allocated() - before)
        row.first_loss = None
        print(f"  {row.name}: {row.failure}", flush=True)
        return None

    def run(self, made: Made) -> None:
        """One round of one variant. Raises: torch.OutOfMemoryError."""
        before = self.allocated()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.case.device)
        seconds, cpu = one_round(made.training, self.batches, self.steps, self.case.device)
        made.row.seconds.append(seconds)
        made.row.cpu.append(cpu)
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated(self.case.device) - before + made.held
            made.row.peak_bytes = max(made.row.peak_bytes or 0, peak)


def out_of_memory(device: torch.device) -> str:
    """Why a variant has no figures."""
    return f"out of memory ({torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB)"


def new_rows(case: Case, variants: Sequence[Variant]) -> list[Row]:
    """A row for each variant."""
    return [Row(variant.name, variant.keeps(case.precision)) for variant in variants]


def run_in_turns(
    case: Case, variants: Sequence[Variant], weights: Weights, batches: list[torch.Tensor], rounds: int, steps: int
) -> list[Row]:
    """All variants are built, then take turns. One that runs out of memory beside the others runs alone afterwards."""
    allow_many_compiled_variants()
    shared = Round(case, weights, batches, steps)
    rows = new_rows(case, variants)
    made = [ready for variant, row in zip(variants, rows, strict=True) if (ready := shared.make(variant, row))]
    for _ in range(rounds):
        for ready in list(made):
            try:
                shared.run(ready)
            except torch.OutOfMemoryError:
                ready.row.failure = out_of_memory(case.device)
                made.remove(ready)
                release(case.device)
    made.clear()
    short = [i for i, row in enumerate(rows) if (row.failure or "").startswith("out of memory")]
    for i, row in zip(
        short, run_one_by_one(case, [variants[i] for i in short], weights, batches, rounds, steps), strict=True
    ):
        rows[i] = row
    return rows


def run_one_by_one(
    case: Case, variants: Sequence[Variant], weights: Weights, batches: list[torch.Tensor], rounds: int, steps: int
) -> list[Row]:
    """Each variant is built, measured and released; one that needs too much memory says so."""
    shared = Round(case, weights, batches, steps)
    rows = new_rows(case, variants)
    for variant, row in zip(variants, rows, strict=True):
        torch._dynamo.reset()
        ready = shared.make(variant, row)
        try:
            for _ in range(rounds if ready else 0):
                shared.run(ready)  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            row.failure, row.first_loss, row.seconds, row.cpu = out_of_memory(case.device), None, [], []
            print(f"  {row.name}: {row.failure}", flush=True)
        del ready
    return rows


def allow_many_compiled_variants() -> None:
    """Variants of one model share code, of which torch compiles 8 versions and then silently runs the rest eagerly: allow
    more, and make the limit an error."""
    settings: Any = torch._dynamo.config
    settings.recompile_limit = 64
    if hasattr(settings, "fail_on_recompile_limit_hit"):
        settings.fail_on_recompile_limit_hit = True
