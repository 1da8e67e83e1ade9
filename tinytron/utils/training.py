"""Precisions, devices, seeds, random states, and atomic file writes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from tinytron.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


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
