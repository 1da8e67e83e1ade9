"""Jobs that turn text into token shards."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from tinytron.config import field
from tinytron.errors import ConfigError
from tinytron.job import BasicJob
from tinytron.jobs.aliases import Alias
from tinytron.jobs.places import folder_of_shards
from tinytron.registry import job
from tinytron.text.inputs import documents_of, load_tokenizer
from tinytron.text.named import find_named
from tinytron.text.options import TokenizeOptions
from tinytron.text.tokenize import tokenize_dataset
from tinytron.utils.signals import StopRequest


@dataclass
class DataConfig:
    """The options of all tokenizing jobs. ``max_samples`` and ``max_tokens`` are unlimited if they are None or -1."""

    name: str = field(
        "data/name", help="text file, folder or pattern, name of a registered dataset, or of a dataset on the hub"
    )
    config: str | None = field("data/config", default=None, help="configuration of a hub dataset")
    split: str = field("data/split", default="train", help="split of a hub dataset")
    suffix: str = field("data/suffix", default="", help="added to the folder of the shards: OUT/data/<name>_<suffix>")
    max_samples: int | None = field("data/max_samples", default=None, help="number of documents to use; default: all")
    max_tokens: int | None = field("data/max_tokens", default=None, help="stop after this many tokens; default: all")
    val_pct: float = field("data/val_pct", default=0.05, help="fraction of the documents to hold out")
    seed: int = field("data/seed", default=2357, help="seed for shuffling the documents")
    shuffle_buffer: int = field(
        "data/shuffle_buffer", default=0, help="shuffle the documents through a buffer of this size"
    )
    streaming: bool = field("data/streaming", default=True, help="stream a hub dataset instead of downloading it first")
    chat_template: Literal["chatml", "tokenizer"] = field(
        "data/chat_template", default="chatml", help="write dialogues in ChatML, or with the tokenizer's own template"
    )
    system_prompt: str | None = field(
        "data/system_prompt", default=None, help="system message for dialogues that begin with none"
    )
    assistant_only: bool = field(
        "data/assistant_only", default=False, help="only the assistant's answers count in the loss"
    )
    backend: str = field(
        "tokenizer/backend", default="tiktoken", help="tiktoken, huggingface, file, or train_bpe to train one"
    )
    tokenizer: str = field(
        "tokenizer/name",
        default="cl100k_base",
        help="encoding, name, folder or tokenizer.json; for train_bpe, the vocabulary size",
    )
    num_proc: int = field("system/num_proc", default=8, help="number of worker processes")


@dataclass
class TextConfig(DataConfig):
    """The keys of texts and dialogues in a row."""

    text_key: str = field("data/text_key", default="text", help="key of the text in a row")
    messages_key: str | None = field(
        "data/messages_key", default=None, help="rows are dialogues: key of the messages, a list of role and content"
    )


@dataclass
class RowConfig:
    """The form of rows of one length."""

    block_size: int = field("architecture/block_size", default=512, help="number of tokens of a row")
    pad_token: str | None = field(
        "data/pad_token", default=None, help="token that fills rows up; default: the end-of-text token"
    )


@dataclass
class BlockwiseConfig(TextConfig, RowConfig):
    """The options of ``data/tokenize_blockwise_dataset``."""


@dataclass
class ContrastiveConfig(DataConfig, RowConfig):
    """The options of ``data/tokenize_contrastive_dataset``."""

    chosen_key: str = field("data/chosen_key", default="chosen", help="key of the better answer, a text or messages")
    rejected_key: str = field("data/rejected_key", default="rejected", help="key of the worse answer")
    prompt_key: str | None = field("data/prompt_key", default=None, help="key of what comes before both answers")


class TokenizeJob(BasicJob):
    """Turns documents into the token shards of a folder. The dataclass ``CONFIG`` has its options; fields of
    ``TokenizeOptions`` among them are passed on under their names."""

    ALIASES = MappingProxyType({"data.dataset": Alias("data.name")})
    PAIRS: ClassVar[bool] = False

    def folder_of_shards(self) -> Path:
        """The folder for the shards."""
        return folder_of_shards(Path(self.spec.root), self.config.name, self.config.suffix)

    def options_of_pipeline(self) -> TokenizeOptions:
        """The options of the tokenizer pipeline. Raises: ConfigError."""
        config = self.config
        samples, tokens = (None if limit == -1 else limit for limit in (config.max_samples, config.max_tokens))
        names = ["chat_template", "system_prompt", "assistant_only", "seed", "shuffle_buffer", "streaming", "num_proc"]
        names += ["block_size", "pad_token"]
        if find_named(config.name) is None:  # a registered dataset reads its rows itself
            names += ["messages_key", "chosen_key", "rejected_key", "prompt_key"]
        given: dict[str, Any] = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return TokenizeOptions(
            dataset_path=config.name,
            dataset_name=config.config,
            dataset_split=config.split,
            dataset_text_key=getattr(config, "text_key", "text"),
            split_name="train",
            eot_position="append",
            max_samples=samples,
            max_tokens=tokens,
            val_fraction=config.val_pct,
            output_dir=str(self.folder_of_shards()),
            **self._tokenizer(),
            **given,
        )

    def _tokenizer(self) -> dict[str, Any]:
        backend, name = self.config.backend, self.config.tokenizer
        backends = {"tiktoken": "encoding_name", "huggingface": "tokenizer_name", "file": "tokenizer_path"}
        if backend == "train_bpe":
            if not name.isdecimal():
                raise ConfigError(f"tokenizer.name={name} must be a vocabulary size, such as 4096")
            return {"train_bpe": int(name)}
        if backend not in backends:
            raise ConfigError(f"tokenizer.backend={backend} must be one of {', '.join(backends)}, train_bpe")
        return {backends[backend]: name}

    def check(self) -> None:
        """Check the options, and that the kind of a registered dataset is the job's. Raises: ConfigError."""
        self.options_of_pipeline()
        found = find_named(self.config.name)
        if found is not None and (found.kind == "pairs") != self.PAIRS:
            other = "contrastive" if found.kind == "pairs" else "variable"
            raise ConfigError(
                f"data.name={self.config.name} is a dataset of {found.kind}; use the job data/tokenize_{other}_dataset"
            )

    def run(self) -> None:
        """Tokenize the documents that are not tokenized yet."""
        options = self.options_of_pipeline()
        documents_of(options)  # raises before the tokenizer is loaded
        loaded = None if options.trains else load_tokenizer(options)
        if (loaded.vocab_size if loaded is not None else options.train_bpe or 0) > 2**16:
            options = replace(options, token_dtype="uint32")
        stop = StopRequest()
        with stop.listening():
            outcome = tokenize_dataset(options, stop, tokenizer=loaded, repair=True)
        if outcome.manifest is None:
            print(f"stopped by {signal.Signals(outcome.received).name}; run the same command again to resume")
            raise SystemExit(128 + outcome.received)
        print(f"token shards: {outcome.folder}", flush=True)


@job("data/tokenize_variable_dataset")
class TokenizeVariableDataset(TokenizeJob):
    """Turn documents into token shards, one after another."""

    CONFIG = TextConfig


@job("data/tokenize_blockwise_dataset")
class TokenizeBlockwiseDataset(TokenizeJob):
    """Turn documents into token shards, each into one row of architecture.block_size tokens."""

    CONFIG = BlockwiseConfig


@job("data/tokenize_contrastive_dataset")
class TokenizeContrastiveDataset(TokenizeJob):
    """Turn pairs of a better and a worse answer into token shards of paired rows."""

    CONFIG = ContrastiveConfig
    DEFAULTS = MappingProxyType({"data.assistant_only": True})
    PAIRS = True
