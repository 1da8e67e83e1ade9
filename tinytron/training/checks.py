"""Rules about options that must fit each other, for any world size. sections.py has the bounds of single values."""

from __future__ import annotations

import itertools
from pathlib import PurePath

from tinytron.distributed.layout import divisors
from tinytron.distributed.sequence_parallel.ulysses import check_sep_size
from tinytron.errors import ConfigError
from tinytron.kernels.choice import check_model
from tinytron.metrics.sinks import SINKS
from tinytron.model.config import ModelConfig
from tinytron.training.lora_section import LoraConfig, check_lora
from tinytron.training.sections import (
    CkptConfig,
    DataConfig,
    LoggingConfig,
    OptimConfig,
    ParallelConfig,
    SeedConfig,
    TrainingConfig,
)
from tinytron.utils.flags import nearest
from tinytron.utils.remote import is_remote
from tinytron.utils.training import round_to


def check(
    *,
    train: TrainingConfig,
    model: ModelConfig,
    optim: OptimConfig,
    lora: LoraConfig,
    data: DataConfig,
    parallel: ParallelConfig,
    ckpt: CkptConfig,
    logging: LoggingConfig,
    seed: SeedConfig,
) -> None:
    """Raises: ConfigError for the first rule that the sections of a run break."""
    _check_logging(logging)
    _check_rates(optim)
    _check_evaluation(train)
    _check_spikes(train, ckpt)
    if train.preempt_url is not None and not train.preempt_url.startswith(("http://", "https://")):
        raise ConfigError(
            f"--preempt_url {train.preempt_url} must begin with http:// or https://; use --preempt_file for a file"
        )
    if data.val_dataset_path is not None and (data.dataset_path is None or data.use_mock_data):
        raise ConfigError(
            f"--val_dataset_path {data.val_dataset_path} needs shards to train on; give --dataset_path too, or drop it"
        )
    _check_lengths(train, model, ckpt)
    _check_batch_warmup(train, logging)
    _check_seq_warmup(train, parallel, logging)
    _check_layout(parallel, train, model)
    if ckpt.init_from is not None and ckpt.resume_path is not None:
        raise ConfigError(
            f"--init_from {ckpt.init_from} begins a new run and --resume_path {ckpt.resume_path} continues "
            "one; drop one of them"
        )
    check_lora(lora, optim.optimizer)
    _check_exports(ckpt)
    _check_kernels(train, model, optim, seed)


def _check_logging(logging: LoggingConfig) -> None:
    if (processes := logging.dry_run_world_size) is not None and not logging.dry_run:
        raise ConfigError(f"--dry_run_world_size {processes} needs --dry_run; add that flag, or drop this one")
    if not logging.exp_name or "/" in logging.exp_name:
        raise ConfigError(f"--exp_name {logging.exp_name!r} must be a plain folder name; use gpt")
    for name in logging.loggers:
        if name not in SINKS:
            raise ConfigError(f"--loggers {name} is not one of {', '.join(SINKS)}{nearest(name, SINKS)}")
    for option in ("wandb_project", "wandb_run_name", "wandb_group", "wandb_mode"):
        if (value := getattr(logging, option)) is not None and "wandb" not in logging.loggers:
            loggers = " ".join(logging.loggers)
            raise ConfigError(f"--{option} {value} needs the logger wandb; use --loggers {loggers} wandb, or drop it")


def _check_rates(optim: OptimConfig) -> None:
    if optim.min_lr > optim.max_lr:
        raise ConfigError(f"--min_lr {optim.min_lr} exceeds --max_lr {optim.max_lr}; use at most {optim.max_lr}")
    _check_weight_decay(optim)
    given = " ".join(map(str, optim.lr_stages))
    if optim.lr_schedule != "cosine_rewarm":
        if optim.lr_stages:
            raise ConfigError(
                f"--lr_stages {given} is for --lr_schedule cosine_rewarm, not {optim.lr_schedule}; drop one of them"
            )
        return
    if not optim.lr_stages:
        raise ConfigError("--lr_schedule cosine_rewarm needs the fractions at which stages begin; use --lr_stages 0.5")
    if any(not low < high for low, high in itertools.pairwise((0.0, *optim.lr_stages, 1.0))):
        raise ConfigError(f"--lr_stages {given} must be increasing fractions between 0 and 1; use 0.5 0.75")
    if optim.min_lr > optim.rewarm_lr:
        raise ConfigError(
            f"--min_lr {optim.min_lr} exceeds --rewarm_lr {optim.rewarm_lr}; use at most {optim.rewarm_lr}"
        )


def _check_weight_decay(optim: OptimConfig) -> None:
    kind = optim.weight_decay_schedule
    if kind != "constant" and optim.weight_decay == 0:
        raise ConfigError(f"--weight_decay_schedule {kind} has no decay to schedule at --weight_decay 0; use 0.1")
    if kind == "lr" and optim.max_lr == 0:
        raise ConfigError("--weight_decay_schedule lr follows the learning rate, but --max_lr is 0; use 0.001")
    if kind in ("constant", "lr") and optim.weight_decay_end:
        raise ConfigError(
            f"--weight_decay_end {optim.weight_decay_end} is not reached by --weight_decay_schedule {kind}; use linear or "
            "cosine, or drop it"
        )


def _check_spikes(train: TrainingConfig, ckpt: CkptConfig) -> None:
    if train.spike_action == "skip":
        return
    if not train.spike_sigma:
        raise ConfigError(
            f"--spike_action {train.spike_action} needs a limit beyond which a step is a spike; use --spike_sigma 6"
        )
    if train.spike_action == "rollback" and (train.debug or not ckpt.do_save):
        off = "--debug" if train.debug else "--no-do_save"
        raise ConfigError(
            f"--spike_action rollback needs checkpoints to go back to; drop {off}, or use --spike_action skip"
        )


def _check_evaluation(train: TrainingConfig) -> None:
    for flag in ("eval_every", "eval_tokenizer", "eval_length", "eval_data_dir"):
        if getattr(train, flag) != getattr(TrainingConfig, flag) and not train.eval_tasks:
            raise ConfigError(f"--{flag} {getattr(train, flag)} needs tasks; use --eval_tasks tasks.jsonl, or drop it")
    stems = [PurePath(task).stem for task in train.eval_tasks]
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise ConfigError(f"--eval_tasks has two files called {min(twice)}, and the log goes by file name; rename one")
    first, last = train.steps_to_profile
    if not 1 <= first <= last:
        raise ConfigError(f"--steps_to_profile {first} {last} must be 1 <= first <= last; use 15 20")


def _check_lengths(train: TrainingConfig, model: ModelConfig, ckpt: CkptConfig) -> None:
    if train.seq_len > model.block_size:
        # The learned positions of existing weights cannot be extended.
        fixed = model.position_type == "learned" and ckpt.init_from is not None
        fitting = f"--seq_len {model.block_size}" if fixed else f"--block_size {train.seq_len}"
        raise ConfigError(f"--seq_len {train.seq_len} exceeds --block_size {model.block_size}; use {fitting}")
    if train.total_batch_size % train.seq_len:
        raise ConfigError(
            f"--total_batch_size {train.total_batch_size} (tokens) must be a multiple of --seq_len "
            f"{train.seq_len}; use {round_to(train.total_batch_size, train.seq_len)}"
        )


def _check_batch_warmup(train: TrainingConfig, logging: LoggingConfig) -> None:
    sizes = train.batch_warmup_sizes
    _check_ends("batch_warmup_sizes", sizes, "batch_warmup_ends", train.batch_warmup_ends, "65536 131072")
    for tokens in sizes:
        if tokens < 1 or tokens % train.seq_len:
            raise ConfigError(
                f"--batch_warmup_sizes {tokens} (tokens) must be a multiple of --seq_len {train.seq_len}; use "
                f"{round_to(tokens, train.seq_len)}"
            )
    if sizes and logging.moe_route_trace:
        raise ConfigError(
            "--moe_route_trace numbers the rows of a constant global batch, and --batch_warmup_sizes changes it; drop one "
            "of them"
        )


def _check_seq_warmup(train: TrainingConfig, parallel: ParallelConfig, logging: LoggingConfig) -> None:
    lengths, sep = train.seq_warmup_lens, parallel.sep_size
    _check_ends("seq_warmup_lens", lengths, "seq_warmup_ends", train.seq_warmup_ends, "256 1024")
    for length in lengths:
        if length < 1 or train.seq_len % length or length % sep:
            fitting = [n for n in divisors(train.seq_len) if n % sep == 0]
            shared = f", and a multiple of --sep_size {sep}" if sep > 1 else ""
            raise ConfigError(
                f"--seq_warmup_lens {length} must divide --seq_len {train.seq_len}{shared}; use one of {fitting}"
            )
    if lengths and logging.moe_route_trace:
        raise ConfigError(
            "--moe_route_trace numbers rows of one length, and --seq_warmup_lens changes it; drop one of them"
        )


def _check_ends(name: str, values: tuple[int, ...], name_of_ends: str, ends: tuple[int, ...], works: str) -> None:
    """The rules about ``values`` of the first steps and the numbers of steps after which each ends."""
    given = " ".join(map(str, ends))
    if len(values) != len(ends):
        what = "sizes" if name == "batch_warmup_sizes" else "lengths"
        raise ConfigError(
            f"--{name} has {len(values)} {what}, and --{name_of_ends} {len(ends)} numbers of steps; give one for each "
            f"{what[:-1]}, such as --{name} {works} --{name_of_ends} 100 300"
        )
    if any(not low < high for low, high in itertools.pairwise((0, *ends))):
        raise ConfigError(f"--{name_of_ends} {given} must be increasing numbers of steps; use 100 300")


def _check_layout(parallel: ParallelConfig, train: TrainingConfig, model: ModelConfig) -> None:
    check_sep_size(parallel.sep_size, model.num_attention_heads, model.num_key_value_heads, train.seq_len)
    ep = parallel.ep_size or parallel.sep_size
    if model.use_moe and model.num_experts % ep:
        raise ConfigError(
            f"--ep_size {ep} must divide --num_experts {model.num_experts}; use one of {divisors(model.num_experts)}"
        )
    if parallel.grad_reduce_dtype != "fp32" and not parallel.use_distributed_optimizer:
        raise ConfigError(
            f"--grad_reduce_dtype {parallel.grad_reduce_dtype} needs --use_distributed_optimizer: without it "
            "gradients are summed in place; use fp32"
        )


def _check_exports(ckpt: CkptConfig) -> None:
    if ckpt.save_at_start and not ckpt.do_save:
        raise ConfigError("--save_at_start saves, and --no-do_save does not; drop one of them")
    if ckpt.export_dir is not None and is_remote(ckpt.export_dir):
        raise ConfigError(
            f"--export_dir {ckpt.export_dir} is a URL; give a local folder, or drop it: with a URL as --log_dir the "
            "exports in the run's folder are copied there"
        )
    if not ckpt.export_every:
        if ckpt.hub_model_id is not None:
            raise ConfigError(
                f"--hub_model_id {ckpt.hub_model_id} uploads exports, but there are none; "
                f"use --export_every {ckpt.save_every_steps or 1000}"
            )
        if ckpt.export_dir is not None:
            raise ConfigError(
                f"--export_dir {ckpt.export_dir} is for exports, and there are none; "
                f"use --export_every {ckpt.save_every_steps or 1000}, or drop it"
            )
        return
    if not ckpt.do_save:
        raise ConfigError(f"--export_every {ckpt.export_every} exports checkpoints; drop it, or --no-do_save")
    if ckpt.save_every_steps and ckpt.export_every % ckpt.save_every_steps:
        raise ConfigError(
            f"--export_every {ckpt.export_every} must be a multiple of --save_every_steps {ckpt.save_every_steps}, because "
            "checkpoints are exported; use "
            f"{round_to(ckpt.export_every, ckpt.save_every_steps)}, or --save_every_steps {ckpt.export_every}"
        )


def _check_kernels(train: TrainingConfig, model: ModelConfig, optim: OptimConfig, seed: SeedConfig) -> None:
    """Rules about optional kernels, for any device."""
    kernels = train.kernels
    check_model(kernels, train.precision, head_dim=model.resolved_head_dim, dropout=model.dropout)
    if kernels.liger:
        if train.use_compile:
            raise ConfigError("--use_liger_kernel and --use_compile both fuse norms and SwiGLU; drop one of them")
        if model.norm_type != "rms" and model.mlp_type != "swiglu":
            raise ConfigError(
                f"--use_liger_kernel does nothing for --norm_type {model.norm_type} with --mlp_type {model.mlp_type}; "
                "use rms or swiglu, or drop the flag"
            )
    experts = model.use_moe and not train.use_compile
    if kernels.triton and kernels.cut and not experts and optim.optimizer != "muon":
        why = "--use_compile fuses the experts' sums" if model.use_moe else "there are no experts"
        raise ConfigError(
            "--use_triton_kernels does nothing here: --use_cut_cross_entropy computes the loss, --optimizer "
            f"{optim.optimizer} has no symmetric products, and {why}; drop one of the two flags"
        )
    if kernels.cut and train.z_loss_coef:
        raise ConfigError(
            f"--z_loss_coef {train.z_loss_coef} cannot be used with --use_cut_cross_entropy, which does not return the "
            "log-partition; use 0, or drop the flag"
        )
    if kernels.cut and seed.deterministic:
        raise ConfigError(
            "--deterministic cannot be used with --use_cut_cross_entropy, which adds gradients in no fixed order; drop one "
            "of them"
        )
