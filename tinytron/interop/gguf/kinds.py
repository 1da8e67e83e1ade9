"""The types of a GGUF file's weights."""

from __future__ import annotations

import torch

# By --gguf: the type that numbers must fit, and the file type of llama.cpp (llama_ftype).
KINDS: dict[str, tuple[torch.dtype, int]] = {
    "f32": (torch.float32, 0),
    "f16": (torch.float16, 1),
    "bf16": (torch.bfloat16, 32),
    "q8_0": (torch.float16, 7),  # blocks of 32 numbers of 8 bits, and their scale in fp16
}
Q8_BLOCK = 32
