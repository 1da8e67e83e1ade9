"""Short names for subclasses of the trainer."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.parallel_state import ParallelState
from tinytron.training.derive import TrainingInfo
from tinytron.training.pipeline import DataPipeline
from tinytron.training.run.folder import RunFolder


class TrainerAttributes:
    """Shorthands for subclasses of the trainer, derived from its parts."""

    state: ParallelState
    data: DataPipeline
    folder: RunFolder
    optimizer: DistributedOptimizer

    @property
    def device(self) -> torch.device:
        """The device that this process computes on."""
        return self.state.device

    @property
    def master_process(self) -> bool:
        """True on rank 0, which prints, logs and writes everything that is written once."""
        return self.state.is_master

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """The ranks that process different sequences, but the same part of each."""
        return self.state.groups["dp"]

    @property
    def dp_rank(self) -> int:
        """This rank's number in ``dp_group``."""
        return self.state.group_rank("dp")

    @property
    def dp_world_size(self) -> int:
        """The size of ``dp_group``."""
        return self.state.layout.dp

    @property
    def sp_group(self) -> dist.ProcessGroup:
        """The ranks that share each sequence (``--sep_size``)."""
        return self.state.groups["sep"]

    @property
    def sp_rank(self) -> int:
        """This rank's number in ``sp_group``."""
        return self.state.group_rank("sep")

    @property
    def sp_world_size(self) -> int:
        """The size of ``sp_group``."""
        return self.state.layout.sep

    @property
    def training_info(self) -> TrainingInfo:
        """Steps and accumulation, derived from flags, processes and data."""
        return self.data.info

    @property
    def log_dir(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @property
    def raw_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that ``optimizer`` wraps."""
        return self.optimizer.inner
