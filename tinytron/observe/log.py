"""Follows a log file that may be large, and that a run may be writing.

The file is read in blocks that are spread over it: the end, the beginning, the middle, the quarters, ... So curves have
their whole length after a moment, and become finer until all blocks are read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from tinytron.observe.curves import Curve, Name, merged
from tinytron.observe.folder import LOG, Folder
from tinytron.observe.records import Block, Text, parse

BLOCK_BYTES = 2**18
LINE_BYTES = 2**22  # longer lines are not looked for at the end of the file
REST_BYTES = 2**12  # read at a time for the rest of a line
CHECKED_BYTES = 256  # the last bytes that were read; if they changed, the file was rewritten
MAX_CURVES = 2000  # per run; further ones are counted and left out
MAX_TEXTS = 20


class LogReader:
    """The curves of ``folder``'s log so far. Methods may be called from several threads."""

    def __init__(self, folder: Folder, name: str = LOG, block_bytes: int = BLOCK_BYTES) -> None:
        self._folder, self._name, self._block_bytes = folder, name, block_bytes
        self._lock = threading.RLock()
        self.left_out = 0  # curves
        self.rewrites: list[int] = []  # the last step before each rewrite of the file that was noticed
        self._reset()

    def _reset(self) -> None:
        self._blocks: dict[int, Block] = {}  # by the place where they begin
        self._merged: dict[Name, Curve] = {}
        self._merged_at = (-1, -1)  # the version of ``_merged``, and the bytes read then
        self._waiting: list[tuple[int, int]] = []  # blocks still to be read, the next one last
        self._size, self._end, self._tail = 0, 0, b""
        self.read_bytes, self.total_bytes = 0, 0
        self.version = getattr(self, "version", 0) + 1

    def refresh(self, size: int, seconds: float = float("inf")) -> bool:
        """Read for about ``seconds`` in a file that has ``size`` bytes by now. True if all of it is read."""
        with self._lock:
            self._size = size
            if self._end and (size < self._end or self._changed()):
                self.rewrites.append(self.last_step)
                self._reset()
            if self._end == 0:
                self._begin(size)
            elif size > self._end and not self._waiting:
                self._follow(size)
        until = time.monotonic() + seconds
        while self._waiting:
            with self._lock:
                if self._waiting:
                    self._read(*self._waiting.pop())
            if time.monotonic() > until:
                break
        return not self._waiting

    def _changed(self) -> bool:
        return self._bytes(self._end - len(self._tail), self._end) != self._tail

    def _bytes(self, start: int, end: int) -> bytes:
        return self._folder.read(self._name, start, end)

    def _begin(self, size: int) -> None:
        """Cut the whole lines of the file into blocks, in the order in which they will be read."""
        tail = self._bytes(max(0, size - LINE_BYTES), size)
        self._finish_at(size - (len(tail) - 1 - tail.rfind(b"\n")) if b"\n" in tail else 0)
        starts = range(0, self._end, self._block_bytes)
        spread = [starts[n] for n in _spread(len(starts))]
        order = [*starts[-1:], *(start for start in spread if start != starts[-1])]
        self._waiting = [(start, min(start + self._block_bytes, self._end)) for start in reversed(order)]

    def _follow(self, size: int) -> None:
        """Read the whole lines that were appended."""
        while self._end < size:
            content = self._bytes(self._end, min(self._end + LINE_BYTES, size))
            if (length := content.rfind(b"\n") + 1) == 0:
                return
            self._add(self._end, parse(content[:length]), length)
            self._finish_at(self._end + length)

    def _finish_at(self, end: int) -> None:
        self._end = self.total_bytes = end
        self._tail = self._bytes(max(0, end - CHECKED_BYTES), end)

    def _read(self, start: int, end: int) -> None:
        """Read the lines that begin between ``start`` and ``end``."""
        content = self._bytes(max(0, start - 1), end)
        if start:  # the line that begins before belongs to the block before
            content = content[content.find(b"\n") + 1 :] if b"\n" in content else b""
        place = end
        while content and not content.endswith(b"\n"):
            more = self._bytes(place, min(place + REST_BYTES, self._end))
            if not more:
                break
            place += len(more)
            content += more[: more.find(b"\n") + 1] if b"\n" in more else more
        self._add(start, parse(content), end - start)

    def _add(self, start: int, block: Block, size: int) -> None:
        self._blocks[start] = block
        self.read_bytes += size
        self.version += 1

    def _in_order(self) -> Iterator[Block]:
        return (self._blocks[start] for start in sorted(self._blocks))

    @property
    def curves(self) -> dict[Name, Curve]:
        """All curves as far as they are read, at most ``MAX_CURVES``. During the first pass over a long file they are put
        together a few times only, whenever there is half as much again."""
        with self._lock:
            version, size = self._merged_at
            if version != self.version and (not self._waiting or self.read_bytes >= 1.5 * size):
                parts: dict[Name, list[Curve]] = {}
                for block in self._in_order():
                    for name, curve in block.curves.items():
                        parts.setdefault(name, []).append(curve)
                kept = list(parts.items())[:MAX_CURVES]
                self._merged, self.left_out = {name: merged(found) for name, found in kept}, len(parts) - len(kept)
                self._merged_at = self.version, self.read_bytes
            return self._merged

    @property
    def loads(self) -> dict[str, list[tuple[int, list[float]]]]:
        """The experts' shares by layer, as (step, shares) with ascending steps."""
        with self._lock:
            found: dict[str, dict[int, list[float]]] = {}
            for block in self._in_order():
                for layer, entries in block.loads.items():
                    found.setdefault(layer, {}).update(entries)
            return {layer: sorted(by_step.items()) for layer, by_step in found.items()}

    @property
    def texts(self) -> list[Text]:
        """The newest texts, oldest first."""
        with self._lock:
            found = [text for block in self._in_order() for text in block.texts]
            return sorted(found, key=lambda text: text.step)[-MAX_TEXTS:]

    @property
    def counts(self) -> tuple[int, int]:
        """The number of lines read, and how many of them were damaged and passed over."""
        with self._lock:
            return sum(b.lines for b in self._blocks.values()), sum(b.damaged for b in self._blocks.values())

    @property
    def complete(self) -> bool:
        """True if all of the file is read."""
        return not self._waiting

    @property
    def unfinished(self) -> bool:
        """True if the file ends in the middle of a line."""
        return self._size > self._end

    @property
    def last_step(self) -> int:
        """The highest training step; 0 without any."""
        with self._lock:
            return max((block.steps[1] for block in self._blocks.values() if block.steps), default=0)

    @property
    def turns(self) -> list[tuple[int, int]]:
        """Where the log goes back: a training step, and a step that is not later but follows in the log. Complete once all
        of the log is read."""
        with self._lock:
            found, before = [], None
            for block in self._in_order():
                if block.steps is None:
                    continue
                if before is not None and not self._waiting and block.steps[0] <= before:
                    found.append((before, block.steps[0]))
                found += block.turns
                before = block.steps[1]
            return found


def _spread(count: int) -> list[int]:
    """0 to ``count - 1``, in an order whose beginnings are spread over all of them: their bits reversed."""
    bits = max(1, (count - 1).bit_length())
    return [n for n in (int(f"{n:0{bits}b}"[::-1], 2) for n in range(2**bits)) if n < count]
