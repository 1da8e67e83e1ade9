"""Training with a reference: preferences (DPO), and a second stage that stays close to the first."""

from __future__ import annotations

from tinytron.model import GPT
from tinytron.registry import job
from tinytron.training.contrastive import (
    BackbonedContrastiveTrainer,
    BackbonedContrastiveTrainerConfig,
    ContrastiveTrainer,
    ContrastiveTrainerConfig,
)
from tinytron.training.kl_divergence import KLDivergenceTrainer, KLDivergenceTrainerConfig


@job("gpt/train/contrastive")
class ContrastGPT(ContrastiveTrainer[ContrastiveTrainerConfig, GPT]):
    """Train a GPT on pairs of a better and a worse answer (DPO), from the weights of another job."""


@job("backbone/train/contrastive")
class ContrastBackbone(BackbonedContrastiveTrainer[BackbonedContrastiveTrainerConfig, GPT]):
    """Train a model of Hugging Face on pairs of a better and a worse answer (DPO)."""


@job("gpt/train/kl")
class StagesGPT(KLDivergenceTrainer[KLDivergenceTrainerConfig, GPT]):
    """Pre-train a GPT in two stages, the second with a KL penalty against the first."""
