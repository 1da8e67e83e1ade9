"""Tinytron's weights as a folder that transformers opens by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinytron.checkpoint.load import load_weights
from tinytron.errors import ConfigError
from tinytron.interop.architectures import write_architecture
from tinytron.interop.card import model_card, run_config
from tinytron.interop.checkpoints import OwnModel, own_model
from tinytron.interop.families import Family
from tinytron.interop.folder import check_new, new_folder
from tinytron.interop.load import expected_shapes
from tinytron.interop.safetensors import write_safetensors
from tinytron.interop.tokenizer import TokenizerFiles, given_tokenizer, tokenizer_of_data
from tinytron.interop.weights import SAFETENSORS
from tinytron.model import GPT, ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Exported:
    """What was written: the family, the number of tensors and files, and bytes in all."""

    family: Family
    tensors: int
    files: int
    bytes: int


def export(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    max_shard_size: int = 5 * 10**9,
    name: str | None = None,
    replace: bool = False,
) -> Exported:
    """Write the weights of a run, a checkpoint or a consolidated file to the folder ``out``, in ``dtype`` (default: their
    own), in files of at most ``max_shard_size`` bytes. ``out`` appears whole or not at all; with ``replace`` in the place
    of an older one. ``name``: what the model card calls the model (default: as the folder).

    Raises: ConfigError if no family has the architecture, ``out`` is there, or the tokenizer does not fit; CheckpointError
    if the checkpoint is missing or damaged; OSError if the disk refuses.
    """
    if not replace:
        check_new(out)
    if max_shard_size < 1:
        raise ConfigError(f"--max_shard_size {max_shard_size} must be at least 1; use 5GB")
    own = own_model(checkpoint)
    family, settings = write_architecture(own.config)
    weights = own.weights()
    _check(weights, own)
    if tokenizer is None:
        found = tokenizer_of_data(run_config(own, "data").get("dataset_path"), own.config.vocab_size)
    else:
        found = given_tokenizer(tokenizer, own.config.vocab_size)
    dtype = dtype or weights["wte.weight"].dtype
    with new_folder(out, replace=replace) as folder:
        made = _write_weights(folder, family, own.config, weights, dtype, max_shard_size)
        _write_settings(folder, settings, dtype, found)
        found.write(folder, own.config.block_size)
        (folder / "README.md").write_text(model_card(own, family, dtype, name or out.name))
    return made


def _check(weights: Mapping[str, torch.Tensor], own: OwnModel) -> None:
    """Whether ``weights`` are those of the architecture; raises before anything is written."""
    empty = GPT(own.config, device="meta", seed=None)
    load_weights(empty, {n: torch.empty_like(w, device="meta") for n, w in weights.items()}, str(own.file))
    biases = [name for name, weight in weights.items() if name.endswith("router.bias") and bool(weight.any())]
    if biases:
        raise ConfigError(
            f"{biases[0]} is not zero (--moe_bias_update_rate), and no Hugging Face family has such a bias; "
            "keep the weights as a checkpoint"
        )


def _write_weights(
    out: Path,
    family: Family,
    config: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    max_shard_size: int,
) -> Exported:
    shapes = expected_shapes(family, config)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_shard_size)
    get = _their_tensors(family, config, weights)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, members in zip([SAFETENSORS] if len(shards) == 1 else names, shards, strict=True):
        write_safetensors(out / name, {member: shapes[member] for member in members}, dtype, get)
    if len(shards) > 1:
        places = {member: name for name, members in zip(names, shards, strict=True) for member in members}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (out / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2))
    return Exported(family, len(shapes), len(shards), sum(sizes.values()))


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most ``limit`` bytes; a larger tensor is alone."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _their_tensors(
    family: Family, config: ModelConfig, weights: Mapping[str, torch.Tensor]
) -> Callable[[str], torch.Tensor]:
    views = {
        part.name: (part.view, part.shape)
        for spec in GPT(config, device="meta", seed=None).param_specs()
        for part in family.parts(spec, weights[spec.name], config)
    }
    return lambda name: views[name][0].reshape(views[name][1])


def _write_settings(out: Path, settings: dict[str, Any], dtype: torch.dtype, tokenizer: TokenizerFiles) -> None:
    ids = {
        "bos_token_id": tokenizer.eot_id if tokenizer.begins else None,
        "eos_token_id": tokenizer.eot_id,
        "pad_token_id": None,
    }
    common = {"torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True}
    (out / "config.json").write_text(json.dumps({**settings, **ids, **common}, indent=2))
    generation = {"do_sample": True, **{key: value for key, value in ids.items() if value is not None}}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2))
