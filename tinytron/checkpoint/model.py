"""Models saved by Tinytron: a run folder, one of its checkpoints, a consolidated file, or an imported model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinytron.checkpoint.files import checkpoint_of, newest_checkpoint, verify
from tinytron.checkpoint.load import load_weights, read_file, read_json, read_meta
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.distributed.zero1.averages import AVERAGE
from tinytron.errors import CheckpointError, ConfigError
from tinytron.model import GPT, ModelConfig
from tinytron.model.lora import merged

CONFIG = "config.json"  # describes a run or an imported model; it is next to the weights


class SavedModel(NamedTuple):
    """A weights file, its architecture, and its checkpoint's metadata (for an imported model only the configuration).
    ``read`` returns the weights of a file that does not hold them in Tinytron's form."""

    file: Path
    config: ModelConfig
    meta: CheckpointMeta
    read: Callable[[], dict[str, torch.Tensor]] | None = None

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole ``state_dict``, memory-mapped if the file allows it: a tensor is read when it is used. Raises:
        CheckpointError if the file is damaged."""
        return read_weights(self.file, mmap=True) if self.read is None else self.read()

    def section(self, name: str) -> dict[str, Any]:
        """One section of the run's configuration; empty if it is unknown."""
        found: dict[str, Any] = self.meta.run.get("config", {}).get(name, {})
        return found


# In the weights of a model of transformers that the GPT cannot be: a tensor with the bytes of its config.json.
HF_CONFIG = "hf_config"


def is_saved_model(path: Path) -> bool:
    """True if ``path`` was written by Tinytron: a weights file, or the folder of a run or an import."""
    if path.is_file():
        return path.suffix == ".pt"
    if not path.is_dir():
        return False
    try:
        return "config" in read_json(path / CONFIG)
    except CheckpointError:
        return any(path.glob("*_model.pt"))


def saved_model(path: Path, *, check: bool = True) -> SavedModel:
    """The newest model of a folder, or the model in a weights file. With ``check`` the file is read once in full and
    compared with its checkpoint's checksums.

    The checkpoint's metadata describes the model; weights without metadata are described by the ``config.json`` next to
    them. Raises: CheckpointError if the weights or the description are missing, or the weights are damaged.
    """
    file = weights_at(path)
    files = checkpoint_of(file)
    if files is not None and files.meta.is_file():
        meta = read_meta(files.meta)
        verify(files.folder, meta.files, [file.name] if check and file.name in meta.files else [])
        return SavedModel(file, model_config_of(_sections(meta.run, files.meta), files.meta), meta)
    consolidated = read_file(file, mmap=True).get("meta")
    if isinstance(consolidated, dict):
        sections = _sections(consolidated.get("run"), file)
        return SavedModel(file, model_config_of(sections, file), CheckpointMeta.from_dict(consolidated))
    sections = _sections_beside(file)
    return SavedModel(file, model_config_of(sections, file.with_name(CONFIG)), CheckpointMeta(run={"config": sections}))


def load_model(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[GPT, dict[str, Any]]:
    """Load the model of a run folder's newest checkpoint, or of one weights file in it (``00100_model.pt``, or a file that
    ``consolidate`` wrote). Returns the model in evaluation mode and the run's configuration by section, from the
    ``config.json`` next to the weights.

    ``dtype`` None keeps the file's. Raises: CheckpointError if weights or configuration are missing or do not fit each
    other. Checksums are not compared: that would read every file twice.
    """
    file = weights_at(Path(path))
    sections = _sections_beside(file)
    weights = read_weights(file)
    config = model_config_of(sections, file.with_name(CONFIG))
    model = GPT(config, dtype=dtype or weights["wte.weight"].dtype, device=device, seed=None)
    load_weights(model, weights, str(file))
    return model.eval(), sections


def weights_at(path: Path) -> Path:
    """The weights file ``path``, or the newest weights file in the folder ``path``, preferring a complete checkpoint.
    Raises: CheckpointError if there is none."""
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


def foreign_config(file: Path) -> dict[str, Any] | None:
    """The config.json that a weights file carries if transformers builds its model; ``None`` for other files. Raises:
    CheckpointError if the file is damaged."""
    content = read_file(file, mmap=True)
    text = content.get("model", content).get(HF_CONFIG) if isinstance(content, dict) else None
    found: dict[str, Any] | None = None if text is None else json.loads(bytes(text.tolist()))
    return found


def read_weights(
    file: Path, *, mmap: bool = False, foreign: bool = False, merge: bool = True
) -> dict[str, torch.Tensor]:
    """The ``state_dict`` in a weights file; with ``mmap`` a tensor is read when it is used. Adapters are merged into the
    weights, unless ``merge`` is false. ``foreign``: of any model, not only of the GPT. Raises: CheckpointError if the file
    is damaged or holds something else."""
    content = read_file(file, mmap=mmap)
    inner = content.get("model")  # a consolidated file has the state_dict under this key
    weights: dict[str, torch.Tensor] = inner if isinstance(inner, dict) else content
    if HF_CONFIG in weights and not foreign:
        raise CheckpointError(
            f"{file} holds a model of transformers that is not Tinytron's GPT; write it to a folder with tinytron export, "
            "and open that with transformers"
        )
    if not foreign and "wte.weight" not in weights:
        raise CheckpointError(f"{file} does not hold GPT weights (no wte.weight); use a file like 00100_model.pt")
    if wrong := [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]:
        raise CheckpointError(f"{file} holds {wrong[0]}, which is not a tensor")
    return merged(weights) if merge else weights


def averages_of(saved: SavedModel, *, foreign: bool = False) -> dict[str, torch.Tensor]:
    """The weights of ``saved``'s checkpoint with their moving averages (``--ema_decay``) in their place and precision;
    adapters are merged. Tied tensors stay tied, and what is not trained stays as it is. ``foreign`` as in ``read_weights``.
    Reads the states once in full to compare their checksums. Raises: CheckpointError if averages are missing or damaged."""
    files = checkpoint_of(saved.file)
    # torch's DCP takes seconds to import.
    from tinytron.checkpoint.optimizer_state import read_states, stored_states
    from tinytron.checkpoint.sharded import FlatRanges

    stored = stored_states(files.optimizer) if files is not None and files.optimizer.is_dir() else {}
    if files is None or not any(key.endswith(f"/{AVERAGE}") for key in stored):
        raise CheckpointError(
            f"{saved.file} has no averaged weights next to it; use a checkpoint of a run with --ema_decay, or drop --ema"
        )
    verify(files.folder, saved.meta.files, [name for name in saved.meta.files if name.startswith(files.optimizer.name)])
    weights = read_weights(saved.file, mmap=True, foreign=foreign, merge=False)
    keys = {name: f"{name}/{AVERAGE}" for name in weights if f"{name}/{AVERAGE}" in stored}
    found = {n: torch.empty(weights[n].shape, dtype=stored[key].properties.dtype) for n, key in keys.items()}
    read_states({key: FlatRanges.whole(found[name].view(-1)) for name, key in keys.items()}, files.optimizer)
    places = {weights[name].data_ptr(): average.to(weights[name].dtype) for name, average in found.items()}
    return merged({name: places.get(weight.data_ptr(), weight) for name, weight in weights.items()})


def _sections_beside(file: Path) -> dict[str, Any]:
    path = file.with_name(CONFIG)
    if not path.is_file():
        raise CheckpointError(f"{file} needs its run's {CONFIG} next to it, but there is none; copy both")
    return _sections(read_json(path), path)


def _sections(description: Any, source: Path) -> dict[str, Any]:
    """The configuration by section from the run's ``description``, which was read from ``source``."""
    sections = description.get("config") if isinstance(description, dict) else None
    if not isinstance(sections, dict) or not isinstance(sections.get("model"), dict):
        raise CheckpointError(
            f"{source} does not describe a model (it has no config.model); use a file that a run wrote"
        )
    return sections


def model_config_of(config: dict[str, Any], source: Path | str) -> ModelConfig:
    """The ``ModelConfig`` in a saved configuration; options that were added later keep their defaults.

    For a model with rotary positions that was trained from scratch, ``block_size`` becomes the training length: the model
    has never seen a later position. Raises: CheckpointError naming ``source`` for options that are unknown or contradict
    each other.
    """
    saved: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in config["model"].items()}
    if unknown := saved.keys() - {f.name for f in dataclasses.fields(ModelConfig)}:
        raise CheckpointError(
            f"{source} has the model option {min(unknown)}, which this version lacks; update tinytron"
        )
    try:
        found = ModelConfig(**saved)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    seq_len = config.get("train", {}).get("seq_len")
    if type(seq_len) is int and found.position_type == "rotary" and not config.get("ckpt", {}).get("init_from"):
        found = dataclasses.replace(found, block_size=min(found.block_size, seq_len))
    return found
