"""The checkpoints of a run: their records, and their exports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.nn as nn

from tinytron.checkpoint import (
    CheckpointFiles,
    CheckpointSaver,
    Retention,
    complete_checkpoints,
    first_undamaged,
    load_checkpoint,
)
from tinytron.checkpoint.meta import FORMAT_VERSION, CheckpointMeta
from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.agreement import told_by_first
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import CheckpointError
from tinytron.metrics.routing import keep_traces_until
from tinytron.training.config import Config
from tinytron.training.pipeline import DataPipeline
from tinytron.training.run.exports import build_exports
from tinytron.training.run.folder import RunFolder
from tinytron.training.run.guards import Guards
from tinytron.utils.batch_sizes import Skips


class RunSaver:
    """Saves a run that continues after step ``resumed`` into its folder. Construction is collective, as are all methods
    that say so.

    ``enabled`` says whether the run saves by itself (``--do_save``); ``saved`` is the step that was last saved, resumed
    from or gone back to. Raises: ConfigError on every rank if the model or its tokenizer cannot be exported as
    ``--export_every`` asks.
    """

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        folder: RunFolder,
        model: nn.Module,
        optimizer: DistributedOptimizer,
        data: DataPipeline,
        guards: Guards,
        *,
        resumed: int,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.state, self.folder, self.data, self.guards = config, state, folder, data, guards
        self.enabled, self.saved = config.ckpt.do_save and not config.train.debug, resumed
        last, run = data.info.max_steps, (model, folder.path, state, folder.mirror)
        exports = build_exports(config, *run, resumed=resumed, last=last, say=say)
        ckpt = config.ckpt
        self.checkpoints = CheckpointSaver(
            folder.path,
            model,
            optimizer,
            state,
            retention=Retention(ckpt.keep_last, ckpt.keep_every, ckpt.keep_best),
            mirror=folder.mirror,
            consumer=exports,
        )
        self._background = False

    @contextlib.contextmanager
    def in_background(self) -> Iterator[None]:
        """Context of the training loop: a save inside returns before the checkpoint is written (``--async_save``)."""
        self._background = self.config.ckpt.async_save
        try:
            yield
        finally:
            self._background = False

    def save(self, step: int, about: Mapping[str, Any]) -> list[str]:
        """Save a checkpoint of ``step``, with more fields of its record in ``about`` (``TrainingEvals.about``); returns
        lines to print. Collective."""
        meta = CheckpointMeta(
            format=FORMAT_VERSION,
            run=self.folder.description,
            identity=self.config.identity(),
            data=self.data.identity(step, self.data.skips),
            data_position=self.data.position(step),
            skips=[list(part) for part in self.data.skips.parts],
            **about,
            guard=self.guards.state_dict(),
        )
        self.saved = step
        return self.checkpoints.save(step, meta, wait=not self._background)

    def needed_at_start(self, *, continues: bool) -> bool:
        """Whether to save before the first step: with ``--save_at_start``, and with ``--spike_action rollback`` unless
        there is a checkpoint of this run to go back to. Collective."""
        if self.config.train.spike_action == "rollback":
            return not told_by_first(lambda: bool(complete_checkpoints(self.folder.path)), self.state.groups["world"])
        return self.enabled and self.config.ckpt.save_at_start and not continues

    def go_back(self, step: int, due: Callable[[int], bool], say: Callable[[str], None]) -> int:
        """Return from ``step`` to the newest undamaged checkpoint: weights, optimizer, generators and the spikes' window
        are as they were, and the data since then are passed over. Returns its step. Collective.

        Checkpoints that are not ``due`` at their step, but were saved because the run was stopped, count only if there is
        no other: a run that was not stopped does not have them. Raises: CheckpointError without a checkpoint; StorageError;
        DataError if the data would end before the run does.
        """
        for message in self.checkpoints.finish():
            say(message)
        world, optimizer = self.state.groups["world"], self.checkpoints.optimizer
        found = [self.files(at) for at in told_by_first(lambda: self._ways_back(due), world)]
        if not found:
            raise CheckpointError(
                f"{self.folder.path} has no checkpoint for --spike_action rollback to go back to; free disk space, or use "
                "--spike_action skip"
            )
        if self.folder.mirror is not None:
            self.folder.mirror.fetch(found[0].step)
        files, meta = first_undamaged(found, world, say)
        self.data.go_back(step, files.step, Skips.of(meta.skips))
        optimizer.finish_gather()
        optimizer.inner.state.clear()
        load_checkpoint(files, meta, self.checkpoints.model, optimizer, self.state)
        self.guards.load_state_dict(meta.guard)
        if self.state.is_master:
            keep_traces_until(self.folder.path, files.step)
        self.saved = files.step
        return files.step

    def _ways_back(self, due: Callable[[int], bool]) -> list[int]:
        """The steps of the checkpoints to go back to, the first choice first."""
        steps = [files.step for files in complete_checkpoints(self.folder.path) if files.step <= self.saved]
        return [step for step in steps if step == 0 or due(step)] or steps

    def files(self, step: int) -> CheckpointFiles:
        """The files of a checkpoint of ``step``, whether they exist or not."""
        return CheckpointFiles(self.folder.path, step)

    def report(self) -> list[str]:
        """Messages since the last call, for printing; does not wait."""
        return self.checkpoints.report()

    def close(self, say: Callable[[str], None], *, wait: bool = True) -> None:
        """Wait for the last save, and with ``wait`` for exports and uploads. Raises: CheckpointError if the save failed."""
        self.checkpoints.close(say, wait=wait)
