"""``manifest.json``, the description of a folder of token shards; it is written after all other files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinytron.errors import DataError
from tinytron.utils.training import write_atomically

MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"  # a folder has the second only if the tokenizer can be saved so
FORMAT, VERSION = "tinytron tokens", 1


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer that made the ids. ``kind`` is the flag that named it, ``sha256`` is the hash of tokenizer.json or
    of the serialized vocabulary. ``eot_position`` is ``prepend``, ``append`` or, without a token between documents,
    ``none``."""

    kind: str
    name: str
    sha256: str
    vocab_size: int
    eot_id: int | None
    eot_token: str | None
    eot_position: str


@dataclass(frozen=True)
class ShardFacts:
    """One shard: its number of tokens, the number of documents that begin in it, and the hash of its content."""

    name: str
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A folder of token shards.

    ``source`` has the path, configuration, split, text key and local files; ``options`` everything else that determines the
    tokens; ``command`` reproduces the folder. ``documents`` and ``tokens`` are counts by split. ``empty`` counts the
    documents that were left out because they had no text or less than ``--min_chars``. A folder that is not
    ``complete`` was made with ``--max_file_index`` and can be continued.
    """

    dtype: str
    file_format: str
    tokenizer: TokenizerFacts
    source: dict[str, Any]
    options: dict[str, Any]
    command: str
    documents: dict[str, int]
    tokens: dict[str, int]
    empty: int
    complete: bool
    shards: list[ShardFacts]
    format: str = field(default=FORMAT)
    version: int = field(default=VERSION)

    @property
    def row(self) -> int | None:
        """Number of tokens of a row, if every document is one row of this length; else ``None``."""
        row = self.options.get("block_size")
        return row if isinstance(row, int) else None

    @property
    def paired(self) -> bool:
        """True if row i of ``SPLIT.pos_*.bin`` and row i of ``SPLIT.neg_*.bin`` are a pair."""
        return self.options.get("pairs") is True

    @property
    def weighted(self) -> bool:
        """True if every shard was written with weights."""
        return self.row is not None or self.options.get("assistant_only") is True

    def shards_of(self, split: str) -> list[ShardFacts]:
        """The files of one split, in order."""
        return [shard for shard in self.shards if shard.name.rpartition("_")[0] == split]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; it appears complete or not at all. Raises: OSError."""
    facts = dataclasses.asdict(manifest)
    ordered = {"format": facts.pop("format"), "version": facts.pop("version"), **facts}
    text = json.dumps(ordered, indent=2) + "\n"
    write_atomically(folder / MANIFEST, lambda file: file.write(text.encode()))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of ``folder``, or ``None`` if it has none. Raises: DataError if it is damaged or from a later
    version."""
    path = folder / MANIFEST
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); tokenize again with --overwrite, or remove it") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise DataError(
            f'{path} is not a manifest of token shards ("format": "{FORMAT}"); remove it, or use another folder'
        )
    if facts.get("version") != VERSION:
        raise DataError(f"{path}: version {facts.get('version')}, but only version {VERSION} is known; update tinytron")
    try:
        tokenizer = _typed(TokenizerFacts, facts.pop("tokenizer"))
        shards = [_typed(ShardFacts, shard) for shard in facts.pop("shards")]
        manifest: Manifest = _typed(Manifest, {**facts, "tokenizer": tokenizer, "shards": shards})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); tokenize again with --overwrite") from error
    return manifest


def _typed(cls: type, facts: dict[str, Any]) -> Any:
    """``cls(**facts)`` with every field checked to be present and of its type. Raises: TypeError, KeyError."""
    wanted = {"str": str, "int": int, "bool": bool}
    for info in dataclasses.fields(cls):
        kind = wanted.get(str(info.type), dict if str(info.type).startswith("dict") else object)
        if not isinstance(facts[info.name], kind):
            raise TypeError(f"{info.name} is {type(facts[info.name]).__name__}")
    return cls(**{info.name: facts[info.name] for info in dataclasses.fields(cls)})
