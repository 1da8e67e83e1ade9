"""Documents of any lengths into shards of any size, written in any number of goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.corpus import starts_of, tokens_of
from tinytron.text.token_writer import SplitWriter, Tokens

UINT16 = np.dtype("<u2")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    size=st.integers(1, 10),
    chunk=st.integers(1, 5),
    last=st.integers(0, 30),
)
def test_shards_and_sidecars_hold_the_documents(
    tmp_path: Path, lengths: list[int], size: int, chunk: int, last: int
) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    tokens = np.arange(sum(lengths), dtype=UINT16)
    ends = np.cumsum(lengths)
    writer = SplitWriter(tmp_path, "train", UINT16, "timl", size, last=last)
    for first in range(0, len(lengths), chunk):
        mine = lengths[first : first + chunk]
        start = int(ends[first]) - lengths[first]
        writer.add(Tokens(tokens[start : start + sum(mine)], np.array(mine, np.uint32)))
        writer.write_full()
        writer, before = SplitWriter(tmp_path, "train", UINT16, "timl", size, last=last), writer
        assert writer.restore(*before.state()) == len(before.state()[1])
    assert len(writer.shards) == min(last + 1, len(tokens) // size)
    writer.last = None
    writer.write_full()
    rest = writer.write_rest()
    shards = [*writer.shards, *([rest] if rest else [])]
    assert [shard.tokens for shard in shards] == [min(size, len(tokens) - at) for at in range(0, len(tokens), size)]
    assert tokens_of(tmp_path) == tokens.tolist()
    assert starts_of(tmp_path) == [int(end) - n for end, n in zip(ends, lengths, strict=True)]
    assert sum(shard.documents for shard in shards) == len(lengths)
