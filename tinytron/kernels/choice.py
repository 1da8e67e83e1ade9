"""Packages that a flag for CUDA kernels needs and nobody needs otherwise."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from tinytron.errors import ConfigError, first_line


def check_package(flag: str, package: str, module: str, names: Sequence[str], device: torch.device) -> None:
    """Raises: ConfigError unless ``device`` is a CUDA device and the pip ``package`` has ``names`` in ``module``."""
    if device.type != "cuda":
        raise ConfigError(f"--{flag} runs on CUDA only, not on {device.type}; drop --{flag}")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"--{flag} needs the {package} package ({first_line(error)}): pip install {package}; or drop --{flag}"
        ) from error
    if missing := [name for name in names if not hasattr(found, name)]:
        raise ConfigError(
            f"--{flag} needs a newer {package}, whose {module} has {missing[0]}: pip install --upgrade {package}; "
            f"or drop --{flag}"
        )


def check_triton(device: torch.device) -> None:
    """Raises: ConfigError if our own kernels (triton_*.py) cannot run on ``device``, or triton is missing or too old."""
    check_package("use_triton_kernels", "triton", "triton.language", ("debug_barrier", "static_range"), device)
