"""Samples from token shards: consecutive windows of a shard, or rows packed with whole documents."""

from __future__ import annotations

import contextlib
import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from tinytron.data.batch import FIELDS, Batch
from tinytron.data.manifest import read_manifest
from tinytron.data.mixture import MixtureOrder
from tinytron.data.pack_files import PackFile
from tinytron.data.rows import FixedRows
from tinytron.data.shards import Shard
from tinytron.errors import DataError
from tinytron.utils.sequences import IGNORE_INDEX

NOTED_SHARE = 0.01  # ``describe`` mentions unused tokens above this share
Piece = tuple[int, int]  # first token, and number of training pairs (token, next token)


@dataclass(frozen=True)
class SampleOptions:
    """The rules that turn tokens into samples.

    ``document_mask``: tokens attend only to their own document, in which positions count from 0.
    ``cross_document_loss``: a document's last token is trained to predict the next document's first token.
    ``packing``: ``concat`` cuts the token stream every ``seq_len`` tokens, ``best_fit`` fills rows with whole documents.
    ``mark_padding``: samples mark the tokens that only fill up their row, for models with experts.
    """

    document_mask: bool = False
    cross_document_loss: bool = True
    packing: Literal["concat", "best_fit"] = "concat"
    mark_padding: bool = False

    @property
    def needs_documents(self) -> bool:
        """True if the samples depend on where documents begin."""
        return self.document_mask or not self.cross_document_loss or self.packing == "best_fit"


class TokenShardDataset(Dataset[dict[str, torch.Tensor]]):
    """Samples of ``seq_len`` training pairs (a token and the next one), numbered through the shards in the given order.

    ``concat``: sample i of a shard is ``tokens[i*S : i*S + S + 1]``, S = ``seq_len``. Neighbors share one token, so every
    token except a shard's first is a target once; the remainder is dropped, and no sample crosses shards. ``best_fit``: a
    sample is a row of the shard's packing (packing.py); the unused end of a row is padding with token 0 and no target. If
    the shards consist of rows (rows.py), each of them is a sample, whatever the packing.

    Raises: DataError for a damaged shard, for shards of pairs, for shards without a single sample, and on access for a
    token id of ``vocab_size`` or more.
    """

    def __init__(
        self, shards: Sequence[Shard], seq_len: int, vocab_size: int, reading: SampleOptions | None = None
    ) -> None:
        self.shards, self.seq_len, self.vocab_size = list(shards), seq_len, vocab_size
        self.reading = reading or SampleOptions()
        self.rows = any(shard.row is not None for shard in self.shards)
        self.packs = self._open_packs()
        if self.packs:
            counts = [pack.num_rows for pack in self.packs]
        else:
            counts = [max(0, shard.count - 1) // seq_len for shard in self.shards]
        self.ends = list(accumulate(counts))
        self._counting = np.arange(seq_len)
        self.passed_over: list[Path] = []  # token files in the folder that belong to neither split
        if not len(self):
            sizes = ", ".join(f"{shard.path.name}: {shard.count}" for shard in self.shards[:5])
            raise DataError(
                f"no shard holds one sample of --seq_len {seq_len} + 1 tokens ({sizes} tokens); use a shorter --seq_len"
            )
        if self.reading.needs_documents:
            self.shards[0].starts_between(0, 1)  # fail now if document boundaries are unknown
        self.weighted = self.shards[0].weights is not None

    def __len__(self) -> int:
        return self.ends[-1]

    def _open_packs(self) -> Sequence[PackFile | FixedRows]:
        """The rows of every shard, unless samples are cut from its stream of tokens."""
        if (paired := next((shard for shard in self.shards if shard.paired), None)) is not None:
            raise DataError(
                f"{paired.path.parent} holds pairs of answers, which only a trainer that reads pairs can use "
                "(tinytron.data.pairs); for this one tokenize with data/tokenize_blockwise_dataset"
            )
        if self.rows:
            if (other := next((shard for shard in self.shards if shard.row is None), None)) is not None:
                raise DataError(f"{other.path} has no rows, but others have; keep them in folders of their own")
            return [FixedRows(shard, self.seq_len) for shard in self.shards]
        return [PackFile(shard, self.seq_len) for shard in self.shards] if self.reading.packing == "best_fit" else []

    @property
    def paths(self) -> list[Path]:
        """The shards' files, in order."""
        return [shard.path for shard in self.shards]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all shards."""
        return sum(shard.count for shard in self.shards)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self.__getitems__([range(len(self))[index]])
        return {name: rows[0] for name in FIELDS if (rows := getattr(batch, name)) is not None}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The samples ``indices`` as a batch; they are read straight into its memory."""
        return read_rows([(self, index) for index in indices])

    def read(self, index: int, into: dict[str, npt.NDArray[Any]], row: int) -> None:
        """Write sample ``index`` into row ``row`` of uninitialized arrays ``[B, S]``, which are named as in ``Batch``."""
        number = bisect_right(self.ends, index)
        shard = self.shards[number]
        at = 0  # tokens of the row filled so far
        inputs, labels = into["input_ids"][row], into["labels"][row]
        weights = into["weights"][row] if "weights" in into else None
        positions = into["positions"][row] if "positions" in into else None
        for first, count in self._pieces(number, index - (self.ends[number - 1] if number else 0)):
            tokens = shard.tokens[first : first + count + 1]
            place = slice(at, at + count)
            self._check(number, first, tokens)
            inputs[place], labels[place] = tokens[:-1], tokens[1:]
            if weights is not None:
                weights[place] = self._weights(shard, first + 1, first + count + 1) if self.weighted else 1
            self._mark_documents(shard, first, labels[place], None if positions is None else positions[place])
            at += count
        if "padding" in into:
            into["padding"][row] = self._counting >= at
        if at == self.seq_len:
            return
        inputs[at:] = 0
        labels[at:] = IGNORE_INDEX
        if weights is not None:
            weights[at:] = 0
        if positions is not None:
            positions[at:] = self._counting[: self.seq_len - at]  # the unused end counts as a separate document

    def _pieces(self, number: int, row: int) -> list[Piece]:
        """The pieces that make up row ``row`` of shard ``number``."""
        return self.packs[number].pieces(row) if self.packs else [(row * self.seq_len, self.seq_len)]

    def _mark_documents(
        self, shard: Shard, first: int, labels: npt.NDArray[np.int64], positions: npt.NDArray[np.int64] | None
    ) -> None:
        """Fill in the positions of the piece that starts at token ``first``, and ignore labels that begin another
        document."""
        if positions is None and self.reading.cross_document_loss:
            return
        count = len(labels)
        if self.packs:  # a piece is part of one document; the label of its last token may begin another
            if positions is not None:
                positions[:] = self._counting[:count]
            if not self.reading.cross_document_loss and len(shard.starts_between(first + count, first + count + 1)):
                labels[-1] = IGNORE_INDEX
            return
        starts = shard.starts_between(first + 1, first + count + 1) - first
        if not self.reading.cross_document_loss:
            labels[starts - 1] = IGNORE_INDEX
        if positions is not None:
            edges = np.concatenate(([0], starts, [count]))
            began = edges[:-1].repeat(edges[1:] - edges[:-1])  # for each token, the start of its document
            np.subtract(self._counting[:count], began, out=positions)

    def _weights(self, shard: Shard, first: int, last: int) -> npt.NDArray[np.float32]:
        if shard.weights is None:
            raise DataError(
                f"{shard.path} has no {shard.path.stem}.weights, but {self.shards[0].path.stem} has; write them for all "
                "shards or for none"
            )
        weights = shard.weights[first:last]
        if not (weights.min() >= 0 and weights.max() < np.inf):
            at = first + int(np.argmin((weights >= 0) & (weights < np.inf)))
            raise DataError(
                f"{shard.path.with_suffix('.weights')}: weight {float(shard.weights[at])} of token {at}; weights must be "
                "finite and at least 0"
            )
        return weights

    def _check(self, number: int, first: int, tokens: npt.NDArray[Any]) -> None:
        if len(tokens) and int(tokens.max()) >= self.vocab_size:
            shard = self.shards[number]
            at = first + int(np.argmax(tokens >= self.vocab_size))
            offset = shard.offset + at * tokens.dtype.itemsize
            raise DataError(
                f"{shard.path}: token id {int(shard.tokens[at])} at byte {offset} is not below --vocab_size "
                f"{self.vocab_size}; use {_vocabulary_size_for(shard, int(shard.tokens[at]))}"
            )

    def describe(self) -> list[str]:
        """Notes for the user about the samples: skipped files, unused tokens, packing, weights."""
        notes = []
        if self.passed_over:
            names = ", ".join(path.name for path in self.passed_over[:5])
            notes.append(f"skipped, because the file names mark neither training nor validation shards: {names}")
        unused = 1 - len(self) * self.seq_len / max(1, self.num_tokens)
        if not self.packs and unused > NOTED_SHARE:
            notes.append(
                f"{unused:.0%} of the tokens are not used: they are left over when shards are cut into sequences of "
                f"{self.seq_len}; make fewer, longer shards, or use a shorter --seq_len"
            )
        if self.rows:
            sizes = sorted({shard.row for shard in self.shards if shard.row is not None})
            notes.append(f"rows: {len(self):,} rows of {'/'.join(map(str, sizes))} tokens, one per sequence")
        elif self.packs:
            used = 1 - self.num_tokens / (len(self) * self.seq_len)
            notes.append(
                f"best-fit packing: {len(self):,} sequences of {self.seq_len} tokens, {used:.2%} of them unused"
            )
        if self.weighted:
            notes.append("tokens are weighted: there are .weights files next to the shards")
        return notes

    def check_token_ids(self, part: int = 0, parts: int = 1, limit: int = 2**28) -> None:
        """Look for ids outside the vocabulary in the shards that no manifest vouches for; this call checks every
        ``parts``-th of them. It checks all tokens, or about ``limit`` evenly spread ones if there are more (the others are
        checked on access).

        Raises: DataError naming file, byte and id.
        """
        unsure = [n for n, s in enumerate(self.shards) if s.vocab_size is None or s.vocab_size > self.vocab_size]
        mine = unsure[part::parts]
        block = 2**18
        stride = block * max(1, -(-sum(self.shards[n].count for n in mine) // limit))
        for number in mine:
            shard = self.shards[number]
            for first in range(0, shard.count, stride):
                self._check(number, first, shard.tokens[first : first + block])

    def fingerprint(self) -> str:
        """A hash that identifies the samples, independent of their path: made from the hashes in the shards' manifests, or
        without those from sizes, types and the first and last tokens."""
        digest = hashlib.sha256()
        for shard in self.shards:
            known = f"{shard.count}:{shard.sha256}:{self.seq_len};".encode() if shard.sha256 else None
            digest.update(known or shard.fingerprint(self.seq_len))
        packed = "packed " if self.packs else ""
        if self.rows:
            packed = "rows "
        return f"{packed}shards:{digest.hexdigest()[:16]}"


class MixtureDataset(Dataset[dict[str, torch.Tensor]]):
    """The samples of several datasets, numbered one dataset after the other; a batch has the ``sources`` of its rows.

    ``datasets`` maps the sources' names to their datasets; ``order`` is the training order of the samples.
    """

    def __init__(self, datasets: Mapping[str, TokenShardDataset], order: MixtureOrder | None = None) -> None:
        self.names, self.datasets, self.order = list(datasets), list(datasets.values()), order
        self.ends = list(accumulate(map(len, self.datasets)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        source, local = self._place(range(len(self))[index])
        return self.datasets[source][local]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        places = [self._place(index) for index in indices]
        batch = read_rows([(self.datasets[source], local) for source, local in places])
        return batch._replace(sources=torch.tensor([source for source, _ in places]))

    def _place(self, index: int) -> tuple[int, int]:
        source = bisect_right(self.ends, index)
        return source, index - (self.ends[source - 1] if source else 0)

    def fingerprint(self) -> str:
        """The sources' fingerprints, by name."""
        return ", ".join(f"{n}={d.fingerprint()}" for n, d in zip(self.names, self.datasets, strict=True))


def _vocabulary_size_for(shard: Shard, token: int) -> str:
    """The vocabulary size that makes ``token`` valid: that of the tokenizer, if the shard's manifest tells it."""
    with contextlib.suppress(DataError):  # a damaged manifest
        manifest = read_manifest(shard.path.parent)
        if manifest is not None and manifest.tokenizer.vocab_size > token:
            return f"--vocab_size {manifest.tokenizer.vocab_size}, the size of the tokenizer that wrote it, or more"
    return "the vocabulary size of the tokenizer that wrote it"


def read_rows(samples: Sequence[tuple[TokenShardDataset, int]]) -> Batch:
    """A batch of samples, each given as a dataset and a number in it; all samples have the same length."""
    shape = len(samples), samples[0][0].seq_len
    rows: dict[str, npt.NDArray[Any]] = {"input_ids": np.empty(shape, np.int64), "labels": np.empty(shape, np.int64)}
    if any(dataset.weighted for dataset, _ in samples):
        rows["weights"] = np.empty(shape, np.float32)
    if samples[0][0].reading.document_mask:
        rows["positions"] = np.empty(shape, np.int64)
    if any(dataset.reading.mark_padding and dataset.packs for dataset, _ in samples):
        rows["padding"] = np.empty(shape, np.bool_)
    for row, (dataset, index) in enumerate(samples):
        dataset.read(index, rows, row)
    return Batch.of({name: torch.from_numpy(array) for name, array in rows.items()})
