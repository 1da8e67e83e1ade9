"""A random order of n items as a formula, without an index array, so 10^12 samples need no memory and no start-up time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDS = 6


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al., OOPSLA 2014): every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


class Permutation:
    """A bijection of ``range(n)`` chosen by ``key``: a Feistel network over the next even number of bits, applied
    repeatedly until the value is below n (cycle walking; Black and Rogaway, CT-RSA 2002)."""

    def __init__(self, n: int, *key: int) -> None:
        assert n > 0, "a permutation needs at least one item"
        self.n = n
        self.half_bits = np.uint64(max(1, (max(1, (n - 1).bit_length()) + 1) // 2))
        self.mask = np.uint64((1 << int(self.half_bits)) - 1)
        state = np.random.SeedSequence([*key, n]).generate_state(_ROUNDS, np.uint64)
        self.round_keys = [np.uint64(k) for k in state]

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Item numbers at ``positions`` (each in ``[0, n)``)."""
        values = self._encrypt(np.asarray(positions, dtype=np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self.half_bits, values & self.mask
        for key in self.round_keys:
            left, right = right, left ^ (_mix(right + key) & self.mask)
        joined: npt.NDArray[np.uint64] = (left << self.half_bits) | right
        return joined
