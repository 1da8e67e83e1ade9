"""Weights of Tinytron's own: of a run, one of its checkpoints, a consolidated file, or what an import wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinytron.checkpoint.files import CheckpointFiles, checkpoint_of, verify
from tinytron.checkpoint.load import read_file, read_meta
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.checkpoint.model import model_config_of, weights_at
from tinytron.errors import CheckpointError
from tinytron.interop.weights import read_json
from tinytron.model.config import ModelConfig

DESCRIPTION = "config.json"  # of a run's folder


class OwnModel(NamedTuple):
    """A file of weights, the architecture, and what the checkpoint's metadata says (nothing about an imported one)."""

    file: Path
    config: ModelConfig
    meta: CheckpointMeta

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole ``state_dict``, read where it is used. Raises: CheckpointError if the file is damaged."""
        content = read_file(self.file, mmap=True)
        inner = content.get("model")
        weights: dict[str, torch.Tensor] = inner if isinstance(inner, dict) else content
        if wrong := [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]:
            raise CheckpointError(f"{self.file} holds {wrong[0]}, which is no tensor")
        return weights


def is_own(path: Path) -> bool:
    """Whether ``path`` is Tinytron's: a file of weights, or a folder of a run or an import."""
    if path.is_file():
        return path.suffix == ".pt"
    if not path.is_dir():
        return False
    description = path / DESCRIPTION
    try:
        return "config" in read_json(description)
    except CheckpointError:
        return any(path.glob("*_model.pt"))


def own_model(path: Path) -> OwnModel:
    """The newest weights of a folder, or those of a file. Raises: CheckpointError if there are none, or they are not what
    was written."""
    file = weights_at(path)
    files = checkpoint_of(file)
    return _of_checkpoint(files) if files is not None and files.meta.is_file() else _of_file(file)


def _of_checkpoint(files: CheckpointFiles) -> OwnModel:
    meta = read_meta(files.meta)
    verify(files.folder, meta.files, [files.model.name] if files.model.name in meta.files else [])
    return OwnModel(files.model, _architecture(meta.run, files.meta), meta)


def _of_file(path: Path) -> OwnModel:
    meta = read_file(path, mmap=True).get("meta")
    if isinstance(meta, dict):  # of a consolidated file
        return OwnModel(path, _architecture(meta.get("run"), path), CheckpointMeta.from_dict(meta))
    description = path.with_name(DESCRIPTION)
    return OwnModel(path, _architecture(read_json(description), description), CheckpointMeta())


def _architecture(run: Any, source: Path) -> ModelConfig:
    config = run.get("config") if isinstance(run, dict) else None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{source} does not describe a model (it has no config.model); use what a run wrote")
    return model_config_of(config, source)
