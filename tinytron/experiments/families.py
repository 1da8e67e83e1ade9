"""Pre-training and fine-tuning of the families of Hugging Face that the GPT has, by the name of the family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tinytron.model import GPT
from tinytron.registry import job
from tinytron.training import Trainer
from tinytron.training.backbone import BackbonedTrainer, BackbonedTrainerConfig
from tinytron.training.config import all_sections
from tinytron.training.presets import preset_options
from tinytron.utils.flags import config_fields


def options_of_preset(name: str) -> dict[str, Any]:
    """The options of a preset by their path."""
    options = preset_options(name)
    sections = all_sections({}).items()
    return {
        f"{section}.{i.name}": options[i.name]
        for section, cls in sections
        for i in config_fields(cls)
        if i.name in options
    }


@job("llama/train/pretrain")
class PretrainLlama(Trainer):
    """Pre-train a Llama, by default of 160M parameters."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = options_of_preset("llama-160m")


@job("qwen/train/pretrain")
class PretrainQwen(Trainer):
    """Pre-train a Qwen 3, by default of 0.6B parameters."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = options_of_preset("qwen3-0.6b")


@job("gpt_neox/train/pretrain")
class PretrainGPTNeoX(Trainer):
    """Pre-train a GPT-NeoX, by default a Pythia of 160M parameters."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = options_of_preset("pythia-160m")


@job("llama/train/finetune")
class FinetuneLlama(BackbonedTrainer[BackbonedTrainerConfig, GPT]):
    """Fine-tune a Llama of Hugging Face on token shards."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"architecture.backbone.implementation": "llama"}


@job("qwen/train/finetune")
class FinetuneQwen(BackbonedTrainer[BackbonedTrainerConfig, GPT]):
    """Fine-tune a Qwen 2 or 3 of Hugging Face on token shards."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"architecture.backbone.implementation": "qwen"}


@job("gpt_neox/train/finetune")
class FinetuneGPTNeoX(BackbonedTrainer[BackbonedTrainerConfig, GPT]):
    """Fine-tune a GPT-NeoX of Hugging Face on token shards."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"architecture.backbone.implementation": "gpt_neox"}
