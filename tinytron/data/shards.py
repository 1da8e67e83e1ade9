"""Token shards: the files of a split, and one shard with the files that belong to it.

train_000000.bin       the tokens (formats.py)
train_000000.docs      document starts, in tokens: uint32 in a timl v1 file; without it the end-of-text token marks them
train_000000.weights   how much each token counts as a target: float32 in a timl v1 file; optional
manifest.json          tokenizer, documents and hashes of the folder (manifest.py); optional
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tinytron.data.formats import HEADER_BYTES, open_shard, open_weights, read_header
from tinytron.data.manifest import MANIFEST, ShardFacts, TokenizerFacts, read_manifest
from tinytron.errors import DataError
from tinytron.utils.training import sha256_of

_HELD_OUT = (
    "val",
    "valid",
    "validate",
    "validation",
    "valset",
    "dev",
    "devset",
    "eval",
    "evaluation",
    "heldout",
    "holdout",
)
_SPLITS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("test", "tests", "testing", "testset"), "test"),
    **dict.fromkeys(_HELD_OUT, "val"),
}
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)}|held[-_ ]out|hold[-_ ]out)(?![a-z])", re.IGNORECASE)


def split_of(name: str) -> str | None:
    """``train``, ``val`` or ``test`` if the file name has such a word, upper or lower case, not next to other letters:
    ``train_000001.bin``, ``fineweb-val-000000.bin``, ``Valid.bin``; else ``None``. If there are two such words, the first
    one counts. A test split is used for neither training nor validation."""
    match = _SPLIT.search(name)
    return _SPLITS[re.sub("[-_ ]", "", match[1].lower())] if match else None


def find_shards(dataset_path: str, split: str) -> list[Path]:
    """The shards of ``split``, which is ``train`` or ``val``, sorted.

    ``dataset_path`` is a folder, whose ``*.bin`` are chosen by name, or a glob pattern. Files that match a pattern are
    chosen by name too. If several folders match, the folder's name decides for a file whose own name has no split.
    Matching files without any split are training shards.

    Raises: DataError if the folder or its training shards are missing.
    """
    splits = _splits_at(dataset_path)
    says = (split, None) if split == "train" and not Path(dataset_path).is_dir() else (split,)
    shards = [path for path, found in splits.items() if found in says]
    if shards or split != "train":
        return shards
    if Path(dataset_path).is_dir():
        others = f" (it has {', '.join(path.name for path in list(splits)[:3])})" if splits else ""
        raise DataError(f"--dataset_path {dataset_path} has no train_*.bin; name a folder with token shards{others}")
    if splits:
        first = next(iter(splits))
        raise DataError(
            f"--dataset_path {dataset_path} matches only held-out files, such as {first.name}; "
            "give a pattern that also matches training shards"
        )
    raise DataError(
        f"--dataset_path {dataset_path} is not a folder and matches no file; "
        "give a folder with train_*.bin and val_*.bin, or a pattern such as 'shards/train_*.bin'"
    )


def find_held_out(path: str) -> list[Path]:
    """The shards of ``--val_dataset_path``, sorted: a file, the files that match a pattern, or of a folder those whose
    names say so, else all ``*.bin``. Raises: DataError if there is none."""
    files = _splits_at(path)
    if not files:
        raise DataError(
            f"--val_dataset_path {path} has no token shards; give a file, a folder with *.bin, or a pattern such as "
            "'shards/val_*.bin'"
        )
    named = [file for file, split in files.items() if split == "val"]
    return named if named and Path(path).is_dir() else list(files)


def check_held_out(train: Sequence[Shard], val: Sequence[Shard]) -> None:
    """Check that the shards ``val`` of ``--val_dataset_path`` go with those that are trained on. Raises: DataError if a
    file is in both, or if their manifests name different tokenizers."""
    trained = {shard.path.resolve() for shard in train}
    if both := [shard.path for shard in val if shard.path.resolve() in trained]:
        raise DataError(
            f"--val_dataset_path: {both[0]} is training data, too; move it to another folder, or rename it to "
            f"val_{both[0].name.removeprefix('train_')}, so that it is not trained on"
        )
    made, other = ({s.tokenizer.sha256: s.tokenizer for s in shards if s.tokenizer} for shards in (train, val))
    if made and (unknown := other.keys() - made.keys()):
        ours, theirs = next(iter(made.values())), other[min(unknown)]
        raise DataError(
            f"--val_dataset_path: the shards were made with --{theirs.kind} {theirs.name}, but those of --dataset_path "
            f"with --{ours.kind} {ours.name}, another tokenizer; tokenize both with the same one"
        )


def passed_over(dataset_path: str) -> list[Path]:
    """The token files at ``dataset_path`` whose names belong to neither split, sorted."""
    says = (None, "test") if Path(dataset_path).is_dir() else ("test",)
    return [path for path, split in _splits_at(dataset_path).items() if split in says]


def _splits_at(dataset_path: str) -> dict[Path, str | None]:
    """The ``*.bin`` of the folder, or the files that match the pattern, sorted, each with the split that its name gives."""
    folder = Path(dataset_path)
    if folder.is_dir():
        return {path: split_of(path.name) for path in sorted(folder.glob("*.bin"))}
    files = sorted(Path(name) for name in glob.glob(dataset_path))
    several = len({path.parent for path in files}) > 1
    return {path: split_of(path.name) or (split_of(path.parent.name) if several else None) for path in files}


class EndOfText(NamedTuple):
    """The token between documents, and the side of a document that it is on."""

    token: int
    position: Literal["prepend", "append"] = "prepend"


class Shard:
    """One token file, memory-mapped when it is first used. A manifest's entries for it are trusted: ``facts``, whose name
    is the one under which it was written, the ``tokenizer``, whose vocabulary bounds all ids, the length of a ``row`` if
    the shard consists of rows, and whether the rows are one side of pairs.

    Raises: DataError as ``formats.read_header``: without ``facts`` in the constructor, otherwise when it is first used.
    """

    def __init__(
        self,
        path: Path,
        headerless: str | None = None,
        eot: EndOfText | None = None,
        facts: ShardFacts | None = None,
        tokenizer: TokenizerFacts | None = None,
        row: int | None = None,
        paired: bool = False,
    ) -> None:
        self.path, self.headerless, self.eot, self.tokenizer = path, headerless, eot, tokenizer
        self.row, self.paired = row, paired
        self.vocab_size = tokenizer.vocab_size if tokenizer else None
        self._written = facts.name if facts else path.name
        self.count = read_header(path, headerless).count if facts is None else facts.tokens
        self.sha256 = facts.sha256 if facts else None

    def __getstate__(self) -> dict[str, Any]:
        """The state without the memory maps: another process makes its own."""
        maps = ("tokens", "weights", "document_starts")
        return {name: value for name, value in self.__dict__.items() if name not in maps}

    @cached_property
    def tokens(self) -> npt.NDArray[Any]:
        """The token ids, read-only, ``[count]``."""
        tokens = np.asarray(open_shard(self.path, self.headerless))  # a plain array: slices of np.memmap are slow
        if len(tokens) != self.count:
            raise DataError(f"{self.path}: {len(tokens)} tokens, but manifest.json says {self.count}; tokenize again")
        return tokens

    @cached_property
    def weights(self) -> npt.NDArray[np.float32] | None:
        """The weight of each token as a target, ``[count]``, or ``None`` without a ``.weights`` file."""
        path = sidecar(self.path, self._written, ".weights")
        if not path.exists():
            return None
        weights = np.asarray(open_weights(path))
        if len(weights) != self.count:
            raise DataError(f"{path}: {len(weights)} weights for the {self.count} tokens of {self.path.name}")
        return weights

    @cached_property
    def document_starts(self) -> npt.NDArray[np.uint32] | None:
        """The offsets where documents begin, ascending, or ``None`` without a ``.docs`` file. Tokens before the first
        offset continue a document of the previous shard."""
        path = sidecar(self.path, self._written, ".docs")
        if not path.exists():
            return None
        starts: npt.NDArray[Any] = np.asarray(open_shard(path))
        if len(starts) and not (int(starts[-1]) < self.count and np.all(starts[1:] > starts[:-1])):
            raise DataError(f"{path}: the offsets do not ascend within the {self.count} tokens of {self.path.name}")
        return starts

    def starts_between(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """The offsets, ascending, of the documents that begin at a token ``first .. last - 1`` of the shard.

        Raises: DataError if there is neither a ``.docs`` file nor an end-of-text token.
        """
        starts = self.document_starts
        if starts is not None:
            # The bounds are uint32, because with another type numpy would copy the whole array to a common one.
            low, high = starts.searchsorted(np.array([first, last], np.uint32))
            return starts[low:high].astype(np.int64)
        if self.eot is None:
            raise DataError(
                f"{self.path}: it is unknown where documents begin (no {self.path.stem}.docs, no manifest.json); give "
                "--eot_id, the token between documents, or drop --document_mask and --packing best_fit"
            )
        shift = 1 if self.eot.position == "append" else 0
        low = max(0, first - shift)
        return np.flatnonzero(self.tokens[low : max(low, last - shift)] == self.eot.token) + low + shift

    @property
    def offset(self) -> int:
        """The byte offset of the first token."""
        return read_header(self.path, self.headerless).offset

    def fingerprint(self, seq_len: int) -> bytes:
        """The size, the type, ``seq_len``, and the first and last 2^15 tokens, as bytes."""
        ends = self.tokens[: 2**15].tobytes() + self.tokens[-(2**15) :].tobytes()
        return f"{self.count}:{self.tokens.dtype}:{seq_len};".encode() + ends


def open_shards(paths: Sequence[Path], headerless: str | None = None, eot: EndOfText | None = None) -> list[Shard]:
    """The shards ``paths``. A shard that the manifest in its folder lists is not opened yet; only its size is checked.

    Raises: DataError for files whose size disagrees with their manifest or header, and as ``read_manifest``.
    """
    manifests = {folder: read_manifest(folder) for folder in {path.parent for path in paths}}
    known: dict[Path, ShardFacts] = {}
    for folder, found in manifests.items():
        if found is not None:
            itemsize = np.dtype(found.dtype).itemsize
            known |= facts_of(found.shards, itemsize, [path for path in paths if path.parent == folder])
    shards = []
    for path in paths:
        manifest = manifests[path.parent]
        facts = known.get(path)
        if manifest is None or facts is None:
            shards.append(Shard(path, headerless, eot))
            continue
        expected = HEADER_BYTES + facts.tokens * np.dtype(manifest.dtype).itemsize
        if (size := path.stat().st_size) != expected:
            raise DataError(
                f"{path}: {size} bytes, but {facts.tokens} tokens in its {MANIFEST} make {expected}: it is truncated or "
                "another file; tokenize again, or remove the manifest"
            )
        written = manifest.tokenizer
        separator = eot
        if separator is None and written.eot_id is not None:
            position: Any = written.eot_position
            separator = EndOfText(written.eot_id, position)
        shards.append(Shard(path, headerless, separator, facts, written, manifest.row, manifest.paired))
    return shards


def sidecar(path: Path, written: str, suffix: str) -> Path:
    """The file with ``suffix`` that belongs to the shard ``path``, which may have been renamed without it since it was
    written under the name ``written``."""
    own = path.with_suffix(suffix)
    return own if own.exists() else path.with_name(written).with_suffix(suffix)


def facts_of(shards: Sequence[ShardFacts], itemsize: int, paths: Sequence[Path]) -> dict[Path, ShardFacts]:
    """The entries of a manifest's ``shards``, of ``itemsize`` bytes per token, for those of the files ``paths`` in its
    folder that it lists. A renamed file (``train_000000.bin`` moved to ``validation_000000.bin``) is recognized by its
    content: it has the size and the SHA-256 of an entry whose own file is gone."""
    listed = {facts.name: facts for facts in shards}
    found = {path: listed[path.name] for path in paths if path.name in listed}
    for path in paths:
        if path in found or not path.exists():
            continue
        size = path.stat().st_size
        gone = [f for f in shards if HEADER_BYTES + f.tokens * itemsize == size and not path.with_name(f.name).exists()]
        content = sha256_of(path) if gone else ""
        if (facts := next((f for f in gone if f.sha256 == content), None)) is not None:
            found[path] = facts
    return found


def names_gone(shards: Sequence[ShardFacts], itemsize: int, folder: Path) -> list[str]:
    """The names of the ``shards`` that ``folder`` has neither under that name nor under another (see ``facts_of``)."""
    gone = [facts.name for facts in shards if not (folder / facts.name).is_file()]
    if not gone:
        return []
    there = {facts.name for facts in facts_of(shards, itemsize, sorted(folder.glob("*.bin"))).values()}
    return [name for name in gone if name not in there]
