"""Writes Tinytron's weights as a folder that transformers opens without further code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinytron.checkpoint.load import load_weights
from tinytron.checkpoint.model import SavedModel, averages_of, foreign_config, read_weights, saved_model
from tinytron.distributed.param_spec import ParamSpec
from tinytron.errors import CheckpointError, ConfigError
from tinytron.interop.architectures import write_architecture
from tinytron.interop.card import model_card
from tinytron.interop.causal_lm import build_causal_lm, without_bars
from tinytron.interop.families import Family, Part
from tinytron.interop.folder import check_new, new_folder
from tinytron.interop.generation import GENERATION, generation_settings
from tinytron.interop.mup import folded_config, folded_weights
from tinytron.interop.open import Say, local_checkpoint, open_saved
from tinytron.interop.safetensors import write_safetensors
from tinytron.interop.tokenizer import TokenizerFiles, exported_tokenizer
from tinytron.interop.weights import SAFETENSORS
from tinytron.model import GPT
from tinytron.text.run_tokenizer import TOKENS
from tinytron.utils.progress import Progress
from tinytron.utils.training import DTYPES


@dataclass(frozen=True)
class Exported:
    """A finished export: the class in transformers, the number of tensors and files, total bytes, the tokenizer and what is
    known about its tokens, and a line for each setting of an imported model that training changed."""

    architecture: str
    tensors: int
    files: int
    bytes: int
    tokenizer: TokenizerFiles
    changes: tuple[str, ...] = ()


def export(
    checkpoint: Path | str,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    max_shard_size: int = 5 * 10**9,
    name: str | None = None,
    revision: str | None = None,
    replace: bool = False,
    averaged: bool = False,
    say: Say = lambda text: None,
    progress: bool = False,
) -> Exported:
    """Write the weights of ``checkpoint`` (anything ``open_saved`` opens) to the folder ``out``, in ``dtype`` (default:
    as stored), in files of at most ``max_shard_size`` bytes. ``out`` appears complete or not at all; with ``replace`` it
    takes the place of an older one. The model card refers to the model as ``name`` (default: the folder's name) and loads
    it from the hub's branch ``revision``. ``averaged`` writes the moving averages of the weights. ``say`` is passed to
    ``open_saved``. ``progress`` shows how much is written.

    Raises: ConfigError if no family has the architecture, ``out`` exists, or the tokenizer does not fit; CheckpointError
    if the checkpoint is missing or damaged; OSError if writing fails; and what ``open_saved`` raises.
    """
    if not replace:
        check_new(out)
    if max_shard_size < 1:
        raise ConfigError(f"--max_shard_size {max_shard_size} must be at least 1; use 5GB")
    source = local_checkpoint(checkpoint, say)
    if source.is_file() and (theirs := foreign_config(source)) is not None:
        return _export_foreign(source, theirs, out, dtype, tokenizer, max_shard_size, replace, averaged)
    saved = open_saved(source, say)
    family, settings = write_architecture(folded_config(saved.config))
    weights = averages_of(saved) if averaged else saved.weights()
    weights = folded_weights(saved.config, weights)
    saved = saved._replace(config=folded_config(saved.config))
    parts = _parts(family, saved, weights)
    found = exported_tokenizer(
        saved.config.vocab_size, saved.section("data"),
        given=tokenizer, checkpoint=saved.file, imported=saved.section(TOKENS),
    )  # fmt: skip
    dtype = dtype or weights["wte.weight"].dtype
    with new_folder(out, replace=replace) as folder:
        files, size = _write_weights(folder, parts, dtype, max_shard_size, progress)
        changes = _write_settings(folder, settings, dtype, found)
        changes += found.write(folder, saved.config.block_size)
        (folder / "README.md").write_text(
            model_card(saved, family, dtype, found, name or out.name, revision), encoding="utf-8"
        )
    return Exported(family.architecture, len(parts), files, size, found, tuple(changes))


def _export_foreign(
    file: Path,
    settings: dict[str, Any],
    out: Path,
    dtype: torch.dtype | None,
    tokenizer: Path | None,
    max_shard_size: int,
    replace: bool,
    averaged: bool,
) -> Exported:
    """``export`` for the weights of a ``CausalLM``, by transformers itself."""
    saved = saved_model(file)
    weights = averages_of(saved, foreign=True) if averaged else read_weights(file, mmap=True, foreign=True)
    found = exported_tokenizer(
        saved.config.vocab_size, saved.section("data"),
        given=tokenizer, checkpoint=saved.file, imported=saved.section(TOKENS),
    )  # fmt: skip
    stored = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    model = build_causal_lm(settings, str(file), dtype=stored)
    load_weights(model, weights, str(file))
    if dtype is not None:
        model.hf.to(dtype)
    model.hf.config.update(found.facts.as_import())
    with new_folder(out, replace=replace) as folder, without_bars():
        model.hf.save_pretrained(folder, max_shard_size=max_shard_size)
        changes = found.write(folder, saved.config.block_size)
        files = list(folder.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
    tensors = len(model.hf.state_dict())
    return Exported(type(model.hf).__name__, tensors, len(files), size, found, tuple(changes))


def _parts(family: Family, saved: SavedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    """The family's tensors by name, as views of ``weights``. Raises: the same as ``checked_specs``."""
    specs = checked_specs(saved, weights)
    return {part.name: part for spec in specs for part in family.parts(spec, weights[spec.name], saved.config)}


def checked_specs(saved: SavedModel, weights: Mapping[str, torch.Tensor]) -> list[ParamSpec]:
    """The parameter specs of ``saved``. Checks before anything is written; raises CheckpointError unless the ``weights``
    fit the architecture, and ConfigError for a weight that no family has."""
    empty = GPT(saved.config, device="meta", seed=None)
    load_weights(empty, {n: torch.empty_like(w, device="meta") for n, w in weights.items()}, str(saved.file))
    biases = [name for name, weight in weights.items() if name.endswith("router.bias") and bool(weight.any())]
    if biases:
        raise ConfigError(
            f"{biases[0]} is not zero (--moe_bias_update_rate), and no Hugging Face family has such a bias; "
            "keep the weights as a checkpoint"
        )
    return empty.param_specs()


def _write_weights(
    out: Path, parts: Mapping[str, Part], dtype: torch.dtype, max_shard_size: int, progress: bool
) -> tuple[int, int]:
    """Write ``parts`` in files of at most ``max_shard_size`` bytes; returns the number of files and their total bytes."""

    def tensor(name: str) -> torch.Tensor:
        value = parts[name].view.reshape(parts[name].shape)
        name_of = {kind: text for text, kind in DTYPES.items()}
        check_finite(name, value, dtype, f"--dtype {name_of[dtype]}", "--dtype bf16")
        return value

    sizes = {name: math.prod(part.shape) * dtype.itemsize for name, part in parts.items()}
    shards = _shards(sizes, max_shard_size)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with Progress("exporting", sum(sizes.values()), shown=progress) as shown:
        for name, members in zip([SAFETENSORS] if len(shards) == 1 else names, shards, strict=True):
            shapes = {member: parts[member].shape for member in members}
            write_safetensors(out / name, shapes, dtype, tensor, shown.update)
    if len(shards) > 1:
        places = {member: name for name, members in zip(names, shards, strict=True) for member in members}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (out / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return len(shards), sum(sizes.values())


def check_finite(name: str, value: torch.Tensor, dtype: torch.dtype, option: str, works: str) -> None:
    """Raises: ConfigError for values too large for ``dtype``, which the flag ``option`` asks for and ``works`` avoids;
    CheckpointError for NaN or infinite values."""
    if value.numel() == 0:
        return
    largest = value.abs().amax()
    if not bool(largest.isfinite()):
        raise CheckpointError(f"{name} has NaN or infinite weights; export an earlier checkpoint")
    if not bool(largest.to(dtype).isfinite()):
        raise ConfigError(
            f"{option} has a maximum of {torch.finfo(dtype).max:g}, but {name} contains {float(largest):g}; use {works}"
        )


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most ``limit`` bytes; a larger tensor gets its own group."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _write_settings(out: Path, settings: dict[str, Any], dtype: torch.dtype, tokenizer: TokenizerFiles) -> list[str]:
    ids = tokenizer.facts.as_import()
    common = {"torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True}
    (out / "config.json").write_text(json.dumps({**settings, **ids, **common}, indent=2), encoding="utf-8")
    generation, changes = generation_settings(tokenizer.generation, tokenizer.facts, tokenizer.unused)
    (out / GENERATION).write_text(json.dumps(generation, indent=2), encoding="utf-8")
    return changes
