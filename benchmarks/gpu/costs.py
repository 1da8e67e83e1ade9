"""A training run's costs apart from its steps: host waits, waiting for data, the stall of a checkpoint, the first step."""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpu.corpus import write_corpus
from gpu.memory import flags_of
from gpu.part import Context, run
from tinytron.training import Trainer, build_config, parse_args

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 4  # steps that are not measured
PLAIN_SAVE_AT = (7, 8)  # steps before which torch.save is timed, while nothing is written in the background
SAVE_AT = (10, 20)  # steps before which a checkpoint is saved
WAITS_AT = 6  # the step in which waits are counted


class Timed(Trainer):
    """A trainer that takes the time around its steps."""

    def __init__(self, config: Any) -> None:
        self.gaps: list[float] = []  # seconds between two steps: waiting for data, logging
        self.stalls: list[float] = []  # seconds that a save holds training up
        self.plain_saves: list[float] = []  # seconds that torch.save takes for the same
        self.waits = 0
        self._left = self._began = time.perf_counter()
        self.loop_seconds = 0.0
        super().__init__(config)

    def train_step(self, microbatches: list[Any]) -> None:
        now = time.perf_counter()
        if self.step == WARM_UP:
            torch.cuda.synchronize()
            self._began = now = time.perf_counter()
        elif self.step > WARM_UP:
            self.gaps.append(now - self._left)
        if self.step in PLAIN_SAVE_AT:
            self.plain_saves.append(self._seconds(self._save_plainly))
        if self.step in SAVE_AT:
            self.stalls.append(self._seconds(self.save))
        if self.step == WAITS_AT:
            self.waits = self._counted_waits(microbatches)
        else:
            super().train_step(microbatches)
        self._left = time.perf_counter()
        if self.step + 1 == self.training_info.max_steps:
            torch.cuda.synchronize()
            self.loop_seconds = time.perf_counter() - self._began

    def _counted_waits(self, microbatches: list[Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                super().train_step(microbatches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing CUDA operation" in str(one.message) for one in caught)

    def _seconds(self, action: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def _save_plainly(self) -> None:
        """What torch.save does with the same tensors."""
        state = {"model": self.raw_model.state_dict(), "optimizer": self.raw_optimizer.state_dict()}
        torch.save(state, self.log_dir / "plain.pt")


def measure_loop(context: Context) -> None:
    """Waits, gaps and stalls of one run on token shards."""
    last = max(SAVE_AT) + 4
    flags = flags_of((), context.sizes, context.out / "log")
    vocab = int(flags[flags.index("--vocab_size") + 1])
    rows = int(flags[flags.index("--batch_size") + 1])
    data = write_corpus(context.out / "data", (last + 1) * rows * context.sizes.seq_len + 1, 100, vocab)
    unwanted = ("--debug", "--use_mock_data")
    flags = [flag for flag in flags if flag not in unwanted]
    flags += ["--dataset_path", str(data), "--max_steps", str(last), "--save_every_steps", "0", "--log_every", "1000"]
    trainer = Timed(build_config(parse_args(flags)))
    trainer.train()
    # The savings are not part of the loop that is measured.
    seconds = trainer.loop_seconds - sum(trainer.stalls) - sum(trainer.plain_saves)
    stall, plain = statistics.median(trainer.stalls), statistics.median(trainer.plain_saves)
    result = context.result
    result.figure("costs.host_waits", trainer.waits)
    result.figure("costs.loader_share", sum(trainer.gaps) / seconds)
    result.figure("costs.checkpoint_stall_seconds", stall)
    result.figure("costs.checkpoint_stall_over_torch_save", stall / plain)
    result.note(
        f"{trainer.waits} host waits in a step; {sum(trainer.gaps) / seconds:.2%} of the loop between steps; a save holds "
        f"training up for {stall:.3f} s, torch.save for {plain:.3f} s"
    )
    dist.destroy_process_group()
    del trainer
    gc.collect()
    torch.cuda.empty_cache()  # the next measurement is another process on the same GPU
    for path in (context.out / "log", data):
        shutil.rmtree(path)


def measure_first_step(context: Context) -> None:
    """Seconds of a whole process that makes one compiled step, with an empty compile cache and with a full one."""
    cache = context.out / "compile_cache"
    flags = [*flags_of((), context.sizes, context.out / "first"), "--max_steps", "1", "--use_compile"]
    command = [sys.executable, "pretrain_debug.py", *flags]
    settings = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    if context.rehearsing:
        settings["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled
    for name in ("cold",) if context.rehearsing else ("cold", "warm"):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, check=True)
        context.result.figure(f"costs.first_step_{name}_seconds", time.perf_counter() - start)
    shutil.rmtree(cache, ignore_errors=True)
    shown = [
        f"{key.split('_')[-2]} {value:.1f} s" for key, value in context.result.figures.items() if "first_step" in key
    ]
    context.result.note(f"a process with one compiled step: {', '.join(shown)}")


def main(context: Context, _: argparse.Namespace) -> None:
    """Measure the loop, then the first step."""
    measure_loop(context)
    measure_first_step(context)


if __name__ == "__main__":
    run(main, __doc__)
