"""How large the parts run: chosen by the GPU's memory and compute capability; toy sizes for rehearsals."""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 2**30
ROLES = ("dense128", "dense64", "large", "experts")


@dataclass(frozen=True)
class Sizes:
    """``models``: a model of step_time.py and its sequences per step, by role: a dense model with heads of 128 and of 64,
    a large one, one with experts. ``kernel_*``: tokens, widths and vocabulary of the kernels measured alone."""

    name: str
    precision: str
    models: dict[str, tuple[str, int]]
    seq_len: int
    rounds: int
    steps: int  # of one variant in a round
    kernel_tokens: int
    kernel_widths: tuple[int, ...]
    kernel_vocab: int
    matmul: int  # side of the square products
    copy_bytes: int
    train_steps: int  # of the real run


FULL = Sizes(
    name="full",
    precision="bf16",
    models={"dense128": ("0.25b", 8), "dense64": ("0.25b-h64", 8), "large": ("1b", 2), "experts": ("0.3b-a0.17b", 8)},
    seq_len=4096,
    rounds=5,
    steps=4,
    kernel_tokens=16384,
    kernel_widths=(768, 2048),
    kernel_vocab=50304,
    matmul=8192,
    copy_bytes=2**31,
    train_steps=100,
)
MEDIUM = replace(
    FULL,
    name="medium",
    models={"dense128": ("0.25b", 2), "dense64": ("0.25b-h64", 2), "large": ("0.5b", 1), "experts": ("0.3b-a0.17b", 2)},
    kernel_tokens=8192,
    copy_bytes=2**29,
)
SMALL = replace(
    FULL,
    name="small",
    models={"dense128": ("0.1b", 2), "dense64": ("0.1b-h64", 2), "large": ("0.25b", 1), "experts": ("0.1b-moe", 2)},
    seq_len=1024,
    kernel_tokens=4096,
    kernel_widths=(768,),
    copy_bytes=2**27,
)
TOY = Sizes(
    name="toy",
    precision="fp32",
    models={"dense128": ("tiny", 2), "dense64": ("tiny", 2), "large": ("tiny", 2), "experts": ("tiny-moe", 2)},
    seq_len=16,
    rounds=2,
    steps=1,
    kernel_tokens=8,
    kernel_widths=(16,),
    kernel_vocab=40,
    matmul=64,
    copy_bytes=2**16,
    train_steps=6,
)


def choose_sizes(memory: int, capability: tuple[int, int]) -> Sizes:
    """The largest that fit into ``memory`` bytes. Before Ampere (capability 8) there is no bf16: small models in fp32."""
    if capability < (8, 0):
        return replace(SMALL, precision="fp32")
    if memory >= 70 * GIB:
        return FULL
    return MEDIUM if memory >= 22 * GIB else SMALL
