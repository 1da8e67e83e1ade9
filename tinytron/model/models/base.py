"""The smallest model to build on: an embedding, a body of your own, and the embedding again as the head.

class MyModel(LanguageModel):
    depth: int = field("model/depth", default=2)

    def __init__(self, *, vocab_size: int, hidden_size: int, depth: int) -> None:
        super().__init__(vocab_size=vocab_size, hidden_size=hidden_size)
        self.layers = nn.ModuleList(MyLayer(hidden_size) for _ in range(depth))

    def body(self, x_BSD: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return x_BSD
"""

from __future__ import annotations

import torch
import torch.nn as nn

from tinytron.config import field
from tinytron.model.modules.loss import cross_entropy_of_logits
from tinytron.utils.sequences import IGNORE_INDEX


class LanguageModel(nn.Module):
    """A causal language model; subclasses define ``body``. Sizes are those of the run (``--vocab_size``,
    ``--hidden_size``). It sees whole sequences: ``--sep_size 1``."""

    vocab_size: int = field("model/vocab_size")
    hidden_size: int = field("model/hidden_size")

    def __init__(self, *, vocab_size: int, hidden_size: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        nn.init.normal_(self.embedding.weight, std=init_std)
        self.norm = nn.RMSNorm(hidden_size)

    def body(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """The layers between embedding and head, ``[B, S, D] -> [B, S, D]``, which must not look ahead."""
        return x_BSD

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        deterministic: bool = False,
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits ``[B, S, V]`` for the token ids ``x`` ``[B, S]``, and their mean cross entropy with the targets ``y``, of
        which -100 and those outside ``padding_mask`` are ignored, and which count ``weights`` ``[B, S]`` times.
        ``deterministic``: without dropout, for a body that has some."""
        logits = self.norm(self.body(self.embedding(x))) @ self.embedding.weight.T
        if y is None:
            return logits, None
        if padding_mask is not None:
            y = y.masked_fill(~padding_mask.bool(), IGNORE_INDEX)
        weights_T = None if weights is None else weights.flatten()
        sums = cross_entropy_of_logits(logits.flatten(0, 1), y.flatten(), weights_T=weights_T)
        count = ((y != IGNORE_INDEX) if weights is None else weights * (y != IGNORE_INDEX)).sum(dtype=torch.float64)
        return logits, sums.objective / torch.where(count > 0, count, 1)
