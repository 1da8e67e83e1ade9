"""In which order samples are trained on: a function from the position in the whole run to the number of a sample."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from tinytron.data.permutation import Permutation


class Order(Protocol):
    """``num_samples`` is how many positions a run has that asks for one epoch."""

    @property
    def num_samples(self) -> int: ...

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The sample numbers at ``positions``, which count from the first sample of the run."""


class ShuffledEpochs:
    """Every sample once per epoch; each epoch in an order of its own, given by (seed, epoch)."""

    def __init__(self, num_samples: int, *key: int) -> None:
        self.num_samples, self.key = num_samples, key
        self._permutations: dict[int, Permutation] = {}  # of the current epochs; the result does not depend on it

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sample numbers. Shapes: any, kept."""
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
