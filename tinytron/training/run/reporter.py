"""Collects the measurements of a run's steps and passes them to sinks: the trainer's only place to log and print."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from tinytron.distributed.agreement import agree
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.distributed.zero1.timing import seconds_of_reductions
from tinytron.errors import ConfigError, first_line
from tinytron.metrics import StepWindow, TrainClock
from tinytron.metrics.phases import phase_record
from tinytron.metrics.sinks import Record, RunInfo, Sink, SinkFailedError
from tinytron.training.config import Config
from tinytron.training.world import measure_peak
from tinytron.utils.phases import PhaseTimer, phase

# Called with the step at every report, on every rank (so it may be collective); returns values to add to its record.
Metric = Callable[[int], Record]


class Reporter:
    """Collects the results of steps on the device, and at every report writes them to the ``sinks``, on the master.

    Records that a sink fails to write wait in memory for the next call; its error is printed, and the run continues. A sink
    that raises a SinkFailedError is removed.
    ``metrics`` add numbers to the record of a report's last step. ``clock`` measures training time; evaluation and saving
    pause it. Unless ``times_phases`` is false, the record also has the seconds of each phase.
    """

    def __init__(self, state: ParallelState, sinks: Iterable[Sink], times_phases: bool = True) -> None:
        self._state = state
        self._timer = PhaseTimer(state.device) if times_phases else None
        self._pending: list[tuple[Sink, list[Record]]] = []
        self.metrics: list[Metric] = []
        self.clock, self.window = TrainClock(), StepWindow(state.groups["world"])
        self._reported = 0
        self._flops_per_token = self._peak_flops = 1.0
        self._peak_raised, self._exchange = False, 0.0
        for sink in sinks:
            self.add(sink)

    def add(self, sink: Sink) -> None:
        """Add a sink, before ``start``; only the master uses it."""
        if self._state.is_master:
            self._pending.append((sink, []))

    def say(self, *texts: str) -> None:
        """Print messages, on the master."""
        for sink, _ in self._pending:
            for text in texts:
                sink.say(text)

    def start(self, run: RunInfo) -> None:
        """Open the sinks for a run that starts, or continues, after ``run.first_step``. Collective.

        Raises: what a sink's ``open`` and ``resume`` raise, on every rank if it is a TinytronError.
        """

        def start_sinks() -> None:
            for entry in tuple(self._pending):
                try:
                    entry[0].open(run)
                    entry[0].resume(run.first_step)
                except SinkFailedError as error:
                    self._drop(entry, error)
                except OSError as error:
                    raise ConfigError(f"the logger {type(entry[0]).__name__} cannot begin ({error})") from error

        agree(start_sinks, self._state.groups["world"])
        self._run, self._reported = run, run.first_step

    def begin_training(self, config: Config, flops_per_token: float, optimizer: DistributedOptimizer) -> None:
        """Measure how fast all ranks multiply, for MFU, and how fast they exchange gradients; training time starts
        afterwards. Collective."""
        self._peak_flops, lines = measure_peak(config, self._state)
        self._flops_per_token = flops_per_token
        self.say(*lines)
        if self._timer is not None and self._state.layout.world_size > 1:
            self._exchange = seconds_of_reductions(optimizer, self._state.groups["world"], self._state.device)
        self.clock.lap()
        if self._timer is not None:
            self._timer.start()

    @contextlib.contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Context of a phase outside of training, such as an evaluation: the clock is paused."""
        with self.clock.paused(), phase(name):
            yield

    def advance(self, step: int) -> None:
        """Step ``step`` is complete."""
        for sink, _ in self._pending:
            sink.advance(step)

    def advance_within_step(self, done: int, microbatches: int) -> None:
        """``done`` of the current step's ``microbatches`` are computed."""
        for sink, _ in self._pending:
            sink.advance_within_step(done, microbatches)

    def report(self, step: int, skipped: torch.Tensor) -> dict[str, float]:
        """Write the records of the steps since the last report, up to ``step``; returns the last one's numbers, or an empty
        result without such steps. Collective; the host waits for the device.

        ``skipped`` is the number of steps that the optimizer skipped, on the device.
        """
        records = self.window.flush()
        if not records:  # a dropped step followed the last report
            return {}
        seconds = self.clock.lap()
        rate = self._run.tokens_between(self._reported, step) / seconds
        self._reported = step
        self._raise_peak(rate * self._flops_per_token)
        speed = {"tokens_per_second": rate, "mfu": rate * self._flops_per_token / self._peak_flops}
        extra: Record = {**speed, "skipped_steps": int(skipped)}
        entries: list[Record] = [{**record.fields(), "stage": "train", **extra} for record in records]
        if self._timer is not None and PhaseTimer.active is self._timer:  # not in a loop of the user's own
            entries[-1] |= phase_record(self._timer.take(), len(records), self._state, self._exchange)
        with self.clock.paused():
            for metric in self.metrics:
                entries[-1] |= metric(step)
            self.write(entries)
        return {**records[-1].fields(), "seconds": seconds / len(records), **speed}

    def go_back(self, step: int) -> None:
        """The run continues after the earlier ``step``: the sinks forget later records. Collective."""
        self.window.flush()
        self._reported = step
        for entry in tuple(self._pending):
            entry[1].clear()
            try:
                entry[0].go_back(step)
            except SinkFailedError as error:
                self._drop(entry, error)
            except Exception as error:
                self.say(f"error: {first_line(error)}; the logger keeps what it has of the steps after {step}")

    def _raise_peak(self, reached: float) -> None:
        """Raise the peak to the rate that training ``reached``, in FLOP/s: the machine may have been busy during the
        measurement."""
        if reached <= self._peak_flops:
            return
        if not self._peak_raised:
            self.say(
                f"training reached {reached / 1e12:.3g} TFLOP/s, more than the peak of {self._peak_flops / 1e12:.3g} "
                "measured for MFU; from here on MFU is relative to the highest rate so far"
            )
        self._peak_flops, self._peak_raised = reached, True

    def write(self, records: Sequence[Record]) -> None:
        """Pass records to all sinks, each with those that it failed to write before."""
        for entry in tuple(self._pending):
            sink, pending = entry
            pending.extend(records)
            try:
                sink.write(tuple(pending))
            except SinkFailedError as error:
                self._drop(entry, error)
            except Exception as error:  # a failing log must not end a run
                self.say(f"error: {first_line(error)}; its lines wait for the next report")
            else:
                pending.clear()

    def _drop(self, entry: tuple[Sink, list[Record]], error: SinkFailedError) -> None:
        self._pending.remove(entry)
        self.say(f"error: {error}; training continues without it")

    def figure(self, step: int, name: str, image: bytes) -> None:
        """Pass a figure, a PNG image, to all sinks; called in a thread."""
        for sink, _ in tuple(self._pending):
            sink.figure(step, name, image)

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Context of the training loop: closes the sinks at its end, after telling them about an error."""
        try:
            yield
        except Exception as error:
            for sink, _ in tuple(self._pending):
                with contextlib.suppress(Exception):  # the first error matters
                    sink.fail(first_line(error))
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Training ended: close the sinks, the last one first, because it may have something for the others."""
        if self._timer is not None:
            self._timer.stop()
        for sink, _ in reversed(tuple(self._pending)):
            try:
                sink.close()
            except Exception as error:
                self.say(f"error: {first_line(error)}")
