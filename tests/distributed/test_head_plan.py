"""Which heads each rank of a sequence group attends with, and the cut of the sequence: arithmetic, no processes (P7)."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from tinytron.distributed.sequence_parallel.ulysses import HeadPlan, check_sep_size, cut_sequence
from tinytron.errors import ConfigError

SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 32]
GQA = [(N, K) for N in (1, 2, 4, 6, 8, 12, 16, 24, 32, 128) for K in range(1, N + 1) if N % K == 0]
FITTING = [(N, K, P) for (N, K), P in itertools.product(GQA, SIZES) if N % P == 0 and (K % P == 0 or P % K == 0)]
UNFIT = [(N, K, P) for (N, K), P in itertools.product(GQA, SIZES) if (N, K, P) not in FITTING]


def test_the_cases_are_of_every_kind() -> None:
    kinds = {(K == N, K == 1, P > K, P == 1) for N, K, P in FITTING}
    assert kinds >= {(True, False, False, False), (False, True, True, False), (False, False, True, False)}
    assert len(FITTING) > 100
    assert len(UNFIT) > 100


def packed_index(plan: HeadPlan) -> list[int]:
    """Positions in the packed axis, rank by rank: what each rank is sent."""
    index: list[int] = (
        plan.pack(torch.arange(plan.num_heads + 2 * plan.num_kv_heads).view(1, 1, -1, 1)).flatten().tolist()
    )
    return index


def test_every_query_meets_its_own_key_and_value_head() -> None:
    """Slice the index as attention slices what arrives, and ask which global heads each pair of local ones is."""
    for N, K, P in FITTING:
        check_heads(N, K, P)


def check_heads(N: int, K: int, P: int) -> None:
    plan = HeadPlan(N, K, P)
    n, k = plan.heads, plan.kv_heads
    index = packed_index(plan)
    assert len(index) == P * (n + 2 * k)
    assert n % k == 0  # GQA on the rank is GQA
    queries, kv_used = [], set()
    for rank in range(P):
        q = index[rank * (n + 2 * k) :][:n]
        keys = [i - N for i in index[rank * (n + 2 * k) + n :][:k]]
        values = [i - N - K for i in index[rank * (n + 2 * k) + n + k :][:k]]
        assert keys == values
        for local, head in enumerate(q):
            assert keys[local // (n // k)] == head // (N // K), (rank, head)
        queries += q
        kv_used |= set(keys)
    assert queries == list(range(N))  # in order: head_to_seq puts the ranks' outputs side by side
    assert kv_used == set(range(K))


def test_no_head_is_sent_more_often_than_needed() -> None:
    for N, K, P in FITTING:
        sent = [i for i in packed_index(HeadPlan(N, K, P)) if i >= N]
        assert all(sent.count(i) == max(1, P // K) for i in range(N, N + 2 * K)), (N, K, P)


def test_examples_written_out() -> None:
    # MHA: 4 query heads 0-3, keys 4-7, values 8-11, on two ranks.
    assert packed_index(HeadPlan(4, 4, 2)) == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    # GQA with fewer key heads than ranks: each of the two keys (4, 5) and values (6, 7) goes to two ranks.
    assert packed_index(HeadPlan(4, 2, 4)) == [0, 4, 6, 1, 4, 6, 2, 5, 7, 3, 5, 7]
    assert packed_index(HeadPlan(2, 1, 2)) == [0, 2, 3, 1, 2, 3]


def test_a_size_that_does_not_fit_names_those_that_do() -> None:
    for N, K, P in UNFIT:
        check_refusal(N, K, P)


def check_refusal(N: int, K: int, P: int) -> None:
    text = (
        f"--sep_size {P} must divide --num_attention_heads {N}, and divide or be a multiple of --num_key_value_heads {K}; "
        "use one of "
    )
    with pytest.raises(ConfigError, match=re.escape(text)) as caught:
        HeadPlan(N, K, P)
    proposed = [int(p) for p in re.findall(r"\d+", str(caught.value).removeprefix(text))]
    assert proposed
    for works in proposed:
        HeadPlan(N, K, works)
    for other in set(range(1, N + 2)) - set(proposed):
        with pytest.raises(ConfigError, match="use one of"):
            HeadPlan(N, K, other)


def test_with_a_sequence_length_the_sizes_fit_both() -> None:
    with pytest.raises(ConfigError, match=r"^--sep_size 12 must divide --seq_len 8; use one of \[1, 2, 4\]$"):
        check_sep_size(12, 12, 4, seq_len=8)
    with pytest.raises(ConfigError, match=r"--num_key_value_heads 4; use one of \[1, 2, 4\]$"):
        check_sep_size(8, 12, 4, seq_len=8)
    for works in (1, 2, 4):
        check_sep_size(works, 12, 4, seq_len=8)
    check_sep_size(12, 12, 4)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_parts_of_a_cut_sequence_are_the_whole_in_order(size: int) -> None:
    whole = torch.arange(4 * 12).view(4, 12)
    parts = [cut_sequence(whole, rank, size) for rank in range(size)]
    assert all(part.shape == (4, 12 // size) and part.is_contiguous() for part in parts)
    assert torch.equal(torch.cat(parts, dim=1), whole)
