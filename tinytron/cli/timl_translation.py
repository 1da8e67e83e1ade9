"""The meaning of timl's flags in our options, where one flag is not one option."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tinytron.distributed.layout import divisors
from tinytron.errors import ConfigError
from tinytron.training.hf_model import architecture
from tinytron.training.sections import LoggingConfig

Values = Mapping[str, Any]  # timl's flags by name
Options = dict[str, Any]  # ours by path


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
_BACKENDS = MappingProxyType({"eager": "math", "sdpa": "sdpa", "flash_attention_2": "flash"})
# Settings of liger-kernel by their value here: the parts that Tinytron's own model has.
LIGER_PARTS = MappingProxyType(
    {
        "rms_norm": True,
        "swiglu": True,
        "rope": False,
        "layer_norm": False,
        "geglu": False,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
)


class _Scheduler(NamedTuple):
    """A scheduler of transformers: ours of the same shape, and the settings that it takes."""

    ours: str
    settings: tuple[str, ...] = ()


SCHEDULERS: Mapping[str, _Scheduler] = MappingProxyType(
    {
        "linear": _Scheduler("linear"),
        "cosine": _Scheduler("cosine", ("num_cycles",)),
        "cosine_with_min_lr": _Scheduler("cosine", ("min_lr", "min_lr_rate", "num_cycles")),
        "cosine_warmup_with_min_lr": _Scheduler("cosine", ("min_lr", "min_lr_rate", "num_cycles")),
        "cosine_with_restarts": _Scheduler("cosine_with_restarts", ("num_cycles",)),
        "polynomial": _Scheduler("polynomial", ("power", "lr_end")),
        "constant": _Scheduler("constant"),
        "constant_with_warmup": _Scheduler("constant"),
        "inverse_sqrt": _Scheduler("inverse_sqrt", ("timescale",)),
        "warmup_stable_decay": _Scheduler(
            "wsd", ("num_decay_steps", "decay_type", "min_lr_ratio", "warmup_type", "num_cycles")
        ),
    }
)
_DECAYS = MappingProxyType({"linear": "linear", "cosine": "cosine", "1-sqrt": "sqrt"})


def model_options(name: str, block_size: int) -> Options:
    """The model's options for ``--model_name name`` (see ``training/hf_model.py``). Raises: ConfigError for a model that is
    not known, or shorter than ``block_size`` tokens."""
    options, foreign = architecture(name, "--model_name")
    if foreign:
        return {"ckpt.hf_model": name} | {f"model.{key}": options[key] for key in ("vocab_size", "block_size")}
    if block_size > options["block_size"]:
        if options["position_type"] == "learned":
            raise ConfigError(
                f"--block_size {block_size} exceeds the {options['block_size']} positions of --model_name {name}; use "
                f"--block_size {options['block_size']}"
            )
        options["block_size"] = block_size
    return {f"model.{key}": value for key, value in options.items()}


def check_batches(values: Values, world_size: int) -> None:
    """Check that the batch sizes divide, and that ``--gradient_accumulation_steps`` agrees. Raises: ConfigError."""
    batch, micro = values["train_batch_size"], values["per_device_train_batch_size"]
    for name in ("block_size", "train_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size"):
        if values[name] < 1:
            raise ConfigError(f"--{name} {values[name]} must be at least 1; use 8")
    if batch % (micro * world_size):
        fitting = [size for size in divisors(batch) if batch % (size * world_size) == 0]
        hint = f"use a --per_device_train_batch_size of {fitting}" if fitting else f"use {world_size * micro}"
        raise ConfigError(
            f"--train_batch_size {batch} must be a multiple of --per_device_train_batch_size {micro} x {world_size} "
            f"processes; {hint}"
        )
    steps, asked = batch // (micro * world_size), values.get("gradient_accumulation_steps", None)
    if asked is not None and asked != steps:
        raise ConfigError(
            f"--gradient_accumulation_steps {asked} disagrees with --train_batch_size {batch} / "
            f"(--per_device_train_batch_size {micro} x {world_size} processes) = {steps}; use {steps}, or drop it"
        )


def check_forward(values: Values) -> None:
    """Raises: ConfigError for arguments of a forward pass that takes none."""
    if forward := values.get("forward_kwargs"):
        raise ConfigError(
            f"--forward_kwargs {next(iter(forward))}: Tinytron's own model takes no further arguments; use {{}}, or "
            "give them to tinytron.timl.Trainer with a model of your own"
        )


def check_packages(values: Values) -> None:
    """Check the settings of liger-kernel and cut-cross-entropy. Raises: ConfigError."""
    for key, value in (values.get("liger_kernel_kwargs") or {}).items():
        if key not in LIGER_PARTS:
            raise ConfigError(f"--liger_kernel_kwargs: {key} is unknown; use {', '.join(LIGER_PARTS)}")
        if value is not LIGER_PARTS[key]:
            raise ConfigError(
                f"--liger_kernel_kwargs: {key} is always {str(LIGER_PARTS[key]).lower()} here, where liger-kernel computes "
                "RMSNorm and SwiGLU; leave it out"
            )
    for key, value in (values.get("cut_cross_entropy_kwargs") or {}).items():
        if (key, value) not in (("impl", "cce"), ("reduction", "mean")):
            raise ConfigError(
                f"--cut_cross_entropy_kwargs: {key} {value} is not available here; leave it out, or use impl cce"
            )


def schedule_options(values: Values) -> Options:
    """The learning rate. Raises: ConfigError for an unknown scheduler or setting, and for one that we do not have."""
    name, settings = values["lr_scheduler_type"], values.get("lr_scheduler_kwargs") or {}
    if (scheduler := SCHEDULERS.get(name)) is None:
        raise ConfigError(f"--lr_scheduler_type {name} is not available; use one of {', '.join(SCHEDULERS)}")
    for key, value in settings.items():
        if key not in scheduler.settings:
            has = f"it has {', '.join(scheduler.settings)}" if scheduler.settings else "it has none"
            raise ConfigError(f"--lr_scheduler_kwargs: {key} is not a setting of {name}; {has}")
        if not key.endswith("_type") and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"--lr_scheduler_kwargs: {key} {value} must be a number; use 1e-5")
    options: Options = {"optim.lr_schedule": scheduler.ours, "optim.min_lr": _min_lr(name, settings, values)}
    steps = 0 if name == "constant" else values["warmup_steps"]
    ratio = 0.0 if steps > 0 or name == "constant" else values["warmup_ratio"]
    options |= {"optim.warmup_steps": max(0, steps), "optim.warmup_ratio": ratio}
    if name == "polynomial":
        options["optim.lr_power"] = float(settings.get("power", 1.0))
    elif name == "cosine_with_restarts":
        if (cycles := settings.get("num_cycles", 1)) != int(cycles):
            raise ConfigError(f"--lr_scheduler_kwargs: num_cycles {cycles} of {name} must be a whole number; use 1")
        options["optim.lr_cycles"] = int(cycles)
    elif settings.get("num_cycles", 0.5) != 0.5:
        raise ConfigError(
            f"--lr_scheduler_kwargs: num_cycles {settings['num_cycles']} of {name} must be 0.5, half a wave; use "
            "--lr_scheduler_type cosine_with_restarts for several"
        )
    if (scale := settings.get("timescale")) is not None and (ratio or scale != (steps or 10_000)):
        raise ConfigError(
            f"--lr_scheduler_kwargs: timescale {scale} must be the warm-up, or 10000 without one; use --warmup_steps "
            f"{scale}"
        )
    return options | (_stable_options(settings, values) if scheduler.ours == "wsd" else {})


def _min_lr(name: str, settings: Values, values: Values) -> float:
    """The rate at the end of the decay."""
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and ("min_lr" in settings) == (
        "min_lr_rate" in settings
    ):
        raise ConfigError(
            f"""--lr_scheduler_type {name} needs one of min_lr and min_lr_rate; use '{{"min_lr": 1e-5}}'"""
        )
    rate = settings.get("min_lr_rate", settings.get("min_lr_ratio", 0.0))
    default = 1e-7 if name == "polynomial" else rate * values["learning_rate"]
    return float(settings.get("min_lr", settings.get("lr_end", default)))


def _stable_options(settings: Values, values: Values) -> Options:
    """The decay of warmup_stable_decay."""
    steps, last = settings.get("num_decay_steps"), _last_step(values)
    if steps is None or last is None or not 0 < steps <= last:
        raise ConfigError(
            "--lr_scheduler_type warmup_stable_decay needs num_decay_steps, at most the steps of the run, and "
            """--max_train_steps or --max_train_tokens; use '{"num_decay_steps": 100}' --max_train_steps 1000"""
        )
    if (decay := settings.get("decay_type", "cosine")) not in _DECAYS:
        raise ConfigError(f"--lr_scheduler_kwargs: decay_type {decay} is unknown; use one of {', '.join(_DECAYS)}")
    if (warmup := settings.get("warmup_type", "linear")) != "linear":
        raise ConfigError(f"--lr_scheduler_kwargs: warmup_type {warmup} is not available; use linear")
    return {"optim.wsd_decay_fraction": steps / last, "optim.wsd_decay_shape": _DECAYS[decay]}


def _last_step(values: Values) -> int | None:
    """The smaller of the two limits of a run, in steps; ``None`` without a limit."""
    limits = [values.get("max_train_steps")]
    if (tokens := values.get("max_train_tokens")) is not None:
        limits.append(math.ceil(tokens / (values["train_batch_size"] * values["block_size"])))
    return min((limit for limit in limits if limit is not None), default=None)


def length_options(values: Values) -> Options:
    """The length of a run for which both limits are given: timl takes the smaller one, where Tinytron takes the steps."""
    if values.get("max_train_steps") is None or values.get("max_train_tokens") is None:
        return {}
    return {"train.max_steps": _last_step(values), "train.max_train_tokens": None}


def run_options(values: Values, world_size: int) -> Options:
    """Intervals, checkpoints and uploads, validation, precision and attention. Raises: ConfigError."""
    if values["optim"] not in OPTIMIZERS:
        raise ConfigError(f"--optim {values['optim']} is not available; use one of {', '.join(OPTIMIZERS)}")
    attention = values.get("attn_implementation")
    if attention is not None and attention not in _BACKENDS:
        raise ConfigError(f"--attn_implementation {attention} is not available; use one of {', '.join(_BACKENDS)}")
    log, evaluate = values["log_every_steps"], values["eval_every_steps"]
    per_batch = values["per_device_eval_batch_size"] * world_size * values["block_size"]
    limits = [values.get("max_eval_tokens"), values.get("max_eval_steps") and values["max_eval_steps"] * per_batch]
    return {
        "logging.log_every": log if log > 0 else 10**9,
        "train.do_val": evaluate > 0,
        "train.val_every_steps": max(0, evaluate),
        "train.max_eval_tokens": min((limit for limit in limits if limit is not None), default=None),
        "train.precision": "bf16" if values["bf16"] else "fp32",
        "train.attn_backend": "auto" if attention is None else _BACKENDS[attention],
        **_saving_options(values),
        **_wandb_options(values),
    }


def _wandb_options(values: Values) -> Options:
    project, name = values.get("wandb_project"), values.get("wandb_run_name")
    if project is None and name is None:
        return {}
    return {
        "logging.loggers": [*LoggingConfig().loggers, "wandb"],
        "logging.wandb_project": project or Path(values["output_dir"]).name,
        "logging.wandb_run_name": name,
    }


def _saving_options(values: Values) -> Options:
    every, repository = values["save_every_steps"], values.get("hub_model_id")
    if values["push_to_hub"] and repository is None:
        raise ConfigError("--push_to_hub true needs a repository; give --hub_model_id owner/name")
    if values["push_to_hub"] and every <= 0 and not values["debug"]:
        raise ConfigError(
            f"--push_to_hub true uploads checkpoints, and --save_every_steps {every} makes none; use 1000, or push_to_hub "
            "false"
        )
    if every <= 0 or values["debug"]:
        return {"ckpt.do_save": False}
    return {
        "ckpt.save_every_steps": every,
        "ckpt.save_at_start": True,
        "ckpt.export_every": every,
        "ckpt.export_dir": values["output_dir"],
        "ckpt.hub_model_id": repository if values["push_to_hub"] else None,
    }
