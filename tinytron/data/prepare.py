"""Documents to token shards, once: a folder whose marker is written last, so that an interrupted preparation is done
again and never half-used. Any number of processes may ask for the same folder: one works, the others wait.

documents (token ids) -> ``write_token_shards`` -> train_000000.bin, train_000001.bin, ... -> prepared.json
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from tinytron.data.formats import MAX_TOKENS, TOKEN_DTYPES, read_header, write_shard
from tinytron.distributed.agreement import together
from tinytron.errors import DataError
from tinytron.utils.training import write_atomically

T = TypeVar("T")
Facts = dict[str, Any]

MARKER = "prepared.json"
LOCK = "prepare.lock"
TOKENS_PER_SHARD = 2**24


# Writing.


class Written(NamedTuple):
    """What ``write_token_shards`` wrote; ``sha256`` is that of all its token ids, as they lie in the shards."""

    documents: int
    tokens: int
    sha256: str


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type of a token shard that holds the ids ``0 .. vocab_size - 1``."""
    return TOKEN_DTYPES[0] if vocab_size <= 2**16 else TOKEN_DTYPES[1]


def write_token_shards(
    documents: Iterable[npt.ArrayLike],
    folder: Path,
    prefix: str = "train",
    dtype: npt.DTypeLike = np.uint16,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    first_index: int = 0,
) -> Written:
    """Write the token ids of ``documents`` one after another into ``<prefix>_<index, 6 digits>.bin``, each shard of
    ``tokens_per_shard`` ids but the last (documents go on in the next shard) and each there whole or not at all.

    Holds one shard and one document in memory. Raises: DataError for ids that ``dtype`` cannot hold.
    """
    writer = _ShardWriter(folder, prefix, np.dtype(dtype), tokens_per_shard, first_index)
    count = 0
    for document in documents:
        count += 1
        writer.append(np.asarray(document, np.int64), f"document {count}")
    writer.flush()
    return Written(count, writer.tokens, writer.digest.hexdigest())


class _ShardWriter:
    """A buffer of one shard, written whenever it is full."""

    def __init__(self, folder: Path, prefix: str, dtype: np.dtype[Any], tokens_per_shard: int, index: int) -> None:
        assert dtype in TOKEN_DTYPES, f"{dtype} is not a type of token shards: uint16 or uint32"
        if not 1 <= tokens_per_shard <= MAX_TOKENS:
            raise DataError(f"{tokens_per_shard} tokens per shard must be in 1..{MAX_TOKENS}; use {TOKENS_PER_SHARD}")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.prefix, self.index = folder, prefix, index
        self.buffer, self.filled = np.empty(tokens_per_shard, dtype), 0
        self.tokens, self.digest = 0, hashlib.sha256()

    def append(self, ids: npt.NDArray[np.int64], what: str) -> None:
        limit = np.iinfo(self.buffer.dtype).max
        if ids.size and (ids.min() < 0 or ids.max() > limit):
            raise DataError(f"{what}: token ids {ids.min()}..{ids.max()} do not fit {self.buffer.dtype}; use uint32")
        while ids.size:
            part = ids[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            ids = ids[len(part) :]
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        if not self.filled:
            return
        tokens = self.buffer[: self.filled]
        write_shard(self.folder / f"{self.prefix}_{self.index:06d}.bin", tokens, tokens.dtype)
        self.digest.update(tokens.tobytes())
        self.tokens, self.index, self.filled = self.tokens + self.filled, self.index + 1, 0


def with_progress(
    documents: Iterable[list[int]], every: float = 10.0, say: Callable[[str], object] | None = None
) -> Iterator[list[int]]:
    """The same ``documents``; meanwhile print their number, the tokens and the rate every ``every`` seconds and at the
    end."""
    start = said = time.perf_counter()
    count = tokens = 0
    say = say or (lambda text: print(text, flush=True))

    def report(verb: str) -> None:
        rate = tokens / max(1e-9, time.perf_counter() - start)
        say(f"{verb} {count:,} documents, {tokens:,} tokens ({rate:,.0f} tokens/s)")

    for document in documents:
        yield document
        count, tokens = count + 1, tokens + len(document)
        if time.perf_counter() - said >= every:
            said = time.perf_counter()
            report("preparing:")
    report("prepared")


# Once: the marker, and what names a folder.


def prepared(folder: Path) -> Facts | None:
    """The facts of a finished preparation; ``None`` if there is none, if it was interrupted, or if the shards beside the
    marker are no longer those that were written."""
    try:
        facts = json.loads((folder / MARKER).read_text())
        whole = isinstance(facts, dict) and facts.get("shards") == _shards(folder)
    except (OSError, ValueError, DataError):
        return None
    return facts if whole else None


def mark_prepared(folder: Path, facts: Mapping[str, Any]) -> Facts:
    """Declare the shards in ``folder`` whole: write the marker with ``facts`` (plain JSON values) and, under
    ``shards``, every shard's number of tokens. Returns what ``prepared`` will return."""
    text = json.dumps({**facts, "shards": _shards(folder)}, indent=2)
    write_atomically(folder / MARKER, lambda file: file.write(text.encode()))
    marked: Facts = json.loads(text)
    return marked


def prepare_once(folder: Path, write: Callable[[Path], Mapping[str, Any]]) -> Facts:
    """The facts of ``folder``, for which ``write(folder)`` first writes the shards unless that is done already. What an
    interrupted preparation left is removed; a second process waits for the first and uses its result.

    Raises: DataError if ``folder`` has shards that were not prepared here (they are not touched), or cannot be written
    or locked.
    """
    if (facts := prepared(folder)) is not None:
        return facts
    if not (folder / LOCK).exists() and any(folder.glob("*.bin")):
        raise DataError(f"{folder} holds token shards that were not prepared here; use another folder, or remove them")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK):
            if (facts := prepared(folder)) is not None:  # by the process that held the lock
                return facts
            for left_over in [folder / MARKER, *folder.glob("*.bin"), *folder.glob("*.tmp")]:
                left_over.unlink(missing_ok=True)
            return mark_prepared(folder, write(folder))
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error}); use a folder on a disk with space") from error


def file_states(paths: Iterable[Path]) -> list[list[Any]]:
    """Path, size and modification time of the files among ``paths`` and of all files below folders among them; a path
    that does not exist (a name on the hub) adds nothing. What a recipe says of local sources. Raises: OSError."""
    files = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()
    ]
    return [[str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that name the folder of what ``recipe`` (plain JSON values) makes."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _shards(folder: Path) -> dict[str, int]:
    return {path.name: read_header(path).count for path in sorted(folder.glob("*.bin"))}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the file ``path`` and so of its folder; the kernel releases it when the process ends, however it
    ends. Raises: OSError."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {path.parent}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Together: one process of each node prepares, all ranks learn how it ended.


def prepare_together(
    folder: Path, write: Callable[[Path], Mapping[str, Any]], group: dist.ProcessGroup, *, leader: bool
) -> Facts:
    """``prepare_once`` on the ranks that are ``leader`` (one per node), while the others wait, for hours if need be.
    Collective.

    Raises on every rank: what ``write`` raises on any; DataError if a rank finds nothing in ``folder`` afterwards, or if
    nodes made different shards (any fact differs but ``recipe``, where paths and times may).
    """

    def find() -> Facts:
        if (facts := prepared(folder)) is None:
            raise DataError(f"{folder}: not prepared as seen from every process; use a folder that they all see")
        return facts

    together_patiently(lambda: prepare_once(folder, write) if leader else None, group)
    facts = together(find, group)
    compared = {key: value for key, value in facts.items() if key != "recipe"}
    require_same(
        compared, group, f"{folder} differs between nodes; give every node the same sources, or share the folder"
    )
    return facts


def together_patiently(action: Callable[[], T], group: dist.ProcessGroup, every: float = 5.0) -> T:
    """``together`` for an ``action`` that may take longer than the time after which a waiting collective gives up: it
    runs in a thread while the ranks meet every ``every`` seconds, until all are done or one has failed. Collective."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # carried over to the main thread, and raised there
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    states: list[tuple[bool, bool]] = [(False, False)] * dist.get_world_size(group)
    while not (all(done for done, _ in states) or any(failed for _, failed in states)):
        wait([future], timeout=every)
        done = future.done()
        dist.all_gather_object(states, (done, done and future.exception() is not None), group=group)
    return together(lambda: future.result() if future.done() else None, group)  # type: ignore[return-value]


def require_same(value: object, group: dist.ProcessGroup, message: str) -> None:
    """Raise a DataError with ``message`` on every rank if ``value`` is not the same on all. Collective."""
    values: list[object] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    if any(other != values[0] for other in values):
        raise DataError(message)
