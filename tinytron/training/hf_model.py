"""``--hf_model``: a new model whose architecture comes from a name, or from a config.json of transformers.

A family that Tinytron's GPT has becomes that GPT. Every other causal language model of transformers is trained as it is
(``tinytron.interop.causal_lm``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tinytron.checkpoint.load import read_json
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError
from tinytron.interop.architectures import read_config
from tinytron.interop.causal_lm import CausalLM, build_causal_lm, config_file, foreign_settings, sizes_of
from tinytron.interop.load import check_given
from tinytron.model.config import ModelConfig
from tinytron.training.config import Config
from tinytron.training.presets import PRESETS
from tinytron.utils.training import DTYPES

Options = dict[str, Any]  # options of ``ModelConfig`` by name


class _Known(NamedTuple):
    """A model that needs no config.json: the preset with its sizes, its longest sequence, and the dropout of its
    config.json."""

    preset: str
    block_size: int
    dropout: float = 0.0


KNOWN: Mapping[str, _Known] = MappingProxyType(
    {
        "gpt2": _Known("gpt2", 1024, 0.1),
        "openai-community/gpt2": _Known("gpt2", 1024, 0.1),
        "gpt2-medium": _Known("gpt2-medium", 1024, 0.1),
        "openai-community/gpt2-medium": _Known("gpt2-medium", 1024, 0.1),
        "EleutherAI/pythia-160m": _Known("pythia-160m", 2048),
        "JackFram/llama-160m": _Known("llama-160m", 2048),
        "Qwen/Qwen3-0.6B": _Known("qwen3-0.6b", 40960),
    }
)
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1  # GPT-2's dropouts, and their default in transformers


def architecture(name: str, flag: str) -> tuple[Options, bool]:
    """The options of a new model with the architecture ``name``, the value of ``flag``; and True if transformers has to
    build it, in which case only vocabulary and longest sequence are the model's own. A known model has the options of its
    preset, others what their config.json says, with dropout and the scale of the first weights. Raises: ConfigError."""
    known = None if Path(name).exists() else KNOWN.get(name)
    if known is not None:
        sizes = {field.name for field in dataclasses.fields(ModelConfig)}
        options = {key: value for key, value in PRESETS[known.preset].options.items() if key in sizes}
        options |= {"block_size": known.block_size, "dropout": known.dropout}
        return dataclasses.asdict(ModelConfig(**options)), False
    try:
        file = config_file(name)
        foreign = foreign_settings(name)
        if foreign is not None:
            return {**dataclasses.asdict(ModelConfig()), **sizes_of(foreign, str(file))}, True
        content = read_json(file)
        config = read_config(content, str(file)).config
    except ConfigError as error:
        raise ConfigError(f"{flag} {name}: {error}; known without a config.json: {', '.join(KNOWN)}") from error
    keys, absent = _DROPOUTS if content.get("model_type") == "gpt2" else (("hidden_dropout", "attention_dropout"), 0.0)
    rates = {key: float(content.get(key, absent)) for key in keys}
    if len(set(rates.values())) > 1:
        shown = ", ".join(f"{key} {rate}" for key, rate in rates.items())
        raise ConfigError(f"{file}: {shown}, but the model has one dropout; make them equal")
    init_std = float(content.get("initializer_range") or 0.02)  # the default of every family of transformers
    return dataclasses.asdict(config) | {"dropout": rates[keys[0]], "init_std": init_std}, False


def options_of_foreign(flag: str, name: str, sizes: Options, values: Options, given: Set[str]) -> Options:
    """The model options of a run that trains the foreign model ``name`` with these ``sizes``. Raises: ConfigError for a
    ``given`` flag that would have to change it."""
    options = {**dataclasses.asdict(ModelConfig()), **sizes}
    for key in sorted(given):
        if values[key] != options[key]:
            raise ConfigError(
                f"--{key} {values[key]} describes Tinytron's GPT, but {flag} {name} is built by transformers; change its "
                f"config.json, and drop --{key}"
            )
    return options


def new_model_options(name: str, values: Options, given: Set[str]) -> Options:
    """The model options for ``--hf_model name``: its architecture, and those of ``values`` that are ``given`` and do not
    contradict it. Raises: ConfigError."""
    options, foreign = architecture(name, "--hf_model")
    if foreign:
        sizes = {key: options[key] for key in ("vocab_size", "block_size")}
        return options_of_foreign("--hf_model", name, sizes, values, given)
    return check_given("--hf_model", name, ModelConfig(**options), {key: values[key] for key in given})


def foreign_model(config: Config) -> tuple[dict[str, Any], str] | None:
    """The settings and the name of the foreign model that the run trains; ``None`` if it trains the GPT. Raises:
    ConfigError or CheckpointError if its description cannot be read."""
    name = config.ckpt.hf_model or config.ckpt.init_from
    if name is None or (name in KNOWN and not Path(name).exists()):
        return None
    settings = foreign_settings(name)
    return None if settings is None else (settings, name)


def build_foreign(config: Config, settings: dict[str, Any], name: str, state: ParallelState) -> CausalLM:
    """The foreign model of this rank, whole. Raises: ConfigError for an option that only the GPT has."""
    train, parallel = config.train, config.parallel
    kind = settings["model_type"]
    refused = {
        f"--sep_size {parallel.sep_size}": (parallel.sep_size > 1, "--sep_size 1"),
        f"--ep_size {parallel.ep_size}": ((parallel.ep_size or 1) > 1, "--ep_size 1"),
        f"--recompute {train.recompute}": (train.recompute not in ("none", "full"), "--recompute full"),
        "--use_liger_kernel": (train.use_liger_kernel, "--no-use_liger_kernel"),
        "--use_cut_cross_entropy": (train.use_cut_cross_entropy, "--no-use_cut_cross_entropy"),
        "--document_mask": (config.data.document_mask, "--no-document_mask"),
        f"--attn_backend {train.attn_backend}": (train.attn_backend == "varlen", "--attn_backend auto"),
    }
    for flag, (given, works) in refused.items():
        if given:
            raise ConfigError(
                f"{flag} needs Tinytron's GPT, but transformers builds {name} (family {kind}); use {works}"
            )
    model = build_causal_lm(
        settings,
        name,
        dtype=DTYPES[train.precision],
        device=state.device,
        seed=config.seed.seed,
        attention=train.attn_backend,
        recompute=train.recompute == "full",
        z_loss_coef=train.z_loss_coef,
    )
    if train.use_compile:
        (model.hf.get_decoder() if model.fused else model.hf).compile()
    return model
