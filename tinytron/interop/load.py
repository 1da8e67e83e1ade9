"""Loads existing weights into a model: Hugging Face's, streamed tensor by tensor, or Tinytron's own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from tinytron.checkpoint.load import load_weights, read_json
from tinytron.checkpoint.model import is_saved_model, saved_model
from tinytron.distributed.sharding import Box, box_of
from tinytron.errors import CheckpointError, ConfigError
from tinytron.interop.architectures import Architecture, facts, read_config
from tinytron.interop.families import Family, Part
from tinytron.interop.hub import model_folder
from tinytron.interop.weights import HFWeights
from tinytron.model import GPT, ModelConfig
from tinytron.utils.progress import Progress

FLAG = "--init_from"
_VOCABULARY = ("wte.weight", "lm_head.weight")
# Model options that describe how it is trained, not what its weights mean.
_FREE = {
    "dropout", "init_std", "moe_aux_loss_coef", "moe_aux_loss_scope", "moe_z_loss_coef", "moe_bias_update_rate",
}  # fmt: skip


def architecture_of(name: str) -> ModelConfig:
    """The architecture of the weights that ``--init_from`` names: a Tinytron folder or file, a Hugging Face folder, or a
    name on the hub. Raises: ConfigError; CheckpointError."""
    if is_saved_model(Path(name)):
        return saved_model(Path(name), check=False).config
    return _architecture(model_folder(name, weights=False)).config


def _architecture(folder: Path) -> Architecture:
    path = folder / "config.json"
    return read_config(read_json(path), str(path))


def model_options(name: str, values: Mapping[str, Any], given: Set[str]) -> dict[str, Any]:
    """The model options for ``--init_from name``: the architecture of the weights, plus two kinds of ``values``: options
    that describe training, and ``given`` ones that do not contradict the weights. ``vocab_size`` may be larger (rows are
    added), and ``block_size`` may be anything unless positions are learned.

    Raises: ConfigError naming the first contradicting flag, and what ``architecture_of`` raises.
    """
    theirs = architecture_of(name)
    return check_given(FLAG, name, theirs, {key: v for key, v in values.items() if key in _FREE or key in given})


def check_given(flag: str, name: str, theirs: ModelConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the architecture ``theirs``, which ``flag`` names, with the user's ``own`` in their place. Raises:
    ConfigError naming the first one that contradicts it."""
    options = {**dataclasses.asdict(theirs), **own}
    for key in sorted(own.keys() - _FREE - {"block_size", "vocab_size"}):
        alone = dataclasses.asdict(theirs) | {key: own[key]}
        if not _same(theirs, alone):
            raise ConfigError(
                f"--{key} {own[key]} contradicts {flag} {name}, which has {getattr(theirs, key)}; drop --{key}"
            )
    if options["vocab_size"] < theirs.vocab_size:
        raise ConfigError(
            f"--vocab_size {options['vocab_size']} is less than the {theirs.vocab_size} tokens of {flag} {name}; "
            f"use {theirs.vocab_size} or more"
        )
    if theirs.position_type == "learned" and options["block_size"] != theirs.block_size:
        raise ConfigError(
            f"--block_size {options['block_size']} is not the {theirs.block_size} learned positions of {flag} {name}; "
            f"use {theirs.block_size}"
        )
    return options


def _same(theirs: ModelConfig, options: dict[str, Any]) -> bool:
    try:
        return facts(ModelConfig(**options)) == facts(theirs)
    except ConfigError:
        return False


def load_pretrained(model: GPT, name: str, *, progress: bool = False) -> list[str]:
    """Set every weight of ``model`` from what ``--init_from`` names; each rank reads only its own experts. Returns the
    ignored keys of a Hugging Face config.json: those that do not change what the weights compute. ``progress``
    shows how much is read.

    Rows beyond the vocabulary of the weights become the mean of its rows. Then no padding logit exceeds the mean of the
    other logits, and padding gets at most its share of the probability. (With rows of zeros, a model whose logits are all
    far below zero would predict nothing but padding.)

    Raises: CheckpointError naming missing, unknown and misshapen tensors; ConfigError if the model is a different one.
    """
    if is_saved_model(Path(name)):
        saved = saved_model(Path(name))
        _require_same(model.config, saved.config, name)
        load_weights(model, _with_rows(saved.weights(), model.config.vocab_size), str(saved.file), model.state)
        return []
    folder = model_folder(name, weights=True)
    family, config, ignored = _architecture(folder)
    _require_same(model.config, config, name)
    load_hf(model, HFWeights(folder), family, config.vocab_size, progress=progress)
    return list(ignored)


def _with_rows(weights: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """``weights`` with rows added up to ``vocab_size``; larger tables are kept, and loading them reports the error."""
    tables = {name: weights[name] for name in _VOCABULARY if name in weights and weights[name].ndim}
    more = {n: table.new_empty(vocab_size, *table.shape[1:]) for n, table in tables.items() if len(table) < vocab_size}
    for name, rows in more.items():
        rows[: len(tables[name])] = tables[name]
        _fill(rows, len(tables[name]))
    return {**weights, **more}


def _fill(rows: torch.Tensor, known: int) -> None:
    """Set the rows after the first ``known`` rows to the mean of those."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    rows[known:] = rows[:known].mean(0, dtype=wide).to(rows.dtype)


def about_ignored(keys: Sequence[str]) -> str:
    """The part of a message about weights that lists the ignored ``keys`` of their config.json."""
    return f"; ignored in its config.json, not part of the model's function: {', '.join(keys)}" if keys else ""


def _require_same(ours: ModelConfig, theirs: ModelConfig, name: str) -> None:
    mine, other = (facts(config) | {"block_size": 0, "vocab_size": 0} for config in (ours, theirs))
    if different := sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key)):
        key = different[0]
        raise ConfigError(
            f"{FLAG} {name} has {key} {getattr(theirs, key)}, but this model has {getattr(ours, key)}; build its "
            "configuration with parse_args and build_config, which take the architecture from there"
        )


@torch.no_grad()
def load_hf(model: GPT, weights: HFWeights, family: Family, vocab_size: int, *, progress: bool = False) -> None:
    """Copy ``weights``, which have ``vocab_size`` rows of tokens, into ``model``, one tensor at a time. ``progress`` and
    errors are those of ``load_pretrained``; errors are raised before anything is copied."""
    shapes = expected_shapes(family, dataclasses.replace(model.config, vocab_size=vocab_size))
    names = _names_in(weights, family, shapes)
    _check(weights, family, shapes, names)
    specs = [spec for spec in model.param_specs() if spec.kind != "adapter"]
    total = sum(model.get_parameter(spec.name).nbytes for spec in specs)
    with Progress(f"reading {weights.folder}", total, shown=progress) as shown:
        for spec in specs:
            held, box = model.get_parameter(spec.name), box_of(spec, model.state)
            read = box.stack() if spec.stacked else Box.whole(spec.shape)  # Hugging Face stores whole tensors
            ours = held if box == read else held.new_empty(read.size)
            rows = ours[:vocab_size] if spec.name in _VOCABULARY else ours
            for part in family.parts(spec, rows, model.config, read.start[0]):
                part.view.copy_(weights.get(names[part.name]).view(part.view.shape))
            if spec.name in _VOCABULARY and len(ours) > vocab_size:
                _fill(ours, vocab_size)
            if ours is not held:
                held.copy_(box.within(read).cut(ours))
            shown.update(held.nbytes)
    for layer in model.moe_layers:
        layer.router.bias.zero_()


def parts_of(family: Family, model: GPT) -> list[Part]:
    """All Hugging Face tensors that a whole ``model`` corresponds to."""
    return [
        part
        for spec in model.param_specs()
        for part in family.parts(spec, model.get_parameter(spec.name).detach(), model.config)
    ]


def expected_shapes(family: Family, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Hugging Face tensors of an architecture, without allocating them."""
    return {part.name: part.shape for part in parts_of(family, GPT(config, device="meta", seed=None))}


def _names_in(weights: HFWeights, family: Family, shapes: Mapping[str, Any]) -> dict[str, str]:
    """The name of each tensor in the files: files of the bare model omit the model's prefix, and a tensor that embedding
    and head share may be stored under the head's name alone."""
    bare = not any(name.startswith(family.base) for name in weights.shapes)
    names = {name: name.removeprefix(family.base) if bare else name for name in shapes}
    (head,), (embedding,) = family.table["lm_head"], family.table["wte"]
    table, tied = f"{embedding}.weight", f"{head}.weight"
    if tied not in shapes and names[table] not in weights.shapes and tied in weights.shapes:
        names[table] = tied
    return names


def _check(weights: HFWeights, family: Family, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]) -> None:
    expected = {names[name]: shape for name, shape in shapes.items()}
    problems = [f"{n} {list(shape)} is missing" for n, shape in expected.items() if n not in weights.shapes]
    for name, shape in weights.shapes.items():
        if name not in expected:
            if not re.search(family.ignored, name) and not _is_tied_head(weights, family, names, name):
                problems.append(f"{name} {list(shape)} is unknown to this {family.model_type}")
        elif shape != expected[name]:
            problems.append(f"{name} is {list(shape)}, expected {list(expected[name])}")
        elif not weights.dtypes[name].is_floating_point:
            problems.append(f"{name} has type {str(weights.dtypes[name]).removeprefix('torch.')}, expected floats")
    if problems:
        raise CheckpointError(
            f"{weights.folder} does not match the {family.model_type} that its config.json describes "
            f"({len(problems)} differences): {'; '.join(sorted(problems)[:3])}"
        )


def _is_tied_head(weights: HFWeights, family: Family, names: Mapping[str, str], name: str) -> bool:
    """True if ``name`` is a tied head that was saved all the same, and its values equal the embedding's."""
    (head,), (embedding,) = family.table["lm_head"], family.table["wte"]
    table = names[f"{embedding}.weight"]
    return (
        name == f"{head}.weight"
        and weights.shapes.get(table) == weights.shapes[name]
        and torch.equal(weights.get(table), weights.get(name))
    )
