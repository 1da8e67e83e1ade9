"""The cache changes nothing: in parts, in batches and through every window the logits are those of one pass."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.inference.models import BLOCK, MODELS, logits_of, make_model, random_ids
from tinytron.inference import KVCache
from tinytron.model import GPT

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@torch.no_grad()
def in_parts(model: GPT, rows: list[list[int]], parts: list[int]) -> list[torch.Tensor]:
    """Logits ``[S, V]`` of every row, ``parts`` columns at a time; shorter rows are padded on the left."""
    longest = max(map(len, rows))
    dtype = next(model.parameters()).dtype
    cache = KVCache(model.config, [longest - len(row) for row in rows], longest, dtype)
    columns = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    assert sum(parts) == longest
    made = []
    for part in columns.split(parts, dim=1):
        hidden, _ = model.hidden_states(part, cache.extend(part.shape[1]), cache=cache.layers)
        made.append(model.lm_head(hidden))
    return [logits[longest - len(row) :] for logits, row in zip(torch.cat(made, dim=1), rows, strict=True)]


def check(model: GPT, rows: list[list[int]], parts: list[int]) -> None:
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    for made, row in zip(in_parts(model, rows, parts), rows, strict=True):
        expected = logits_of(model, row)
        torch.testing.assert_close(made, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


PARTS = {
    "one pass": [18],
    "token by token": [1] * 18,
    "prompt and tokens": [7] + [1] * 11,
    "prompts that go on": [3, 6, 1, 1, 5, 2],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_prompt_and_tokens_equal_one_pass(name: str, dtype: torch.dtype) -> None:
    check(make_model(name, dtype), [random_ids(18)], PARTS["prompt and tokens"])


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize(
    "name", ["plain", "learned", "window", "window of itself", "some windows", "moe", "all at once"]
)
def test_rows_of_different_lengths_in_any_parts(name: str, parts: list[int]) -> None:
    check(make_model(name), [random_ids(18, 1), random_ids(11, 2), random_ids(17, 3), random_ids(2, 4)], parts)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 17, 18, 19])
def test_every_window_in_every_split(window: int) -> None:
    model = make_model("plain", sliding_window=window)
    for first, second in itertools.product((1, 2, 4, 9), (1, 3, 5)):
        check(model, [random_ids(18, 1), random_ids(6, 2)], [first, second, 18 - first - second])


def test_a_window_has_no_more_slots_than_it_needs() -> None:
    model = make_model("some windows")
    cache = KVCache(model.config, [0, 0], BLOCK)
    assert [tuple(layer.kept.shape) for layer in cache.layers] == [(2, 2, s, 2, 4) for s in (BLOCK, 4, BLOCK)]


def test_positions_count_the_tokens() -> None:
    cache = KVCache(make_model().config, [2, 0], BLOCK)
    assert cache.extend(4).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert cache.extend(1).tolist() == [[2], [4]]


@torch.no_grad()
def test_rows_can_be_left_out_and_repeated() -> None:
    model, rows = make_model("some windows"), [random_ids(7, n) for n in range(3)]
    cache = KVCache(model.config, [0, 0, 0], 10, torch.float64)
    model.hidden_states(torch.tensor(rows), cache.extend(7), cache=cache.layers)
    cache.keep([2, 0, 2])
    new = random_ids(3, 9)
    hidden, _ = model.hidden_states(torch.tensor(new).unsqueeze(1), cache.extend(1), cache=cache.layers)
    for logits, row, token in zip(model.lm_head(hidden[:, 0]), (2, 0, 2), new, strict=True):
        torch.testing.assert_close(logits, logits_of(model, [*rows[row], token])[-1], rtol=0, atol=1e-9)


def test_padding_is_seen_by_nobody() -> None:
    """Whatever stands there, and whatever its numbers are."""
    model, row = make_model("moe"), random_ids(5)
    made = []
    for filler in (0, 7):
        cache = KVCache(model.config, [4, 0], 9, torch.float64)
        ids = torch.tensor([[filler] * 4 + row, random_ids(9, 2)])
        with torch.no_grad():
            hidden, _ = model.hidden_states(ids, cache.extend(9), cache=cache.layers)
        assert bool(hidden.isfinite().all())
        made.append(hidden[0, 4:])
    assert torch.equal(made[0], made[1])


def test_no_column_sees_nothing() -> None:
    """Padding too: backends differ in what they make of a row without any key."""
    cache = KVCache(make_model("some windows").config, [4, 0], 9)
    cache.extend(9)
    for layer in cache.layers:
        assert layer.plan.mask is not None
        assert bool((layer.plan.mask == 0).any(-1).all())


def test_a_cache_that_is_too_small_is_a_bug() -> None:
    cache = KVCache(make_model().config, [0], 4)
    with pytest.raises(AssertionError, match="5 columns in a cache of 4"):
        cache.extend(5)


def test_training_passes_without_a_cache_are_as_they_were() -> None:
    model, ids = make_model(), torch.tensor([random_ids(9)])
    plain, _ = model.hidden_states(ids)
    cache = KVCache(model.config, [0], 9, torch.float64)
    with torch.no_grad():
        kept, _ = model.hidden_states(ids, cache.extend(9), cache=cache.layers)
    torch.testing.assert_close(kept, plain, rtol=1e-12, atol=1e-12)
    assert plain.requires_grad
