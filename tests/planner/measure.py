"""What a real training step allocates, as torch's own profiler records it, and what real objects hold."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tests.helpers.runs import config_of
from tinytron.checkpoint.files import CheckpointFiles
from tinytron.checkpoint.host_buffers import HostBuffers
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.checkpoint.snapshot import take_snapshot
from tinytron.data import Batch
from tinytron.model.modules.loss import LossSums
from tinytron.training import Config, Trainer

_MARK = 4321  # bytes: an allocation that says where the forward pass ends


class _Marked(Trainer):
    def _loss(self, batch: Batch) -> LossSums:
        sums = super()._loss(batch)
        time.sleep(0.1)  # gloo's threads let go of what they exchanged some time after it is there
        torch.empty(_MARK, dtype=torch.uint8)
        return sums


def measured_step(log_dir: Path, *flags: object) -> tuple[int, int]:
    """Bytes alive after the (last) forward and at the fullest moment of one ``train_step``, beside what was alive before.
    A job for the pool."""
    trainer = _Marked(config_of("--log_dir", log_dir, "--debug", "--use_mock_data", *flags))
    steps = trainer.data.steps(trainer.step)
    trainer.train_step(next(steps))
    microbatches = next(steps)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        trainer.train_step(microbatches)
    return _after_mark_and_peak(recorded)


def _after_mark_and_peak(recorded: profile) -> tuple[int, int]:
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = at_mark = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.nbytes() == _MARK:
            at_mark = live
        live += event.nbytes()
        peak = max(peak, live)
    return at_mark, peak


class _ProfiledStart(Trainer):
    def _init_model(self, config: Config) -> None:
        # From the model on: the recorder sees only those deallocations whose allocation it has seen.
        self.recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.recorded.start()
        super()._init_model(config)

    def _attach_optimizer(self) -> None:
        super()._attach_optimizer()
        self.recorded.stop()


def measured_start(log_dir: Path, *flags: object) -> int:
    """Bytes at the fullest moment of moving the parameters into flat buffers, themselves included. A job for the pool."""
    trainer = _ProfiledStart(config_of("--log_dir", log_dir, "--debug", *flags))
    return _after_mark_and_peak(trainer.recorded)[1]


def held_bytes(log_dir: Path, *flags: object) -> dict[str, Any]:
    """What this rank holds after two steps, by kind, storage by storage; and what it would save. A job for the pool."""
    trainer = Trainer(config_of("--log_dir", log_dir, "--debug", *flags))
    trainer.train()
    optimizer, buffers = trainer.optimizer, trainer.optimizer.buffers
    states = [v for state in optimizer.inner.state.values() for v in state.values() if torch.is_tensor(v)]
    parameters = {b.param_data.untyped_storage().data_ptr() for b in buffers}
    mains = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for b in buffers for t in b._mains}
    host = HostBuffers()
    files = CheckpointFiles(trainer.log_dir, 1)
    snapshot = take_snapshot(files, trainer.raw_model, optimizer, CheckpointMeta(), trainer.state, host)
    return {
        "parameters": sum(b.param_data.untyped_storage().nbytes() for b in buffers),
        "gradients": sum(b.grad_data.untyped_storage().nbytes() for b in buffers)
        + sum(
            p.grad.nbytes
            for b in buffers
            for p in b.params
            if p.grad is not None and p.grad.data_ptr() not in parameters
        ),
        "main": sum(size for place, size in mains.items() if place not in parameters),
        "optimizer": sum(math.prod(v.shape) * v.element_size() for v in states),
        "exchange": sum(part.nbytes for b in buffers for exchange in b._exchanges for part in exchange._parts),
        "weights": sum({t.data_ptr(): t.nbytes for t in snapshot.weights.values()}.values()),
        "states": sum(part.elements.nbytes for part in snapshot.states.values()),
        "host": sum(t.nbytes for t in host._buffers.values()),
        "tables": sum(t.nbytes for t in trainer.raw_model.buffers())
        + sum(getattr(trainer.raw_model, name).nbytes for name in ("step_load", "load")),
    }
