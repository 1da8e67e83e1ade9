"""Knowledge distillation: a model learns from data and from the predictions of a teacher (arXiv:1503.02531).

The loss is ``(1 - weight)`` times the cross entropy of the data plus ``weight`` times the divergence from the teacher,
over the whole vocabulary. The teacher is frozen, without dropout, and runs on the same layout as the student.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from tinytron.config import configure, field
from tinytron.distributed.agreement import agree
from tinytron.errors import ConfigError
from tinytron.interop.causal_lm import CausalLM, foreign_settings, sizes_of
from tinytron.interop.load import architecture_of
from tinytron.model import GPT, ModelConfig
from tinytron.training.backbone import BackbonedTrainer, BackbonedTrainerConfig
from tinytron.training.base import BaseTrainerConfig
from tinytron.training.build import build_model
from tinytron.training.config import Config, LoraConfig
from tinytron.training.hf_model import foreign_model
from tinytron.training.memory import Frozen
from tinytron.training.reference import Divergence, ReferenceTrainer
from tinytron.training.run.resume import fill_model

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT")


@dataclass
class DistillationTrainerConfig(BaseTrainerConfig):
    """The options of a run, and those of its teacher."""

    teacher: str = field("distillation/teacher", help="model to learn from: what --init_from takes")
    weight: float = field(
        "distillation/weight", default=0.5, help="share of the teacher in the loss; the rest is the data's"
    )
    temperature: float = field("distillation/temperature", default=1.0, help="divides the logits of both models")
    divergence: str = field(
        "distillation/divergence",
        default="forward",
        help="forward: KL(teacher || student); reverse: KL(student || teacher)",
    )

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ConfigError(f"distillation.weight={self.weight} must be above 0 and at most 1; use 0.5")
        if not 0 < self.temperature <= 1000:
            raise ConfigError(f"distillation.temperature={self.temperature} must be above 0; use 1")
        if self.divergence not in ("forward", "reverse"):
            raise ConfigError(f"distillation.divergence={self.divergence} must be forward or reverse; use forward")


@dataclass
class BackbonedDistillationTrainerConfig(DistillationTrainerConfig, BackbonedTrainerConfig):
    """The options of distillation into a model of Hugging Face."""


class DistillationTrainer(ReferenceTrainer[ConfigT, ModelT]):
    """Trains the GPT on data and on the predictions of ``distillation.teacher``, a run, or any causal language model of
    transformers, with the same vocabulary. Its options come from a job.

    Raises: as ``BaseTrainer``; ConfigError if the vocabularies differ, or the teacher is for shorter sequences.
    """

    CONFIG: ClassVar[type] = DistillationTrainerConfig

    def __init__(self, spec: Config) -> None:
        self.options: DistillationTrainerConfig = configure(DistillationTrainerConfig)
        given = self.options
        self.divergence = Divergence(
            given.weight, 1 - given.weight, of_reference=given.divergence == "forward", temperature=given.temperature
        )
        super().__init__(spec)

    def _init_model(self, config: Config | None = None) -> None:
        super()._init_model(config)
        name = self.options.teacher
        teacher = build_model(teacher_config(self.config, name), self.state)
        if isinstance(teacher, CausalLM) and not teacher.fused:
            raise ConfigError(
                f"distillation.teacher={name}: the logits of a {teacher.hf.config.model_type} are not the product of "
                "hidden states and a matrix; use a family such as llama or opt"
            )
        fill_model(teacher, name, self.state)
        self.reference = teacher.eval().requires_grad_(False)
        count = sum(parameter.numel() for parameter in teacher.parameters())
        self._say(f"the teacher is {name}, with {count / 1e6:.2f}M parameters on this rank")

    def _frozen_models(self, config: Config) -> Frozen | None:
        teacher = agree(lambda: teacher_config(config, self.options.teacher), self.state.groups["world"])
        return (teacher.model,) if issubclass(self.MODEL, GPT) and foreign_model(config) is None else None


class BackbonedDistillationTrainer(DistillationTrainer[ConfigT, ModelT], BackbonedTrainer[ConfigT, ModelT]):
    """``DistillationTrainer`` from the weights ``--init_from`` (``architecture.backbone.weights``)."""

    CONFIG = BackbonedDistillationTrainerConfig


def teacher_config(config: Config, name: str) -> Config:
    """The student's ``config`` with the model ``name`` in place of the student. Raises: ConfigError unless it has the same
    vocabulary, and room for the student's sequences."""
    seq_len, foreign = config.train.seq_len, foreign_settings(name)
    if foreign is not None:
        options: dict[str, Any] = {**dataclasses.asdict(ModelConfig()), **sizes_of(foreign, name)}
    else:
        options = dataclasses.asdict(architecture_of(name))
        if options["position_type"] == "rotary":
            options["block_size"] = max(options["block_size"], seq_len)
    if options["vocab_size"] != config.model.vocab_size:
        raise ConfigError(
            f"distillation.teacher={name} has {options['vocab_size']} tokens, but the student has "
            f"{config.model.vocab_size}; use a teacher with the same tokenizer, or --vocab_size {options['vocab_size']}"
        )
    if options["block_size"] < seq_len:
        raise ConfigError(
            f"distillation.teacher={name} is for sequences of at most {options['block_size']} tokens, but --seq_len is "
            f"{seq_len}; use --seq_len {options['block_size']}"
        )
    ckpt = replace(config.ckpt, init_from=name, hf_model=None, resume_path=None)
    return replace(config, model=ModelConfig(**options), ckpt=ckpt, lora=LoraConfig())
