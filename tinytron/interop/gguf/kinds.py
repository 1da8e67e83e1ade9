"""The data types of weights in a GGUF file."""

from __future__ import annotations

import torch

# By --gguf: the type that values must fit into, and llama.cpp's file type (llama_ftype).
KINDS: dict[str, tuple[torch.dtype, int]] = {
    "f32": (torch.float32, 0),
    "f16": (torch.float16, 1),
    "bf16": (torch.bfloat16, 32),
    "q8_0": (torch.float16, 7),  # blocks of 32 numbers of 8 bits, each with a scale in fp16
}
Q8_BLOCK = 32
