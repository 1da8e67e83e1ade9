"""Jobs that turn text into token shards."""

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
    """The options of the tokenizing jobs. ``max_samples`` and ``max_tokens`` are unlimited if they are None or -1."""

    name: str = field("data/name", help="text file, folder or pattern, or the name of a hub dataset")
    config: str | None = field("data/config", default=None, help="configuration of a hub dataset")
    split: str = field("data/split", default="train", help="split of a hub dataset")
    text_key: str = field("data/text_key", default="text", help="key of the text in a row")
    suffix: str = field("data/suffix", default="", help="added to the folder of the shards: OUT/data/<name>_<suffix>")
    max_samples: int | None = field("data/max_samples", default=None, help="number of documents to use; default: all")
    max_tokens: int | None = field("data/max_tokens", default=None, help="stop after this many tokens; default: all")
    val_pct: float = field("data/val_pct", default=0.05, help="fraction of the documents to hold out")
    seed: int = field("data/seed", default=2357, help="seed for shuffling the documents")
    shuffle_buffer: int = field(
        "data/shuffle_buffer", default=0, help="shuffle the documents through a buffer of this size"
    )
    streaming: bool = field("data/streaming", default=True, help="stream a hub dataset instead of downloading it first")
    backend: str = field(
        "tokenizer/backend", default="tiktoken", help="tiktoken, huggingface, or train_bpe to train one"
    )
    tokenizer: str = field(
        "tokenizer/name", default="cl100k_base", help="encoding, name or folder; for train_bpe, the vocabulary size"
    )
    num_proc: int = field("system/num_proc", default=8, help="number of worker processes")


@job("data/tokenize_variable_dataset")
class TokenizeVariableDataset(BasicJob):
    """Turn documents into token shards, one after another."""

    CONFIG = TokenizeConfig
    ALIASES = MappingProxyType({"data.dataset": Alias("data.name")})

    def folder_of_shards(self) -> Path:
        """The folder for the shards."""
        name = Path(self.config.name).name.split(".")[0].strip("*?[]_- ") or "tokens"
        return Path(self.spec.root) / "data" / (f"{name}_{self.config.suffix}" if self.config.suffix else name)

    def run(self) -> None:
        """Tokenize the documents that are not tokenized yet."""
        config = self.config
        backends = {"tiktoken": "encoding_name", "huggingface": "tokenizer_name", "train_bpe": "train_bpe"}
        if config.backend not in backends:
            raise ConfigError(f"tokenizer.backend={config.backend} must be one of {', '.join(backends)}")
        name = config.tokenizer
        if config.backend == "train_bpe":
            if not name.isdecimal():
                raise ConfigError(f"tokenizer.name={name} must be a vocabulary size, such as 4096")
            tokenizer: dict[str, object] = {"train_bpe": int(name)}
        else:
            tokenizer = {backends[config.backend]: name}
        samples, tokens = (None if limit == -1 else limit for limit in (config.max_samples, config.max_tokens))
        options = TokenizeOptions(
            dataset_path=config.name,
            dataset_name=config.config,
            dataset_split=config.split,
            dataset_text_key=config.text_key,
            split_name="train",
            streaming=config.streaming,
            eot_position="append",
            max_samples=samples,
            max_tokens=tokens,
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
            print(f"stopped by {signal.Signals(outcome.received).name}; run the same command again to resume")
            raise SystemExit(128 + outcome.received)
        print(f"token shards: {outcome.folder}", flush=True)
