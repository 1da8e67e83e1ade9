"""Translates the settings of Hugging Face families to Tinytron's model options, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

from tinytron.errors import ConfigError
from tinytron.interop.families import FAMILIES, Family
from tinytron.interop.settings import Settings
from tinytron.model.config import ModelConfig


class Architecture(NamedTuple):
    """A parsed config.json: its family, the options of the model, and the ``ignored`` keys, which have a value but do not
    change what the weights compute."""

    family: Family
    config: ModelConfig
    ignored: tuple[str, ...]


def read_architecture(values: dict[str, Any], source: str) -> tuple[Family, ModelConfig]:
    """The family and the options from ``read_config``. Raises: the same."""
    found = read_config(values, source)
    return found.family, found.config


def read_config(values: dict[str, Any], source: str) -> Architecture:
    """The architecture that a config.json describes; ``source`` names it in errors.

    Raises: ConfigError for an unknown family, or for a setting that Tinytron does not support (names key and value).
    """
    settings = Settings(values, source)
    model_type = settings.take("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise settings.wrong("model_type", model_type, f"supported are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    settings.one_of("is_causal", {True: True}, True)
    options = family.read(settings)
    ignored = tuple(settings.finish(model_type))
    try:
        return Architecture(family, ModelConfig(**options), ignored)
    except ConfigError as error:
        raise ConfigError(f"{source} describes a model that Tinytron cannot build: {error}") from error


def write_architecture(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that can express ``config``, and its config.json, with the keys that old and new versions of transformers
    read. Raises: ConfigError naming the options that the nearest family lacks.

    Every family writes ``config`` with its own keys, and the result is read back like any config.json. The first family
    for which the ``facts`` agree is chosen. So no option is lost silently, and no table of who supports what is needed.
    """
    lacking: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        values = {"model_type": family.model_type, "architectures": [family.architecture], **family.write(config)}
        try:
            read = read_config(values, "config.json").config
        except ConfigError:  # the part that this family can express is not a valid model
            continue
        different = _differences(config, read)
        if not different:
            return family, values
        lacking[family.model_type] = different
    if not lacking:
        raise ConfigError(
            "no Hugging Face family has this architecture or a similar one; keep the weights as a checkpoint"
        )
    nearest = min(lacking, key=lambda model_type: len(lacking[model_type]))
    shown = ", ".join(dict.fromkeys(text for key in lacking[nearest] for text in _show(config, key)))
    raise ConfigError(
        f"no Hugging Face family has this architecture; the nearest, {nearest}, lacks {shown}; "
        "keep the weights as a checkpoint, or train without these options"
    )


def _differences(config: ModelConfig, read: ModelConfig) -> list[str]:
    """The facts of ``config`` that differ in ``read``, which a family wrote and read for it. A router's load-balancing bias
    counts as a difference: no family has one."""
    wanted = facts(config) | {"moe_bias_update_rate": config.moe_bias_update_rate if config.use_moe else 0.0}
    got = facts(read) | {"moe_bias_update_rate": 0.0}
    return sorted(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key))


def _show(config: ModelConfig, key: str) -> list[str]:
    """The flags that a fact comes from."""
    flags = {
        "dense_layers": ["first_k_dense", "dense_layers"],
        "sliding_window": ["sliding_window", "sliding_window_layers"],
        **{name: ["bias", name] for name in ("qkv_bias", "attention_bias", "mlp_bias")},
    }
    found = []
    for name in [name for name in flags.get(key, []) if getattr(config, name)] or [key]:
        value = getattr(config, name)
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        else:
            found.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return found


def facts(config: ModelConfig) -> dict[str, Any]:
    """The meaning of the weights, keyed by flag. Options without effect are left out, so two configurations that mean the
    same have equal facts."""
    names = "block_size vocab_size num_layer num_attention_heads num_key_value_heads hidden_size norm_type norm_eps"
    names += " parallel_residual qk_norm position_type tied_lm_head use_moe"
    found: dict[str, Any] = {name: getattr(config, name) for name in names.split()}
    found |= {
        "head_dim": config.resolved_head_dim,
        "qkv_bias": config.has_qkv_bias,
        "attention_bias": config.has_out_bias,
        "sliding_window": tuple(config.window(layer) for layer in range(config.num_layer)),
    }
    if config.position_type == "rotary":
        found |= {"rope_theta": config.rope_theta, "rotary_fraction": config.rotary_dim, **_scaling_facts(config)}
    if config.mup_base_width:
        found["mup_base_width"] = config.mup_base_width
    has_dense = len(config.moe_layers) < config.num_layer
    if has_dense:
        found["intermediate_size"] = config.intermediate_size
    found |= {
        "mlp_type": config.mlp_type,
        "mlp_bias": config.has_mlp_bias and (has_dense or config.num_shared_experts > 0),
    }
    if config.use_moe:
        names = (
            "num_experts num_experts_per_tok moe_intermediate_size num_shared_experts moe_router_score norm_topk_prob"
        )
        found |= {name: getattr(config, name) for name in names.split()}
        found["dense_layers"] = config.moe_layers
    return found


def _scaling_facts(config: ModelConfig) -> dict[str, Any]:
    kind = config.rope_scaling
    found: dict[str, Any] = {"rope_scaling": kind}
    if kind != "none":
        found["rope_scaling_factor"] = config.rope_scaling_factor
    if kind in ("llama3", "yarn"):
        found["rope_original_block_size"] = config.rope_original_block_size
    if kind == "llama3":
        found |= {name: getattr(config, name) for name in ("rope_low_freq_factor", "rope_high_freq_factor")}
    if kind == "yarn":
        found |= {name: getattr(config, name) for name in ("rope_beta_fast", "rope_beta_slow", "rope_attention_factor")}
    return found
