"""The inputs of a tokenization, as the options name them: where documents come from, and how they become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinytron.data.manifest import TokenizerFacts
from tinytron.errors import ConfigError
from tinytron.registry import DATASETS
from tinytron.text import tokenizers
from tinytron.text.chat import template_of
from tinytron.text.encoders import DocumentEncoder, PlainEncoder, RecordEncoder, RowShape
from tinytron.text.named import find_named, rows_of
from tinytron.text.options import TokenizeOptions
from tinytron.text.rows import MessageRows, PairRows, RowKind, RowReader, TextRows
from tinytron.text.selection import SelectedSource
from tinytron.text.sources import TextSource, open_source
from tinytron.text.tokenizers import TextTokenizer


@dataclass(frozen=True)
class Documents:
    """The documents of a ``source``, and their ``kind``. ``facts`` add to the source's identity; ``note`` is a line for the
    user, or empty."""

    source: TextSource
    kind: RowKind
    facts: dict[str, Any]
    note: str = ""

    def identity(self) -> dict[str, Any]:
        """Plain JSON values that identify the documents. Raises: OSError if source files cannot be examined."""
        return self.source.identity() | self.facts


def documents_of(options: TokenizeOptions) -> Documents:
    """The documents that the options name. Raises: ConfigError, DataError."""
    name = options.dataset_path
    found = find_named(name)
    path, config, split, rows, note = name, options.dataset_name, options.dataset_split, _rows(options), ""
    more: dict[str, Any] = {}
    if found is not None:
        for flag in ("messages_key", "chosen_key"):
            if (value := getattr(options, flag)) is not None:
                raise ConfigError(f"--{flag} {value} does not go with the dataset {name}, which reads its rows itself")
        path, config, rows = found.path, config or found.config, rows_of(name, found)
        split = found.split if split == "train" else split
        more = {"dataset": name}
        note = f"{name} is the registered dataset {path}{f', {config}' if config else ''}, split {split}"
    elif name in DATASETS:
        note = f"{name} is a local path here; the registered dataset of that name is not used"
    _check_kind(options, rows.kind)
    source = open_source(
        path,
        config=config,
        split=split,
        rows=rows,
        streaming=options.streaming,
        cache_dir=options.cache_dir,
        val_path=options.val_path,
        # The ends of files are not reached if the tokenization stops early; the hash holds out documents instead.
        val_fraction=0.0 if options.selects or options.max_tokens is not None else options.val_fraction,
    )
    if options.selects:
        source = SelectedSource(source, options.rule, options.max_samples, options.shuffle_buffer, options.seed)
    return Documents(source, rows.kind, {"split": split} | more, note)


def _rows(options: TokenizeOptions) -> RowReader:
    if options.messages_key is not None:
        return MessageRows(options.messages_key)
    if options.chosen_key is not None and options.rejected_key is not None:
        return PairRows(options.chosen_key, options.rejected_key, options.prompt_key)
    return TextRows(options.dataset_text_key, "--dataset_text_key")


def _check_kind(options: TokenizeOptions, kind: RowKind) -> None:
    given = {
        "--assistant_only": options.assistant_only,
        "--system_prompt": options.system_prompt,
        f"--chat_template {options.chat_template}": options.chat_template != "chatml",
    }
    if kind == "text" and (flag := next((flag for flag, value in given.items() if value), None)):
        raise ConfigError(f"{flag} needs dialogues, but the rows are texts; give --messages_key messages")
    if kind != "text" and options.min_chars:
        raise ConfigError(f"--min_chars {options.min_chars} is for texts, but the rows are {kind}; leave it out")
    if kind == "pairs" and options.block_size is None:
        raise ConfigError("pairs of answers become rows of one length; give --block_size 1024")


def load_tokenizer(options: TokenizeOptions) -> TextTokenizer:
    """The tokenizer that the options name. Raises: ConfigError, DataError."""
    if options.tokenizer_name is not None:
        return tokenizers.from_hub(options.tokenizer_name, options.cache_dir, options.trust_remote_code)
    if options.encoding_name is not None:
        return tokenizers.from_tiktoken(options.encoding_name)
    assert options.tokenizer_path is not None, "the options have exactly one tokenizer, and it is not to be trained"
    return tokenizers.from_file(Path(options.tokenizer_path))


def tokenizer_facts(tokenizer: TextTokenizer, options: TokenizeOptions) -> TokenizerFacts:
    """The manifest's record of ``tokenizer``. Raises: ConfigError if its ids do not fit the data type of the tokens, or if
    it lacks the end-of-text token."""
    largest = int(np.iinfo(options.dtype).max)
    if tokenizer.vocab_size > largest + 1:
        advice = "use --token_dtype uint32" + (" --file_format timl" if options.file_format == "llmc" else "")
        raise ConfigError(
            f"--{tokenizer.kind} {tokenizer.name} has ids up to {tokenizer.vocab_size - 1}, but the maximum of "
            f"--token_dtype {options.token_dtype} is {largest}; {advice}"
        )
    token = number = None
    if options.eot_position != "none":
        token, number = tokenizer.end_of_text(options.eot_token)
    made = (tokenizer.kind, tokenizer.name, tokenizer.sha256, tokenizer.vocab_size)
    return TokenizerFacts(*made, eot_id=number, eot_token=token, eot_position=options.eot_position)


def encoder_of(
    options: TokenizeOptions, kind: RowKind, tokenizer: TextTokenizer, facts: TokenizerFacts
) -> DocumentEncoder:
    """The encoder of documents of this ``kind``. Raises: ConfigError for a template or a token that the tokenizer does not
    have."""
    plain = PlainEncoder(tokenizer.encode, facts.eot_id, facts.eot_position, options.dtype)
    if kind == "text" and options.block_size is None:
        return plain
    where = f"--{tokenizer.kind} {tokenizer.name}"
    template = template_of(options.chat_template, tokenizer.chat_template, tokenizer.specials, tokenizer.named, where)
    row = None
    if options.block_size is not None:
        row = RowShape(options.block_size, _pad_id(options, tokenizer, facts))
    return RecordEncoder(
        plain.encode,
        plain.eot_id,
        plain.eot_position,
        plain.dtype,
        kind,
        tokenizer.specials,
        template,
        options.system_prompt,
        options.assistant_only,
        row,
    )


def _pad_id(options: TokenizeOptions, tokenizer: TextTokenizer, facts: TokenizerFacts) -> int:
    if options.pad_token is None:
        return facts.eot_id or 0
    found = tokenizer.token_id(options.pad_token)
    if found is None:
        known = ", ".join(list(tokenizer.specials)[:8]) or "a token that it has"
        raise ConfigError(
            f"--pad_token {options.pad_token} is not a token of --{tokenizer.kind} {tokenizer.name}; use {known}"
        )
    return found
