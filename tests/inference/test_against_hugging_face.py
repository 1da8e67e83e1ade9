"""Greedy generation token by token that of Hugging Face's ``generate`` with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.inference.models import MOE, make_model, random_ids
from tinytron.inference import KVCache, SamplingOptions, complete

pytest.importorskip("transformers")

from tests.inference.hugging_face import to_hugging_face

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True, "head_dim": 6},
    "mixtral": MOE,
}
PROMPTS = [random_ids(9, 1), random_ids(4, 2), random_ids(12, 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy(kind: str) -> None:
    model = make_model("plain", torch.float64, tied_lm_head=False, **KINDS[kind])
    theirs, longest = to_hugging_face(model), max(map(len, PROMPTS))
    mine = complete(model, PROMPTS, SamplingOptions(max_new_tokens=10, temperature=0))
    assert type(theirs).__name__ == "MixtralForCausalLM" or kind != "mixtral"
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    made = theirs.generate(ids, attention_mask=seen, do_sample=False, max_new_tokens=10, use_cache=True)
    assert [sample.tokens for sample in mine.samples] == made[:, longest:].tolist()
    assert len({tuple(sample.tokens) for sample in mine.samples}) == 3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits(kind: str) -> None:
    model = make_model("plain", torch.float64, tied_lm_head=False, **KINDS[kind])
    theirs, ids = to_hugging_face(model), torch.tensor([PROMPTS[0]])
    expected, cache = theirs(input_ids=ids).logits, KVCache(model.config, [0], 9, torch.float64)
    hidden = [model.hidden_states(p, cache.extend(p.shape[1]), cache=cache.layers)[0] for p in ids.split(4, dim=1)]
    # Their norms and rotations are in fp32, whatever the model is in.
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(model.lm_head(torch.cat(hidden, dim=1)), expected, rtol=0, atol=tolerance)
