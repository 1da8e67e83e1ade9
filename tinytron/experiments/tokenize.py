"""Token shards out of text."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from tinytron.config import field
from tinytron.errors import ConfigError
from tinytron.job import BasicJob
from tinytron.jobs.aliases import Alias
from tinytron.registry import job
from tinytron.text.options import TokenizeOptions
from tinytron.text.tokenize import load_tokenizer, tokenize_dataset
from tinytron.utils.signals import StopRequest


@dataclass
class TokenizeConfig:
    """The options of the tokenizing jobs. ``None`` and -1 mean: no limit."""

    name: str = field("data/name", help="file, folder or pattern of text, or name of a data set on the hub")
    config: str | None = field("data/config", default=None, help="configuration of a data set on the hub")
    split: str = field("data/split", default="train", help="split of a data set on the hub")
    text_key: str = field("data/text_key", default="text", help="key of the text in a row")
    suffix: str = field("data/suffix", default="", help="the shards go to OUT/data/<name>[_<suffix>]")
    max_samples: int | None = field("data/max_samples", default=None, help="take this many documents; default: all")
    val_pct: float = field("data/val_pct", default=0.05, help="part of the documents that is held out")
    seed: int = field("data/seed", default=2357, help="seed of the order of documents, if they are shuffled")
    shuffle_buffer: int = field(
        "data/shuffle_buffer", default=0, help="shuffle through a buffer of this many documents"
    )
    streaming: bool = field("data/streaming", default=True, help="read a data set on the hub without a copy on disk")
    backend: str = field("tokenizer/backend", default="tiktoken", help="tiktoken, huggingface, or train_bpe: train one")
    tokenizer: str = field(
        "tokenizer/name", default="cl100k_base", help="encoding, name or folder; for train_bpe the size"
    )
    num_proc: int = field("system/num_proc", default=8, help="worker processes")


@job("data/tokenize_variable_dataset")
class TokenizeVariableDataset(BasicJob):
    """Turn documents into token shards, one after another."""

    CONFIG = TokenizeConfig
    ALIASES = MappingProxyType({"data.dataset": Alias("data.name")})

    def folder_of_shards(self) -> Path:
        """Where the shards go."""
        name = Path(self.config.name).name.split(".")[0].strip("*?[]_- ") or "tokens"
        return Path(self.spec.root) / "data" / (f"{name}_{self.config.suffix}" if self.config.suffix else name)

    def run(self) -> None:
        """Tokenize what is not tokenized yet."""
        config = self.config
        backends = {"tiktoken": "encoding_name", "huggingface": "tokenizer_name", "train_bpe": "train_bpe"}
        if config.backend not in backends:
            raise ConfigError(f"tokenizer.backend={config.backend} must be one of {', '.join(backends)}")
        name = config.tokenizer
        if config.backend == "train_bpe":
            if not name.isdecimal():
                raise ConfigError(f"tokenizer.name={name} must be the size of the vocabulary, such as 4096")
            tokenizer: dict[str, object] = {"train_bpe": int(name)}
        else:
            tokenizer = {backends[config.backend]: name}
        samples = config.max_samples if config.max_samples != -1 else None
        options = TokenizeOptions(
            dataset_path=config.name,
            dataset_name=config.config,
            dataset_split=config.split,
            dataset_text_key=config.text_key,
            split_name="train",
            streaming=config.streaming,
            eot_position="append",
            max_samples=samples,
            val_fraction=config.val_pct,
            shuffle_buffer=config.shuffle_buffer,
            seed=config.seed,
            num_proc=config.num_proc,
            output_dir=str(self.folder_of_shards()),
            **tokenizer,  # type: ignore[arg-type]
        )
        loaded = None if options.trains else load_tokenizer(options)
        if (loaded.vocab_size if loaded is not None else options.train_bpe or 0) > 2**16:
            options = replace(options, token_dtype="uint32")
        stop = StopRequest()
        with stop.listening():
            outcome = tokenize_dataset(options, stop, tokenizer=loaded, repair=True)
        if outcome.manifest is None:
            print(f"stopped by {signal.Signals(outcome.received).name}; the same command continues where it was")
            raise SystemExit(128 + outcome.received)
        print(f"token shards: {outcome.folder}", flush=True)
