"""A trained model by itself, in one process: weights and the configuration that stands beside them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from tinytron.checkpoint.files import checkpoint_of, newest_checkpoint
from tinytron.checkpoint.load import load_weights, read_file
from tinytron.errors import CheckpointError, ConfigError
from tinytron.model import GPT, ModelConfig

CONFIG = "config.json"


def load_model(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[GPT, dict[str, Any]]:
    """The model of a run folder's newest checkpoint, or of one weights file in it (``00100_model.pt``, or what
    ``consolidate`` writes), ready to evaluate; and the run's configuration by section, from ``config.json`` beside it.

    ``dtype`` None is that of the file. Raises: CheckpointError if there are no weights, no configuration, or they do not
    fit each other.
    """
    weights_file = weights_at(Path(path))
    config = run_config(weights_file)
    content = read_file(weights_file)
    weights = content["model"] if isinstance(content.get("model"), dict) else content
    if not isinstance(embedding := weights.get("wte.weight"), torch.Tensor):
        raise CheckpointError(
            f"{weights_file} holds no weights of a GPT (no wte.weight); use a file like 00100_model.pt"
        )
    model_config = model_config_of(config, weights_file.with_name(CONFIG))
    model = GPT(model_config, dtype=dtype or embedding.dtype, device=device, seed=None)
    load_weights(model, weights, str(weights_file))
    return model.eval(), config


def weights_at(path: Path) -> Path:
    """The weights file ``path``, or the newest one of the folder ``path``: of a whole checkpoint if there is one. Raises:
    CheckpointError if there is none."""
    if path.is_file():
        files = checkpoint_of(path)
        return path if files is None else files.model
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is neither a run folder nor a weights file; use log/<run> or log/<run>/00100_model.pt"
        )
    if (newest := newest_checkpoint(path)) is not None:
        return newest.model
    kept = [files for file in path.glob("*_model.pt") if (files := checkpoint_of(file)) is not None]
    if not kept:
        raise CheckpointError(
            f"{path} holds no checkpoint (no *_model.pt); runs with --debug or --no-do_save write none"
        )
    return max(kept, key=lambda files: files.step).model


def run_config(weights_file: Path) -> dict[str, Any]:
    """The configuration in ``config.json`` beside a weights file, by section. Raises: CheckpointError."""
    path = weights_file.with_name(CONFIG)
    try:
        config = json.loads(path.read_bytes())["config"]
        if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
            raise ValueError("it has no section model")
    except FileNotFoundError:
        raise CheckpointError(
            f"{weights_file} needs its run's {CONFIG} beside it, which is not there; copy both"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no run's configuration ({error}); copy it from the run folder again"
        ) from error
    return config


def model_config_of(config: dict[str, Any], source: Path | str) -> ModelConfig:
    """The ``ModelConfig`` in a saved configuration; options that came later have their defaults. Raises: CheckpointError
    naming ``source`` for options that are unknown or contradict each other."""
    saved: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in config["model"].items()}
    if unknown := saved.keys() - {f.name for f in dataclasses.fields(ModelConfig)}:
        raise CheckpointError(
            f"{source} has the model option {min(unknown)}, which this version lacks; update tinytron"
        )
    try:
        return ModelConfig(**saved)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{source}: {error}") from error
