"""The guard rails of a run (docs/reliability.md), behind one object that the training loop asks once per step."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.collectives import Work
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.replicas import check_replicas
from tinytron.errors import TrainingError
from tinytron.metrics import SpikeDetector
from tinytron.metrics.clock import LONG_STEP_SECONDS
from tinytron.training.config import Config
from tinytron.training.run.unfinished_step import StepDropped
from tinytron.utils.signals import StopRequest
from tinytron.utils.watchdog import Watchdog

_PATIENCE_SECONDS = 2.0


class Guards:
    """Signals, spikes, replicas and stalls. Once ``ends``, the loop is to report, save and call ``leave``.

    ``before_step`` and ``after_step`` stand around a step, ``between_microbatches`` inside, ``spikes.judge`` goes into the
    optimizer's; ``after_report`` is called where the host has waited for the device anyway.
    """

    def __init__(self, config: Config, state: ParallelState, folder: Path, optimizer: DistributedOptimizer) -> None:
        self.config, self.state, self._optimizer = config, state, optimizer
        train = config.train
        self.spikes = SpikeDetector(train.spike_sigma, train.spike_window, state.device, state.groups["world"])
        self._watchdog = Watchdog(train.step_timeout, folder / f"stacks_rank{state.rank}.txt", state.rank)
        self.paused = self._watchdog.paused
        self._request = StopRequest()
        self._notice = threading.Timer(0, str)
        self._signal, self._dropped = 0, False
        self._error: TrainingError | None = None
        self._slow, self._step_began = True, 0.0
        self.acts_within_steps = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Around the training loop: signals are caught and stalls are watched. Collective."""
        self._request, self._agreement = StopRequest(first=self._promise, speaks=self.state.rank == 0), StopAgreement()
        self._signal, self._dropped, self._error = 0, False, None  # a notebook may continue after a stop
        self._slow = self.acts_within_steps = True  # until the first steps have shown how long they take
        try:
            with self._request.listening(), self._watchdog.watching():
                yield
        finally:
            self._notice.cancel()
            self.acts_within_steps = False  # a step by hand

    def _promise(self, number: int) -> None:
        """After Ctrl-C, should the step take long, say that it was heard."""
        if number == signal.SIGINT and self.state.rank == 0:
            part = "micro-batch" if self.acts_within_steps else "step"
            text = f"Ctrl-C: the run ends, and saves, after this {part}; a second one ends it at once"
            self._notice = threading.Timer(_PATIENCE_SECONDS, print, (text,), {"file": sys.stderr, "flush": True})
            self._notice.daemon = True
            self._notice.start()

    def before_step(self) -> bool:
        """A step begins. True if a signal may end it between its micro-batches; the same on every rank: so it is in the
        first steps of a run, and where steps take longer than ``LONG_STEP_SECONDS``."""
        self._step_began = time.monotonic()
        return self.acts_within_steps

    def between_microbatches(self) -> None:
        """Collective. Raises: StepDropped, on every rank alike, if the run ends here."""
        if self.acts_within_steps:
            self._poll()
            if self._signal:
                self._dropped = True
                raise StepDropped

    def after_step(self, step: int, *, last: bool) -> None:
        """``step`` is complete. Collective. Raises: TrainingError on every rank if the replicas diverged."""
        every = self.config.train.replica_check_every
        if every and step % every == 0:
            check_replicas(step, self._optimizer, self.state)
        self._slow = time.monotonic() - self._step_began > LONG_STEP_SECONDS
        self._poll(last=last)
        self._watchdog.beat(step)

    def _poll(self, *, last: bool = False) -> None:
        told = self._agreement.poll((self._request.received, int(self._slow)), last=last, now=self.acts_within_steps)
        if told is not None:
            self._signal, self.acts_within_steps = told[0], bool(told[1])

    def finish_exchange(self) -> None:
        """Wait until all ranks have told each other what they did at the last poll."""
        self._agreement.finish()

    def after_report(self) -> None:
        """With ``--spike_action stop``: see whether a step was rejected since the last report."""
        train = self.config.train
        if train.spike_action == "stop" and (spike := self.spikes.first_spike()):
            self._error = TrainingError(
                f"step {spike.step}: {spike.kind} {spike.value:.6g} exceeds {spike.limit:.6g}, the mean + --spike_sigma "
                f"{train.spike_sigma:g} x standard deviation of the last --spike_window {train.spike_window} accepted "
                "steps; the step was skipped and --spike_action stop ends the run; rerun the same command to go on "
                "behind it, or use --spike_action skip"
            )

    @property
    def ends(self) -> bool:
        """The run ends with this step; the same on every rank."""
        return self._signal != 0 or self._error is not None

    def leave(self, step: int, say: Callable[[str], None]) -> None:
        """If the run ``ends``, end it. Collective. Raises: TrainingError after a spike; for a signal, after saying how to
        resume, SystemExit: 130 after Ctrl-C, else 0."""
        if self._error is not None:
            raise self._error
        if self._signal:
            off = "--debug" if self.config.train.debug else "" if self.config.ckpt.do_save else "--no-do_save"
            again = "the same command" if self.config.ckpt.resume else "this command without --no-resume"
            what = f"nothing is saved with {off}" if off else f"saved; run {again} again to resume"
            if not step:  # its first step was dropped
                what = f"there is nothing to save yet; run {again} again to begin"
            name = "Ctrl-C" if self._signal == signal.SIGINT else signal.Signals(self._signal).name
            where = f" in step {step + 1}, which does not count" if self._dropped else ""
            say(f"step {step} | stopped by {name}{where}: {what}")
            if self._signal != signal.SIGINT:
                raise SystemExit(0)
            self._agreement.wait()  # a launcher ends all ranks once one has failed
            raise SystemExit(128 + signal.SIGINT)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, in plain types; empty without ``--spike_sigma``."""
        return self.spikes.state_dict() if self.config.train.spike_sigma else {}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from what ``state_dict`` returned; a run that had no guard leaves nothing to go on from."""
        if state and self.config.train.spike_sigma:
            self.spikes.load_state_dict(state)


class StopAgreement:
    """A stop that all ranks agree on, although a signal may reach only one of them, and each at another moment: at each
    poll every rank tells some numbers, and learns what was told at the poll before.

    The exchange runs in the background, on the host: neither host nor device waits for it, except for a rank that is
    more than a poll ahead. It has a process group of its own, so that it does not wait behind others. Collective over
    the world, like ``poll``.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._told = torch.zeros(2, dtype=torch.int32)
        self._values = self._told.numpy()  # the same memory, read and written without an operation of torch
        self._work: Work | None = None

    def wait(self) -> None:
        """Until all ranks are here."""
        dist.barrier(self._group)

    def finish(self) -> None:
        """Wait for the exchange that the last poll began; the next poll returns its result."""
        if self._work is not None:
            self._work.wait()

    def poll(self, tell: tuple[int, int], *, last: bool, now: bool) -> list[int] | None:
        """Tell a stop signal that this rank received (0: none) and one more number. Returns the largest of each that any
        rank told at the poll before, ``None`` if there was none; ``now`` waits for what the ranks tell at this poll, and
        returns that: worth it where polls are seconds apart. Nothing is told once a signal was, and with ``last``, after
        which no rank polls."""
        told = self._receive()
        if not last and not (told and told[0]):
            self._values[:] = tell
            self._work = dist.all_reduce(self._told, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
            if now:
                told = self._receive()
        return told

    def _receive(self) -> list[int] | None:
        """The result of the exchange under way, once it is complete."""
        if self._work is None:
            return None
        self._work.wait()
        self._work = None
        return self._values.tolist()
