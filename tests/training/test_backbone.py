"""Fine-tuning from a backbone: what it must be given, and which family it must be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.runs import config_of
from tests.interop import families
from tinytron.config import configuration
from tinytron.errors import ConfigError
from tinytron.model import GPT
from tinytron.training.backbone import BackbonedTrainer, BackbonedTrainerConfig, check_family


class Tune(BackbonedTrainer[BackbonedTrainerConfig, GPT]):
    pass


def test_it_needs_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Tune needs weights to start from; give architecture\.backbone\.weights"):
        Tune(config_of("--log_dir", tmp_path))


def test_the_family_must_be_the_one_that_was_named(tmp_path: Path) -> None:
    families.save("qwen2", tmp_path / "qwen2")
    weights = str(tmp_path / "qwen2")
    for accepted in ("qwen", "qwen2", None):
        check_family(accepted, weights)
    with pytest.raises(ConfigError, match=r"implementation=llama, but .* is of the family qwen2; use qwen2, or leave"):
        check_family("llama", weights)
    tree = {"architecture": {"backbone": {"implementation": "gpt_neox"}}}
    with configuration(tree), pytest.raises(ConfigError, match="implementation=gpt_neox, but"):
        Tune(config_of("--log_dir", tmp_path, "--init_from", weights, "--seq_len", 12, "--total_batch_size", 96))
