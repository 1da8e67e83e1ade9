"""What ``says`` takes for an error text that names something."""

from __future__ import annotations

import re

import pytest

from tests.helpers.errors import says

TEXT = "--sep_size 3 must divide --seq_len 24; use one of [1, 2]"


@pytest.mark.parametrize(
    ("telling", "found"),
    [
        (TEXT, True),
        ("--sep_size 3 ... --seq_len 24 ... use one of [1, 2]", True),
        ("... --seq_len 24 ...", True),
        ("--sep_size 3 ... [1, 2]", True),
        ("--sep_size 3 ... --seq_len 24", False),  # the end is not open
        ("--seq_len 24 ...", False),
        ("--sep_size 3 ... --seq_len 2 ...", False),  # another number
        ("... size 3 ...", False),
        ("... --seq_len 24 ... --sep_size 3 ...", False),
        ("--sep_size . ...", False),  # no pattern of its own
    ],
)
def test_parts_are_found_whole_and_in_order(telling: str, found: bool) -> None:
    assert bool(re.search(says(telling), TEXT)) == found
