"""The training order of samples: a function from a position in the whole run to a sample number."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from tinytron.data.permutation import Permutation


class Order(Protocol):
    """A training order. ``num_samples`` is the number of positions in one epoch."""

    @property
    def num_samples(self) -> int: ...

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The sample numbers at ``positions``, which count from the first sample of the run."""


class ShuffledEpochs:
    """Every sample once per epoch, and each epoch in a different order, determined by (seed, epoch)."""

    def __init__(self, num_samples: int, *key: int) -> None:
        self.num_samples, self.key = num_samples, key
        self._permutations: dict[int, Permutation] = {}  # a cache for the current epochs

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The sample numbers at ``positions``, which may have any shape; the result has the same shape."""
        epochs, within = np.divmod(positions, self.num_samples)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            samples[chosen] = self._permutation(epoch)(within[chosen])
        return samples

    def _permutation(self, epoch: int) -> Permutation:
        if epoch not in self._permutations:
            if len(self._permutations) > 1:
                self._permutations.clear()
            self._permutations[epoch] = Permutation(self.num_samples, *self.key, epoch)
        return self._permutations[epoch]
