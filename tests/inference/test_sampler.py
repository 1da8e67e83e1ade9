"""Every choice against loops over the vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from tinytron.errors import ConfigError
from tinytron.inference import SamplingOptions
from tinytron.inference.sampler import draw, keep_min_p, keep_top_k, keep_top_p, next_tokens

V = 23


def make_logits(rows: int = 6, seed: int = 0) -> torch.Tensor:
    """With ties: values are rounded."""
    noise = torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise * 4).round() / 2


def probabilities(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [{i for i, x in enumerate(row) if x > -math.inf} for row in logits.tolist()]


@pytest.mark.parametrize("k", [1, 2, 7, V, V + 5])
def test_top_k(k: int) -> None:
    logits = make_logits()
    for row, made in zip(logits.tolist(), kept(keep_top_k(logits, k)), strict=True):
        least = sorted(row)[-min(k, V)]
        assert made == {i for i, x in enumerate(row) if x >= least}


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p(p: float) -> None:
    logits = make_logits()
    for row, made in zip(logits.tolist(), kept(keep_top_p(logits, p)), strict=True):
        chance, expected, total = probabilities(row), set(), 0.0
        for i in sorted(range(V), key=lambda i: (-row[i], i)):
            expected.add(i)
            total += chance[i]
            if total >= p:
                break
        assert made == expected


def test_top_p_that_is_reached_exactly() -> None:
    logits = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log2() * math.log(2)
    assert kept(keep_top_p(logits, 0.5)) == [{1}]
    assert kept(keep_top_p(logits, 0.75)) == [{0, 1}]


@pytest.mark.parametrize("count", [3, 10, 20, 50])
def test_top_p_takes_no_token_too_many_of_equal_ones(count: int) -> None:
    """Sums of probabilities in fp32 miss ``k / count`` in either direction."""
    for k in range(1, count + 1):
        assert kept(keep_top_p(torch.zeros(1, count), k / count)) == [set(range(k))]
    assert kept(keep_top_p(torch.tensor([[0.3, 0.1, 0.1, 0.5]]).log(), 0.8)) == [{0, 3}]


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-38, 1e-45, 5e-324])
def test_tiny_temperatures_take_the_likeliest_token(temperature: float) -> None:
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(3)) * 20
    u = torch.linspace(0, 0.999, 6, dtype=torch.float64)
    for options in (SamplingOptions(temperature=temperature), SamplingOptions(temperature=temperature, top_p=0.9)):
        assert next_tokens(logits, options, u).tolist() == logits.argmax(-1).tolist()
    hidden = logits.masked_fill(torch.arange(V) % 2 == 0, -math.inf)
    options = SamplingOptions(temperature=temperature, top_k=3, min_p=0.1)
    assert next_tokens(hidden, options, u).tolist() == hidden.argmax(-1).tolist()


@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p(p: float) -> None:
    logits = make_logits()
    for row, made in zip(logits.tolist(), kept(keep_min_p(logits, p)), strict=True):
        chance = probabilities(row)
        assert made == {i for i in range(V) if chance[i] >= p * max(chance) * (1 - 1e-12)}


def test_a_draw_is_where_the_distribution_function_passes_the_number() -> None:
    logits = make_logits(200)
    u = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row, number, made in zip(logits.tolist(), u.tolist(), draw(logits, u).tolist(), strict=True):
        chance, total = probabilities(row), 0.0
        for i in range(V):
            total += chance[i]
            if total > number:
                break
        assert made == i


def test_draws_have_the_distribution() -> None:
    logits, count = make_logits(1), 20000
    u = torch.rand(count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = draw(logits.expand(count, V), u).bincount(minlength=V).double() / count
    assert float((seen - logits[0].softmax(-1)).abs().max()) < 4 * (0.25 / count) ** 0.5


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_an_excluded_token_is_never_drawn(u: float) -> None:
    logits = torch.full((1, V), -math.inf)
    logits[0, [3, 11]] = torch.tensor([0.3, -40.0])
    assert draw(logits, torch.tensor([u], dtype=torch.float64)).item() in (3, 11)
    logits[0, 11] = -math.inf
    assert draw(logits, torch.tensor([u], dtype=torch.float64)).item() == 3


def test_the_order_of_the_choices() -> None:
    """Temperature first, then top-k, top-p among those, min-p among those."""
    logits = torch.tensor([[2.0, 1.9, 1.0, 0.0, -3.0]], dtype=torch.float64)
    options = SamplingOptions(temperature=0.5, top_k=3, top_p=0.8, min_p=0.9)
    u = torch.rand(500, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = keep_min_p(keep_top_p(keep_top_k(logits / 0.5, 3), 0.8), 0.9)
    assert kept(expected) == [{0}]
    assert kept(keep_top_p(keep_min_p(logits / 0.5, 0.9), 0.8)) == [{0}]
    assert next_tokens(logits.expand(500, 5), options, u).unique().tolist() == [0]
    wider = SamplingOptions(temperature=0.5, top_k=3, top_p=0.8)
    assert next_tokens(logits.expand(500, 5), wider, u).unique().tolist() == [0, 1]
    hotter = SamplingOptions(temperature=5.0, top_k=3)
    assert next_tokens(logits.expand(500, 5), hotter, u).unique().tolist() == [0, 1, 2]


def test_temperature_zero_is_the_likeliest() -> None:
    logits = make_logits()
    made = next_tokens(logits, SamplingOptions(temperature=0, top_k=1), torch.zeros(6, dtype=torch.float64))
    assert made.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_half_precision_is_widened() -> None:
    logits = torch.tensor([[0.0, 0.001]], dtype=torch.bfloat16)
    u = torch.tensor([0.4999], dtype=torch.float64)
    assert next_tokens(logits, SamplingOptions(temperature=0.001), u).item() == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -0.1}, "--temperature -0.1 must be at least 0 (the likeliest token); use 0.8"),
        ({"temperature": math.nan}, "--temperature nan must be at least 0"),
        ({"top_p": 0.0}, "--top_p 0.0 must be above 0 and at most 1 (all tokens); use 0.9"),
        ({"top_p": 1.5}, "--top_p 1.5 must be above 0"),
        ({"min_p": 1.5}, "--min_p 1.5 must be in [0, 1]; use 0.05"),
        ({"top_k": -1}, "--top_k -1 must be at least 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0 must be at least 1"),
        ({"num_samples": 0}, "--num_samples 0 must be at least 1"),
        ({"stop": ("a", "")}, "--stop '' would stop at once; give a text of at least one character"),
    ],
)
def test_values_that_make_no_sense(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingOptions(**options)  # type: ignore[arg-type]
    assert str(error.value).startswith(text)
