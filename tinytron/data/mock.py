"""Random tokens with the interface of real data, for debugging and for benchmarks without a disk."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset


class MockDataset(Dataset[dict[str, torch.Tensor]]):
    """``num_samples`` samples of uniform random tokens. Sample i depends only on (seed, offset + i), so every process,
    layout and resumed run sees the same samples. ``offset`` separates validation from training."""

    def __init__(self, num_samples: int, seq_len: int, vocab_size: int, seed: int, offset: int = 0) -> None:
        self.num_samples, self.seq_len, self.vocab_size = num_samples, seq_len, vocab_size
        self.seed, self.offset = seed, offset

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")  # ends a plain for loop over the dataset
        random = np.random.default_rng([self.seed, self.offset + index])
        tokens = torch.from_numpy(random.integers(0, self.vocab_size, self.seq_len + 1, dtype=np.int64))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}

    def fingerprint(self) -> str:
        """A string of everything that the samples depend on."""
        return f"mock:{self.num_samples}:{self.seq_len}:{self.vocab_size}:{self.seed}:{self.offset}"
