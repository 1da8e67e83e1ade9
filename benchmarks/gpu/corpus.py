"""A made-up language for training runs: the same token ids on every machine, with something in it to learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinytron.data import write_shard

WORDS, FOLLOWERS = 2000, 20


def token_ids(count: int, vocab_size: int, seed: int) -> np.ndarray:
    """``count`` ids below ``vocab_size``: words of 1 to 4 tokens, which follow one another by a table that is the same for
    every ``seed``.

    ``numpy.random.RandomState``, because its streams never change between versions of numpy.
    """
    table = np.random.RandomState(0)
    lengths = table.randint(1, 5, WORDS)
    spelling = table.randint(0, vocab_size, (WORDS, 4))
    followers = table.randint(0, WORDS, (WORDS, FOLLOWERS))
    text = np.random.RandomState(seed)
    choices = np.minimum(text.geometric(0.3, count), FOLLOWERS) - 1  # the first follower is the most likely
    word = 0
    parts = []
    length = 0
    for choice in choices:
        word = followers[word, choice]
        parts.append(spelling[word, : lengths[word]])
        length += lengths[word]
        if length >= count:
            break
    return np.concatenate(parts)[:count]


def write_corpus(folder: Path, train_tokens: int, val_tokens: int, vocab_size: int) -> Path:
    """Shards of training and validation text in ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "train_000000.bin", token_ids(train_tokens, vocab_size, 1))
    write_shard(folder / "val_000000.bin", token_ids(val_tokens, vocab_size, 2))
    return folder
