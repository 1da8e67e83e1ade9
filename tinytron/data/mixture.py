"""Weighted mixtures of data sources: a formula that maps each position of the run to a sample.

The run is a sequence of segments. A segment is a stage, or the remainder of a stage after one of its sources is used up.
Each segment is divided into blocks of M positions. With weights w_1 + w_2 + ... = 1 and W_k = w_1 + ... + w_k, the
number of positions that source k has in the first B blocks is

    T_k(B) = floor(W_k M B) - floor(W_(k-1) M B)

This differs from w_k M B by less than one, however long the run, and the sources' counts sum to M B. Block b holds
T_k(b+1) - T_k(b) positions of source k. This is never negative: floor(W_k M (b+1)) - floor(W_k M b) is at least
floor(W_k M); the same difference for W_(k-1) is at most ceil(W_(k-1) M); and W_k M >= W_(k-1) M + 1, because a weight is 0
(then T_k is 0) or at least 1/M. Each block has its own random permutation. The positions of a source, in order, walk
through the source's own epochs, whose orders do not depend on the mixture.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from tinytron.data.mixture_file import BLOCK, FADE_STEPS, Mixture
from tinytron.data.order import ShuffledEpochs
from tinytron.data.permutation import Permutation
from tinytron.errors import ConfigError, DataError

Ints = npt.NDArray[np.int64]
ENDLESS = 2**62  # positions; a segment that would end later counts as endless
_SHUFFLE = 0x6D6978  # keeps the keys of blocks apart from those of sources
_CACHED_BLOCKS = 8


@dataclass(frozen=True)
class Segment:
    """Positions ``start`` to ``end`` - 1 (None: endless), of which source k gets the share ``weights[k]``. ``used[k]`` of
    its samples were used in earlier segments."""

    number: int
    stage: int
    start: int
    end: int | None
    weights: tuple[Fraction, ...]
    used: tuple[int, ...]

    def before_block(self, block: int) -> list[int]:
        """T_k(block) for every source k."""
        edges = [0]
        total = Fraction(0)
        for weight in self.weights:
            total += weight
            edges.append(total.numerator * BLOCK * block // total.denominator)
        return [high - low for low, high in itertools.pairwise(edges)]


class MixtureOrder:
    """Maps the positions of a run to sample ids, as a function of (arguments, position) alone. Ids number the samples
    of all sources in a row: the id of a sample is the total size of the sources before its own, plus its number in its
    source.

    ``sizes`` has each source's number of samples. ``seq_len`` is the number of tokens per sample: stages,
    ``max_tokens`` and ``max_epochs`` are rounded down to whole samples. ``fingerprints`` identify the sources'
    contents. Positions, counts and ids are in samples. Raises: ConfigError for a stage or a cap of less than one
    sample.
    """

    def __init__(
        self, mixture: Mixture, sizes: Sequence[int], seq_len: int, seed: int, fingerprints: Sequence[str] | None = None
    ) -> None:
        assert len(sizes) == len(mixture.sources), "every source has a size"
        assert min(sizes) > 0, "every source has a sample"
        self.names = [source.name for source in mixture.sources]
        self.file, self.sizes, self.seq_len, self.seed = mixture.file, [int(size) for size in sizes], seq_len, seed
        self.fingerprints = list(fingerprints or [""] * len(sizes))
        self.ends: Ints = np.cumsum(np.array(sizes, np.int64))
        self.caps = [self._cap(mixture, number) for number in range(len(sizes))]
        self.stages = mixture.stages
        self.stage_weights = [stage.weights for stage in mixture.stages]
        self.stage_sizes = [
            None if stage.tokens is None else self._samples(stage.tokens, stage.key, FADE_STEPS if stage.fading else 1)
            for stage in mixture.stages
        ]
        # Every source has its own key, so that its order is the same in every mixture.
        self.keys = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") for name in self.names]
        self.walks = [ShuffledEpochs(size, seed, key) for size, key in zip(self.sizes, self.keys, strict=True)]
        self.capacity: int | None = None  # samples until a stage has no source left; None: endless
        self._cache: dict[tuple[int, int], tuple[Ints, Ints]] = {}
        self.segments = self._lay_out()
        self._starts: Ints = np.array([segment.start for segment in self.segments], np.int64)

    @property
    def num_samples(self) -> int:
        """The default length of a run: the sum of the sources' caps, or of their sizes; at most ``capacity``.
        It determines only the length: how much each source contributes is up to the weights."""
        total = sum(size if cap is None else cap for size, cap in zip(self.sizes, self.caps, strict=True))
        return total if self.capacity is None else min(total, self.capacity)

    def __call__(self, positions: Ints) -> Ints:
        """Sample ids at ``positions``, in any order. Raises: DataError beyond ``capacity``."""
        positions = np.asarray(positions, np.int64)
        if positions.size:
            self._check_end(int(positions.max()) + 1)
        ids = np.empty_like(positions)
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        for block, here in _groups((positions - self._starts[numbers]) // BLOCK):
            for number, chosen in _groups(numbers[here]):
                places = here[chosen]
                sources, ranks = self._block(self.segments[number], block)
                offsets = (positions[places] - self._starts[number]) % BLOCK
                for source, of_source in _groups(sources[offsets]):
                    ids[places[of_source]] = self._walk(source, ranks[offsets[of_source]])
        return ids

    def counts(self, position: int) -> Ints:
        """Number of samples of each source among positions 0 to ``position`` - 1. Raises: DataError beyond ``capacity``."""
        self._check_end(position)
        segment = self.segments[int(np.searchsorted(self._starts, position, side="right")) - 1]
        return np.array(self._counts_of(segment, position - segment.start), np.int64)

    def source_of(self, ids: Ints) -> Ints:
        """The index of the source that each sample id belongs to."""
        return np.searchsorted(self.ends, ids, side="right").astype(np.int64)

    def fingerprint(self, position: int) -> str:
        """A hash of everything that the samples before ``position`` depend on, except the seed: the contents of the sources
        used so far, and each segment's length and weights. Two mixtures with the same hash agree on those samples, whatever
        comes later."""
        contents = dict(zip(self.names, zip(self.sizes, self.fingerprints, strict=True), strict=True))
        parts: list[object] = [self.seq_len]
        for segment in self.segments:
            if segment.start < position:
                weights = {n: str(w) for n, w in zip(self.names, segment.weights, strict=True) if w}
                length = position if segment.end is None else min(position, segment.end)
                parts.append([length, weights, {name: contents[name] for name in weights}])
        return f"mixture:{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"

    def describe(self, num_samples: int | None = None) -> list[str]:
        """Lines for the user about a run of ``num_samples`` (default: ``self.num_samples``; at most ``capacity``): the
        contribution of each source, and the composition of each segment."""
        length = self.num_samples if num_samples is None else num_samples
        length = length if self.capacity is None else min(length, self.capacity)
        used = self.counts(length).tolist()
        lines = [f"mixture {self.file}: {len(self.names)} sources, {self._tokens(length)}"]
        for k, name in enumerate(self.names):
            shares = "/".join(f"{float(stage.weights[k]):.4g}" for stage in self.stages if not stage.fading)
            line = (
                f"  {name}: weight {shares}, has {self._tokens(self.sizes[k])}, gives {self._tokens(used[k])} "
                f"({used[k] / self.sizes[k]:.3g} epochs)"
            )
            cap = self.caps[k]
            lines.append(line if cap is None else f"{line}, at most {self._tokens(cap)}")
        for segment in self.segments:
            end, stage = segment.end, self.stages[segment.stage]
            if stage.fading:
                if not self.stages[segment.stage - 1].fading:
                    lines.append(f"  from {self._tokens(segment.start)}: a fade to stage {stage.number + 1}")
                continue
            parts = ", ".join(f"{n} {float(w):.4g}" for n, w in zip(self.names, segment.weights, strict=True) if w)
            line = f"  stage {stage.number + 1}, from {self._tokens(segment.start)} "
            line += f"to {'the end of the run' if end is None else self._tokens(end)}: {parts}"
            over = [] if end is None else self._used_up_at(segment, end)
            lines.append(f"{line}; {', '.join(over)} used up at its end" if over else line)
        if self.capacity is not None:
            lines.append(f"  the mixture ends after {self._tokens(self.capacity)}, all used up")
        return lines

    def _used_up_at(self, segment: Segment, end: int) -> list[str]:
        counts = self._counts_of(segment, end - segment.start)
        return [
            n for n, w, c, cap in zip(self.names, segment.weights, counts, self.caps, strict=True) if w and c == cap
        ]

    def _tokens(self, samples: int) -> str:
        tokens = float(samples * self.seq_len)
        for unit in ("", "K", "M", "B", "T"):
            if tokens < 999.95 or unit == "T":
                break
            tokens /= 1000
        return f"{tokens:.4g}{unit} tokens"

    def _check_end(self, end: int) -> None:
        assert end >= 0, "positions count from 0"
        if self.capacity is not None and end > self.capacity:
            last = self.segments[-1]
            names = [name for name, weight in zip(self.names, self.stage_weights[last.stage], strict=True) if weight]
            stage = self.stages[last.stage].number + 1
            raise DataError(
                f"{self.file}: the mixture ends after {self.capacity * self.seq_len} tokens, when {', '.join(names)} (all "
                f"that stage {stage} uses) have reached their max_epochs or max_tokens; lower --max_steps to no "
                "more tokens than that, or raise a cap"
            )

    # Layout.

    def _samples(self, tokens: Fraction, key: str, parts: int = 1) -> int:
        """The samples of one of the equal ``parts`` of what ``key`` gives."""
        if tokens < self.seq_len:
            least = "one sample" if parts == 1 else f"{parts} samples"
            raise ConfigError(
                f"{self.file}: {key} {float(tokens * parts):.12g} is less than {least} of --seq_len {self.seq_len}; "
                f"use {self.seq_len * parts} or more"
            )
        return int(tokens // self.seq_len)

    def _cap(self, mixture: Mixture, number: int) -> int | None:
        source = mixture.sources[number]
        key = f"sources[{number}]"
        caps = []
        if source.max_tokens is not None:
            caps.append(self._samples(source.max_tokens, f"{key}.max_tokens"))
        if (epochs := source.max_epochs) is not None:
            size = self.sizes[number]
            caps.append(int(epochs * size))
            if not caps[-1]:
                raise ConfigError(
                    f"{self.file}: {key}.max_epochs {float(epochs):.6g} of {size} samples is less than one sample of "
                    f"--seq_len {self.seq_len}; use {1.0001 / size:.6g} or more"
                )
        return min(caps, default=None)

    def _lay_out(self) -> list[Segment]:
        """Build the segments and set ``capacity``. There are few of them, because each one ends a stage or a source."""
        segments: list[Segment] = []
        start = 0
        stage = 0
        stage_start = 0
        used = [0] * len(self.sizes)
        while True:
            left = [None if cap is None else cap - u for cap, u in zip(self.caps, used, strict=True)]
            weights = [Fraction(0) if rest == 0 else w for w, rest in zip(self.stage_weights[stage], left, strict=True)]
            if not (total := sum(weights, Fraction(0))):
                self.capacity = start
                return segments
            segment = Segment(len(segments), stage, start, None, tuple(w / total for w in weights), tuple(used))
            size = self.stage_sizes[stage]
            ends = [] if size is None else [stage_start + size]
            ends += [
                start + self._length_until(segment, k, rest)
                for k, rest in enumerate(left)
                if rest is not None and weights[k]
            ]
            end = min(ends, default=ENDLESS)
            if end >= ENDLESS:
                return [*segments, segment]
            segments.append(Segment(segment.number, stage, start, end, segment.weights, segment.used))
            used = self._counts_of(segment, end - start)
            start = end
            if size is not None and end == stage_start + size:
                stage += 1
                stage_start = end

    def _length_until(self, segment: Segment, source: int, count: int) -> int:
        """Number of positions of ``segment`` up to and including the ``count``-th of ``source``, or ``ENDLESS``."""
        # T(B) is less than 1 away from w M B, and w M >= 1. So this starts no later than the block that is wanted, and the
        # loop below takes at most three rounds.
        block = int((count - 1) / (segment.weights[source] * BLOCK))
        if block * BLOCK >= ENDLESS:
            return ENDLESS
        while segment.before_block(block + 1)[source] < count:
            block += 1
        sources, _ = self._block(segment, block)
        within = count - segment.before_block(block)[source]
        return block * BLOCK + int(np.flatnonzero(sources == source)[within - 1]) + 1

    # Blocks.

    def _make_block(self, segment: Segment, block: int) -> tuple[Ints, Ints]:
        """The source of each position of a block, and the number of that source's samples before it in the whole run."""
        before, after = segment.before_block(block), segment.before_block(block + 1)
        bounds = np.cumsum([high - low for low, high in zip(before, after, strict=True)])
        shuffle = Permutation(BLOCK, self.seed, _SHUFFLE, segment.number, block)
        slots = shuffle(np.arange(BLOCK, dtype=np.int64))
        sources = np.searchsorted(bounds, slots, side="right").astype(np.int64)
        ranks = np.empty_like(sources)
        for source, places in _groups(sources):
            first = segment.used[source] + before[source]
            ranks[places] = np.arange(first, first + len(places), dtype=np.int64)
        return sources, ranks

    def _block(self, segment: Segment, block: int) -> tuple[Ints, Ints]:
        """``_make_block`` with a small cache, because a batch is often smaller than a block."""
        key = (segment.number, block)
        if key not in self._cache:
            if len(self._cache) >= _CACHED_BLOCKS:
                del self._cache[next(iter(self._cache))]  # the oldest
            self._cache[key] = self._make_block(segment, block)
        return self._cache[key]

    def _walk(self, source: int, ranks: Ints) -> Ints:
        """The sample ids at positions ``ranks`` of a source's own order."""
        return self.walks[source](ranks) + (self.ends[source] - self.sizes[source])

    def _counts_of(self, segment: Segment, length: int) -> list[int]:
        """Number of samples of each source before position ``length`` of ``segment``."""
        block, rest = divmod(length, BLOCK)
        counts = [used + before for used, before in zip(segment.used, segment.before_block(block), strict=True)]
        if rest:
            sources, _ = self._block(segment, block)
            part = np.bincount(sources[:rest], minlength=len(counts))
            counts = [count + int(more) for count, more in zip(counts, part, strict=True)]
        return counts


def _groups(values: Ints) -> Iterator[tuple[int, Ints]]:
    """Each distinct value and the indices where it occurs, both ascending."""
    order = np.argsort(values, kind="stable")
    cuts = np.flatnonzero(np.diff(values[order])) + 1
    for places in np.split(order, cuts):
        if len(places):
            yield int(values[places[0]]), places
