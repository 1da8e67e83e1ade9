"""Writes the adapters of a run (LoRA) as a folder that the peft package opens, on top of the model it started from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinytron.checkpoint.model import HF_CONFIG, SavedModel, is_saved_model, read_weights, saved_model
from tinytron.errors import ConfigError
from tinytron.interop.architectures import write_architecture
from tinytron.interop.export import check_finite
from tinytron.interop.folder import check_new, new_folder
from tinytron.interop.open import Say, local_checkpoint
from tinytron.interop.safetensors import write_safetensors
from tinytron.model import GPT
from tinytron.model.lora import adapter_parts

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names
_PREFIX = "base_model.model."
_FOREIGN = "hf."  # the prefix of tensor names of a model that transformers built


@dataclass(frozen=True)
class ExportedAdapters:
    """A finished export: the model to load the adapters on, their number, and total bytes."""

    base: str
    adapters: int
    bytes: int


class _Adapter(NamedTuple):
    """The adapter of one of their layers: ``module`` is its path, ``a`` is ``[r, in]`` and ``b`` ``[out, r]``."""

    module: str
    a: torch.Tensor
    b: torch.Tensor


def export_adapters(
    checkpoint: Path | str, out: Path, *, base: str | None = None, say: Say = lambda text: None
) -> ExportedAdapters:
    """Write the adapters of ``checkpoint``, a run with ``--lora_rank``, to the new folder ``out``. ``base`` is the model in
    transformers to load them on (default: the run's ``--init_from``).

    Raises: ConfigError if there are no adapters, no family has the architecture, or the base is unknown; CheckpointError if
    the checkpoint is missing or damaged; OSError if writing fails.
    """
    check_new(out)
    file = local_checkpoint(checkpoint, say)
    saved = saved_model(file) if file.is_file() else None
    weights = {} if saved is None else read_weights(saved.file, mmap=True, foreign=True, merge=False)
    layers = [name.removesuffix(".lora.a") for name in weights if name.endswith(".lora.a")]
    if saved is None or not layers:
        raise ConfigError(f"{checkpoint} has no adapters; use a run with --lora_rank, or export without --adapters")
    base = _base(saved, base)
    if HF_CONFIG in weights:
        found, transposed = [_foreign(weights, layer) for layer in layers], False
    else:
        family, _ = write_architecture(saved.config)
        specs = {spec.name: spec for spec in GPT(saved.config, device="meta", seed=None).param_specs()}
        found, transposed = [], bool(family.transposed)
        for layer in layers:
            a, b, columns = _whole(weights, layer)
            spec = specs[f"{layer}.weight"]
            marks = {part.name: part.view for part in family.parts(spec, columns, saved.config)}
            for part in family.parts(spec, b, saved.config):
                turned = transposed and part.shape != tuple(b.shape)
                used = marks[part.name].reshape(-1, b.shape[1]) if not turned else marks[part.name].t()
                kept = used.any(0)
                whole = part.view.t() if turned else part.view.reshape(-1, b.shape[1])
                if bool(kept.any()):
                    found.append(_Adapter(part.name.removesuffix(".weight"), a[kept], whole[:, kept]))
    ratio = float(weights[f"{layers[0]}.lora.scale"])
    with new_folder(out) as folder:
        size = _write(folder, found, ratio, base, transposed=transposed)
    return ExportedAdapters(base, len(found), size)


def _base(saved: SavedModel, given: str | None) -> str:
    name = given or saved.section("ckpt").get("init_from")
    if name is None or (given is None and is_saved_model(Path(name))):
        raise ConfigError(
            f"the adapters belong to {name or 'weights that the run does not name'}, which transformers cannot open; "
            "export that model first, and give the folder with --base"
        )
    return str(name)


def _foreign(weights: dict[str, torch.Tensor], layer: str) -> _Adapter:
    ((_, a, b),) = adapter_parts(weights, layer)
    return _Adapter(layer.removeprefix(_FOREIGN), a, b)


def _whole(weights: dict[str, torch.Tensor], layer: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The adapter of a layer that may pack several projections, as one: A ``[n r, in]``, B ``[out, n r]``, and the mask of
    B's elements that belong to a projection's own A."""
    parts = list(adapter_parts(weights, layer))
    a = torch.cat([one for _, one, _ in parts])
    b = a.new_zeros(len(weights[f"{layer}.weight"]), len(a))
    mask = torch.zeros_like(b, dtype=torch.bool)
    first = 0
    for rows, _, part in parts:
        columns = slice(first, first + part.shape[1])
        b[rows, columns], mask[rows, columns] = part, True
        first += part.shape[1]
    return a, b, mask


def _write(folder: Path, found: list[_Adapter], ratio: float, base: str, *, transposed: bool) -> int:
    tensors = dict(_named(found))
    for name, tensor in tensors.items():
        check_finite(name, tensor, tensor.dtype, "the checkpoint", "an earlier one")
    dtype = found[0].a.dtype
    write_safetensors(folder / WEIGHTS, {n: tuple(t.shape) for n, t in tensors.items()}, dtype, tensors.__getitem__)
    ranks = {adapter.module: len(adapter.a) for adapter in found}
    rank = min(ranks.values())
    wider = {re.escape(module): r for module, r in ranks.items() if r != rank}
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": ratio * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(ranks),
        "rank_pattern": wider,
        "alpha_pattern": {module: ratio * r for module, r in wider.items()},
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return sum(tensor.nbytes for tensor in tensors.values())


def _named(found: list[_Adapter]) -> Iterator[tuple[str, torch.Tensor]]:
    for adapter in found:
        yield f"{_PREFIX}{adapter.module}.lora_A.weight", adapter.a
        yield f"{_PREFIX}{adapter.module}.lora_B.weight", adapter.b
