"""Training in two phases: all weights first, and then adapters (LoRA) on the weights of that moment, which stay frozen.

A run that adapts existing weights needs no trainer of its own: ``--init_from`` and ``--lora_rank``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from tinytron.checkpoint import first_undamaged
from tinytron.config import configure, field
from tinytron.data import Batch
from tinytron.distributed.agreement import told_by_first
from tinytron.errors import ConfigError
from tinytron.model.lora import add_adapters
from tinytron.training.base import BaseTrainer, BaseTrainerConfig
from tinytron.training.config import Config, LoraConfig
from tinytron.training.derive import due_at_boundary
from tinytron.training.run.resume import checkpoints_to_resume

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT")


@dataclass
class LoraTrainerConfig(BaseTrainerConfig):
    """The options of a run, and the length of its first phase."""

    pre_lora_tokens: int = field("training/pre_lora_tokens", help="tokens that train all weights, before the adapters")

    def __post_init__(self) -> None:
        if self.pre_lora_tokens < 1:
            raise ConfigError(
                f"training.pre_lora_tokens={self.pre_lora_tokens} must be at least 1; use half of training.tokens, or "
                "--init_from and --lora_rank without this trainer"
            )


class LoraTrainer(BaseTrainer[ConfigT, ModelT]):
    """Trains all weights for ``training.pre_lora_tokens`` tokens, and then adapters as ``--lora_rank`` and its companions
    say. At the boundary it validates and saves, and the optimizer starts from scratch, because none of its states belongs
    to an adapter; the schedule continues. Its options come from a job.

    Raises: as ``BaseTrainer``; ConfigError without ``--lora_rank``, with ``--spike_action rollback``, or if the first phase
    is not shorter than the run.
    """

    CONFIG: ClassVar[type] = LoraTrainerConfig
    _adapted = False

    def __init__(self, spec: Config) -> None:
        self.options: LoraTrainerConfig = configure(LoraTrainerConfig)
        if not spec.lora.lora_rank:
            raise ConfigError(f"{type(self).__name__} needs adapters for its second phase; give --lora_rank 16")
        if spec.train.spike_action == "rollback":
            raise ConfigError(
                f"--spike_action rollback cannot undo the second phase of {type(self).__name__}; use --spike_action skip"
            )
        super().__init__(spec)

    def _init_batch_config(self, topology: Any) -> None:
        super()._init_batch_config(topology)
        self.due = due_at_boundary(
            self.due, self.training_info, "training.pre_lora_tokens", self.options.pre_lora_tokens
        )
        self.boundary = self.due.boundary

    def _init_model(self, config: Config | None = None) -> None:
        super()._init_model(replace(self.config, lora=LoraConfig()))

    def _resume_from_checkpoint(self) -> None:
        """Load a checkpoint, into a model with adapters if it is of the second phase."""
        world = self.state.groups["world"]
        found = told_by_first(lambda: checkpoints_to_resume(self.config, self.log_dir), world)
        if found and first_undamaged(found, world, lambda text: None)[0].step > self.boundary:
            self._begin_adapters()
        super()._resume_from_checkpoint()

    def train_step(self, microbatches: list[Batch]) -> None:
        """One optimizer step; the first one of the second phase adds the adapters before it."""
        if self.step >= self.boundary and not self._adapted:
            self._say(f"step {self.step} | from here on adapters of rank {self.config.lora.lora_rank} are trained")
            self._finish_exchanges()
            self._begin_adapters()
        super().train_step(microbatches)

    def _begin_adapters(self) -> None:
        """Add the adapters, freeze all else, and let the optimizer have them."""
        wrapper: Any = self.optimizer
        adapters = self.config.lora.adapters
        assert adapters is not None, "the constructor has checked it"
        add_adapters(self.raw_model, adapters, self.config.seed.seed)
        self._init_optimizer(self.config)
        made: Any = self.optimizer
        wrapper.replace_inner(getattr(made, "inner", made))
        self.optimizer = wrapper  # type: ignore[method-assign]  # the guards and the saver know this one
        self._attach_optimizer()
        self._adapted = True
