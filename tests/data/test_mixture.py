"""Mixtures against a twin that deals out one position after the other, and the properties they must have whatever the
formula."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytron.data import mixture as mixture_module
from tinytron.data.mixture import MixtureOrder
from tinytron.data.mixture_file import Mixture, Source, Stage, read_mixture
from tinytron.data.permutation import Permutation
from tinytron.errors import ConfigError, DataError

M = 4096


def mixed(
    stages: Sequence[tuple[int | None, Sequence[int]]],
    epochs: Sequence[Any] = (),
    tokens: Sequence[Any] = (),
    names: Sequence[str] = "abcdef",
) -> Mixture:
    """Sources a, b, ...; a stage is (tokens, relative weights)."""
    count = len(stages[0][1])
    caps = [(epochs[k] if epochs else None, tokens[k] if tokens else None) for k in range(count)]
    return Mixture(
        "mix.json",
        tuple(
            Source(names[k], names[k], *(None if cap is None else Fraction(str(cap)) for cap in caps[k]))
            for k in range(count)
        ),
        tuple(
            Stage(
                None if length is None else Fraction(length), tuple(Fraction(w, sum(weights)) for w in weights), number
            )
            for number, (length, weights) in enumerate(stages)
        ),
    )


def positions(order: MixtureOrder, first: int, last: int) -> list[int]:
    return [int(i) for i in order(np.arange(first, last))]


# The twin: one position after the other, in dictionaries.


def twin(
    plan: Mixture, sizes: Sequence[int], seq_len: int, seed: int, length: int, block: int
) -> list[tuple[str, int]]:
    """(source, sample of it) of every position below ``length``, or of all there are."""
    names = [source.name for source in plan.sources]
    size = dict(zip(names, sizes, strict=True))
    caps = {}
    for source in plan.sources:
        given = [] if source.max_epochs is None else [math.floor(source.max_epochs * size[source.name])]
        given += [] if source.max_tokens is None else [math.floor(source.max_tokens / seq_len)]
        caps[source.name] = min(given) if given else None
    given_so_far = dict.fromkeys(names, 0)
    out: list[tuple[str, int]] = []
    number = 0
    for stage in plan.stages:
        stage_left = length if stage.tokens is None else math.floor(stage.tokens / seq_len)
        while stage_left > 0:
            alive = {
                name: weight
                for name, weight in zip(names, stage.weights, strict=True)
                if weight and given_so_far[name] != caps[name]
            }
            if not alive:
                return out
            total = sum(alive.values())
            dealt = dict.fromkeys(alive, 0)
            blocks, ended = 0, False
            while stage_left > 0 and not ended:
                blocks += 1
                deck, edge = [], Fraction(0)
                for name, weight in alive.items():
                    should = math.floor((edge + weight / total) * block * blocks) - math.floor(edge * block * blocks)
                    edge += weight / total
                    deck += [name] * (should - dealt[name])
                    dealt[name] = should
                shuffle = Permutation(block, seed, 0x6D6978, number, blocks - 1)(np.arange(block))
                for card in shuffle.tolist():
                    name = deck[card]
                    out.append((name, given_so_far[name]))
                    given_so_far[name] += 1
                    stage_left -= 1
                    if len(out) == length:
                        return out
                    ended = given_so_far[name] == caps[name]
                    if ended or stage_left == 0:
                        break
            number += 1
    return out


@st.composite
def plans(draw: st.DrawFn) -> tuple[Mixture, list[int]]:
    """Mixtures of a few small sources with stages and caps."""
    count = draw(st.integers(1, 4))
    stages = []
    for _ in range(draw(st.integers(0, 2))):
        weights = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count).filter(any))
        stages.append((draw(st.integers(3, 150)), weights))
    stages.append((None, draw(st.lists(st.integers(0, 3), min_size=count, max_size=count).filter(any))))
    epochs = draw(st.lists(st.sampled_from([None, 0.5, 1, 1.7, 3]), min_size=count, max_size=count))
    tokens = draw(st.lists(st.sampled_from([None, None, 3, 50, 100]), min_size=count, max_size=count))
    sizes = draw(st.lists(st.integers(2, 40), min_size=count, max_size=count))
    return mixed(stages, epochs, tokens), sizes


@settings(max_examples=120, deadline=None)
@given(plan=plans(), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_every_position_is_the_twins(plan: tuple[Mixture, list[int]], seed: int, data: st.DataObject) -> None:
    """In blocks of 16, so that a few hundred positions have ends of blocks, stages and sources; 3 tokens a sample."""
    mixture, sizes = plan
    length, offsets = 400, dict(zip("abcdef", [0, *np.cumsum(sizes)], strict=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture_module, "BLOCK", 16)
        order = MixtureOrder(mixture, sizes, 3, seed)
        expected = twin(mixture, sizes, 3, seed, length, 16)
        reached = len(expected)
        assert order.capacity is None or order.capacity >= reached
        if reached < length:
            assert order.capacity == reached
        ids = positions(order, 0, reached)
        # Which sample: the epoch's permutation of the source, whose key only its name and the seed decide.
        for (name, index), found in zip(expected, ids, strict=True):
            k = "abcdef".index(name)
            shuffle = Permutation(sizes[k], seed, order.keys[k], index // sizes[k])
            assert found == offsets[name] + int(shuffle(np.array([index % sizes[k]]))[0])
        # Counts.
        at = data.draw(st.integers(0, reached))
        so_far = Counter(name for name, _ in expected[:at])
        assert order.counts(at).tolist() == [so_far[source.name] for source in mixture.sources]
        # Random access: any positions, in any order, from a fresh object or a used one.
        some = data.draw(st.lists(st.integers(0, reached - 1), max_size=20))
        for asked in (order, MixtureOrder(mixture, sizes, 3, seed)):
            assert asked(np.array(some, np.int64)).tolist() == [ids[p] for p in some]


def test_whole_blocks_are_the_twins_too() -> None:
    plan = mixed([(3 * 5000, [5, 3, 2]), (None, [1, 0, 3])], epochs=[1.5, None, None])
    sizes = [3000, 700, 2000]
    expected = twin(plan, sizes, 3, 7, 14000, M)
    order = MixtureOrder(plan, sizes, 3, 7)
    names = ["abc"[k] for k in order.source_of(order(np.arange(14000)))]
    assert names == [name for name, _ in expected]
    assert [segment.stage for segment in order.segments] == [0, 1, 1]
    assert order.segments[1].start == 5000


# Properties that hold whatever the formula.


@pytest.mark.parametrize("weights", [[1], [7, 3], [1, 1, 1], [1, 4095], [4095, 1], [1, 2, 4093], [3, 1, 1000, 17, 5]])
def test_proportions_are_exact_at_the_ends_of_blocks(weights: list[int]) -> None:
    order = MixtureOrder(mixed([(None, weights)]), [50] * len(weights), 1, 3)
    sources = order.source_of(order(np.arange(6 * M)))
    for blocks in range(1, 7):
        counts = np.bincount(sources[: blocks * M], minlength=len(weights))
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - Fraction(weight, sum(weights)) * M * blocks) < 1


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.integers(15, 1000), min_size=1, max_size=60),
    block=st.one_of(st.integers(0, 50), st.just(10**12)),
)
def test_no_block_takes_a_negative_number_from_a_source(weights: list[int], block: int) -> None:
    order = MixtureOrder(mixed([(None, weights)], names="abcdefghijklmnopqrstuvwxyz" * 3), [5] * len(weights), 1, 0)
    before, after = (order.segments[0].before_block(b) for b in (block, block + 1))
    assert all(high - low >= 0 for low, high in zip(before, after, strict=True))
    assert sum(after) - sum(before) == M
    assert all(abs(t - Fraction(w, sum(weights)) * M * (block + 1)) < 1 for t, w in zip(after, weights, strict=True))


def streams(order: MixtureOrder, length: int) -> list[list[int]]:
    """The ids of every source, in the order in which they come."""
    ids = order(np.arange(length))
    sources = order.source_of(ids)
    return [ids[sources == k].tolist() for k in range(len(order.sizes))]


def test_every_source_is_walked_epoch_by_epoch_across_all_ends() -> None:
    sizes = [900, 37, 5000]
    plan = mixed([(4000, [2, 1, 5]), (9000, [0, 1, 1]), (None, [3, 1, 1])], epochs=[5.5, None, 1])
    order = MixtureOrder(plan, sizes, 1, 11)
    assert len(order.segments) > 3
    first = 0
    for size, stream in zip(sizes, streams(order, 40_000), strict=True):
        orders = [stream[i : i + size] for i in range(0, len(stream), size)]
        for epoch in orders[:-1]:
            assert sorted(epoch) == list(range(first, first + size))
        assert len(set(orders[-1])) == len(orders[-1])
        assert set(orders[-1]) <= set(range(first, first + size))
        assert len(orders) == 1 or orders[0] != orders[1]
        first += size


def test_a_block_is_shuffled() -> None:
    order = MixtureOrder(mixed([(None, [1, 1])]), [10**6, 10**6], 1, 3)
    sources = order.source_of(order(np.arange(2 * M)))
    assert sources[:M].tolist() != sources[M:].tolist()
    runs = np.count_nonzero(np.diff(sources[:M])) + 1
    assert abs(runs - M / 2) < 5 * (M / 4) ** 0.5  # of M fair coins


def test_the_order_inside_a_source_does_not_depend_on_the_mixture() -> None:
    sizes = [500, 300]
    alone = streams(MixtureOrder(mixed([(None, [1])]), sizes[:1], 8, 5), 2000)[0]
    even = streams(MixtureOrder(mixed([(None, [1, 1])]), sizes, 8, 5), 4000)
    rare = streams(MixtureOrder(mixed([(800, [1, 4]), (None, [1, 9])], epochs=[None, 2]), sizes, 8, 5), 4000)
    swapped = streams(MixtureOrder(mixed([(None, [1, 1])], names="ba"), sizes[::-1], 8, 5), 4000)
    for stream in (even[0], rare[0], [i - 300 for i in swapped[1]]):
        shorter = min(len(alone), len(stream))
        assert shorter > 300
        assert stream[:shorter] == alone[:shorter]


def test_names_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, names: str = "ab") -> MixtureOrder:
        return MixtureOrder(mixed([(None, [1, 1])], names=names), [300, 300], 8, seed)

    base = order(5)
    other = order(6)
    assert positions(base, 0, 500) == positions(order(5), 0, 500)
    a, b = streams(base, 500)
    assert a[:200] != [i - 300 for i in b[:200]]
    for differs in (streams(other, 500)[0], streams(order(5, "cb"), 500)[0]):
        assert sum(x == y for x, y in zip(a, differs, strict=False)) < 20
    mixed_up = base.source_of(base(np.arange(500))) != other.source_of(other(np.arange(500)))
    assert mixed_up.sum() > 100


def test_the_order_is_frozen() -> None:
    """A resumed run of an older version must go on in the same order."""
    order = MixtureOrder(mixed([(None, [2, 1])]), [7, 5], 8, 1337)
    assert positions(order, 0, 12) == [0, 7, 11, 9, 4, 6, 5, 2, 1, 3, 4, 5]
    assert order.fingerprint(12) == "mixture:b6acce9522838f38"


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_any_chunking_gives_the_same_walk(chunk: int) -> None:
    plan = mixed([(2000, [2, 1]), (None, [1, 3])], epochs=[3, None])
    whole = positions(MixtureOrder(plan, [400, 90], 1, 2), 0, 6000)
    order = MixtureOrder(plan, [400, 90], 1, 2)
    for first in range(1500, 1500 + 20 * chunk, chunk):
        last = min(first + chunk, 6000)
        assert positions(order, first, last) == whole[first:last]
    assert order(np.arange(6000)[::-1].reshape(-1)).tolist() == whole[::-1]
    assert order(np.array([], np.int64)).tolist() == []


def test_a_run_of_a_quadrillion_samples_costs_nothing() -> None:
    """Ends of stages and caps are found by arithmetic; few blocks are remembered."""
    plan = mixed([(10**14, [7, 2, 1]), (None, [1, 1, 1])], epochs=[2.5, None, None], tokens=[None, 10**13, None])
    sizes = [10**12, 10**9, 10**7]
    order = MixtureOrder(plan, sizes, 10, 4)
    assert len(order.segments) == 4
    far = np.array([10**15, 3, 10**12 + 1, 10**15 + 1, 10**13 - 1])
    ids = order(far)
    assert len(set(ids.tolist())) == 5
    assert ids.tolist() == [int(order(far[i : i + 1])[0]) for i in range(5)]
    assert order.counts(10**15).tolist() == [25 * 10**11, 10**12, 10**15 - 35 * 10**11]
    for first in range(0, 10**12, 10**11):
        positions(order, first, first + 5000)
    assert len(pickle.dumps(order)) < 10**6
    assert len(order._cache) <= mixture_module._CACHED_BLOCKS


# Caps and the end.


def test_a_source_gives_what_its_caps_allow_and_the_others_go_on_in_proportion() -> None:
    plan = mixed([(None, [2, 1, 1])], epochs=[2, None, None], tokens=[8 * 1500, None, None])
    order = MixtureOrder(plan, [1000, 100, 100], 8, 1)
    sources = order.source_of(order(np.arange(40_000)))
    assert np.count_nonzero(sources == 0) == 1500  # the smaller cap
    end = int(np.flatnonzero(sources == 0)[-1]) + 1
    assert [segment.start for segment in order.segments] == [0, end]
    assert order.segments[1].weights == (0, Fraction(1, 2), Fraction(1, 2))
    assert np.bincount(sources[end : end + M]).tolist() == [0, M // 2, M // 2]
    assert order.counts(end)[0] == 1500
    assert order.counts(end - 1)[0] == 1499
    assert order.capacity is None
    assert order.num_samples == 1500 + 100 + 100


def test_a_fraction_of_an_epoch() -> None:
    order = MixtureOrder(mixed([(None, [1, 1])], epochs=[0.5, 1.25]), [101, 10], 8, 1)
    assert order.caps == [50, 12]
    assert order.capacity == order.num_samples == 62
    assert sorted(Counter(positions(order, 0, 62)).values()) == [1] * 58 + [2] * 2


def test_a_later_stage_renews_nothing_and_keeps_its_own_sources() -> None:
    """a is used up in the first stage; b, which only the second uses, is not touched by that."""
    order = MixtureOrder(mixed([(1000, [1, 0, 1]), (None, [2, 1, 1])], epochs=[1, 1, None]), [100, 50, 70], 1, 1)
    assert order.counts(1000).tolist() == [100, 0, 900]
    assert order.segments[2].weights == (0, Fraction(1, 2), Fraction(1, 2))
    assert order.counts(5000).tolist() == [100, 50, 4850]


def test_caps_that_end_with_the_stage_leave_no_empty_segment() -> None:
    order = MixtureOrder(mixed([(300, [1, 0]), (None, [1, 1])], epochs=[3, None]), [100, 50], 1, 1)
    assert [(s.stage, s.start) for s in order.segments] == [(0, 0), (1, 300)]
    assert order.segments[1].weights == (0, 1)


@pytest.mark.parametrize("stages", [[(None, [1, 1])], [(1000, [1, 1]), (None, [1, 1])]])
def test_the_mixture_ends_when_all_that_a_stage_uses_is_used_up(stages: Any) -> None:
    order = MixtureOrder(mixed(stages, epochs=[1, 2]), [100, 50], 8, 1)
    if len(stages) == 2:
        assert order.segments[-1].stage == 1 or order.capacity == 125
    assert order.capacity == order.num_samples == 200
    assert sorted(Counter(positions(order, 0, 200)).values()) == [1] * 100 + [2] * 50
    assert order.counts(200).tolist() == [100, 100]
    text = (
        rf"mix\.json: the mixture ends after 1600 tokens, when a, b \(all that stage {len(stages)} uses\) have reached "
        "their max_epochs or max_tokens; lower --max_steps to no more tokens than that, or raise a cap"
    )
    for ask in (lambda: order(np.array([3, 200])), lambda: order.counts(201)):
        with pytest.raises(DataError, match=text):
            ask()


def test_a_stage_without_sources_ends_the_mixture_before_later_stages() -> None:
    order = MixtureOrder(mixed([(1000, [1, 0]), (None, [0, 1])], epochs=[2, None]), [100, 50], 1, 1)
    assert order.capacity == order.num_samples == 200  # not 250, which the sources have together
    with pytest.raises(DataError, match=r"ends after 200 tokens, when a \(all that stage 1 uses\)"):
        order(np.array([200]))


def test_what_no_run_will_reach_does_not_overflow() -> None:
    order = MixtureOrder(mixed([(None, [1, 4095])], epochs=[10**6, None]), [10**15, 10], 1, 1)
    assert len(order.segments) == 1
    assert order.capacity is None


# What it says about itself.


def test_the_default_length_counts_caps_instead_of_sizes() -> None:
    for epochs, tokens, length in ((None, None, 150), (2, None, 250), (None, 8 * 30, 80), (0.5, 8 * 30, 80)):
        order = MixtureOrder(mixed([(None, [9, 1])], [epochs, None], [tokens, None]), [100, 50], 8, 1)
        assert order.num_samples == length


def test_the_description_has_tokens_weights_epochs_segments_and_ends() -> None:
    plan = mixed([(10**6, [3, 1, 0]), (None, [1, 1, 2])], epochs=[1, None, 1], names=["web", "code", "math"])
    order = MixtureOrder(plan, [500, 100, 200], 1000, 7)
    first, web, code, math_, *segments = order.describe()
    assert first == "mixture mix.json: 3 sources, 800K tokens"
    assert web.startswith("  web: weight 0.75/0.25, has 500K tokens, gives ")
    assert web.endswith("at most 500K tokens")
    assert math_ == "  math: weight 0/0.5, has 200K tokens, gives 0 tokens (0 epochs), at most 200K tokens"
    counts = order.counts(800)
    assert f"gives {counts[1]}K tokens ({counts[1] / 100:.3g} epochs)" in code
    ends = [order.segments[i].start for i in range(1, 4)]
    assert segments == [
        f"  stage 1, from 0 tokens to {ends[0]}K tokens: web 0.75, code 0.25; web used up at its end",
        f"  stage 1, from {ends[0]}K tokens to 1M tokens: code 1",
        f"  stage 2, from 1M tokens to {ends[2] / 1000:.4g}M tokens: code 0.3333, math 0.6667; math used up at its end",
        f"  stage 2, from {ends[2] / 1000:.4g}M tokens to the end of the run: code 1",
    ]
    assert "2 sources, 2T tokens" in MixtureOrder(mixed([(None, [1, 1])]), [10**9] * 2, 1000, 7).describe()[0]


def test_the_description_of_an_end() -> None:
    order = MixtureOrder(mixed([(None, [1])], epochs=[2]), [100], 8, 1)
    assert order.describe(1000)[0].endswith("1 sources, 1.6K tokens")
    assert order.describe(1000)[-1] == "  the mixture ends after 1.6K tokens, all used up"


def test_the_fingerprint_follows_everything_the_order_depends_on() -> None:
    def fingerprint(
        stages: Any = ((80, [7, 3]), (None, [1, 1])),
        sizes: Any = (10, 20),
        contents: Any = ("x", "y"),
        at: int = 50,
        **options: Any,
    ) -> str:
        return MixtureOrder(mixed(stages, **options), sizes, 8, 1, contents).fingerprint(at)

    same = fingerprint()
    assert same.startswith("mixture:")
    assert fingerprint(((80, [14, 6]), (None, [5, 5]))) == same  # weights are relative
    others = {
        fingerprint(((80, [6, 4]), (None, [1, 1]))),
        fingerprint(((80, [7, 3]), (None, [1, 2]))),
        fingerprint(((88, [7, 3]), (None, [1, 1]))),
        fingerprint(sizes=(10, 21)),
        fingerprint(contents=("x", "z")),
        fingerprint(epochs=(2, None)),
        fingerprint(tokens=(8, None)),
        fingerprint(names="ac"),
    }
    assert len(others | {same}) == 9
    # What comes after a position is no part of what came before it.
    early = fingerprint(at=10)
    assert early != same
    assert fingerprint(((80, [7, 3]), (None, [1, 2])), at=10) == early
    assert fingerprint(((88, [7, 3]), (None, [1, 1])), at=10) == early
    assert fingerprint(((88, [7, 3]), (None, [1, 1])), at=11) != fingerprint(at=11)
    assert fingerprint(((80, [7, 4]), (None, [1, 1])), at=10) != early
    assert fingerprint(((80, [7, 0]), (None, [1, 1])), contents=("x", "z"), at=10) == fingerprint(
        ((80, [7, 0]), (None, [1, 1])), at=10
    )


@pytest.mark.parametrize(
    ("stages", "options", "text"),
    [
        ([(7, [1]), (None, [1])], {}, r"stages\[0\]\.tokens 7 .*--seq_len 8; use 8 or more"),
        (
            [(None, [1])],
            {"tokens": [7.5]},
            r"sources\[0\]\.max_tokens 7\.5 .*--seq_len 8; use 8",
        ),
        (
            [(None, [1])],
            {"epochs": [0.009]},
            r"sources\[0\]\.max_epochs 0\.009 of 100 samples .*--seq_len 8; use 0\.010001 or more",
        ),
    ],
)
def test_less_than_a_sample_is_refused(stages: Any, options: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^mix\.json: {text}"):
        MixtureOrder(mixed(stages, **options), [100], 8, 1)
    assert MixtureOrder(mixed([(None, [1])], epochs=[0.010001]), [100], 8, 1).caps == [1]


def test_sizes_must_fit_the_sources() -> None:
    with pytest.raises(AssertionError, match="every source has a size"):
        MixtureOrder(mixed([(None, [1, 1])]), [3], 8, 1)
    with pytest.raises(AssertionError, match="every source has a sample"):
        MixtureOrder(mixed([(None, [1, 1])]), [3, 0], 8, 1)
    with pytest.raises(AssertionError, match="positions count from 0"):
        MixtureOrder(mixed([(None, [1, 1])]), [3, 1], 8, 1).counts(-1)


def test_a_fade_shifts_the_shares_and_is_one_line_of_the_plan(tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [
        {"tokens": 40_960, "weights": {"a": 1}},
        {"weights": {"b": 1}, "fade": {"tokens": 655_360, "shape": "linear"}},
    ]
    sources = [{"name": name, "path": name} for name in "ab"]
    (tmp_path / "mix.json").write_text(json.dumps({"sources": sources, "stages": stages}))
    plan = read_mixture(tmp_path / "mix.json")
    order = MixtureOrder(plan, [10**6, 10**6], 10, 7)
    chosen = order.source_of(order(np.arange(4096 * 20)))
    shares = chosen.reshape(20, 4096).mean(1)
    assert shares[0] == 0
    assert shares[1:17] == pytest.approx((np.arange(16) + 0.5) / 16, abs=1e-3)
    assert shares[17:].tolist() == [1, 1, 1]
    lines = "\n".join(order.describe(4096 * 20))
    assert "weight 1/0, " in lines
    assert lines.count("a fade to stage 2") == 1
    assert lines.count("stage 2, from 696.3K tokens") == 1
    text = r"stages\[1\]\.fade\.tokens 655360 is less than 16 samples of --seq_len 40961; use 655376"
    stages[0]["tokens"] = 50_000
    (tmp_path / "mix.json").write_text(json.dumps({"sources": sources, "stages": stages}))
    with pytest.raises(ConfigError, match=text):
        MixtureOrder(read_mixture(tmp_path / "mix.json"), [10**6, 10**6], 40_961, 7)
