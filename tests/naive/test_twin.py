"""The twin describes the same model as tinytron.model.GPT, and its step is what it says."""

from __future__ import annotations

import pytest
import torch

from tests.naive.gpt import Shape, logits, mean_loss
from tests.naive.training import Recipe, learning_rate, train
from tinytron.model import GPT, ModelConfig

CONFIG = ModelConfig(
    vocab_size=61, num_layer=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16, intermediate_size=24
)
SHAPE = Shape(layers=2, heads=4, kv_heads=2)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(61, (4, 13), generator=torch.Generator().manual_seed(5))
    labels = tokens[:, 1:].clone()
    labels[1, 4:], labels[3] = -100, -100
    return tokens[:, :-1], labels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_the_twin_has_the_logits_loss_and_gradients_of_the_model(
    batch: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    model = GPT(CONFIG, dtype=dtype)
    with torch.no_grad():
        for weight in model.parameters():  # logits of size one, norms that are not all ones
            weight.add_(
                0.3 * torch.randn(weight.shape, dtype=dtype, generator=torch.Generator().manual_seed(weight.numel()))
            )
    weights = {n: w.detach().clone().requires_grad_() for n, w in model.state_dict().items() if n != "lm_head.weight"}
    weights["lm_head.weight"] = weights["wte.weight"]
    torch.testing.assert_close(logits(weights, batch[0], SHAPE), model(batch[0]), rtol=tolerance, atol=30 * tolerance)

    valid = (batch[1] != -100).sum()
    loss, sums = mean_loss(weights, *batch, SHAPE), model(*batch)
    torch.testing.assert_close(loss, sums.objective / valid, rtol=tolerance, atol=0)
    torch.testing.assert_close(loss.detach(), sums.token / valid, rtol=tolerance, atol=0)
    loss.backward()  # type: ignore[no-untyped-call]
    (sums.objective / valid).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weights[name].grad, weight.grad, rtol=tolerance, atol=30 * tolerance)


def test_the_twin_keeps_tied_weights_tied_clips_and_learns(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    initial = GPT(CONFIG).state_dict()
    outcome = train(initial, [batch] * 20, SHAPE, Recipe(max_lr=1e-2, clip=0.5))
    assert "lm_head.weight" not in outcome.weights
    assert outcome.losses[-1] < 0.8 * outcome.losses[0]
    assert outcome.norms[0] > 0.5
    assert sum((g**2).sum() for g in outcome.grads[0].values()) ** 0.5 == pytest.approx(0.5, rel=1e-5)


def test_the_twins_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(Recipe(), step, 5) for step in range(5)]
    assert rates == pytest.approx([0.001, 0.002, 0.002, 0.0011, 0.0002])
