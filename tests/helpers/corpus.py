"""Texts, tokenizers and a pipeline too simple to be wrong, for tests of the real one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinytron.data.formats import open_shard
from tinytron.text.options import TokenizeOptions, parse_options
from tinytron.text.rows import TextRows
from tinytron.text.sources import FileSource
from tinytron.text.tokenize import Outcome, tokenize_dataset
from tinytron.text.worker_pool import WORKER

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests fork; before the first use
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, here or in a process started from here

EOT = "<|endoftext|>"
WORDS = "the quick brown fox jumps over a lazy dog and sleeps all day, says 42 naïve 猫s 🙂".split()  # noqa: SIM905


def make_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Different texts of different lengths; one spells the end-of-text token, two are the same."""
    chance = random.Random(seed)
    texts = [f"{i} " + " ".join(chance.choices(WORDS, k=chance.randrange(1, longest))) for i in range(count)]
    texts[1] += f" {EOT} and on"
    texts[-1] = texts[2]
    return texts


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """One row per text."""
    rows = [json.dumps({"id": i, key: text}) for i, text in enumerate(texts)]
    path.write_text("".join(row + "\n" for row in rows))
    return path


def make_tokenizer(path: Path, special: tuple[str, ...] = (EOT,)) -> Path:
    """A tokenizer.json of 400 tokens, whose template adds the first special token, and which cuts texts off: what
    tokenizing must not do."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(50), trainer)
    if special:
        template = [(special[0], tokenizer.token_to_id(special[0]))]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=template
        )
    tokenizer.enable_truncation(7)
    tokenizer.save(str(path))
    return path


class Naive:
    """What the shards should hold, document by document."""

    def __init__(self, tokenizer: Path, position: str = "prepend", eot: str = EOT) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer))
        self.tokenizer.no_truncation()
        self.eot: int = self.tokenizer.token_to_id(eot)
        self.tokenizer.encode_special_tokens = True
        self.position = position

    def documents(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each."""
        made = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts if text]
        if self.position == "none":
            return made
        return [[self.eot, *ids] if self.position == "prepend" else [*ids, self.eot] for ids in made]

    def tokens(self, texts: list[str]) -> list[int]:
        """All in a row."""
        return [token for ids in self.documents(texts) for token in ids]


def read_texts(files: Iterable[Path], text_key: str = "text", option: str = "the text key") -> Iterator[str]:
    """The documents of ``files``, one after another."""
    source = FileSource(list(files), TextRows(text_key, option))
    for chunk in source.chunks(1024):
        yield from source.read(chunk)


def options(path: object, tokenizer: object, out: Path, *flags: object) -> TokenizeOptions:
    """From a command line, with small shards and no workers unless ``flags`` say otherwise."""
    argv = ["--dataset_path", path, "--output_dir", out, "--num_proc", 0, "--num_tokens_per_file", 500]
    argv += ["--tokenizer_path", tokenizer] if tokenizer is not None else []
    return parse_options([str(word) for word in (*argv, "--chunksize", 7, *flags)])


def tokenize(path: object, tokenizer: object, out: Path, *flags: object, **more: Any) -> Outcome:
    """``tokenize_dataset`` with ``options``."""
    return tokenize_dataset(options(path, tokenizer, out, *flags), **more)


def tokens_of(folder: Path, split: str = "train") -> list[int]:
    """Those of all timl shards of a split."""
    return [token for path in sorted(folder.glob(f"{split}_*.bin")) for token in open_shard(path).tolist()]


def starts_of(folder: Path, split: str = "train") -> list[int]:
    """Where documents begin, counted through all shards of a split."""
    starts, before = list[int](), 0
    for path in sorted(folder.glob(f"{split}_*.bin")):
        mine = open_shard(path.with_suffix(".docs"))
        assert mine.dtype == np.uint32
        assert all(mine < len(open_shard(path)))
        starts += [before + int(start) for start in mine]
        before += len(open_shard(path))
    return starts


def contents(folder: Path) -> dict[str, str]:
    """Every file but the lock, by its hash."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix != ".lock"}


def workers() -> list[Any]:
    """The processes of worker pools."""
    return [process for process in multiprocessing.active_children() if process.name == WORKER]
