"""``--dry_run``: the requirements of a run, from its configuration alone; no data, run folder or process group."""

from __future__ import annotations

import torch

from tinytron.distributed.layout import ParallelLayout
from tinytron.errors import ConfigError
from tinytron.kernels.choice import check_device
from tinytron.model.lora import add_adapters
from tinytron.planner.memory import MemoryPlan, plan_memory
from tinytron.planner.pretend import DeviceKind
from tinytron.planner.report import describe
from tinytron.planner.step import Workload, meta_model
from tinytron.training.build import muon_options, optimizer_groups, optimizer_options
from tinytron.training.config import Config
from tinytron.training.derive import accumulation_steps, with_fitting_batch
from tinytron.training.hf_model import foreign_model
from tinytron.training.world import place_in_world
from tinytron.utils.training import DTYPES


def workload(config: Config, layout: ParallelLayout) -> Workload:
    """One rank's work, on the kind of device that ``--backend`` implies (auto: that of this machine).

    Raises: ConfigError if the batch does not divide evenly over the ranks, or kernels cannot run there.
    """
    train, backend = config.train, config.parallel.backend
    gpu = backend == "nccl" or (backend == "auto" and torch.cuda.is_available())
    device: DeviceKind = "cuda" if gpu else "cpu"
    if device == "cpu":
        check_device(train.kernels, torch.device("cpu"), DTYPES[train.precision])
    return Workload(
        dtype=DTYPES[train.precision],
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        micro_batches=accumulation_steps(config, layout),
        recompute=train.recompute,
        attn_backend=train.attn_backend,
        documents=config.data.document_mask,
        padding=config.model.use_moe and config.data.packing == "best_fit",
        device=device,
    )


def plan_run(config: Config, world_size: int) -> tuple[MemoryPlan, Workload, ParallelLayout]:
    """Memory of one of ``world_size`` ranks. Raises: ConfigError for a layout that the run would reject, too."""
    if not config.train.batch_size:
        raise ConfigError(
            "--dry_run needs a number: --batch_size auto measures the machine that a run starts on; use --batch_size 8"
        )
    if (named := foreign_model(config)) is not None:
        raise ConfigError(
            f"--dry_run knows only Tinytron's GPT, but {named[1]} is built by transformers; leave --dry_run out"
        )
    layout = ParallelLayout(world_size, config.parallel.sep_size, config.parallel.ep_size)
    config = with_fitting_batch(config, layout)
    work = workload(config, layout)
    model = meta_model(config.model, work, layout)
    if (adapters := config.lora.adapters) is not None:
        add_adapters(model, adapters, config.seed.seed)
    groups, options = optimizer_groups(config.optim, model), optimizer_options(config, model)
    return plan_memory(model, groups, options, work, layout, muon_options(config.optim)), work, layout


def dry_run(config: Config) -> None:
    """Print the plan of ``--dry_run_world_size`` ranks (default: as many as launched), on the first process.

    Raises: ConfigError in the same cases as the run.
    """
    rank, launched, _ = place_in_world()
    if rank > 0:
        return
    plan, work, layout = plan_run(config, config.logging.dry_run_world_size or launched)
    memory = None
    if work.device == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    print(describe(plan, config.model, work, layout, memory))
