"""Training with another model's predictions: preferences (DPO), a second stage close to the first, distillation; and
by rewards (GRPO)."""

from __future__ import annotations

from tinytron.model import GPT
from tinytron.registry import job
from tinytron.training.contrastive import (
    BackbonedContrastiveTrainer,
    BackbonedContrastiveTrainerConfig,
    ContrastiveTrainer,
    ContrastiveTrainerConfig,
)
from tinytron.training.distillation import (
    BackbonedDistillationTrainer,
    BackbonedDistillationTrainerConfig,
    DistillationTrainer,
    DistillationTrainerConfig,
)
from tinytron.training.grpo import (
    BackbonedGRPOTrainer,
    BackbonedGRPOTrainerConfig,
    GRPOTrainer,
    GRPOTrainerConfig,
)
from tinytron.training.kl_divergence import KLDivergenceTrainer, KLDivergenceTrainerConfig
from tinytron.training.lora import LoraTrainer, LoraTrainerConfig


@job("gpt/train/contrastive")
class ContrastGPT(ContrastiveTrainer[ContrastiveTrainerConfig, GPT]):
    """Train a GPT on pairs of a better and a worse answer (DPO), from the weights of another job."""


@job("backbone/train/contrastive")
class ContrastBackbone(BackbonedContrastiveTrainer[BackbonedContrastiveTrainerConfig, GPT]):
    """Train a model of Hugging Face on pairs of a better and a worse answer (DPO)."""


@job("gpt/train/kl")
class StagesGPT(KLDivergenceTrainer[KLDivergenceTrainerConfig, GPT]):
    """Pre-train a GPT in two stages, the second with a KL penalty against the first."""


@job("gpt/train/distill")
class DistillGPT(DistillationTrainer[DistillationTrainerConfig, GPT]):
    """Train a new GPT on data and on the predictions of a teacher."""


@job("backbone/train/distill")
class DistillBackbone(BackbonedDistillationTrainer[BackbonedDistillationTrainerConfig, GPT]):
    """Train a model of Hugging Face on data and on the predictions of a teacher."""


@job("gpt/train/grpo")
class ReinforceGPT(GRPOTrainer[GRPOTrainerConfig, GPT]):
    """Train a GPT by rewards for its answers (GRPO), from the weights of another job."""


@job("backbone/train/grpo")
class ReinforceBackbone(BackbonedGRPOTrainer[BackbonedGRPOTrainerConfig, GPT]):
    """Train a model of Hugging Face by rewards for its answers (GRPO)."""


@job("gpt/train/lora")
class AdaptGPT(LoraTrainer[LoraTrainerConfig, GPT]):
    """Train all weights of a GPT first, and then adapters (LoRA) on them."""
