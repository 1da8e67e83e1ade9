"""llama.cpp itself, through the wheels of cyllama: ``pip install cyllama``, which no extra of ours asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

ll = pytest.importorskip("cyllama.llama.llama_cpp")
_CONTEXT = 128


class _Model(ll.LlamaModel):  # type: ignore[misc, name-defined]
    @property
    def n_vocab(self) -> int:
        """``get_logits_ith`` of cyllama 0.2.18 asks the model for it, which has it no more."""
        return int(self.get_vocab().n_vocab)


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU, with keys and values cached in fp32."""

    def __init__(self, path: Path) -> None:
        ll.disable_logging()
        params = ll.LlamaModelParams()
        params.n_gpu_layers = 0
        self._model = _Model(str(path), params)
        self.vocab = self._model.get_vocab()

    def tokenize(self, text: str) -> list[int]:
        """The ids of a prompt, special tokens in it spelled out."""
        return list(self.vocab.tokenize(text, True, False))

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """``[len(ids), vocabulary]``."""
        params = ll.LlamaContextParams()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads = _CONTEXT, _CONTEXT, _CONTEXT, 1
        params.type_k = params.type_v = params.flash_attn_type = 0
        context = ll.LlamaContext(self._model, params)
        batch = ll.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for place, token in enumerate(ids):
            batch.add(token, place, [0], True)
        context.decode(batch)
        return np.array([context.get_logits_ith(place) for place in range(len(ids))])

    def greedy(self, prompt: str, count: int) -> str:
        """The text of the likeliest tokens after ``prompt``, up to one that ends texts."""
        ids, new = self.tokenize(prompt), list[int]()
        while len(new) < count:
            token = int(self.logits([*ids, *new])[-1].argmax())
            if self.vocab.is_eog(token):
                break
            new.append(token)
        return str(self.vocab.detokenize(new, 4096, False, False)) if new else ""
