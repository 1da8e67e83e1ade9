"""The cost of statistics: training steps with each of ``--log_norms``, ``--log_activations``, ``--log_attention`` and
``--log_loss_by_position``, next to the same step without, in one run.

python benchmarks/observe.py [--model 10m] [--precision bf16] [--batch 4] [--seq_len 512] [--rounds 9] [--threads 2]

A figure is the median over rounds, in which the alternatives take turns; a ratio by the clock is one of two steps of the
same round. By processor time it is one of the least times of all rounds, which other load disturbs less. A measured step
includes its report. Without statistics only the named points (``HasPoints.point``) and the timing of phases are left. They
are timed by themselves, because a step's own noise is a thousand times larger.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from rounds import WARM_UP, ratio
from step_report import machine
from step_time import MODELS, model_config

from tinytron.hooks import points_of
from tinytron.metrics.step_statistics import AllStatistics
from tinytron.training import Config, Trainer, build_config, parse_args
from tinytron.training.build import build_statistics
from tinytron.utils.phases import FORWARD, PhaseTimer, phase

FLAGS = ("log_norms", "log_activations", "log_attention", "log_loss_by_position")
PHASES_PER_STEP = 5  # with one micro-batch: wait for data, forward, backward, exchange, optimizer
EVERY = 10  # the default of --log_every
HEAD = (
    "| statistics | ms of a step | by the clock | by processor time | at `--log_every 10` | memory |\n"
    + 6 * "|---"
    + "|"
)
Seconds = tuple[float, float]  # by the clock, and of all threads


class Measured(Trainer):
    """A trainer whose steps are timed, with any statistics."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.batches = next(iter(self.data.steps(0)))
        self.none = self._statistics

    def with_flags(self, *flags: str) -> AllStatistics:
        """The statistics that ``flags`` ask for."""
        argv = [f"--{flag}" for flag in flags]
        config = build_config(parse_args([*_argv(self.model_flags), *argv]))
        return build_statistics(
            config, self.raw_model, self.state, self.optimizer, self._custom["train"], self._sources
        )

    def timed(self, measured: AllStatistics) -> Seconds:
        """Time one step and its report."""
        self._statistics = measured
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter(), time.process_time()
        self.train_step(self.batches)
        measured.record(1)
        self.reporter.window.flush()  # waits for the device
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    model_flags: dict[str, Any]


def _argv(flags: dict[str, Any]) -> list[str]:
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def make(args: argparse.Namespace, log_dir: str) -> Measured:
    """A trainer of one micro-batch a step, of which every step is reported."""
    config = model_config(args.model, args.seq_len)
    names = (
        "num_layer",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
    )
    flags: dict[str, Any] = {
        **{name: getattr(config, name) for name in (*names, "block_size")},
        **{"seq_len": args.seq_len, "batch_size": args.batch, "total_batch_size": args.batch * args.seq_len},
        **{"precision": args.precision, "log_every": 1, "max_steps": 2, "mock_data_num_samples": 2 * args.batch},
        **{"log_dir": log_dir, "prefetch": 0},
    }
    if config.use_moe:
        raise SystemExit(f"error: --model {args.model} has experts; use one without, such as 10m")
    cls = type("T", (Measured,), {"model_flags": flags})
    trainer: Measured = cls(build_config(parse_args([*_argv(flags), "--debug", "--use_mock_data"])))
    return trainer


def point_seconds(trainer: Measured) -> tuple[int, float]:
    """Number of points of the model, and the seconds that a call without hooks takes."""
    known = points_of(trainer.raw_model)
    module, name = next(iter(known.values()))
    x, calls = torch.zeros(1), 200_000
    begin = time.perf_counter()
    for _ in range(calls):
        module.point(name, x)
    return len(known), (time.perf_counter() - begin) / calls


def phase_seconds(device: torch.device) -> float:
    """The seconds that timing a phase takes (``--log_phases``), in addition to its mark for the profiler."""

    def of_calls(calls: int = 20_000) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            with phase(FORWARD):
                pass
        return (time.perf_counter() - begin) / calls

    timer, plain = PhaseTimer(device), of_calls()
    timer.start()
    timed = of_calls()
    timer.stop()
    return timed - plain


def memory_of(step: Callable[[], object]) -> str:
    """Peak of the allocated memory on a GPU, in MiB."""
    if not torch.cuda.is_available():
        return "-"
    torch.cuda.reset_peak_memory_stats()
    step()
    return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB"


def rows(trainer: Measured, rounds: int) -> list[str]:
    """The table's rows: without statistics, each alone, all together."""
    kinds = {"none": trainer.none, **{f"`--{flag}`": trainer.with_flags(flag) for flag in FLAGS}}
    kinds["all of them"] = trainer.with_flags(*FLAGS)
    times: dict[str, list[Seconds]] = {name: [] for name in kinds}
    for number in range(rounds + WARM_UP):
        for name, measured in kinds.items():
            gc.collect()
            seconds = trainer.timed(measured)
            if number >= WARM_UP:
                times[name].append(seconds)
    lines = []
    for name, seen in times.items():
        clock = ratio([own[0] for own in seen], [base[0] for base in times["none"]]) - 1
        processor = min(own[1] for own in seen) / min(base[1] for base in times["none"]) - 1
        step = 1e3 * statistics.median(own[0] for own in seen)
        cost = f"{clock:+.1%} | {processor:+.1%} | {processor / EVERY:+.2%}" if name != "none" else "| |"
        lines.append(f"| {name} | {step:.0f} | {cost} | {memory_of(lambda m=kinds[name]: trainer.timed(m))} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="10m", choices=MODELS)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    for name, default in (("threads", torch.get_num_threads()), ("batch", 4), ("seq_len", 512), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as log_dir:
        trainer = make(args, log_dir)
        print(f"\n{args.model}, {args.precision}, {args.batch} x {args.seq_len} tokens a step, {args.rounds} rounds")
        print(f"{machine(trainer.device)}\n\n{HEAD}")
        lines = rows(trainer, args.rounds)
        print("\n".join(lines))
        points, seconds = point_seconds(trainer)
        step = float(lines[0].split("|")[2]) / 1e3
        print(f"\n{points} points without hooks: {1e9 * seconds:.0f} ns each, {points * seconds / step:.4%} of a step")
        seconds = phase_seconds(trainer.device)
        cost = PHASES_PER_STEP * seconds / step
        print(f"{PHASES_PER_STEP} phases timed: {1e9 * seconds:.0f} ns each, {cost:.4%} of a step")


if __name__ == "__main__":
    main()
