"""Loss of any model on held-out data: token shards, or a text file that the model's tokenizer encodes.

source -> samples of ``seq_len`` training pairs, cut as in training -> batches on the device -> ``validate``
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tinytron.data import Batch, SampleOptions, TokenShardDataset, build_val_loader, find_shards
from tinytron.data.pack_files import make_pack_files
from tinytron.data.shards import EndOfText, open_shards
from tinytron.errors import ConfigError, DataError
from tinytron.evaluation.sources import DataSource
from tinytron.evaluation.validate import ValResult, validate
from tinytron.inference.engine import not_finite
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
from tinytron.text.rows import TextRows
from tinytron.text.run_tokenizer import RunTokenizer, tokenizers_of_data
from tinytron.text.sources import FileSource
from tinytron.text.token_bytes import token_bytes, token_bytes_of_data
from tinytron.text.tokenizer_files import read_vocabulary
from tinytron.text.tokenizers import encode_documents
from tinytron.utils.progress import Progress
from tinytron.utils.sequences import IGNORE_INDEX, documents_of

_DOCUMENTS_AT_ONCE = 1024


@dataclass(frozen=True)
class HeldOut:
    """Batches on the host, for one pass, and the number of bytes of every token id, if known."""

    batches: Iterable[Batch]
    token_bytes: list[int] | None


def default_seq_len(config: Mapping[str, Any], block_size: int, longest: int = 4096) -> int:
    """The length of samples: the one of the run whose configuration is ``config``, else the model's longest sequence, up to
    ``longest``."""
    trained = config.get("train", {}).get("seq_len")
    return min(block_size, trained if type(trained) is int else longest)


def held_out(
    source: DataSource,
    model: GPT,
    config: Mapping[str, Any],
    tokenizer: RunTokenizer | None,
    seq_len: int,
    batch_tokens: int,
    text_key: str = "text",
) -> HeldOut:
    """The data of ``source``: one split of its token shards, or a text file (with the text of a row under ``text_key``).
    ``config`` has the sections of the run that trained the model: its ``data`` section says how token shards are cut and
    masked.

    Raises: DataError for data that is missing, damaged or shorter than one sample; ConfigError for texts without a
    ``tokenizer``, and for shards that were made with a different one.
    """
    rows = max(1, batch_tokens // seq_len)
    if source.split is None:
        if tokenizer is None:
            raise ConfigError(f"no tokenizer to read {source.path} with; give --tokenizer path/to/tokenizer.json")
        tokens = _tokens_of_file(Path(source.local), tokenizer, text_key)
        return HeldOut(_cut(tokens, seq_len, rows, source.path), _bytes_of(tokenizer))
    dataset = _shards(source.local, source.split, model, config.get("data", {}), seq_len)
    if tokenizer is not None:
        _require_same(source, tokenizer)
    loader = build_val_loader(
        dataset, num_samples=len(dataset), micro_batch=rows, dp_rank=0, dp_size=1, num_workers=0, pin_memory=False
    )
    sizes = token_bytes_of_data(source.local)
    if sizes is None and tokenizer is not None:
        sizes = _bytes_of(tokenizer)
    return HeldOut(loader, sizes)


def measure(model: GPT, data: HeldOut) -> ValResult:
    """Loss of ``model`` on ``data``, in one process. Raises: ConfigError or CheckpointError if it is not finite."""
    device, size = model.lm_head.weight.device, model.config.vocab_size

    def batches() -> Iterator[Batch]:
        with Progress("measuring the loss", None, "token") as progress:
            for batch in data.batches:
                documents = None if batch.positions is None else documents_of(batch.positions)
                padding = batch.padding if model.config.use_moe else None
                yield batch._replace(documents=documents, padding=padding).to(device)
                progress.update(batch.input_ids.numel())

    def loss(batch: Batch) -> LossSums:
        sums: LossSums = model(batch.input_ids, batch.labels, **batch.model_inputs())
        return sums

    known = data.token_bytes
    sizes_V = None if known is None else torch.tensor((known + [0] * size)[:size], device=device)
    result = validate(model, loss, batches(), None, token_bytes_V=sizes_V)
    if not math.isfinite(result.loss):
        raise not_finite("losses", model.lm_head.weight.dtype)
    return result


def _shards(path: str, split: str, model: GPT, data: Mapping[str, Any], seq_len: int) -> TokenShardDataset:
    eot = None if data.get("eot_id") is None else EndOfText(data["eot_id"], data.get("eot_position", "prepend"))
    shards = open_shards(find_shards(path, split), data.get("token_dtype"), eot)
    reading = SampleOptions(
        data.get("document_mask", False),
        data.get("cross_document_loss", True),
        data.get("packing", "concat"),
        mark_padding=model.config.use_moe,
    )
    if reading.packing == "best_fit":
        make_pack_files([shard for shard in shards if shard.row is None], seq_len)
    dataset = TokenShardDataset(shards, seq_len, model.config.vocab_size, reading)
    dataset.check_token_ids()
    return dataset


def _require_same(source: DataSource, tokenizer: RunTokenizer) -> None:
    """Raises: ConfigError if the tokenizer.json next to the shards has tokens with other ids than the model's tokenizer."""
    for file in tokenizers_of_data(source.local).files[:1]:
        try:
            theirs = read_vocabulary(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        for token, number in theirs.items():
            if (own := tokenizer.tokenizer.token_id(token)) != number:
                raise ConfigError(
                    f"--data {source.path} was made with another tokenizer than the model's: {token!r} is {number} there "
                    f"and {own} here; tokenize its texts with {tokenizer.tokenizer.name}, or give a text file"
                )


def _bytes_of(tokenizer: RunTokenizer) -> list[int] | None:
    """The number of bytes of every token id; ``None`` if the tokenizer does not have them in a known form."""
    serialized = tokenizer.tokenizer.serialized
    try:
        return token_bytes(serialized) if serialized else None
    except ValueError:
        return None


def _tokens_of_file(path: Path, tokenizer: RunTokenizer, text_key: str) -> npt.NDArray[np.int64]:
    """The token ids of all documents of a file, each after the token that texts begin with, or else separated by the
    end-of-text token, if the tokenizer has one."""
    source = FileSource([path], TextRows(text_key, "--text_key"), str(path))
    texts = [text for chunk in source.chunks(_DOCUMENTS_AT_ONCE) for text in source.read(chunk) if text]
    first = tokenizer.end if tokenizer.begin is None and tokenizer.prepend else tokenizer.begin
    position = "append" if first is None else "prepend"
    separator = tokenizer.end if first is None else first
    tokens, _ = encode_documents(texts, tokenizer.tokenizer.encode, separator, position, np.dtype(np.int64))
    return tokens[:-1] if position == "append" and separator is not None else tokens


def _cut(tokens: npt.NDArray[np.int64], seq_len: int, rows: int, name: str) -> list[Batch]:
    """Batches of ``rows`` samples. Sample i has the training pairs of ``tokens[i*S : i*S + S + 1]``, S = ``seq_len``; the
    last may be shorter. Every token but the first is a target once. Raises: DataError for fewer than two tokens."""
    pairs = len(tokens) - 1
    if pairs < 1:
        raise DataError(f"{name} has {len(tokens)} tokens; give a longer text, of at least 2")
    samples = -(-pairs // seq_len)
    ids = np.zeros(samples * seq_len, np.int64)
    labels = np.full(samples * seq_len, IGNORE_INDEX, np.int64)
    ids[:pairs], labels[:pairs] = tokens[:-1], tokens[1:]
    ids_NS, labels_NS = (torch.from_numpy(array).view(samples, seq_len) for array in (ids, labels))
    padding_NS = labels_NS == IGNORE_INDEX
    return [
        Batch(ids_NS[place], labels_NS[place], padding=padding_NS[place])
        for place in (slice(first, first + rows) for first in range(0, samples, rows))
    ]
