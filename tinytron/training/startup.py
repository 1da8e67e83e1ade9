"""What happens once, before the first step: joining the world, the run's folder, and what is recorded about a run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import tinytron
from tinytron.checkpoint import CheckpointFiles, complete_checkpoints, find_checkpoints
from tinytron.checkpoint.files import bytes_of, leftovers, remove_leftovers
from tinytron.checkpoint.mirror import Mirror
from tinytron.distributed.agreement import together, together_long
from tinytron.distributed.collectives import sum_over
from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.errors import CheckpointError, ConfigError, first_line
from tinytron.interop import load_pretrained
from tinytron.model import GPT
from tinytron.training.config import DTYPES, Config
from tinytron.training.derive import accumulation_steps
from tinytron.utils.lock import lock_folder
from tinytron.utils.matmul import onednn_keeps_fp32, use_onednn
from tinytron.utils.profile import measured_matmul_rate, peak_flops
from tinytron.utils.remote import is_remote, local_folder
from tinytron.utils.training import seed_all, use_deterministic_kernels, write_atomically

T = TypeVar("T")
FORMAT_VERSION = 2  # of the metadata in a checkpoint

# A checkpoint continues only where these are the same; other differences are the user's choice and are printed.
_FIXED_ON_RESUME = ("model.", "train.total_batch_size", "train.seq_len", "seed.seed")
_REMEDY = "wait for it or stop it, or use another --exp_name"  # when the run folder is in use


def join_world(config: Config) -> ParallelState:
    """Read the launcher's environment (none: one process), initialise the process group and build the parallel groups.

    Raises: ConfigError, before any rank waits, for a broken environment, a layout or batch that does not fit the number
    of processes, or more processes than GPUs.
    """
    rank, world_size, local_rank = place_in_world()
    joined = dist.is_initialized()  # a caller (a notebook, a test) may have done it
    if joined:
        rank, world_size = dist.get_rank(), dist.get_world_size()
    layout = ParallelLayout(world_size, config.parallel.sep_size, config.parallel.ep_size)
    accumulation_steps(config, layout)  # checked before anybody waits
    device = torch.device("cpu")
    if torch.cuda.is_available() and config.parallel.backend != "gloo":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}; "
                f"use --nproc_per_node {torch.cuda.device_count()}, or NUM_GPUS=0 for CPU processes"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif config.parallel.backend == "nccl":
        raise ConfigError("--backend nccl needs a GPU, and this machine has none; use --backend gloo or auto")
    if not joined:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            try:
                dist.init_process_group(backend, config.parallel.init_method, rank=rank, world_size=world_size)
            except (ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"rank {rank} cannot join the others by --init_method {config.parallel.init_method} "
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
    # Whoever stops with an error from here on takes no connection away that another is still making.
    together(lambda: None, state.groups["world"])
    return state


def place_in_world() -> tuple[int, int, int]:
    """Rank, world size and local rank from the launcher's environment; without one: the only process."""
    values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
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
    return values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"]


def first_on_node() -> bool:
    """Whether this process is the one that fetches and makes files for all of its node."""
    return place_in_world()[2] == 0


def run_folder(config: Config) -> Path:
    """``<log_dir>/<exp_name>_<config_hash>``; where it is staged, if the log folder is remote."""
    return local_folder(config.logging.log_dir) / _run_name(config)


def _run_name(config: Config) -> str:
    return f"{config.logging.exp_name}_{config.config_hash()}"


def open_mirror(config: Config, state: ParallelState) -> Mirror | None:
    """The remote copy of the run's folder, if the log folder is remote; what it has and the local folder lacks is fetched.
    Collective, once the folder is prepared.

    With ``--no-resume`` a run that is there is moved aside. Raises: ConfigError or StorageError on every rank if the
    storage cannot be used.
    """
    log_dir = config.logging.log_dir
    if not is_remote(log_dir):
        return None
    url, world = f"{log_dir.rstrip('/')}/{_run_name(config)}", state.groups["world"]
    mirror = together(lambda: Mirror(run_folder(config), url, state, first_on_node()), world)
    if not config.ckpt.resume:
        together_long(lambda: mirror.set_aside() if state.is_master else None, world)
    elif not config.train.debug:
        mirror.restore()
    return mirror


def prepare_run_folder(config: Config, state: ParallelState) -> Path:
    """Create the run's folder. Collective.

    With ``--no-resume`` a folder that holds a run is moved aside (``.1``, ``.2``, ...), never overwritten. A remote one is
    staged on each node. Raises: ConfigError on every rank if the folder cannot be written, or is not the same for all.
    """
    folder, world = run_folder(config), state.groups["world"]
    seal, staged = folder / ".shared", is_remote(config.logging.log_dir)

    def create() -> None:
        # Only the master has a log; the other nodes of a staged run have parts of checkpoints.
        if not config.ckpt.resume and (folder if staged else folder / "log.txt").exists():
            lock_folder(folder, _REMEDY).close()  # not from under a living run
            number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
            folder.rename(folder.with_name(f"{folder.name}.{number}"))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(seal, lambda file: file.write(b""))

    def see() -> None:
        if not seal.exists():
            raise ConfigError(
                f"--log_dir {config.logging.log_dir} is not the same folder on all nodes: process {state.rank} does not "
                f"see what process 0 wrote to {folder}; use a folder that all nodes share"
            )

    creates = first_on_node() if staged else state.is_master
    together(lambda: writable(config, create) if creates else None, world)
    together(see, world)
    together(lambda: seal.unlink() if creates else None, world)
    return folder


def lock_run_folder(folder: Path, state: ParallelState) -> IO[str] | None:
    """Keep other runs out of ``folder`` until the result is closed or the master's process ends, however it ends.
    Collective.

    Raises: ConfigError on every rank if a living run holds the folder, naming its host and process.
    """
    return together(lambda: lock_folder(folder, _REMEDY) if state.is_master else None, state.groups["world"])


def remove_leftovers_of_saves(config: Config, folder: Path, state: ParallelState) -> list[str]:
    """Delete what earlier, killed processes left half saved in ``folder``, whose lock is held; returns what there is to
    say. Collective. Raises: ConfigError on every rank if the system refuses."""

    def remove() -> list[str]:
        size = bytes_of(leftovers(folder))
        names = [path.name for path in remove_leftovers(folder)]
        return [f"removed what interrupted saves left: {', '.join(names)} ({size:,} bytes)"] if names else []

    return together(lambda: writable(config, remove) if state.is_master else [], state.groups["world"])


def write_description(
    config: Config, state: ParallelState, description: dict[str, Any], mirror: Mirror | None = None
) -> None:
    """Save ``description`` as the run folder's ``config.json``, on the master. Collective.

    Raises: ConfigError or, for the copy of ``mirror``, StorageError on every rank: a run whose log folder cannot be
    written does not begin.
    """
    text = json.dumps(description, indent=2).encode()
    path = run_folder(config) / "config.json"

    def action() -> None:
        write_atomically(path, lambda file: file.write(text))
        if mirror is not None:
            mirror.remote.push(path.parent, [path.name])

    together(lambda: writable(config, action) if state.is_master else None, state.groups["world"])


def writable(config: Config, action: Callable[[], T]) -> T:
    """The result of ``action``, which writes below the log folder. Raises: ConfigError if the system refuses."""
    try:
        return action()
    except OSError as error:
        raise ConfigError(
            f"--log_dir {config.logging.log_dir} cannot be written ({error.strerror}: {error.filename}); "
            "use a folder you may write to, such as --log_dir ./log/"
        ) from error


def measure_peak(config: Config, state: ParallelState) -> tuple[float, list[str]]:
    """Matrix products of all ranks together, in FLOP/s, and lines about that: on CPUs also one if they are faster in fp32
    than in the 16 bits of ``--precision``. Collective."""
    precision, world = config.train.precision, state.groups["world"]
    peak, source = peak_flops(state.device, DTYPES[precision])
    total = float(sum_over(torch.tensor(peak, device=state.device), world))
    lines = [f"peak matmul rate for MFU: {total / 1e12:.3g} TFLOP/s ({source})"]
    if state.device.type == "cpu" and precision in ("bf16", "fp16"):
        wide = measured_matmul_rate(state.device, torch.float32, seconds=0.1)
        wide = float(sum_over(torch.tensor(wide), world))
        if wide > 1.1 * total:  # closer is noise
            lines.append(
                f"{precision} is slow on this CPU: matrix products run at {total / 1e9:.3g} GFLOP/s, in fp32 at "
                f"{wide / 1e9:.3g} GFLOP/s; --precision fp32 would be faster (as a new run: a run keeps its precision)"
            )
    return total, lines


def describe_run(config: Config, layout: ParallelLayout) -> dict[str, Any]:
    """Configuration, layout, code revision and versions."""
    return {
        "config": config.as_dict(),
        "config_hash": config.config_hash(),
        "world_size": layout.world_size,
        "command": sys.argv,
        "git": git_revision(),
        "versions": {
            "tinytron": tinytron.__version__,
            "torch": str(torch.__version__),  # a str subclass that weights_only loading refuses
            "numpy": np.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
    }


def git_revision() -> str | None:
    """Commit of the code, with ``-dirty`` if files differ from it; ``None`` outside a git checkout."""
    command = ["git", "-C", str(Path(tinytron.__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def run_record(config: Config, description: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's metadata says beside step and random states; plain types only."""
    return {"format": FORMAT_VERSION, "run": description, "identity": config.identity()}


def checkpoints_to_resume(config: Config, folder: Path) -> list[CheckpointFiles]:
    """Those of the run's ``folder``, newest first, or else what ``--resume_path`` names: a requeued job with that flag goes
    on where it got to. Raises: CheckpointError if ``--resume_path`` names none."""
    own = complete_checkpoints(folder) if config.ckpt.resume and not config.train.debug else []
    if own or config.ckpt.resume_path is None:
        return own
    return find_checkpoints(config.ckpt.resume_path)


def load_initial_weights(name: str, model: nn.Module, optimizer: DistributedOptimizer, state: ParallelState) -> None:
    """Begin with the weights that ``--init_from name`` names. Collective. Raises: ConfigError or CheckpointError on every
    rank if they cannot be had, or do not fit the model."""

    def load() -> None:
        if not isinstance(model, GPT):
            raise ConfigError(
                f"--init_from {name} fills our GPT, and this is a {type(model).__name__}; load it yourself"
            )
        load_pretrained(model, name)

    together_long(load, state.groups["world"])  # may be fetched from the hub first
    optimizer.refresh_shards()


def data_position(config: Config, step: int) -> dict[str, int]:
    """Where a run is in its data after ``step`` steps, in steps, samples and tokens: the order follows from these alone."""
    samples = step * config.train.total_batch_size // config.train.seq_len
    return {"step": step, "samples": samples, "tokens": step * config.train.total_batch_size}


def check_continues(config: Config, meta: dict[str, Any], fingerprint: str, source: str) -> list[str]:
    """Whether a checkpoint's run can be continued with ``config``; returns the allowed differences, as text.

    Raises: CheckpointError for another format, model, batch, sequence length, seed or data set.
    """
    if meta.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{source}: format {meta.get('format')}, this version reads format {FORMAT_VERSION}")
    # An option that came after the checkpoint was written was at its default.
    mine, theirs = config.identity(), {**Config().identity(), **meta["identity"]}
    differing = [k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
    differences = [f"{k}: {theirs.get(k)} in the checkpoint, {mine.get(k)} now" for k in differing]
    fixed = [text for k, text in zip(differing, differences, strict=True) if k.startswith(_FIXED_ON_RESUME)]
    if fixed:
        shown = "; ".join(fixed[:3])
        raise CheckpointError(f"{source} is of a different run ({shown}); use the flags it was trained with")
    if meta["data"] != fingerprint:
        raise CheckpointError(
            f"{source} was trained on other data ({meta['data']}, now {fingerprint}); use the same data (and the same "
            "--do_val and --split_rate, if validation data is split off), or another --exp_name to start a new run"
        )
    return differences
