"""Generation and scoring on a CUDA device are those on the CPU; run with ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.device import DEVICE, GPU_TEST, sized
from tests.inference.models import MODELS, greedy, make_model, random_ids
from tinytron.inference import SamplingOptions, complete

pytestmark = GPU_TEST
PROMPTS = [random_ids(9, 1), random_ids(4, 2), random_ids(12, 4)]


@pytest.mark.parametrize("name", sized(list(MODELS), ["plain", "some windows", "all at once"]))
def test_greedy_tokens(name: str) -> None:
    model = make_model(name)
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS]
    made = complete(model.to(DEVICE), PROMPTS, SamplingOptions(max_new_tokens=8, temperature=0))
    assert [sample.tokens for sample in made.samples] == expected


def test_samples() -> None:
    options = SamplingOptions(max_new_tokens=8, temperature=2.0, top_k=20, top_p=0.95, min_p=0.01, num_samples=3)
    model = make_model("some windows")
    expected = [sample.tokens for sample in complete(model, PROMPTS, options).samples]
    assert [sample.tokens for sample in complete(model.to(DEVICE), PROMPTS, options).samples] == expected


@pytest.mark.parametrize("name", ["plain", "some windows", "moe"])
def test_bf16_is_finite_with_padding(name: str) -> None:
    model = make_model(name, torch.bfloat16).to(DEVICE)
    made = complete(model, PROMPTS, SamplingOptions(max_new_tokens=8, temperature=1.0))
    assert all(0 <= token < 29 for sample in made.samples for token in sample.tokens)
