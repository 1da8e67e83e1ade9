"""The command line of timl (``scripts/pretrain_model.py``): its flags, defaults and units on top of our options.

torchrun --standalone --nproc_per_node=1 scripts/pretrain_model.py --model_name gpt2 --output_dir models/gpt2_c4 \\
    --train_file_pattern "data/gpt2_c4/train_*.bin" --eval_file_pattern "data/gpt2_c4/validation_*.bin" ...

Trains a model from scratch. Plain python is one process, torchrun and tinytron launch are several. Batches are counted in
sequences. Checkpoints that transformers opens are in OUTPUT_DIR/step<N>. Interrupted? The same command continues.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tinytron.cli import timl_translation as translation
from tinytron.cli.front_end import Setting, Settings, aliases_of, options_of, read_flags, with_defaults
from tinytron.config import MISSING
from tinytron.jobs.aliases import Alias, tokens
from tinytron.jobs.training import TrainingJob
from tinytron.training import Config, Trainer, build_config, parse_args
from tinytron.training.config_files import words_of
from tinytron.training.world import place_in_world
from tinytron.utils.flags import Parser

REDACTED = "***"
WORKS = (
    '--model_name gpt2 --output_dir models/gpt2 --train_file_pattern "data/train_*.bin" --eval_file_pattern '
    '"data/validation_*.bin" --block_size 1024 --train_batch_size 512 --per_device_train_batch_size 32 '
    "--per_device_eval_batch_size 32 --learning_rate 6e-4 --adam_beta1 0.9 --adam_beta2 0.95 --adam_epsilon 1e-8 "
    "--lr_scheduler_type cosine --save_every_steps 1000 --eval_every_steps 100"
)


def json_object(text: str) -> dict[str, Any]:
    """A JSON object such as ``{"min_lr": 1e-5}``. Raises: argparse.ArgumentTypeError."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""{text!r} is not a JSON object like '{{"min_lr": 1e-5}}'""")
    return value


def _own(kind: Any, default: Any, help: str) -> Setting:
    """A flag that translation.py turns into options."""
    return Setting(None, kind, default, help)


SETTINGS: Settings = MappingProxyType(
    {
        "model_name": _own(
            str, MISSING, "architecture: gpt2 and other known names, or the config.json of a folder or a hub name"
        ),
        "attn_implementation": _own(str, None, "eager, sdpa or flash_attention_2; default: the best one here"),
        "output_dir": _own(str, MISSING, "folder of the checkpoints step<N> and of the run"),
        "train_file_pattern": Setting(Alias("data.dataset_path"), str, MISSING, "token shards to train on"),
        "eval_file_pattern": Setting(Alias("data.val_dataset_path"), str, MISSING, "token shards to validate on"),
        "block_size": Setting(Alias("train.seq_len"), int, MISSING, "length of a training sequence [tokens]"),
        "train_batch_size": Setting(
            tokens("train.total_batch_size"), int, MISSING, "batch of one step, of all processes [sequences]"
        ),
        "per_device_train_batch_size": Setting(
            Alias("train.batch_size"), int, MISSING, "micro-batch of a process [sequences]"
        ),
        "per_device_eval_batch_size": _own(
            int, MISSING, "counts the tokens of max_eval_steps; evaluation uses the micro-batch of training [sequences]"
        ),
        "gradient_accumulation_steps": _own(int, None, "follows from the three batch sizes; must agree with them"),
        "max_train_tokens": Setting(Alias("train.max_train_tokens"), int, None, "train on this many tokens"),
        "max_train_steps": Setting(
            Alias("train.max_steps"), int, None, "train for this many steps; default: once through the data"
        ),
        "max_eval_tokens": _own(int, None, "validate on this many tokens of all processes together"),
        "max_eval_steps": _own(int, None, "validate for this many batches of per_device_eval_batch_size per process"),
        "learning_rate": Setting(Alias("optim.max_lr"), float, MISSING, "peak learning rate"),
        "weight_decay": Setting(Alias("optim.weight_decay"), float, 0.0, "decay of matrices and embeddings"),
        "adam_beta1": Setting(Alias("optim.adam_beta1"), float, MISSING, "decay of the first moment"),
        "adam_beta2": Setting(Alias("optim.adam_beta2"), float, MISSING, "decay of the second moment"),
        "adam_epsilon": Setting(Alias("optim.adam_eps"), float, MISSING, "added to the root of the second moment"),
        "max_grad_norm": Setting(
            Alias("train.grad_clip_value"), float, 0.0, "clip the global gradient norm to this; 0: never"
        ),
        "optim": _own(str, "adamw_torch_fused", f"one of {', '.join(translation.OPTIMIZERS)}"),
        "lr_scheduler_type": _own(str, MISSING, f"one of {', '.join(translation.SCHEDULERS)}"),
        "lr_scheduler_kwargs": _own(json_object, None, 'settings of the scheduler as JSON: {"min_lr": 1e-5}'),
        "warmup_ratio": _own(float, 0.0, "warm-up as a part of the steps, unless warmup_steps is given"),
        "warmup_steps": _own(int, 0, "steps of warm-up"),
        "log_every_steps": _own(int, 1, "steps between reports; 0 or less: only the last step"),
        "save_every_steps": _own(int, MISSING, "steps between checkpoints, from step 0; 0 or less: none"),
        "eval_every_steps": _own(int, MISSING, "steps between validations; 0 or less: none"),
        "seed": Setting(Alias("seed.seed"), int, 0, "seed of weights and data order"),
        "full_determinism": Setting(Alias("seed.deterministic"), bool, False, "bit-identical repetition, also on GPUs"),
        "bf16": _own(bool, True, "parameters in bf16 with fp32 main weights; false: fp32"),
        "wandb_project": _own(str, None, "log to this project of Weights & Biases; default: no logging there"),
        "wandb_run_name": _own(str, None, "name of the run there; alone, the project is that of output_dir"),
        "push_to_hub": _own(bool, False, "upload every checkpoint as the revision step<N>, the last one as main too"),
        "hub_model_id": _own(str, None, "hub repository, owner/name"),
        "hub_token": _own(str, None, "token of the hub; default: HF_TOKEN, or that of hf auth login"),
        "hub_private": Setting(Alias("ckpt.hub_private"), bool, True, "make the repository, if it is new, private"),
        "forward_kwargs": _own(json_object, None, "must be empty"),
        "use_liger_kernel": Setting(
            Alias("train.use_liger_kernel"), bool, False, "RMSNorm and SwiGLU by liger-kernel, on CUDA devices"
        ),
        "liger_kernel_kwargs": _own(json_object, None, f"parts as JSON: {', '.join(translation.LIGER_PARTS)}"),
        "use_cut_cross_entropy": Setting(
            Alias("train.use_cut_cross_entropy"), bool, False, "loss by cut-cross-entropy, on CUDA devices"
        ),
        "cut_cross_entropy_kwargs": _own(json_object, None, 'settings as JSON: {"impl": "cce"} alone'),
        "debug": _own(bool, False, "one step; nothing is saved or uploaded"),
    }
)


_COMMON = (
    *("model_name", "output_dir", "train_file_pattern", "eval_file_pattern", "block_size", "train_batch_size"),
    *("per_device_train_batch_size", "max_train_steps", "learning_rate", "lr_scheduler_type", "save_every_steps"),
    *("eval_every_steps", "bf16", "push_to_hub", "hub_model_id", "debug"),
)


class PretrainModel(TrainingJob):
    """A model of transformers' architectures, as timl trains it."""

    ALIASES = aliases_of(SETTINGS)


def build_config_of(argv: Sequence[str], world_size: int = 1) -> Config:
    """The configuration that the flags ``argv`` of timl describe, for ``world_size`` processes. Raises: ConfigError."""
    parser = Parser(
        prog="python scripts/pretrain_model.py",
        usage="%(prog)s --model_name NAME [--flag value ...]",
        description=__doc__,
        common=_COMMON,
    )
    values = with_defaults(SETTINGS, read_flags(SETTINGS, argv, parser, WORKS))
    translation.check_forward(values)
    return config_of(values, translation.model_options(values["model_name"], values["block_size"]), world_size)


def config_of(values: Mapping[str, Any], model: Mapping[str, Any], world_size: int) -> Config:
    """The configuration for the settings ``values`` and the ``model``'s options by path. Raises: ConfigError."""
    translation.check_batches(values, world_size)
    translation.check_packages(values)
    direct = {name: value for name, value in values.items() if SETTINGS[name].alias is not None}
    ours = {**model} | translation.schedule_options(values) | translation.length_options(values)
    ours |= translation.run_options(values, world_size)
    chosen = options_of(PretrainModel, direct | ours, "timl")
    chosen |= {"block_size": model["model.block_size"], "log_dir": values["output_dir"], "exp_name": "run"}
    if values["debug"]:
        chosen |= {"debug": True, "max_steps": 1}
    return build_config(parse_args(words_of(chosen)))


def without_token(words: Sequence[str]) -> tuple[list[str], str | None]:
    """``words`` with the value of ``--hub_token`` made unreadable, because a run's description keeps the command; and that
    value."""
    hidden, token = list(words), None
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name != "--hub_token":
            continue
        if equals:
            hidden[i], token = f"{name}={REDACTED}", value
        elif i + 1 < len(words):
            hidden[i + 1], token = REDACTED, words[i + 1]
    return hidden, token


def main(argv: Sequence[str] | None = None) -> None:
    """Train as ``argv`` (default: the command line) says, as one process of those that the launcher started. Raises:
    TinytronError."""
    words, token = without_token(sys.argv[1:] if argv is None else argv)
    sys.argv[1:] = words
    if token:
        os.environ["HF_TOKEN"] = token  # where huggingface_hub looks
    _, world_size = place_in_world()[:2]
    config = build_config_of(words, world_size)
    Trainer(config).train()
