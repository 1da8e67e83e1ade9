"""The checkpoints of a run: their records, and their exports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.nn as nn

from tinytron.checkpoint import CheckpointFiles, CheckpointSaver, Retention
from tinytron.checkpoint.meta import FORMAT_VERSION, CheckpointMeta
from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.parallel_state import ParallelState
from tinytron.training.config import Config
from tinytron.training.derive import data_position
from tinytron.training.pipeline import DataPipeline
from tinytron.training.run.exports import build_exports
from tinytron.training.run.folder import RunFolder
from tinytron.training.run.guards import Guards


class RunSaver:
    """Saves a run that continues after step ``resumed`` into its folder. Construction is collective, and so is ``save``.

    ``enabled`` says whether the run saves by itself (``--do_save``); ``saved`` is the step that was last saved or resumed
    from. Raises: ConfigError on every rank if the model or its tokenizer cannot be exported as ``--export_every`` asks.
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
        self.config, self.folder, self.data, self.guards = config, folder, data, guards
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
            data=self.data.identity(step),
            data_position=data_position(self.config, step),
            **about,
            guard=self.guards.state_dict(),
        )
        self.saved = step
        return self.checkpoints.save(step, meta, wait=not self._background)

    def files(self, step: int) -> CheckpointFiles:
        """The files of a checkpoint of ``step``, whether they exist or not."""
        return CheckpointFiles(self.folder.path, step)

    def report(self) -> list[str]:
        """Messages since the last call, for printing; does not wait."""
        return self.checkpoints.report()

    def close(self, say: Callable[[str], None], *, wait: bool = True) -> None:
        """Wait for the last save, and with ``wait`` for exports and uploads. Raises: CheckpointError if the save failed."""
        self.checkpoints.close(say, wait=wait)
