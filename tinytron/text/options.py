"""The options of the tokenizer pipeline, from which its command line is generated."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from tinytron.data.formats import MAX_TOKENS
from tinytron.errors import ConfigError
from tinytron.text.selection import DocumentRule
from tinytron.text.tokenizers import SMALLEST_BPE, Kind
from tinytron.utils.flags import Flag, Parser, add_flag, check_bounds, config_fields, parse_strictly

TOKENIZERS: tuple[Kind, ...] = ("tokenizer_name", "encoding_name", "tokenizer_path", "train_bpe", "train_chars")


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """Every option. Raises: ConfigError for values that break a rule.

    Flags with ``identity`` determine the tokens; the others only determine how and where they are made.
    """

    dataset_path: Annotated[
        str, Flag("file, folder or pattern of text, or name of a dataset, registered or on the hub", path=True)
    ] = ""
    dataset_name: Annotated[str | None, Flag("configuration of a dataset on the hub, such as sample-10BT")] = None
    dataset_split: Annotated[str, Flag("split of a dataset on the hub; also begins the names of the files")] = "train"
    dataset_text_key: Annotated[str, Flag("key of the text in a row")] = "text"
    messages_key: Annotated[
        str | None, Flag('rows are dialogues: key of the messages, [{"role": ..., "content": ...}, ...]')
    ] = None
    chosen_key: Annotated[str | None, Flag("rows are pairs of answers: key of the better one, a text or messages")] = (
        None
    )
    rejected_key: Annotated[str | None, Flag("key of the worse answer of a pair")] = None
    prompt_key: Annotated[str | None, Flag("key of what comes before both answers of a pair")] = None
    streaming: Annotated[bool, Flag("read a dataset on the hub row by row, without a copy on disk", identity=False)] = (
        False
    )
    cache_dir: Annotated[
        str | None, Flag("folder for datasets and tokenizers downloaded from the hub", identity=False, path=True)
    ] = None
    trust_remote_code: Annotated[bool, Flag("allow a tokenizer on the hub to run its own code", identity=False)] = False

    tokenizer_name: Annotated[str | None, Flag("tokenizer: name on the hub or folder", path=True)] = None
    encoding_name: Annotated[str | None, Flag("tokenizer: encoding of tiktoken, such as gpt2")] = None
    tokenizer_path: Annotated[str | None, Flag("tokenizer: a tokenizer.json file", path=True)] = None
    train_bpe: Annotated[
        int | None,
        Flag(
            "tokenizer: train byte-level BPE with a vocabulary of this size",
            at_least=SMALLEST_BPE,
            at_most=2**31,
            works="--train_bpe 4096",
        ),
    ] = None
    train_bpe_bytes: Annotated[
        int,
        Flag(
            "amount of text to train it on, from the start of the data",
            unit="bytes",
            at_least=1,
            at_most=2**63,
            works="--train_bpe_bytes 100000000",
        ),
    ] = 10**8
    train_chars: Annotated[bool, Flag("tokenizer: one token for each character of the text")] = False
    eot_token: Annotated[
        str | None,
        Flag("token that separates documents; default: the tokenizer's own, or a known one such as <eot>"),
    ] = None
    eot_position: Annotated[
        Literal["prepend", "append", "none"],
        Flag("put that token before (prepend) or after (append) every document, or leave it out"),
    ] = "prepend"

    min_chars: Annotated[
        int,
        Flag(
            "leave out documents with fewer characters, not counting surrounding white space",
            at_least=0,
            at_most=2**31,
            works="--min_chars 50",
        ),
    ] = 0
    max_samples: Annotated[
        int | None,
        Flag("number of documents to use; default: all", at_least=1, at_most=2**63, works="--max_samples 100000"),
    ] = None
    max_tokens: Annotated[
        int | None,
        Flag(
            "stop after the document that reaches this many tokens, counting all splits; default: all",
            at_least=1,
            at_most=2**63,
            works="--max_tokens 10**9",
        ),
    ] = None
    shuffle_buffer: Annotated[
        int,
        Flag(
            "shuffle the documents through a buffer of this size; 0: keep their order",
            unit="documents",
            at_least=0,
            at_most=2**31,
            works="--shuffle_buffer 10000",
        ),
    ] = 0
    seed: Annotated[int, Flag("seed of --shuffle_buffer")] = 0

    chat_template: Annotated[
        Literal["chatml", "tokenizer"], Flag("write dialogues in ChatML, or with the tokenizer's own template")
    ] = "chatml"
    system_prompt: Annotated[str | None, Flag("system message for dialogues that begin with none")] = None
    assistant_only: Annotated[bool, Flag("only the assistant's answers count in the loss")] = False
    block_size: Annotated[
        int | None,
        Flag(
            "make every document one row of this many tokens: its last ones, or filled up with padding",
            unit="tokens",
            at_least=2,
            at_most=2**24,
            works="--block_size 1024",
        ),
    ] = None
    pad_token: Annotated[str | None, Flag("token for that padding; default: the end-of-text token")] = None

    output_dir: Annotated[
        str | None, Flag("folder for the shards; default: data/<name of the data>", identity=False, path=True)
    ] = None
    split_name: Annotated[str | None, Flag("train or val, for the names of the files; default: --dataset_split")] = None
    token_dtype: Annotated[Literal["uint16", "uint32"], Flag("data type of a token; uint16 for up to 65536 ids")] = (
        "uint16"
    )
    file_format: Annotated[Literal["timl", "llmc"], Flag("header of the shards; llmc: the one llm.c reads")] = "timl"
    num_tokens_per_file: Annotated[
        int,
        Flag(
            "size of every shard but the last",
            unit="tokens",
            at_least=1,
            at_most=MAX_TOKENS,
            works="--num_tokens_per_file 2**27",
        ),
    ] = 2**27
    val_fraction: Annotated[
        float,
        Flag(
            "fraction of the documents that goes to val_*.bin, chosen by a hash of their text",
            at_least=0,
            at_most=0.5,
            works="--val_fraction 0.01",
        ),
    ] = 0.0
    val_path: Annotated[
        str | None, Flag("file, folder or pattern of text whose documents all go to val_*.bin", path=True)
    ] = None
    min_file_index: Annotated[
        int,
        Flag(
            "do not write shards before this one",
            identity=False,
            at_least=0,
            at_most=999_999,
            works="--min_file_index 0",
        ),
    ] = 0
    max_file_index: Annotated[
        int | None,
        Flag(
            "stop after this shard; a later run can continue",
            identity=False,
            at_least=0,
            at_most=999_999,
            works="--max_file_index 0",
        ),
    ] = None
    overwrite: Annotated[bool, Flag("first remove the shards in the output folder", identity=False)] = False

    num_proc: Annotated[
        int | None,
        Flag(
            "number of worker processes, 0: none; default: one less than the number of cores",
            identity=False,
            at_least=0,
            at_most=4096,
            works="--num_proc 1",
        ),
    ] = None
    chunksize: Annotated[
        int,
        Flag(
            "approximate number handed to a worker at a time",
            unit="documents",
            identity=False,
            at_least=1,
            at_most=2**31,
            works="--chunksize 4096",
        ),
    ] = 4096

    def __post_init__(self) -> None:
        if not self.dataset_path:
            raise ConfigError("--dataset_path is missing; give a file or folder of text, or a name on the hub")
        given = [f"--{name}" for name in self._named()]
        if len(given) != 1:
            found = f"{' and '.join(given)} are too many" if given else "no tokenizer given"
            raise ConfigError(f"{found}; give one of {', '.join(f'--{name}' for name in TOKENIZERS)}")
        if self.file_format == "llmc" and self.token_dtype != "uint16":
            raise ConfigError(
                f"--file_format llmc does not support --token_dtype {self.token_dtype}; use --file_format timl"
            )
        check_bounds(self)
        if self.max_file_index is not None and self.min_file_index > self.max_file_index:
            raise ConfigError(
                f"--min_file_index {self.min_file_index} must be in 0..{self.max_file_index}; use --min_file_index 0"
            )
        self._check_records()
        self._check_splits()

    def _check_records(self) -> None:
        pair = (self.chosen_key, self.rejected_key)
        if any(pair) and not all(pair):
            given, other = ("chosen", "rejected") if self.chosen_key else ("rejected", "chosen")
            raise ConfigError(
                f"--{given}_key {getattr(self, f'{given}_key')} needs --{other}_key, the key of the {other} answer; use "
                f"--{other}_key {other}"
            )
        if self.prompt_key and not any(pair):
            raise ConfigError(
                f"--prompt_key {self.prompt_key} is for pairs; give --chosen_key chosen --rejected_key rejected, too"
            )
        if self.messages_key and any(pair):
            raise ConfigError(f"--messages_key {self.messages_key} and --chosen_key exclude each other; leave one out")
        if self.pad_token is not None and self.block_size is None:
            raise ConfigError(f"--pad_token {self.pad_token} needs rows to fill up; add --block_size 1024")
        if self.num_tokens_per_file < (self.block_size or 1):
            raise ConfigError(
                f"--num_tokens_per_file {self.num_tokens_per_file} does not hold one row of --block_size "
                f"{self.block_size}; use --num_tokens_per_file {self.block_size}"
            )

    def _check_splits(self) -> None:
        if self.eot_position == "none" and self.eot_token is not None:
            raise ConfigError(f"--eot_token {self.eot_token} needs --eot_position prepend or append, not none")
        makers = {"--val_fraction": self.val_fraction, "--val_path": self.val_path}
        makers["--dataset_split val"] = self.split == "val"
        given = [name for name, value in makers.items() if value]
        if len(given) > 1:
            raise ConfigError(f"{given[0]} makes val_*.bin, and so does {given[1]}; leave one out")
        limits = {"--max_samples": self.max_samples is not None, "--max_tokens": self.max_tokens is not None}
        limits["--shuffle_buffer"] = self.selects
        if self.val_path is not None and (name := next((name for name, given in limits.items() if given), None)):
            raise ConfigError(f"{name} cannot be combined with --val_path; use --val_fraction, or leave one out")

    @property
    def kind(self) -> Kind:
        """The flag that names the tokenizer."""
        return self._named()[0]

    @property
    def trains(self) -> bool:
        """True if the tokenizer is trained on the text."""
        return self.kind in ("train_bpe", "train_chars")

    def _named(self) -> list[Kind]:
        """The flags that name a tokenizer; exactly one if the options are valid."""
        return [name for name in TOKENIZERS if getattr(self, name) is not None and getattr(self, name) is not False]

    @property
    def selects(self) -> bool:
        """True if documents are shuffled or counted, which one process does in their order."""
        return self.shuffle_buffer > 1 or self.max_samples is not None

    @property
    def split(self) -> str:
        """The beginning of the file names, with ``_`` for characters that do not belong in a name."""
        return re.sub(r"[^A-Za-z0-9.-]+", "_", self.split_name or self.dataset_split).strip("_") or "train"

    @property
    def rule(self) -> DocumentRule:
        """The rule that decides which documents are tokenized, and into which split."""
        return DocumentRule(self.split, self.val_fraction, self.min_chars)

    @property
    def weighted(self) -> bool:
        """True if every token gets a weight."""
        return self.block_size is not None or self.assistant_only

    @property
    def shard_size(self) -> int:
        """Number of tokens of every shard but the last: whole rows, if there are rows."""
        return self.num_tokens_per_file // (self.block_size or 1) * (self.block_size or 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a token."""
        return np.dtype(self.token_dtype).newbyteorder("<")

    @property
    def folder(self) -> Path:
        """The folder for the shards."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        name = Path(self.dataset_path).name.split(".")[0].strip("*?[]_- ") or "tokens"
        return Path("data") / (f"{name}_{self.dataset_name}" if self.dataset_name else name)

    @property
    def workers(self) -> int:
        """The number of worker processes."""
        if self.num_proc is not None:
            return self.num_proc
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores - 1)

    def command(self) -> str:
        """The shortest command that makes the same tokens, regardless of where and how."""
        words = ["tinytron", "tokenize"]
        for info in config_fields(type(self)):
            value = getattr(self, info.name)
            if info.flag.identity and value != info.default:
                words += [f"--{info.name}", str(value).lower() if isinstance(value, bool) else str(value)]
        return shlex.join(words)


# The heading of the flags that begin with this one, in --help-all.
_GROUPS = {
    "dataset_path": "text",
    "tokenizer_name": "tokenizer",
    "min_chars": "documents",
    "chat_template": "dialogues and rows",
    "output_dir": "shards",
    "num_proc": "processes",
}
COMMON = (
    *("dataset_path", "dataset_name", "streaming", "tokenizer_name", "encoding_name", "tokenizer_path", "train_bpe"),
    *("train_chars", "val_fraction", "output_dir", "num_proc"),
)


def build_parser(description: str | None = None, prog: str | None = None) -> argparse.ArgumentParser:
    """One flag per option. ``prog`` is the command's name (default: that of the script)."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s --dataset_path PATH --tokenizer_name NAME [--flag value ...]",
        description=description,
        common=COMMON,
    )
    group: argparse._ActionsContainer = parser
    for info in config_fields(TokenizeOptions):
        if info.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[info.name])
        add_flag(group, info)
    return parser


def parse_options(
    argv: Sequence[str] | None = None, description: str | None = None, prog: str | None = None
) -> TokenizeOptions:
    """The options of ``argv`` (default: the command line). Raises: ConfigError for unknown flags, naming the nearest, and
    for values that break a rule."""
    return TokenizeOptions(**vars(parse_strictly(build_parser(description, prog), argv)))
