"""Training in two stages: pre-training, then pre-training with a penalty for leaving the model of the first stage.

The penalty is KL(policy || reference) of every target's prediction, over the whole vocabulary, in chunks. The reference is
a frozen copy of the weights at the boundary; it exists, and costs a forward pass, in the second stage only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from tinytron.checkpoint import CheckpointFiles
from tinytron.checkpoint.host_buffers import HostBuffers
from tinytron.checkpoint.load import load_weights
from tinytron.checkpoint.model import read_weights
from tinytron.checkpoint.snapshot import consolidated_weights
from tinytron.config import configure, field
from tinytron.data import Batch
from tinytron.distributed.agreement import agree
from tinytron.errors import CheckpointError, ConfigError
from tinytron.model import GPT
from tinytron.training.base import BaseTrainerConfig
from tinytron.training.build import build_model
from tinytron.training.config import Config
from tinytron.training.derive import due_at_boundary
from tinytron.training.memory import Frozen
from tinytron.training.reference import Divergence, ReferenceTrainer
from tinytron.utils.training import write_atomically

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT")
BOUNDARY_FILE = "boundary_0_1.pt"  # in the run's folder: the weights at the end of the first stage


@dataclass
class KLDivergenceTrainerConfig(BaseTrainerConfig):
    """The options of a run, and those of its second stage."""

    stage_tokens: int = field("training/stage_tokens", help="tokens of the first stage, after which the penalty begins")
    beta: float = field("optimization/kl/beta", default=0.1, help="weight of the penalty")

    def __post_init__(self) -> None:
        if self.stage_tokens < 1:
            raise ConfigError(
                f"training.stage_tokens={self.stage_tokens} must be at least 1; use half of training.tokens"
            )
        if not self.beta >= 0:
            raise ConfigError(f"optimization.kl.beta={self.beta} must be at least 0; use 0.1")


class KLDivergenceTrainer(ReferenceTrainer[ConfigT, ModelT]):
    """Trains the GPT in two stages, with the schedule ``wsds`` unless the options name another one. Between the stages it
    validates, and writes the weights to ``boundary_0_1.pt``, which ``--init_from`` takes. Its options come from a job.

    Raises: as ``BaseTrainer``; ConfigError if the first stage is not shorter than the run.
    """

    CONFIG: ClassVar[type] = KLDivergenceTrainerConfig

    @classmethod
    def schedule(cls) -> Any:
        """Warm-up, stable, decay, stable."""
        return "wsds"

    def __init__(self, spec: Config) -> None:
        self.options = configure(KLDivergenceTrainerConfig)
        self.divergence = Divergence(self.options.beta)
        super().__init__(spec)

    def _init_batch_config(self, topology: Any) -> None:
        super()._init_batch_config(topology)
        self.due = due_at_boundary(self.due, self.training_info, "training.stage_tokens", self.options.stage_tokens)
        self.boundary = self.due.boundary  # steps of the first stage

    def _frozen_models(self, config: Config) -> Frozen | None:
        others = super()._frozen_models(config)
        return None if others is None else (*others, config.model)

    def train_step(self, microbatches: list[Batch]) -> None:
        """One optimizer step; the first one of the second stage makes the reference before it."""
        if self.step >= self.boundary and self.reference is None:
            self._begin_second_stage()
        super().train_step(microbatches)

    def _begin_second_stage(self) -> None:
        self._say(f"step {self.step} | the second stage begins: KL penalty times {self.options.beta}")
        self._finish_exchanges()
        weights = consolidated_weights(self.raw_model, self.state, HostBuffers())
        agree(lambda: self._write(self.log_dir / BOUNDARY_FILE, weights), self.state.groups["world"])
        reference = self._copy_of_model()
        reference.load_state_dict(self.raw_model.state_dict())
        self.reference = reference.requires_grad_(False)

    def _go_back(self) -> None:
        super()._go_back()
        if self.step <= self.boundary:
            self.reference = None

    def _write(self, file: Path, weights: dict[str, torch.Tensor]) -> None:
        if self.master_process and self.saver.enabled:
            write_atomically(file, lambda out: torch.save(weights, out))

    def _copy_of_model(self) -> GPT:
        copied = build_model(self.config, self.state, type(self.raw_model))  # type: ignore[arg-type]
        assert isinstance(copied, GPT), "the trainer refuses other models"
        return copied.eval()

    def _resume_from_checkpoint(self) -> None:
        super()._resume_from_checkpoint()
        if not self._continues or self.step <= self.boundary:
            return
        file = self.log_dir / BOUNDARY_FILE
        if not file.is_file():  # the checkpoint of that step has the same weights
            file = CheckpointFiles(self.log_dir, self.boundary).model

        def load() -> None:
            if not file.is_file():
                raise CheckpointError(
                    f"{self.log_dir / BOUNDARY_FILE} is missing; this run is in its second stage, and the file has the "
                    f"reference: restore it, or go back to a checkpoint of step {self.boundary} or less"
                )
            reference = self._copy_of_model()
            load_weights(reference, read_weights(file, merge=False), str(file), self.state)
            self.reference = reference.requires_grad_(False)

        agree(load, self.state.groups["world"])
