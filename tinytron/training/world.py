"""Joining the world: the launcher's environment, the process group, the device, and the matmul rate of all ranks."""

from __future__ import annotations

import importlib.util
import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its functions' defaults would keep the world's group forever

from tinytron.distributed import flight_recorder
from tinytron.distributed.agreement import agree
from tinytron.distributed.collectives import sum_over
from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError, first_line
from tinytron.training.config import Config
from tinytron.training.derive import accumulation_steps, with_fitting_batch
from tinytron.utils.launcher import ELASTIC, check_meeting_place, local_rank_variable
from tinytron.utils.matmul import onednn_keeps_fp32, use_onednn
from tinytron.utils.place import torchrun_variables
from tinytron.utils.profile import measured_matmul_rate, peak_flops
from tinytron.utils.training import DTYPES, seed_all, use_deterministic_kernels


def join_world(config: Config) -> ParallelState:
    """Read the launcher's environment (none: one process), initialize the process group and build the parallel groups.

    Raises: ConfigError, before any rank waits, for a broken environment, a layout or batch that does not fit the number of
    processes, or more processes than GPUs.
    """
    rank, world_size, local_rank = place_in_world()
    joined = dist.is_initialized()  # a caller (a notebook, a test) may have initialized it
    if joined:
        rank, world_size = dist.get_rank(), dist.get_world_size()
    layout = ParallelLayout(world_size, config.parallel.sep_size, config.parallel.ep_size)
    if config.train.batch_size:  # --batch_size auto is resolved later
        accumulation_steps(with_fitting_batch(config, layout), layout)  # checked before any rank waits for another
    device = torch.device("cpu")
    if torch.cuda.is_available() and config.parallel.backend != "gloo":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this node has no GPU: the node has {torch.cuda.device_count()}; "
                f"use --nproc_per_node {torch.cuda.device_count()}, or NUM_GPUS=0 for CPU processes"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif config.parallel.backend == "nccl":
        raise ConfigError("--backend nccl needs a GPU, but this machine has none; use --backend gloo or auto")
    if config.train.step_timeout:
        for name, value in flight_recorder.VARIABLES.items():
            os.environ.setdefault(name, value)  # the user may have chosen another number
    if not joined:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            if config.parallel.init_method == "env://" and (host := os.environ.get("MASTER_ADDR")):
                port = os.environ.get("MASTER_PORT", "")
                check_meeting_place(host, int(port) if port.isdecimal() else None, several=world_size > 1)
            try:
                dist.init_process_group(backend, config.parallel.init_method, rank=rank, world_size=world_size)
            except (ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"rank {rank} cannot join the others with --init_method {config.parallel.init_method} "
                    f"({first_line(error)}); launch with torchrun, which sets MASTER_ADDR and MASTER_PORT"
                ) from error
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    seed_all(config.seed.seed + rank)
    if config.seed.deterministic:
        use_deterministic_kernels()
    torch.set_float32_matmul_precision("highest" if config.train.disable_tf32 else "high")
    if device.type == "cpu" and not config.train.disable_tf32 and onednn_keeps_fp32():
        use_onednn()
    state = ParallelState.create(layout, device)
    # Barrier: a rank that fails after this point cannot tear down connections its peers are still opening.
    agree(lambda: None, state.groups["world"])
    return state


def place_in_world() -> tuple[int, int, int]:
    """Rank, world size and local rank from the launcher's environment; without one, the only process. Processes that srun
    or mpirun started get the variables that torchrun would have set. Raises: ConfigError for impossible values, and if such
    a process cannot know its place."""
    os.environ.update(torchrun_variables(os.environ))
    local = local_rank_variable(os.environ)
    values = {"RANK": 0, "WORLD_SIZE": 1, local: 0}
    for name in values:
        text = os.environ.get(name, str(values[name]))
        if not text.isdecimal():
            raise ConfigError(f"environment variable {name}={text!r} must be a whole number; torchrun sets it")
        values[name] = int(text)
    given, missing = ("RANK", "WORLD_SIZE") if "RANK" in os.environ else ("WORLD_SIZE", "RANK")
    if given in os.environ and missing not in os.environ:
        raise ConfigError(
            f"environment variable {given} is set but {missing} is not; launch with torchrun, or unset {given}"
        )
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise ConfigError(
            f"environment variable RANK={values['RANK']} must be below WORLD_SIZE={values['WORLD_SIZE']}; "
            "torchrun sets both"
        )
    return values["RANK"], values["WORLD_SIZE"], values[local]


def processes_of_node() -> int:
    """Number of processes that torchrun started on this node; 1 if unknown."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() else 1


def first_on_node() -> bool:
    """True in the process that downloads and makes files for all of its node."""
    return place_in_world()[2] == 0


# Set by GKE and Cloud TPU in the containers of a TPU host, and by users of PyTorch/XLA.
_TPU_VARIABLES = {"TPU_WORKER_ID": None, "TPU_ACCELERATOR_TYPE": None, "PJRT_DEVICE": "TPU"}


def has_tpu() -> bool:
    """True on a machine that is set up for TPUs: by its environment, or by the runtime library libtpu."""
    told = (os.environ.get(name) for name in _TPU_VARIABLES)
    wanted = _TPU_VARIABLES.values()
    found = any(text is not None and value in (None, text) for text, value in zip(told, wanted, strict=True))
    return found or importlib.util.find_spec("libtpu") is not None


def tell_launcher(number: int) -> None:
    """Send a signal to the launcher of this process, if its run continues without this node (cli/elastic.py)."""
    if ELASTIC in os.environ:
        os.kill(os.getppid(), number)


def measure_peak(config: Config, state: ParallelState) -> tuple[float, list[str]]:
    """Peak matmul rate of all ranks together, in FLOP/s, and lines to print; on CPUs there is an extra line if fp32 is
    faster than the 16 bits of ``--precision``, and one if the machine has a TPU. Collective."""
    precision, world = config.train.precision, state.groups["world"]
    peak, source = peak_flops(state.device, DTYPES[precision])
    total = float(sum_over(torch.tensor(peak, device=state.device), world))
    lines = [f"peak matmul rate for MFU: {total / 1e12:.3g} TFLOP/s ({source})"]
    if state.device.type == "cpu" and has_tpu():
        lines.append("this machine has a TPU, but Tinytron has no TPU backend: training runs on the host's CPUs")
    if state.device.type == "cpu" and precision in ("bf16", "fp16"):
        wide = measured_matmul_rate(state.device, torch.float32, seconds=0.1)
        wide = float(sum_over(torch.tensor(wide), world))
        if wide > 1.1 * total:  # closer is noise
            lines.append(
                f"{precision} is slow on this CPU: matrix products run at {total / 1e9:.3g} GFLOP/s, in fp32 at "
                f"{wide / 1e9:.3g} GFLOP/s; --precision fp32 would be faster (as a new run: a run keeps its precision)"
            )
    return total, lines
