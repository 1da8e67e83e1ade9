"""The choice of an implementation for every operation that has several, and checks that the choice can run.

Each operation has its own file in this folder. Its public function takes the name of the chosen implementation.
Anything that depends on the call is decided there: device, precision, and whether torch is compiling.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from tinytron.errors import ConfigError, first_line

Backend = Literal["auto", "sdpa", "flash", "varlen", "math"]
LossKernel = Literal["torch", "triton", "cut"]
LigerKernel = Literal["torch", "liger"]
TritonKernel = Literal["torch", "triton"]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The implementation of every operation, as passed to constructors.

    ``torch`` is PyTorch, with hand-written backward passes where torch's keep more than they need. ``triton``
    stands for our Triton kernels; ``liger`` and ``cut`` for the kernels of the liger-kernel and
    cut-cross-entropy packages. attention.py describes the attention backends.
    """

    attention: Backend = "auto"
    rms_norm: LigerKernel = "torch"
    swiglu: LigerKernel = "torch"
    cross_entropy: LossKernel = "torch"
    expert_rows: TritonKernel = "torch"
    gram: TritonKernel = "torch"

    @classmethod
    def from_flags(
        cls,
        *,
        attn_backend: Backend = "auto",
        use_liger_kernel: bool = False,
        use_triton_kernels: bool = False,
        use_cut_cross_entropy: bool = False,
    ) -> Kernels:
        """The choice that corresponds to the flags of these names. If both ``use_triton_kernels`` and
        ``use_cut_cross_entropy`` are set, the package computes the loss, and our kernels the rest."""
        by_liger: LigerKernel = "liger" if use_liger_kernel else "torch"
        by_triton: TritonKernel = "triton" if use_triton_kernels else "torch"
        return cls(
            attention=attn_backend,
            rms_norm=by_liger,
            swiglu=by_liger,
            cross_entropy="cut" if use_cut_cross_entropy else by_triton,
            expert_rows=by_triton,
            gram=by_triton,
        )

    @property
    def liger(self) -> bool:
        """True if liger-kernel computes any operation."""
        return "liger" in (self.rms_norm, self.swiglu)

    @property
    def triton(self) -> bool:
        """True if our Triton kernels compute any operation."""
        return "triton" in (self.cross_entropy, self.expert_rows, self.gram)

    @property
    def cut(self) -> bool:
        """True if cut-cross-entropy computes the loss."""
        return self.cross_entropy == "cut"


DEFAULT = Kernels()


class _Package(NamedTuple):
    """The requirement of a flag for CUDA kernels: a pip package, and ``names`` that one of its modules must have."""

    name: str
    module: str
    names: tuple[str, ...]


_LIGER = _Package("liger-kernel", "liger_kernel.ops", ("LigerRMSNormFunction", "LigerFusedGateUpSiLUMulFunction"))
_TRITON = _Package("triton", "triton.language", ("debug_barrier", "static_range"))
_CUT = _Package("cut-cross-entropy", "cut_cross_entropy", ("linear_cross_entropy",))


def check_device(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """Check that the chosen kernels run on ``device`` in ``dtype``, and that their packages are installed. Raises:
    ConfigError."""
    _check_backend(kernels.attention, device, dtype)
    if kernels.liger:
        _check_package("use_liger_kernel", _LIGER, device)
    if kernels.triton:
        _check_package("use_triton_kernels", _TRITON, device)
    if kernels.cut:
        _check_package("use_cut_cross_entropy", _CUT, device)


def check_model(kernels: Kernels, precision: str, *, head_dim: int, dropout: float) -> None:
    """Check, for any device, that the chosen kernels support ``precision`` (bf16, fp16, fp32 or fp64), the heads and the
    dropout. Raises: ConfigError."""
    if kernels.attention == "varlen":
        _check_sixteen_bits("--attn_backend varlen", precision, "--attn_backend sdpa")
        check_varlen_dropout(dropout)
        if head_dim % 8 or head_dim > 256:
            raise ConfigError(
                f"--attn_backend varlen needs --head_dim to be a multiple of 8 up to 256, not {head_dim}; "
                f"use {min(256, -(-head_dim // 8) * 8)}, or --attn_backend sdpa"
            )
    for flag, asked in (("use_liger_kernel", kernels.liger), ("use_triton_kernels", kernels.triton)):
        if asked and precision == "fp64":
            raise ConfigError(f"--{flag} computes in fp32, not in --precision fp64; use fp32, or drop the flag")
    if kernels.cut:
        _check_sixteen_bits("--use_cut_cross_entropy", precision, "drop the flag")


def check_varlen_dropout(dropout: float) -> None:
    """Check that there is no ``dropout``, which torch's kernels for documents do not support. Raises: ConfigError."""
    if dropout:
        raise ConfigError(
            f"--dropout {dropout} does not work with --attn_backend varlen, which has no dropout; use --dropout 0, or "
            "--attn_backend sdpa"
        )


def _check_sixteen_bits(option: str, precision: str, instead: str) -> None:
    if precision not in ("bf16", "fp16"):
        raise ConfigError(f"{option} computes in bf16 or fp16, not in --precision {precision}; use bf16, or {instead}")


def _check_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    if backend not in ("flash", "varlen"):
        return
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError("--attn_backend flash needs the flash-attn package: pip install flash-attn; or use sdpa")
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"--attn_backend {backend} runs only on CUDA in bf16 or fp16, not on {device.type} in {dtype}; use sdpa"
        )
    if backend == "varlen" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            "--attn_backend varlen needs a GPU of compute capability 8.0 (Ampere) or newer, but this is "
            f"{torch.cuda.get_device_name(device)}; use sdpa"
        )


def _check_package(flag: str, package: _Package, device: torch.device) -> None:
    """Check that ``device`` is a CUDA device, and that ``package`` is installed and new enough. Raises: ConfigError."""
    name, module, names = package
    if device.type != "cuda":
        raise ConfigError(f"--{flag} runs only on CUDA, not on {device.type}; drop --{flag}")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"--{flag} needs the {name} package ({first_line(error)}): pip install {name}; or drop --{flag}"
        ) from error
    if missing := [n for n in names if not hasattr(found, n)]:
        raise ConfigError(
            f"--{flag} needs a newer {name}, whose {module} has {missing[0]}: pip install --upgrade {name}; "
            f"or drop --{flag}"
        )
