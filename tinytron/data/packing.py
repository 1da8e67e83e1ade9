"""Packs whole documents into rows of fixed length with little padding: best-fit-decreasing bin packing (Ding et al.,
arXiv:2404.10830, section 3). Only documents longer than a row are cut.

Bins are counted instead of stored one by one: all pieces of one length, and all bins with the same room, are processed
together.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_WORD = 256  # rooms per word of the bitmap: 65,536 rooms are 256 words of 256 bits


class PackIndex(NamedTuple):
    """The rows of a shard and the pieces in each row; all arrays are uint32.

    Row r holds pieces ``row_ends[r - 1] .. row_ends[r] - 1`` (from 0 for r = 0), the longest first. A piece
    ``(start, length)`` stands for the training pairs ``start .. start + length - 1``: token i is the input, token i + 1 the
    label.
    """

    row_ends: npt.NDArray[np.uint32]
    piece_starts: npt.NDArray[np.uint32]
    piece_lengths: npt.NDArray[np.uint32]


def pack_index(starts: npt.ArrayLike, num_tokens: int, seq_len: int) -> PackIndex:
    """Pack the documents of a shard of ``num_tokens`` tokens into rows of ``seq_len`` pairs.

    ``starts`` are the offsets at which documents begin, ascending. Every pair ``0 .. num_tokens - 2`` is in one piece, and
    no piece crosses a document's start: a document's last pair has the next one's first token as its label. Tokens before
    the first start are a document too: the rest of one that began in the previous shard. Documents of more than ``seq_len``
    pairs are cut into pieces of ``seq_len`` and a remainder.
    """
    assert 0 <= num_tokens < 2**32, f"{num_tokens} tokens in a shard: offsets are uint32"
    edges = np.concatenate(([0], np.asarray(starts, dtype=np.int64), [num_tokens]))
    assert (np.diff(edges) >= 0).all(), f"document starts must ascend, from 0 to {num_tokens}"
    edges = np.minimum(edges, max(0, num_tokens - 1))  # there is one pair fewer than there are tokens
    counts = -(-np.diff(edges) // seq_len)  # pieces per document; a document without pairs has none
    ends = counts.cumsum()
    within = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
    piece_starts = np.repeat(edges[:-1], counts) + within * seq_len
    lengths = np.minimum(seq_len, np.repeat(edges[1:], counts) - piece_starts)
    order, row_ends = best_fit(lengths, seq_len)
    return PackIndex(row_ends.astype(np.uint32), *(a[order].astype(np.uint32) for a in (piece_starts, lengths)))


def best_fit(lengths: npt.ArrayLike, capacity: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pack pieces into bins of ``capacity``. Pieces are taken from the longest to the shortest (equal ones in the order
    given). Each goes into the bin with the least room that it fits into (among equals, the one that has had this room the
    longest), or into a new bin.

    ``lengths`` are from 1 to ``capacity``. Returns ``(order, bin_ends)``: the pieces bin by bin, with bins in the order in
    which they were opened; bin b holds ``order[bin_ends[b - 1] : bin_ends[b]]``. Uses at most 11/9 of the fewest bins
    possible plus 4, like first-fit-decreasing (Johnson et al., SIAM J. Comput. 3(4), 1974).
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    assert ((sizes >= 1) & (sizes <= capacity)).all(), f"pieces must have 1 to {capacity} tokens"
    key = capacity - sizes
    if capacity <= 2**16:
        key = key.astype(np.uint16)  # numpy's stable sort takes linear time for this type
    descending = np.argsort(key, kind="stable")
    bins = _bins_of(np.bincount(sizes, minlength=capacity + 1), capacity)
    order = descending[np.argsort(bins, kind="stable")]
    return order, np.bincount(bins).cumsum()


def _bins_of(count_of: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
    """The bin of each piece, longest piece first; there are ``count_of[length]`` pieces of each length.

    Pieces of one length fill a bin until it has no room for another, because until then it is the fullest bin that fits. So
    consecutive bins with equal room are filled, and moved to their new room, as one group.
    """
    rooms = _Rooms(capacity)
    # Per run of equal pieces: the first bin, the number of bins, and the pieces per bin.
    firsts = []
    bins = []
    fill = []
    opened = 0
    for length in np.flatnonzero(count_of)[::-1].tolist():
        left = int(count_of[length])
        while left:
            room = rooms.least(length)
            if room < 0:  # open as many new bins as the remaining pieces need
                room = capacity
                needed = -(-left // (room // length))
                rooms.put(room, opened, needed)
                opened += needed
            fit = room // length
            if (full := left // fit) > 0:
                first, taken = rooms.take(room, full)
            else:
                first, taken = rooms.take(room, 1)
                fit = left
            rooms.put(room - fit * length, first, taken)
            firsts.append(first)
            bins.append(taken)
            fill.append(fit)
            left -= taken * fit
    ends = np.cumsum(bins)
    filled = np.repeat(np.asarray(firsts) - (ends - bins), bins) + np.arange(ends[-1])
    return np.repeat(filled, np.repeat(fill, bins))


class _Rooms:
    """The bins by the room they have left: queues of groups ``(first bin, number of bins)``, and a bitmap of the rooms that
    occur. The bitmap has two levels to keep its integers short."""

    def __init__(self, capacity: int) -> None:
        self.groups: defaultdict[int, deque[tuple[int, int]]] = defaultdict(deque)
        self.words = [0] * (capacity // _WORD + 1)
        self.used_words = 0  # bit w is set if words[w] is not 0

    def least(self, length: int) -> int:
        """The smallest room of at least ``length`` among all bins; -1 if there is none."""
        word, bit = divmod(length, _WORD)
        if found := self.words[word] >> bit:
            return length + _lowest_bit(found)
        if found := self.used_words >> (word + 1):
            word += 1 + _lowest_bit(found)
            return word * _WORD + _lowest_bit(self.words[word])
        return -1

    def put(self, room: int, first: int, count: int) -> None:
        """Append bins ``first .. first + count - 1`` to the queue of ``room``."""
        groups = self.groups[room]
        if not groups:
            self.words[room // _WORD] |= 1 << room % _WORD
            self.used_words |= 1 << room // _WORD
        elif sum(groups[-1]) == first:
            first, before = groups.pop()
            count += before
        groups.append((first, count))

    def take(self, room: int, most: int) -> tuple[int, int]:
        """Take up to ``most`` consecutive bins from the front of the queue of ``room``: ``(first bin, number of bins)``."""
        groups = self.groups[room]
        first, count = groups.popleft()
        if count > most:
            groups.appendleft((first + most, count - most))
            return first, most
        if not groups:
            self.words[room // _WORD] &= ~(1 << room % _WORD)
            if not self.words[room // _WORD]:
                self.used_words &= ~(1 << room // _WORD)
        return first, count


def _lowest_bit(number: int) -> int:
    return (number & -number).bit_length() - 1
