"""``--batch_size auto``: the largest micro-batch that fits the memory of every rank."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.distributed as dist

from tinytron.distributed.agreement import agree
from tinytron.distributed.layout import ParallelLayout, divisors
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError
from tinytron.training.build import build_model
from tinytron.training.config import Config
from tinytron.training.derive import with_fitting_batch
from tinytron.training.memory import Frozen, estimated_bytes
from tinytron.utils.memory import GIB, Memory, memory_of

AUTO = 0  # --batch_size auto
_ADVICE = "use --recompute full, a shorter --seq_len, a smaller model or more processes"
_SHARE = 0.9  # fraction of the free memory: the estimate may be a tenth too low


def with_batch_size(config: Config, batch_size: int) -> Config:
    """``config`` with this micro-batch."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size))


def with_fitted_batch(config: Config, state: ParallelState, frozen: Frozen | None) -> tuple[Config, list[str]]:
    """``config`` with a number in place of ``--batch_size auto``, or under ``--fit_batch`` with one that divides the batch;
    and lines about it. ``frozen`` is ``None`` for a model whose memory is unknown. Collective. Raises: ConfigError as
    ``fit_batch_size``, or if it would need that memory."""
    if config.train.batch_size != AUTO:
        given, config = config.train.batch_size, with_fitting_batch(config, state.layout)
        if (size := config.train.batch_size) == given:
            return config, []
        return config, [
            f"--fit_batch: {size} sequences per micro-batch, because {given} do not divide the global batch"
        ]
    if frozen is None:
        raise ConfigError(
            "--batch_size auto can only estimate the memory of Tinytron's own model; give a number such as 8"
        )
    config, text = fit_batch_size(config, state, frozen)
    return config, [text]


def fit_batch_size(config: Config, state: ParallelState, frozen: Frozen = ()) -> tuple[Config, str]:
    """``config`` with the largest micro-batch that fits on every rank, and a line about it. Collective.

    The planner's estimate proposes a size that divides the batch. On GPUs each rank then runs one micro-batch of it forward
    and backward, and all ranks try the next smaller size if one runs out of memory. Under sequence or expert parallelism
    only the estimate decides, because a rank that fails in the middle of an exchange would leave the others waiting.

    Raises: ConfigError on every rank if no size fits, or if the loss depends on the size.
    """
    world = state.groups["world"]

    def propose() -> tuple[list[int], Memory]:
        memory = memory_of(state.device)
        if memory is None:
            raise ConfigError("--batch_size auto: the memory of this machine is unknown; give a number such as 8")
        return sizes_that_fit(config, state.layout, state.device, memory, frozen), memory

    sizes, memory = agree(propose, world)
    proposals: list[list[int]] = [[]] * dist.get_world_size(world)
    dist.all_gather_object(proposals, sizes, group=world)
    common = [size for size in sizes if all(size in other for other in proposals)]
    for size in common:
        if not _probes(state) or _fits_everywhere(with_batch_size(config, size), state):
            needed = estimated_bytes(with_batch_size(config, size), state.layout, state.device, frozen) / GIB
            free = memory.free / GIB
            text = f"--batch_size auto: {size} sequences per micro-batch, about {needed:.1f} of {free:.1f} GiB free"
            return with_batch_size(config, size), text
    raise ConfigError(f"--batch_size auto: even one sequence does not fit; {_ADVICE}")


def sizes_that_fit(
    config: Config, layout: ParallelLayout, device: torch.device, memory: Memory, frozen: Frozen = ()
) -> list[int]:
    """The micro-batches that divide the batch of a rank and fit ``memory`` by the estimate, largest first. Raises:
    ConfigError if none fits."""
    if config.balanced_sequences is not None:
        raise ConfigError(
            "--batch_size auto cannot be used with --moe_aux_loss_scope batch, whose loss depends on the micro-batch; "
            "give a number such as --batch_size 8"
        )
    sequences, rest = divmod(config.train.total_batch_size, config.train.seq_len * layout.dp)
    if rest or not sequences:
        needed = config.train.seq_len * layout.dp
        raise ConfigError(
            f"--total_batch_size {config.train.total_batch_size} (tokens) must be a multiple of --seq_len x data-parallel "
            f"ranks = {needed}; use {needed * max(1, round(config.train.total_batch_size / needed))}"
        )
    sequences = math.gcd(sequences, *(size // layout.dp for size in config.train.batch_sizes.sizes()))
    budget = _SHARE * memory.free
    sizes = sorted(divisors(sequences), reverse=True)
    fitting = [n for n in sizes if estimated_bytes(with_batch_size(config, n), layout, device, frozen) <= budget]
    if not fitting:
        needed = estimated_bytes(with_batch_size(config, 1), layout, device, frozen)
        raise ConfigError(
            f"--batch_size auto: one sequence needs about {needed / GIB:.1f} GiB, but only "
            f"{memory.free / GIB:.1f} are free; {_ADVICE}"
        )
    return fitting


def _probes(state: ParallelState) -> bool:
    return state.device.type == "cuda" and state.layout.sep == state.layout.ep == 1


def _fits_everywhere(config: Config, state: ParallelState) -> bool:
    """True if every rank can run a micro-batch. Collective."""
    fits: list[bool] = [False] * dist.get_world_size(state.groups["world"])
    dist.all_gather_object(fits, _fits(config, state), group=state.groups["world"])
    return all(fits)


def _fits(config: Config, state: ParallelState) -> bool:
    """True if this rank can run a micro-batch forward and backward."""
    try:
        run_micro_batch(config, state)
    except torch.OutOfMemoryError:
        return False
    finally:
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def run_micro_batch(config: Config, state: ParallelState) -> None:
    """Run one micro-batch of random tokens forward and backward, through a temporary model. Raises: OutOfMemoryError."""
    model = build_model(config, state)
    shape = (config.train.batch_size, config.train.seq_len)
    ids = torch.randint(config.model.vocab_size, shape, device=state.device)
    model(ids, ids).objective.backward()
