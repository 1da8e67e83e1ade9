"""The rules on a run's options: on single values and on those that must fit each other, whatever the world size."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import TYPE_CHECKING

from tinytron.distributed.layout import divisors
from tinytron.distributed.sequence_parallel.ulysses import check_sep_size
from tinytron.errors import ConfigError
from tinytron.interop import check_repository, write_architecture
from tinytron.kernels.choice import check_model

if TYPE_CHECKING:
    from tinytron.training.config import Config


def check(config: Config) -> None:
    """Raises: ConfigError for the first rule that ``config`` breaks."""
    _check_ranges(config)
    if config.train.seq_len > config.model.block_size:
        # Learned positions of weights that are there already cannot become more.
        fixed = config.model.position_type == "learned" and config.ckpt.init_from is not None
        fitting = f"--seq_len {config.model.block_size}" if fixed else f"--block_size {config.train.seq_len}"
        raise ConfigError(
            f"--seq_len {config.train.seq_len} exceeds --block_size {config.model.block_size}; use {fitting}"
        )
    if config.train.total_batch_size % config.train.seq_len:
        raise ConfigError(
            f"--total_batch_size {config.train.total_batch_size} (tokens) must be a multiple of --seq_len "
            f"{config.train.seq_len}; use {round_to(config.train.total_batch_size, config.train.seq_len)}"
        )
    heads, kv_heads = config.model.num_attention_heads, config.model.num_key_value_heads
    check_sep_size(config.parallel.sep_size, heads, kv_heads, config.train.seq_len)
    ep = config.parallel.ep_size or config.parallel.sep_size
    if config.model.use_moe and config.model.num_experts % ep:
        raise ConfigError(
            f"--ep_size {ep} must divide --num_experts {config.model.num_experts}; "
            f"use one of {divisors(config.model.num_experts)}"
        )
    if config.ckpt.init_from is not None and config.ckpt.resume_path is not None:
        raise ConfigError(
            f"--init_from {config.ckpt.init_from} begins a new run and --resume_path {config.ckpt.resume_path} continues "
            "one; drop one of them"
        )
    _check_exports(config)
    _check_kernels(config)
    if config.parallel.grad_reduce_dtype != "fp32" and not config.parallel.use_distributed_optimizer:
        raise ConfigError(
            f"--grad_reduce_dtype {config.parallel.grad_reduce_dtype} needs --use_distributed_optimizer: without it "
            "gradients are summed in place; use fp32"
        )


def _check_exports(config: Config) -> None:
    ckpt = config.ckpt
    if ckpt.hub_model_id is not None:
        check_repository(ckpt.hub_model_id)
        if not ckpt.export_every:
            raise ConfigError(
                f"--hub_model_id {ckpt.hub_model_id} uploads exports, and there are none; "
                f"use --export_every {ckpt.save_every_steps or 1000}"
            )
    if not ckpt.export_every:
        return
    if not ckpt.do_save:
        raise ConfigError(f"--export_every {ckpt.export_every} exports checkpoints; drop it, or --no-do_save")
    if ckpt.save_every_steps and ckpt.export_every % ckpt.save_every_steps:
        raise ConfigError(
            f"--export_every {ckpt.export_every} must be a multiple of --save_every_steps {ckpt.save_every_steps}: what is "
            f"exported is a checkpoint; use {round_to(ckpt.export_every, ckpt.save_every_steps)}"
        )
    try:
        write_architecture(config.model)
    except ConfigError as error:
        raise ConfigError(f"--export_every {ckpt.export_every}: {error}") from error


def _check_kernels(config: Config) -> None:
    """Rules on optional kernels, wherever they run."""
    train, model = config.train, config.model
    kernels = train.kernels
    check_model(kernels, train.precision, head_dim=model.resolved_head_dim, dropout=model.dropout)
    if kernels.liger:
        if train.use_compile:
            raise ConfigError("--use_liger_kernel and --use_compile both fuse norms and SwiGLU; drop one of them")
        if model.norm_type != "rms" and model.mlp_type != "swiglu":
            raise ConfigError(
                f"--use_liger_kernel has nothing for --norm_type {model.norm_type} with --mlp_type {model.mlp_type}; "
                "use rms or swiglu, or drop the flag"
            )
    experts = model.use_moe and not train.use_compile
    if kernels.triton and kernels.cut and not experts and config.optim.optimizer != "muon":
        why = "--use_compile fuses the experts' sums" if model.use_moe else "there are no experts"
        raise ConfigError(
            "--use_triton_kernels has nothing to do: --use_cut_cross_entropy computes the loss, --optimizer "
            f"{config.optim.optimizer} has no symmetric products, and {why}; drop one of the two flags"
        )
    if kernels.cut and train.z_loss_coef:
        raise ConfigError(
            f"--z_loss_coef {train.z_loss_coef} does not go with --use_cut_cross_entropy, which does not give the "
            "log-partition; use 0, or drop the flag"
        )
    if kernels.cut and config.seed.deterministic:
        raise ConfigError(
            "--deterministic does not go with --use_cut_cross_entropy, which adds gradients up in no fixed order; drop one "
            "of them"
        )


def round_to(value: int, unit: int) -> int:
    """The multiple of ``unit`` at or below ``value``, at least one."""
    return max(unit, value // unit * unit)


def _check_ranges(config: Config) -> None:
    """Rules on single values."""
    train, optim = config.train, config.optim
    at_least = [
        (1, train, ("total_batch_size", "batch_size", "seq_len", "max_epochs")),
        (1, config.data, ("mock_data_num_samples",)),
        (1, config.parallel, ("sep_size",)),
        (1, config.logging, ("log_every",)),
        (1, train, ("spike_window",)),
        (0, train, ("val_every_steps", "eval_every", "grad_clip_value", "z_loss_coef")),
        (0, train, ("spike_sigma", "replica_check_every", "step_timeout")),
        (0, optim, ("max_lr", "min_lr", "warmup_steps", "weight_decay", "adam_eps")),
        (1, optim, ("muon_ns_steps",)),
        (0, optim, ("matrix_lr_mult", "embedding_lr_mult", "head_lr_mult", "scalar_lr_mult")),
        (0, config.parallel, ("ep_size",)),
        (0, config.data, ("num_workers", "prefetch")),
        (0, config.ckpt, ("save_every_steps", "keep_last", "keep_every", "export_every")),
    ]
    for bound, section, names in at_least:
        for name in names:
            if not getattr(section, name) >= bound:
                raise ConfigError(f"--{name} {getattr(section, name)} must be at least {bound}")
    for section, name, bound in (
        (train, "max_steps", 1),
        (train, "max_train_tokens", 1),
        (train, "max_eval_tokens", 1),
        (config.data, "eot_id", 0),
        (config.logging, "dry_run_world_size", 1),
    ):
        if (value := getattr(section, name)) is not None and value < bound:
            raise ConfigError(f"--{name} {value} must be at least {bound}")
    if (processes := config.logging.dry_run_world_size) is not None and not config.logging.dry_run:
        raise ConfigError(f"--dry_run_world_size {processes} is for --dry_run; add that, or drop it")
    if optim.min_lr > optim.max_lr:
        raise ConfigError(f"--min_lr {optim.min_lr} exceeds --max_lr {optim.max_lr}; use at most {optim.max_lr}")
    for name in ("adam_beta1", "adam_beta2", "muon_momentum", "muon_beta2"):
        if not 0.0 <= getattr(optim, name) < 1.0:
            raise ConfigError(f"--{name} {getattr(optim, name)} must be in [0, 1); use 0.9")
    if not 0.0 < optim.wsd_decay_fraction <= 1.0:
        raise ConfigError(f"--wsd_decay_fraction {optim.wsd_decay_fraction} must be in (0, 1]; use 0.1")
    if train.split_rate is not None and not 0.0 < train.split_rate <= 1.0:
        raise ConfigError(f"--split_rate {train.split_rate} must be in (0, 1]; use 0.99")
    if not 0.0 < config.parallel.bucket_size_mb < math.inf:
        raise ConfigError(f"--bucket_size_mb {config.parallel.bucket_size_mb} must be positive; use 64")
    if not 0 <= config.seed.seed < 2**63:
        raise ConfigError(f"--seed {config.seed.seed} must be in 0..2^63 - 1; use 1337")
    if (train.eval_every or train.eval_tokenizer) and not train.eval_tasks:
        flag = "eval_every" if train.eval_every else "eval_tokenizer"
        raise ConfigError(f"--{flag} {getattr(train, flag)} needs tasks; use --eval_tasks tasks.jsonl, or drop it")
    stems = [PurePath(task).stem for task in train.eval_tasks]
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise ConfigError(f"--eval_tasks has two files called {min(twice)}, one name in the log; rename one")
    first, last = train.steps_to_profile
    if not 1 <= first <= last:
        raise ConfigError(f"--steps_to_profile {first} {last} must be 1 <= first <= last; use 15 20")
    if not config.logging.exp_name or "/" in config.logging.exp_name:
        raise ConfigError(f"--exp_name {config.logging.exp_name!r} must be a plain folder name; use gpt")
