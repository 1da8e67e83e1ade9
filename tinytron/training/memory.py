"""Checks before a run begins that it fits the machine's memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tinytron.distributed.agreement import agree
from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError
from tinytron.model import ModelConfig
from tinytron.planner.estimate import Estimate
from tinytron.training.config import Config
from tinytron.training.world import processes_of_node
from tinytron.utils.memory import GIB, Memory, memory_of
from tinytron.utils.training import DTYPES

_CERTAIN = 1.2  # times the machine's memory, because the estimate may be a tenth too high


Frozen = Sequence[ModelConfig]  # models in addition to the trained one, with only their weights in memory


def memory_notes(config: Config, state: ParallelState, frozen: Frozen = ()) -> list[str]:
    """A line if the run needs more memory than is free, by an estimate. Collective. Raises: ConfigError on every rank if it
    needs more than the machine has; the error names flags with which it would fit, if any do."""

    def check() -> list[str]:
        memory = memory_of(state.device)
        return [] if memory is None else compare(config, state.layout, state.device, memory, frozen)

    return agree(check, state.groups["world"])


def compare(
    config: Config, layout: ParallelLayout, device: torch.device, memory: Memory, frozen: Frozen = ()
) -> list[str]:
    """The same as ``memory_notes``, for one rank on a ``device`` with this ``memory``."""
    needed = estimated_bytes(config, layout, device, frozen)
    if needed <= memory.free:
        return []
    where = "this machine" if device.type == "cpu" else "this GPU"
    text = (
        f"this run needs about {needed / GIB:.1f} GiB, but {where} has {memory.total / GIB:.1f} "
        f"({memory.free / GIB:.1f} free)"
    )
    advice = f"use {_smaller(config, layout, device, memory.free, frozen)}; --dry_run shows what the memory is used for"
    if needed > _CERTAIN * memory.total:
        raise ConfigError(f"{text}; {advice}")
    return [f"{text}: the run may fail, or be very slow; {advice}"]


def estimated_bytes(config: Config, layout: ParallelLayout, device: torch.device, frozen: Frozen = ()) -> int:
    """The planner's memory estimate of a run: for a GPU, or on CPUs for all processes of this machine together."""
    train = config.train
    estimate = Estimate(
        dtype=DTYPES[train.precision],
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        recompute=train.recompute,
        shard=config.parallel.use_distributed_optimizer,
        on_cpu=device.type == "cpu",
        averaged=config.optim.ema_decay > 0,
        lora_rank=config.lora.lora_rank,
        frozen=tuple(frozen),
    )
    of_rank = estimate.bytes(config.model, layout)
    return of_rank * (processes_of_node() if device.type == "cpu" else 1)


def _smaller(config: Config, layout: ParallelLayout, device: torch.device, free: int, frozen: Frozen) -> str:
    """Flags with which the run would fit."""
    size = config.train.batch_size
    sizes = [size // 2**n for n in range(size.bit_length()) if size % 2**n == 0]
    for recompute in dict.fromkeys((config.train.recompute, "full")):
        for batch_size in sizes:
            train = dataclasses.replace(config.train, batch_size=batch_size, recompute=recompute)
            if estimated_bytes(dataclasses.replace(config, train=train), layout, device, frozen) <= free:
                words = [f"--batch_size {batch_size}"] if batch_size != size else []
                words += [f"--recompute {recompute}"] if recompute != config.train.recompute else []
                return " ".join(words)
    return "a smaller model or more processes"
