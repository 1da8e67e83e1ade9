"""Describing a folder of token shards, and verifying it against its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinytron.data.formats import open_shard, open_weights, read_header
from tinytron.data.manifest import TOKENIZER, Manifest, ShardFacts, read_manifest
from tinytron.data.shards import facts_of, sidecar
from tinytron.errors import ConfigError, DataError
from tinytron.utils.optional import require_package
from tinytron.utils.progress import Progress
from tinytron.utils.texts import counted
from tinytron.utils.training import sha256_of

SHOWN_CHARS = 200
Tokens = npt.NDArray[Any]


def open_tokens(path: Path) -> tuple[Tokens, str]:
    """The tokens of a shard of any format, and its format. Raises: DataError."""
    return open_shard(path), read_header(path).file_format


def find_token_files(folder: Path) -> list[Path]:
    """The shards of ``folder``, sorted by name. Raises: DataError if there is none."""
    found = sorted(folder.glob("*.bin"))
    if not found:
        raise DataError(f"{folder} holds no token shards (*.bin); give a folder that tinytron tokenize wrote")
    return found


# tinytron data info


def describe(folder: Path) -> list[str]:
    """Lines of text that describe a folder of shards. Raises: DataError."""
    manifest = read_manifest(folder)
    files = find_token_files(folder)
    tokens, file_format = open_tokens(files[0])
    lines = [f"folder     {folder}", f"format     {file_format}, {tokens.dtype.name}"]
    if manifest is None:
        lines.append("manifest   none")
    else:
        facts = manifest.tokenizer
        side = "before" if facts.eot_position == "prepend" else "after"
        end = "no token between documents"
        if facts.eot_id is not None:
            end = f"{facts.eot_token} ({facts.eot_id}) {side} every document"
        lines += [
            f"tokenizer  --{facts.kind} {facts.name}: {facts.vocab_size:,} ids; {end}",
            f"source     {manifest.source.get('path')}",
            f"made by    {manifest.command}",
        ]
        if manifest.row is not None:
            lines.append(f"rows       of {manifest.row:,} tokens{', in pairs' if manifest.paired else ''}")
        if not manifest.complete:
            lines.append("complete   no: the same command, without --max_file_index, continues")
    known = {} if manifest is None else facts_of(manifest.shards, np.dtype(manifest.dtype).itemsize, files)
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(path.name.rpartition("_")[0], []).append(path)
    for split, paths in by_split.items():
        count = sum(read_header(path).count for path in paths)
        listed = [known[path].documents for path in paths if path in known]
        documents = "" if manifest is None else f"{counted(sum(listed), 'document')}, "
        lines.append(f"{split:<10} {documents}{counted(count, 'token')}, {counted(len(paths), 'shard')}")
    if (text := _first_text(folder, files[0], tokens)) is not None:
        lines.append(f"begins     {text[:SHOWN_CHARS]!r}")
    return lines


def _first_text(folder: Path, path: Path, tokens: Tokens) -> str | None:
    """The first document of the first shard as text, if the folder has its tokenizer."""
    if not (folder / TOKENIZER).is_file():
        return None
    try:
        tokenizer = require_package("tokenizers").Tokenizer.from_file(str(folder / TOKENIZER))
    except ConfigError:
        return None
    starts = open_shard(path.with_suffix(".docs")).tolist() if path.with_suffix(".docs").exists() else []
    stop = min(*starts[1:2], len(tokens), 4 * SHOWN_CHARS) if starts[1:2] else min(len(tokens), 4 * SHOWN_CHARS)
    text: str = tokenizer.decode(tokens[:stop].tolist(), skip_special_tokens=True)
    return text


# tinytron data verify


def problems(folder: Path) -> Iterator[str]:
    """One line for each problem of a folder of shards. Raises: DataError if it has no shard, or its manifest is
    damaged."""
    manifest = read_manifest(folder)
    files = find_token_files(folder)
    if manifest is None:
        yield f"{folder} has no manifest.json: hashes, documents and vocabulary cannot be checked"
        for path in files:
            yield from _readable(path)
        return
    known = facts_of(manifest.shards, np.dtype(manifest.dtype).itemsize, files)
    yield from (f"{path}: not in the manifest" for path in files if path not in known)
    places = {shard.name: path for path, shard in known.items()}  # also of renamed files
    with Progress("verifying shards", sum(path.stat().st_size for path in known)) as progress:
        for shard in manifest.shards:
            yield from _shard_problems(places.get(shard.name, folder / shard.name), shard, manifest, progress)
    for split, count in manifest.tokens.items():
        shards = manifest.shards_of(split)
        if (count, manifest.documents.get(split)) != (sum(s.tokens for s in shards), sum(s.documents for s in shards)):
            yield f"{folder}: the manifest's token and document counts of {split} are not the sums over its shards"


def _readable(path: Path) -> Iterator[str]:
    try:
        open_tokens(path)
    except DataError as error:
        yield str(error)


def _shard_problems(path: Path, shard: ShardFacts, manifest: Manifest, progress: Progress) -> Iterator[str]:
    try:
        tokens, file_format = open_tokens(path)
    except DataError as error:
        yield str(error)
        return
    if (file_format, tokens.dtype.name) != (manifest.file_format, manifest.dtype):
        yield f"{path}: {file_format}, {tokens.dtype.name}, but the manifest says {manifest.file_format}, {manifest.dtype}"
    if len(tokens) != shard.tokens:
        yield f"{path}: {len(tokens)} tokens, but the manifest says {shard.tokens}"
    if sha256_of(path, progress.update) != shard.sha256:
        yield f"{path}: its sha256 differs from the one in the manifest"
    if (largest := _largest(tokens)) >= manifest.tokenizer.vocab_size:
        yield f"{path}: token id {largest} is not below the vocabulary of {manifest.tokenizer.vocab_size}"
    yield from _sidecar_problems(sidecar(path, shard.name, ".docs"), tokens, shard, manifest)
    if manifest.weighted:
        yield from _weight_problems(sidecar(path, shard.name, ".weights"), shard)


def _largest(tokens: Tokens, block: int = 2**24) -> int:
    return max((int(tokens[first : first + block].max()) for first in range(0, len(tokens), block)), default=-1)


def _sidecar_problems(path: Path, tokens: Tokens, shard: ShardFacts, manifest: Manifest) -> Iterator[str]:
    try:
        starts = open_shard(path).astype(np.int64)
    except DataError as error:
        yield str(error)
        return
    row = manifest.row
    documents = len(starts) if row is None else int(np.count_nonzero(starts % row == 0))  # others begin padding
    if documents != shard.documents:
        yield f"{path}: {documents} documents, but the manifest says {shard.documents}"
    if len(starts) and (starts[0] < 0 or (np.diff(starts) <= 0).any() or starts[-1] >= len(tokens)):
        yield f"{path}: the document offsets do not ascend, or are outside the shard"
        return
    if manifest.tokenizer.eot_id is None or row is not None:  # a row may begin in the middle of a document
        return
    ends = starts if manifest.tokenizer.eot_position == "prepend" else starts[starts > 0] - 1
    if (tokens[ends] != manifest.tokenizer.eot_id).any():
        yield f"{path}: a document does not begin at {manifest.tokenizer.eot_token}"


def _weight_problems(path: Path, shard: ShardFacts) -> Iterator[str]:
    try:
        weights = open_weights(path)
    except DataError as error:
        yield str(error)
        return
    if len(weights) != shard.tokens:
        yield f"{path}: {len(weights)} weights for {shard.tokens} tokens"
    if len(weights) and not (weights.min() >= 0 and weights.max() < np.inf):
        yield f"{path}: weights must be finite and at least 0"
