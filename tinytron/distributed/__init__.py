"""Floor 1: ranks, process groups, exchanges between ranks, and the sharded optimizer."""

from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.param_spec import ParamSpec
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer

__all__ = ["DistributedOptimizer", "ParallelLayout", "ParallelState", "ParamSpec"]
