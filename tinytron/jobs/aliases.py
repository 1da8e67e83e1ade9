"""A table of the names that other systems use for Tinytron's options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tinytron.errors import ConfigError

Get = Callable[[str], Any]  # the value of an option by its path


def _same(value: Any, get: Get) -> Any:
    return value


@dataclass(frozen=True)
class Alias:
    """Another name of the option ``path``. ``to`` converts a value under that name to Tinytron's, ``back`` does the
    reverse; both may read other options. ``also`` are options that get the same value unless they are given themselves.
    ``type`` is the type of a value under that name (``None``: the option's own)."""

    path: str
    to: Callable[[Any, Get], Any] = _same
    back: Callable[[Any, Get], Any] = _same
    also: tuple[str, ...] = ()
    type: Any = None


SECTIONS: Mapping[str, str] = MappingProxyType({"training": "train", "optimization": "optim", "architecture": "model"})


def tokens(path: str) -> Alias:
    """The option ``path``, in tokens, under a name that counts sequences."""
    return Alias(
        path,
        lambda value, get: value * get("train.seq_len"),
        lambda value, get: value // get("train.seq_len"),
        type=int,
    )


def _steps(get: Get) -> int:
    """Number of steps of the run. Raises: ConfigError if the options do not say how long it is."""
    if (steps := get("train.max_steps")) is not None:
        return int(steps)
    if (tokens := get("train.max_train_tokens")) is not None:
        return -(-int(tokens) // int(get("train.total_batch_size")))
    raise ConfigError("optimization.warmup_pct needs the length of the run; set training.tokens or train.max_steps")


_WARMUP = Alias(
    "optim.warmup_steps",
    lambda value, get: int(value * _steps(get)),
    lambda value, get: value / _steps(get),
    type=float,
)
_ROPE = Alias(
    "model.position_type",
    lambda value, get: "rotary" if value else "learned",
    lambda value, get: value == "rotary",
    type=bool,
)
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_DTYPE = Alias(
    "train.precision",
    lambda value, get: _DTYPES.get(value, value),
    lambda value, get: {ours: theirs for theirs, ours in _DTYPES.items()}.get(value, value),
    type=str,
)
HEADS = Alias("model.num_attention_heads", also=("model.num_key_value_heads",))
_INTERMEDIATE = Alias(
    "model.intermediate_size", lambda value, get: 4 * get("model.hidden_size") if value == -1 else value
)
_MIN_LR = Alias(
    "optim.min_lr",
    lambda value, get: value * get("optim.max_lr"),
    lambda value, get: value / get("optim.max_lr"),
    type=float,
)

_LENGTH = Alias("train.eval_length", lambda value, get: None if value == -1 else value, type=int)

TRAINING: Mapping[str, Alias] = MappingProxyType(
    {
        "training.batch_size": tokens("train.total_batch_size"),
        "training.per_device_batch_size": Alias("train.batch_size", lambda value, get: 0 if value == -1 else value),
        "training.tokens": Alias("train.max_train_tokens"),
        "training.validation": Alias("train.do_val"),
        "training.validation_steps": tokens("train.max_eval_tokens"),
        "training.warmup_pct": _WARMUP,
        "optimization.warmup_pct": _WARMUP,
        "training.decay_pct": Alias("optim.wsd_decay_fraction"),
        "optimization.decay_pct": Alias("optim.wsd_decay_fraction"),
        "optimization.constant_pct": Alias("optim.wsds_constant_fraction"),
        "optimization.lr": Alias("optim.max_lr"),
        "optimization.min_lr_mult": _MIN_LR,
        "optimization.decay_lr_mult": _MIN_LR,
        "optimization.warmup_lr_mult": Alias("optim.warmup_start"),
        "optimization.beta1": Alias("optim.adam_beta1"),
        "optimization.beta2": Alias("optim.adam_beta2"),
        "optimization.eps": Alias("optim.adam_eps"),
        "optimization.muon.momentum": Alias("optim.muon_momentum"),
        "optimization.muon.beta2": Alias("optim.muon_beta2"),
        "optimization.muon.ns_steps": Alias("optim.muon_ns_steps"),
        "optimization.muon.matrix_lr_multiplier": Alias("optim.matrix_lr_mult"),
        "optimization.muon.embedding_lr_multiplier": Alias("optim.embedding_lr_mult"),
        "optimization.muon.unembedding_lr_multiplier": Alias("optim.head_lr_mult"),
        "optimization.muon.scalar_lr_multiplier": Alias("optim.scalar_lr_mult"),
        "optimization.lora.rank": Alias("lora.lora_rank"),
        "optimization.lora.alpha": Alias("lora.lora_alpha"),
        "optimization.lora.target_modules": Alias("lora.lora_targets"),
        "logging.report_interval": Alias("logging.log_every"),
        "logging.checkpoint_interval": Alias("ckpt.save_every_steps"),
        "logging.validation_interval": Alias("train.val_every_steps"),
        "logging.plots.save": Alias("logging.save_plots"),
        "eval.evaluations": Alias("train.eval_tasks"),
        "eval.length": _LENGTH,
        "eval.data_dir": Alias("train.eval_data_dir"),
        "architecture.n_layers": Alias("model.num_layer"),
        "architecture.n_layer": Alias("model.num_layer"),
        "architecture.n_embd": Alias("model.hidden_size"),
        "architecture.n_head": HEADS,
        "architecture.n_kv_head": Alias("model.num_key_value_heads"),
        "architecture.block_size": Alias("train.seq_len"),
        "architecture.layer_norm_eps": Alias("model.norm_eps"),
        "architecture.intermediate_size": _INTERMEDIATE,
        "architecture.rope": _ROPE,
        "architecture.partial_rotary_factor": Alias("model.rotary_fraction"),
        "architecture.attn_bias": Alias("model.attention_bias"),
        "architecture.dtype.activation": _DTYPE,
        "architecture.backbone.weights": Alias("ckpt.init_from"),
        "model.n_layer": Alias("model.num_layer"),
        "model.n_embd": Alias("model.hidden_size"),
        "model.n_head": HEADS,
    }
)
