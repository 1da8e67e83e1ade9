"""The steps of a run, precisions, devices, seeds, random states, and atomic file writes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from tinytron.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class StepCounts:
    """The optimizer steps of a run. ``global_batch_samples`` are the sequences of one step, ``steps_per_epoch`` the whole
    steps in one pass over the data (``None`` for data without a length)."""

    grad_accum_steps: int
    global_batch_samples: int
    steps_per_epoch: int | None
    max_steps: int


def get_training_info(
    *,
    total_batch_size: int,
    batch_size: int,
    seq_len: int,
    dp_size: int = 1,
    num_samples: int | None = None,
    max_steps: int | None = None,
    max_train_tokens: int | None = None,
    max_epochs: int = 1,
) -> StepCounts:
    """The number of optimizer steps of a run and of the micro-batches in each. Pure arithmetic; the arguments are the flags
    of the same names, ``dp_size`` data-parallel ranks, and the number of samples in an epoch (``None``: no length). Of
    several limits ``max_steps`` holds before ``max_train_tokens``, and that before ``max_epochs``.

    Raises: ConfigError if the global batch does not divide evenly over the ranks, the data has less than one global batch,
    or the length of the run is not specified.
    """
    micro_batches = grad_accum_steps(total_batch_size, batch_size, seq_len, dp_size)
    global_batch = total_batch_size // seq_len
    if max_steps is not None:
        steps = max_steps
    elif max_train_tokens is not None:
        steps = -(-max_train_tokens // total_batch_size)
    elif num_samples is None:
        raise ConfigError(
            "the training data has no length; set the length of the run: --max_steps or --max_train_tokens"
        )
    elif not (steps := num_samples * max_epochs // global_batch):
        raise ConfigError(
            f"{max_epochs} epochs of {num_samples} samples do not fill one global batch of {global_batch}; "
            f"use --max_epochs {-(-global_batch // num_samples)}, a smaller --total_batch_size, or --max_steps"
        )
    per_epoch = None if num_samples is None else num_samples // global_batch
    return StepCounts(micro_batches, global_batch, per_epoch, steps)


def grad_accum_steps(total_batch_size: int, batch_size: int, seq_len: int, dp_size: int) -> int:
    """Micro-batches per optimizer step. Raises: ConfigError if the global batch does not divide evenly over the ranks."""
    per_pass = batch_size * seq_len * dp_size
    if total_batch_size % per_pass:
        sequences = total_batch_size // seq_len
        fitting = [b for b in range(1, sequences + 1) if sequences % (b * dp_size) == 0]
        hint = f"use a --batch_size of {fitting}" if fitting else f"use {round_to(total_batch_size, per_pass)}"
        raise ConfigError(
            f"--total_batch_size {total_batch_size} (tokens) must be a multiple of --batch_size x --seq_len x "
            f"data-parallel ranks = {batch_size} x {seq_len} x {dp_size} = {per_pass}; {hint}"
        )
    return total_batch_size // per_pass


def round_to(value: int, unit: int) -> int:
    """The multiple of ``unit`` at or below ``value``, at least one."""
    return max(unit, value // unit * unit)


def device_of(name: str | None) -> torch.device:
    """The device to compute on; ``None`` means a GPU if there is one. Raises: ConfigError for a device that cannot be
    used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); use cpu") from error
    return device


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch (CPU and every CUDA device). Only dropout uses these generators; weights and data have
    their own, stateless randomness."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The states of all random generators of this process, in types that ``torch.load(weights_only=True)`` accepts."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "python": (version, torch.tensor(internal, dtype=torch.int64), gauss_next),
        "numpy": (algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states that ``rng_state`` returned. A CUDA state is skipped on a machine without CUDA."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))
    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def use_deterministic_kernels() -> None:
    """Make repeated runs bit-identical on CUDA, at some cost in speed; on CPUs they already are."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS for deterministic results
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.backends.cudnn.benchmark = False


def sha256_of(path: Path, advance: Callable[[int], object] = lambda size: None) -> str:
    """SHA-256 of a file's content, in hexadecimal digits. ``advance`` is called with the size of every block read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


@contextlib.contextmanager
def appears_whole(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """A temporary file next to ``path``, with ``suffix`` after its name, to write to. At the end it is flushed to
    disk and renamed into place. So a reader sees either the old file or the complete new one, whatever happens. After an
    error it is removed."""
    temporary = path.with_name(path.name + suffix)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # frees the space on a full disk
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write(file)`` on a file that ``appears_whole`` at ``path``."""
    with appears_whole(path) as temporary, open(temporary, "wb") as file:
        write(file)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
