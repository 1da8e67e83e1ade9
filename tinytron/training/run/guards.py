"""The guard rails of a run (docs/reliability.md), behind one object that the training loop consults once per step."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.collectives import Work
from tinytron.distributed.flight_recorder import write_collectives
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.replicas import check_replicas
from tinytron.errors import TrainingError
from tinytron.metrics import SpikeDetector
from tinytron.metrics.clock import LONG_STEP_SECONDS
from tinytron.metrics.spikes import NOTHING_ACCEPTED, Spike
from tinytron.training.config import Config
from tinytron.training.run.unfinished_step import StepDropped
from tinytron.training.world import first_on_node, tell_launcher
from tinytron.utils.preemption import Preemption
from tinytron.utils.signals import StopRequest
from tinytron.utils.watchdog import Watchdog

_PATIENCE_SECONDS = 2.0
_MOST_RETURNS = 3  # to one checkpoint


class Guards:
    """Signals, spikes, replicas and stalls. Once ``ends`` is true, the loop should report, save and call ``leave``.

    ``before_step`` and ``after_step`` enclose a step, ``between_microbatches`` is called inside it, and ``spikes.judge``
    goes to the optimizer's step; ``after_report`` is called where the host has already waited for the device. It sets
    ``spike`` if the run should go back because of one; the caller then calls ``went_back``.
    """

    def __init__(self, config: Config, state: ParallelState, folder: Path, optimizer: DistributedOptimizer) -> None:
        self.config, self.state, self._optimizer = config, state, optimizer
        train = config.train
        self.spikes = SpikeDetector(train.spike_sigma, train.spike_window, state.device, state.groups["world"])
        stacks, collectives = (folder / f"{name}_rank{state.rank}" for name in ("stacks", "collectives"))
        more = partial(write_collectives, collectives.with_suffix(".json"))
        self._watchdog = Watchdog(train.step_timeout, stacks.with_suffix(".txt"), state.rank, more=more)
        self.paused = self._watchdog.paused
        places = (train.preempt_file, train.preempt_url) if first_on_node() else (None, None)
        self._preemption = Preemption(*places, self._announce)
        self._request = StopRequest()
        self._notice = threading.Timer(0, str)
        self._signal, self._dropped = 0, False
        self._error: TrainingError | None = None
        self._returned_to, self._returns = -1, 0
        self.spike: Spike | None = None
        self._slow, self._step_began = True, 0.0
        self.acts_within_steps = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context of the training loop: catches signals and watches for stalls. Collective."""
        self._request, self._agreement = StopRequest(first=self._promise, speaks=self.state.rank == 0), StopAgreement()
        # A notebook may continue after a stop.
        self._signal, self._dropped, self._error, self.spike = 0, False, None, None
        self._slow = self.acts_within_steps = True  # until the first steps have shown how long they take
        try:
            with self._request.listening(), self._watchdog.watching(), self._preemption.watching():
                yield
        finally:
            self._notice.cancel()
            self.acts_within_steps = False  # for a step called by hand

    def _promise(self, number: int) -> None:
        """Confirm after Ctrl-C that it was received, if the step takes long."""
        if number == signal.SIGINT and self.state.rank == 0:
            part = "micro-batch" if self.acts_within_steps else "step"
            text = f"Ctrl-C: the run saves and ends after this {part}; press Ctrl-C again to end it at once"
            self._notice = threading.Timer(_PATIENCE_SECONDS, print, (text,), {"file": sys.stderr, "flush": True})
            self._notice.daemon = True
            self._notice.start()

    def _announce(self, where: str) -> None:
        """Stop after a notice that this node will be taken away."""
        print(f"preemption notice at {where}: the run saves and ends after this step", file=sys.stderr, flush=True)
        self._request.announce(signal.SIGTERM)
        tell_launcher(signal.SIGTERM)

    def before_step(self) -> bool:
        """Called before a step. True if a signal may end it between its micro-batches, which is the same on every rank: in
        the first steps of a run, and where steps take longer than ``LONG_STEP_SECONDS``."""
        self._step_began = time.monotonic()
        return self.acts_within_steps

    def between_microbatches(self) -> None:
        """Collective. Raises: StepDropped, on every rank, if the run ends here."""
        if self.acts_within_steps:
            self._poll()
            if self._signal:
                self._dropped = True
                raise StepDropped

    def after_step(self, step: int, *, last: bool) -> None:
        """Called when ``step`` is complete. Collective. Raises: TrainingError on every rank if the replicas diverged."""
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
        """Wait until all ranks have exchanged what they had to tell at the last poll."""
        self._agreement.finish()

    def after_report(self) -> None:
        """Check whether a step was rejected since the last report, if ``--spike_action`` asks for more than that. The host
        has waited for the device."""
        action = self.config.train.spike_action
        spike = None if action == "skip" else self.spikes.first_spike()
        if action == "rollback":
            self.spike = spike
        elif spike is not None:
            self._error = TrainingError(
                f"{self._about(spike)}; the step was skipped, and --spike_action stop ends the run; rerun the same command "
                "to continue after it, or use --spike_action skip"
            )

    def went_back(self, to: int) -> str:
        """The run went back to the checkpoint of step ``to`` because of ``spike``; returns why. It ends if it had gone back
        there as often as it may."""
        assert self.spike is not None, "it is the reason"
        why, self.spike = self._about(self.spike), None
        self._returns = self._returns + 1 if to == self._returned_to else 1
        self._returned_to = to
        if self._returns > _MOST_RETURNS:
            self._error = TrainingError(
                f"{why}; the run has gone back to step {to} {_MOST_RETURNS} times before, and each time it spiked on other "
                "data; raise --spike_sigma, use --spike_action skip, or begin a run with a lower --max_lr and --resume_path"
            )
        return why

    def _about(self, spike: Spike) -> str:
        train = self.config.train
        return (
            f"step {spike.step}: {spike.kind} {spike.value:.6g} exceeds {spike.limit:.6g}, the mean + --spike_sigma "
            f"{train.spike_sigma:g} x standard deviation of the last --spike_window {train.spike_window} accepted steps"
        )

    @property
    def ends(self) -> bool:
        """True if the run ends with this step; the same on every rank."""
        return self._signal != 0 or self._error is not None

    def leave(self, step: int, say: Callable[[str], None]) -> None:
        """End the run if ``ends`` is true. Collective. Raises: TrainingError after a spike; for a signal, after printing
        how to resume, SystemExit: 130 after Ctrl-C, else 0."""
        if self._error is not None:
            raise self._error
        if self._signal:
            off = ""
            if self.config.train.debug:
                off = "--debug"
            elif not self.config.ckpt.do_save:
                off = "--no-do_save"
            again = "the same command" if self.config.ckpt.resume else "this command without --no-resume"
            what = f"nothing is saved with {off}" if off else f"saved; run {again} again to resume"
            if not step and self.config.train.spike_action != "rollback":  # the first step was dropped
                what = f"there is nothing to save yet; run {again} again to begin"
            name = "Ctrl-C" if self._signal == signal.SIGINT else signal.Signals(self._signal).name
            where = f" in step {step + 1}, which does not count" if self._dropped else ""
            say(f"step {step} | stopped by {name}{where}: {what}")
            # A launcher ends all ranks once one has failed, and one that was stopped may count as failed (cli/entry.py).
            self._agreement.wait()
            raise SystemExit(128 + signal.SIGINT if self._signal == signal.SIGINT else 0)

    def state_dict(self) -> dict[str, Any]:
        """State to save in a checkpoint, in plain types; empty without ``--spike_sigma``."""
        return self.spikes.state_dict() if self.config.train.spike_sigma else {}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from what ``state_dict`` returned; a run without ``--spike_sigma`` saved no state to continue from."""
        if self.config.train.spike_sigma:
            self.spikes.load_state_dict(state or NOTHING_ACCEPTED)


class StopAgreement:
    """Lets all ranks agree to stop, although a signal may reach only one of them, and each at a different time: at each
    poll every rank sends some numbers, and learns what was sent at the previous poll.

    The exchange runs in the background, on the host: neither host nor device waits for it, except for a rank that is more
    than a poll ahead. It has its own process group, so that it does not wait for other collectives. Collective over the
    world, like ``poll``.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._told = torch.zeros(2, dtype=torch.int32)
        self._values = self._told.numpy()  # shares memory; reading and writing it takes no torch operation
        self._work: Work | None = None

    def wait(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier(self._group)

    def finish(self) -> None:
        """Wait for the exchange that the last poll began; the next poll returns its result."""
        if self._work is not None:
            self._work.wait()

    def poll(self, tell: tuple[int, int], *, last: bool, now: bool) -> list[int] | None:
        """Send a stop signal that this rank received (0: none) and one more number. Returns the largest of each that any
        rank sent at the previous poll, or ``None`` if there was none. With ``now`` it waits for what the ranks send at this
        poll, and returns that, which pays if polls are seconds apart. Nothing is sent once a signal has been seen, nor with
        ``last``, after which no rank polls."""
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
