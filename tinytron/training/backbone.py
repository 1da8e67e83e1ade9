"""``BackbonedTrainer``: fine-tuning of a pretrained model of Hugging Face, whose architecture comes with its weights.

architecture:
  backbone:
    implementation: llama
    weights: TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tinytron.checkpoint.load import read_json
from tinytron.checkpoint.model import is_saved_model
from tinytron.config import configure, field, is_configured
from tinytron.errors import ConfigError
from tinytron.interop.causal_lm import config_file
from tinytron.training.base import BaseTrainer, BaseTrainerConfig
from tinytron.training.config import Config

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT")
# Values of ``implementation`` that stand for several families of transformers.
FAMILIES = {"qwen": ("qwen2", "qwen3", "qwen3_moe")}


@dataclass
class BackbonedTrainerConfig(BaseTrainerConfig):
    """The options of a run, and the family that the weights must have."""

    implementation: str | None = field(
        "architecture/backbone/implementation", default=None, help="family of the weights: llama, qwen, gpt_neox, ..."
    )


class BackbonedTrainer(BaseTrainer[ConfigT, ModelT]):
    """Trains on from ``--init_from``, which a job also calls ``architecture.backbone.weights``. ``MODEL`` is not used.
    Raises: ConfigError without weights, or if their family is not ``architecture.backbone.implementation``."""

    CONFIG = BackbonedTrainerConfig

    def __init__(self, spec: Config) -> None:
        if spec.ckpt.init_from is None:
            raise ConfigError(
                f"{type(self).__name__} needs weights to start from; give architecture.backbone.weights, such as "
                "openai-community/gpt2, a folder or a run (--init_from)"
            )
        if is_configured():
            check_family(configure(BackbonedTrainerConfig).implementation, spec.ckpt.init_from)
        super().__init__(spec)


def check_family(implementation: str | None, weights: str) -> None:
    """Raises: ConfigError if ``weights``, a model of Hugging Face, is of another family than ``implementation``."""
    if implementation is None or is_saved_model(Path(weights)):
        return
    settings: dict[str, Any] = read_json(config_file(weights))
    family = settings.get("model_type")
    if family not in FAMILIES.get(implementation, (implementation,)):
        raise ConfigError(
            f"architecture.backbone.implementation={implementation}, but {weights} is of the family {family}; use "
            f"{family}, or leave it out"
        )
