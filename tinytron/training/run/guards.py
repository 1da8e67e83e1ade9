"""The guard rails of a run (docs/reliability.md), behind one object that the training loop asks once per step."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
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
from tinytron.training.config import Config
from tinytron.utils.signals import StopRequest
from tinytron.utils.watchdog import Watchdog

_PATIENCE_SECONDS = 2.0


class Guards:
    """Signals, spikes, replicas and stalls. Once ``ends``, the loop is to report, save and call ``leave``.

    ``spikes.judge`` goes into the optimizer step, ``after_step`` follows it; ``after_report`` is called where the host has
    waited for the device anyway.
    """

    def __init__(self, config: Config, state: ParallelState, folder: Path, optimizer: DistributedOptimizer) -> None:
        self.config, self.state, self._optimizer = config, state, optimizer
        train = config.train
        self.spikes = SpikeDetector(train.spike_sigma, train.spike_window, state.device, state.groups["world"])
        self._watchdog = Watchdog(train.step_timeout, folder / f"stacks_rank{state.rank}.txt", state.rank)
        self.paused = self._watchdog.paused
        self._request = StopRequest()
        self._notice = threading.Timer(0, str)
        self._signal = 0
        self._error: TrainingError | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Around the training loop: signals are caught and stalls are watched. Collective."""
        self._request, self._agreement = StopRequest(first=self._promise), StopAgreement()
        self._signal, self._error = 0, None  # a notebook may go on after a stop
        try:
            with self._request.listening(), self._watchdog.watching():
                yield
        finally:
            self._notice.cancel()

    def _promise(self, number: int) -> None:
        """After Ctrl-C, should the step take long, say that it was heard."""
        if number == signal.SIGINT and self.state.rank == 0:
            text = "Ctrl-C: the run ends, and saves, after this step; a second one ends it at once"
            self._notice = threading.Timer(_PATIENCE_SECONDS, print, (text,), {"file": sys.stderr, "flush": True})
            self._notice.daemon = True
            self._notice.start()

    def after_step(self, step: int, *, last: bool) -> None:
        """``step`` is complete. Collective. Raises: TrainingError on every rank if the replicas diverged."""
        every = self.config.train.replica_check_every
        if every and step % every == 0:
            check_replicas(step, self._optimizer, self.state)
        self._signal = self._agreement.poll(self._request.received, last=last)
        self._watchdog.beat(step)

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
            name = "Ctrl-C" if self._signal == signal.SIGINT else signal.Signals(self._signal).name
            say(f"step {step} | stopped by {name}: {what}")
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
    """A stop that all ranks agree on, although a signal may reach only one of them, and each at another moment: in each
    step every rank says whether it was asked to stop, and learns in the next one whether any rank was.

    The exchange runs in the background, on the host: neither host nor device waits for it, except for a rank that is more
    than a step ahead. It has a process group of its own, so that it does not wait behind others. Collective over the
    world, like ``poll``.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._flag = torch.zeros((), dtype=torch.int32)
        self._work: Work | None = None

    def wait(self) -> None:
        """Until all ranks are here."""
        dist.barrier(self._group)

    def poll(self, received: int, *, last: bool) -> int:
        """Once per step: tell that this rank ``received`` a signal (0: none), and return the largest number that any rank
        told in the step before. ``last``: there is no next step, so nothing is told any more."""
        agreed = 0
        if self._work is not None:
            self._work.wait()
            agreed, self._work = int(self._flag), None
        if agreed == 0 and not last:
            self._flag.fill_(received)
            self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed
