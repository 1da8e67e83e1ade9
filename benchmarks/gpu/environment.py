"""The machine: versions, free memory, and the ceilings that other figures refer to, measured on random data."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess

import torch
from rounds import copy_rate

from gpu.part import Context, run
from tinytron.utils.profile import matmul_rates, peak_flops

OPTIONAL = (
    "numpy", "triton", "transformers", "pytest", "hypothesis", "matplotlib", "tokenizers", "safetensors", "flash-attn",
    "liger-kernel", "cut-cross-entropy",
)  # fmt: skip
PRODUCTS = {"bf16": torch.bfloat16, "fp32": torch.float32}
SECONDS = 1.0  # for one rate


def versions() -> dict[str, str]:
    """Versions of the optional packages; an empty text for one that is missing."""
    found = {}
    for name in OPTIONAL:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def driver() -> str:
    """The driver's version, and the memory that other processes use."""
    command = ["nvidia-smi", "--query-gpu=driver_version,memory.used,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi is missing"


def describe(context: Context) -> None:
    """Notes on GPU, libraries and packages."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    context.result.figure("environment.free_bytes", free)
    context.result.note(
        f"{properties.name}, capability {properties.major}.{properties.minor}, {properties.multi_processor_count} "
        f"multiprocessors, {total / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free; driver and memory: {driver()}"
    )
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    context.result.note(
        f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}, "
        f"cuDNN {torch.backends.cudnn.version()}"
    )
    found = versions()
    context.result.note("packages: " + ", ".join(f"{name} {version}" for name, version in found.items() if version))
    context.result.note("missing: " + (", ".join(name for name, version in found.items() if not version) or "nothing"))
    if free < 0.9 * total:
        context.result.note(
            f"the GPU is not free: {(total - free) / 2**30:.1f} GiB are in use, so figures may be too low"
        )


def ceilings(context: Context) -> None:
    """Rates of copies and of square matrix products: the best, and what is kept up for a second."""
    bandwidth = copy_rate(context.device, context.sizes.copy_bytes)
    context.result.figure("environment.copy_bytes_per_second", bandwidth)
    shown = [f"copies {bandwidth / 1e12:.2f} TB/s"]
    for name, dtype in PRODUCTS.items():
        best, sustained = matmul_rates(
            context.device, dtype, SECONDS / (20 if context.rehearsing else 1), context.sizes.matmul
        )
        context.result.figure(f"environment.{name}_flops", sustained)
        context.result.figure(f"environment.{name}_flops_best", best)
        shown.append(f"{name} {sustained / 1e12:.0f} TFLOP/s")
    if not context.rehearsing:
        for name, dtype in PRODUCTS.items():
            rate, source = peak_flops(context.device, dtype)
            if source == "data sheet":
                context.result.figure(f"environment.{name}_data_sheet_flops", rate)
    context.result.note(
        f"ceilings: {', '.join(shown)} (products of {context.sizes.matmul}, fp32 in TF32), sizes {context.sizes.name}"
    )


def main(context: Context, _: argparse.Namespace) -> None:
    """Look, and measure."""
    describe(context)
    ceilings(context)


if __name__ == "__main__":
    run(main, __doc__)
