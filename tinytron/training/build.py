"""Builds the built-in model and optimizer from the configuration."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.param_spec import specs_of
from tinytron.distributed.zero1.distributed_optimizer import Options
from tinytron.errors import ConfigError
from tinytron.interop.causal_lm import CausalLM
from tinytron.kernels.choice import check_device
from tinytron.metrics import RoutingReport, SourceLosses, load_statistics
from tinytron.metrics.activations import ActivationStatistics
from tinytron.metrics.attention import AttentionStatistics
from tinytron.metrics.custom import MetricSet
from tinytron.metrics.norms import NormStatistics
from tinytron.metrics.positions import LossByPosition
from tinytron.metrics.step_statistics import AllStatistics, SeesLosses, StepStatistics
from tinytron.model import GPT
from tinytron.model.lora import add_adapters
from tinytron.model.protocols import HasExperts, WaitsForParameters
from tinytron.optim import Muon, Rates, Schedule, parameter_groups
from tinytron.training.config import Config, OptimConfig
from tinytron.training.derive import TrainingInfo, accumulation_steps
from tinytron.training.hf_model import build_foreign, foreign_model
from tinytron.training.run.reporter import Metric
from tinytron.utils import profile
from tinytron.utils.model import train_flops_per_token
from tinytron.utils.texts import counted
from tinytron.utils.training import DTYPES


def build_model(config: Config, state: ParallelState, cls: type[GPT] = GPT) -> GPT | CausalLM:
    """The model of this rank, compiled and with adapters if asked for: a GPT (``cls``), or the model of transformers that
    ``--hf_model`` or ``--init_from`` names. Raises: ConfigError for kernels that cannot run here, and for options that the
    model lacks."""
    adapters = config.lora.adapters
    if adapters is not None and config.ckpt.init_from is None and config.ckpt.resume_path is None:
        raise ConfigError(
            f"--lora_rank {adapters.rank} adapts weights that stay as they are, but they would be random; give "
            "--init_from, or drop --lora_rank"
        )
    model = _whole_model(config, state, cls)
    if adapters is not None:
        add_adapters(model, adapters, config.seed.seed)
    return model


def _whole_model(config: Config, state: ParallelState, cls: type[GPT]) -> GPT | CausalLM:
    if (named := foreign_model(config)) is not None:
        return build_foreign(config, *named, state)
    dtype = DTYPES[config.train.precision]
    check_device(config.train.kernels, state.device, dtype)
    gpt = cls(
        config.model,
        dtype=dtype,
        device=state.device,
        seed=config.seed.seed if config.ckpt.init_from is None else None,
        kernels=config.train.kernels,
        recompute=config.train.recompute,
        z_loss_coef=config.train.z_loss_coef,
        state=state,
    )
    if config.train.use_compile:
        # On every rank torch would warn that in-place operations must not be recomputed; there are none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        gpt.compile_blocks()
    return gpt


def optimizer_groups(optim: OptimConfig, model: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, over all trainable parameters."""
    return parameter_groups(
        model,
        specs_of(model),
        optim.weight_decay,
        decay_all=optim.decay_all,
        decay_embeddings=optim.decay_embeddings,
        muon=optim.optimizer == "muon",
        lr_mults={
            "matrix": optim.matrix_lr_mult,
            "embedding": optim.embedding_lr_mult,
            "head": optim.head_lr_mult,
            "scalar": optim.scalar_lr_mult,
        },
        layer_decay=optim.layer_lr_decay,
        width_mult=model.config.width_mult if isinstance(model, GPT) else 1.0,
    )


def muon_options(optim: OptimConfig) -> dict[str, Any]:
    """Options of Muon that it does not share with AdamW."""
    return {
        "momentum": optim.muon_momentum,
        "ns_steps": optim.muon_ns_steps,
        "normuon": optim.muon_normuon,
        "normuon_beta2": optim.muon_beta2,
        "cautious": optim.muon_cautious,
    }


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW for parameters that are not matrices, over all trainable parameters; not wrapped yet."""
    optim = config.optim
    groups, betas = optimizer_groups(optim, model), (optim.adam_beta1, optim.adam_beta2)
    if optim.optimizer != "muon":
        return torch.optim.AdamW(groups, lr=optim.max_lr, betas=betas, eps=optim.adam_eps, fused=True)
    return Muon(
        groups, lr=optim.max_lr, betas=betas, eps=optim.adam_eps, kernels=config.train.kernels, **muon_options(optim)
    )


def build_schedule(optim: OptimConfig, info: TrainingInfo) -> Schedule:
    """The learning rate as a function of the step."""
    return Schedule(
        name=optim.lr_schedule,
        max_lr=optim.max_lr,
        min_lr=optim.min_lr,
        warmup_steps=info.warmup_steps,
        max_steps=info.max_steps,
        decay_fraction=optim.wsd_decay_fraction,
        decay_shape=optim.wsd_decay_shape,
        power=optim.lr_power,
        cycles=optim.lr_cycles,
        constant_fraction=optim.wsds_constant_fraction,
        warmup_start=optim.warmup_start,
        stages=optim.lr_stages,
        rewarm_lr=optim.rewarm_lr,
    )


def build_rates(optim: OptimConfig, info: TrainingInfo) -> Rates:
    """The learning rate and the weight decay of each step."""
    return Rates(
        lr=build_schedule(optim, info),
        max_lr=optim.max_lr,
        max_steps=info.max_steps,
        decay=optim.weight_decay,
        decay_end=optim.weight_decay_end,
        decay_schedule=optim.weight_decay_schedule,
    )


def optimizer_options(config: Config, model: nn.Module) -> Options:
    """The wrapper's options, from the flags. No background gather for foreign models: their forward does not wait."""
    parallel = config.parallel
    return Options(
        shard=parallel.use_distributed_optimizer,
        bucket_size_mb=parallel.bucket_size_mb,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather and isinstance(model, WaitsForParameters),
        reduce_dtype=torch.bfloat16 if parallel.grad_reduce_dtype == "bf16" else None,
        grad_as_view=parallel.ddp_gradient_as_bucket_view,
        allow_unused=parallel.ddp_find_unused_parameters,
        loss_scaling=config.train.precision == "fp16",
        ema_decay=config.optim.ema_decay,
    )


def param_wait_hook(optimizer: DistributedOptimizer, model: nn.Module) -> Callable[[nn.Module], None]:
    """Hook for ``GPT.wait_for_params``: waits until a module's parameters have arrived."""
    owned = {id(module): list(module.parameters()) for module in model.modules()}
    return lambda module: optimizer.finish_gather(owned[id(module)])


def build_routing(config: Config, model: nn.Module, state: ParallelState, folder: Path) -> RoutingReport | None:
    """The report that ``--moe_router_debug`` and ``--moe_route_trace`` ask for, or ``None``; the routers start recording.

    Raises: ConfigError for a model without our expert layers.
    """
    margins, trace = config.logging.moe_router_debug, config.logging.moe_route_trace
    if not (margins or trace):
        return None
    if not (isinstance(model, HasExperts) and model.moe_layers):
        flag = "moe_router_debug" if margins else "moe_route_trace"
        raise ConfigError(
            f"--{flag} needs the expert layers of Tinytron's GPT, but this {type(model).__name__} has none; "
            f"use --use_moe, or --no-{flag}"
        )
    return RoutingReport(model, state, folder, accumulation_steps(config, state.layout), margins=margins, trace=trace)


def build_metrics(
    config: Config,
    model: nn.Module,
    state: ParallelState,
    folder: Path,
    sources: SourceLosses,
    seen_tokens: Callable[[int], dict[str, int]],
) -> list[Metric]:
    """Metrics that the log records with a report's last step: load and margins of experts, losses per source."""
    found: list[Metric] = []
    if isinstance(model, HasExperts) and model.moe_layers:
        experts: HasExperts = model
        found.append(lambda step: {"expert_load": load_statistics(experts.take_load(), experts.config.moe_layers)})
    if sources.names:
        found.append(lambda step: sources.record(seen_tokens(step)))
    if (routing := build_routing(config, model, state, folder)) is not None:
        found.append(routing.record)
    return found


def build_statistics(
    config: Config,
    model: nn.Module,
    state: ParallelState,
    optimizer: DistributedOptimizer,
    custom: MetricSet,
    sources: SourceLosses,
) -> AllStatistics:
    """The statistics of steps that the flags ask for, with the ``custom`` metrics and the losses of ``sources``."""
    found: list[StepStatistics] = [custom]
    losses: list[SeesLosses] = [sources]
    if config.logging.log_norms:
        found.append(NormStatistics(optimizer, state))
    if config.logging.log_activations:
        found.append(ActivationStatistics(model, state, optimizer.loss_scale))
    if config.logging.log_attention:
        found.append(AttentionStatistics(model, state))
    if config.logging.log_loss_by_position:
        longest = max(config.train.seq_len, config.model.block_size)
        found.append(positions := LossByPosition(state, longest))
        losses.append(positions)
    return AllStatistics(found, losses)


def flops_per_token(config: Config, model: nn.Module) -> float:
    """Floating-point operations to train on one token, for MFU. Of a model that is not the GPT, only the products with its
    matrices are known: 6 for each weight (arXiv:2001.08361, section 2.1), without attention. With adapters the weights get
    no gradient, which saves a third."""
    if isinstance(model, GPT):
        share = 2 / 3 if config.lora.lora_rank else 1.0
        return share * train_flops_per_token(config.model, config.train.seq_len)
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - multiplied
    return 6.0 * sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in looked_up)


def build_profiler(
    window: tuple[int, int], step: int, trace: Path, say: Callable[[str], None]
) -> AbstractContextManager[Any]:
    """The profiler for the steps ``window`` (first and last, from 1) of a run that continues after ``step``; a context of
    ``None`` if they are already done."""
    first, last = window
    if last <= step:
        say(f"not profiling: steps {first} to {last} are already done")
        return contextlib.nullcontext()
    say(f"profiling steps {max(first, step + 1)} to {last}: {trace}")
    return profile.build_profiler(max(first, step + 1), last, trace, done=step, say=say)


def describe_run_size(config: Config, model: nn.Module, state: ParallelState, info: TrainingInfo) -> str:
    """A line about what is trained, on which devices and for how long."""
    count = sum(spec.numel for spec in specs_of(model))  # including all experts, on whichever rank
    steps = f"{info.max_steps} steps" + (f" ({info.warmup_steps} of them warm-up)" if info.warmup_steps else "")
    micro_batches = counted(info.grad_accum_steps, "micro-batch", "micro-batches")
    return (
        f"{count / 1e6:.2f}M parameters in {config.train.precision} on {state.layout.world_size} x {state.device.type} | "
        f"{steps} of {config.train.total_batch_size:,} tokens in sequences of {config.train.seq_len}, "
        f"{micro_batches} each"
    )
