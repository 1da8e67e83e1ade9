"""Sweeps: every combination of some values of some options, each with a name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from tinytron.errors import ConfigError

MOST_RUNS = 1000


class Variant(NamedTuple):
    """One run of a sweep: what its name ends in, and its options as ``key=value`` words."""

    suffix: str
    words: tuple[str, ...]


def grid(sweep: Sequence[str]) -> list[Variant]:
    """The runs of ``["optim.max_lr=1e-3,2e-3", "model.num_layer=8,12"]``; the last option changes fastest. Commas in
    brackets and quotes do not separate values. Raises: ConfigError."""
    axes: dict[str, list[str]] = {}
    for word in sweep:
        name, equals, text = word.partition("=")
        values = _split(text) if equals else []
        if not name or not values or "" in values:
            raise ConfigError(f"--sweep {word} must be an option, = and values, such as optim.max_lr=1e-3,2e-3")
        if name in axes:
            raise ConfigError(f"--sweep names {name} twice; give all of its values together: {name}={text},...")
        if twice := [value for value in values if values.count(value) > 1]:
            raise ConfigError(f"--sweep {word} names the value {twice[0]} twice; leave one out")
        axes[name] = values
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MOST_RUNS:
        raise ConfigError(f"--sweep makes {count} runs, more than {MOST_RUNS}; give fewer values")
    combinations = [list(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    suffixes = _suffixes(combinations)
    return [
        Variant(suffix, tuple(f"{name}={value}" for name, value in chosen))
        for suffix, chosen in zip(suffixes, combinations, strict=True)
    ]


def _split(text: str) -> list[str]:
    """The values between the commas that are in no bracket and no quote."""
    found, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        if letter == "," and depth == 0 and not quote:
            found.append("")
        else:
            found[-1] += letter
    return [value.strip() for value in found]


def _suffixes(combinations: Sequence[Sequence[tuple[str, str]]]) -> list[str]:
    """Names that can be a part of a folder's name, such as ``max_lr_1e-3-num_layer_8``; numbered where that is not unique
    or too long."""
    found = []
    for number, chosen in enumerate(combinations):
        words = [f"{name.rpartition('.')[2]}_{value}" for name, value in chosen]
        text = re.sub(r"[^\w.-]+", "_", "-".join(words))
        found.append(text if len(text) <= 100 else f"run{number}")
    return [text if found.count(text) == 1 else f"{text}-{number}" for number, text in enumerate(found)]
