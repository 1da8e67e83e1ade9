"""Pre-train on any Hugging Face dataset and tokenizer, or on your own text: how to give ``Trainer`` other data.

python pretrain_example.py --num_layer 4 ...                  fineweb-edu from the hub, tokenised by gpt2
python pretrain_example.py --dataset_path my_notes/ ...       a folder of .txt .md .py .jsonl .parquet files
python pretrain_example.py --dataset_path corpus.jsonl ...    one such file, or a quoted pattern of them
python pretrain_example.py --dataset_path shards/ ...         token shards (train_*.bin), as pretrain_debug.py

HF_DATASET_REPO    HuggingFaceFW/fineweb-edu   dataset on the hub, used when there is no --dataset_path
HF_DATASET_NAME                                its configuration, such as sample-10BT
HF_SPLIT           train                       its split
HF_TEXT_KEY        text                        key of the text in a row of a dataset, .jsonl or .parquet file
HF_TOKENIZER       gpt2                        name on the hub, local folder, or tokenizer.json file
HF_MAX_SAMPLES     200000                      take this many documents; 0: all
HF_MIN_CHARS       50                          leave out shorter documents
HF_ADD_EOS_TOKEN   1                           end every document with the tokenizer's end-of-text token; 0: do not
HF_SHUFFLE_BUFFER  0                           shuffle the documents through a buffer of this many (by --seed)
HF_CACHE_DIR       ./data/prepared             where token shards are kept, so that the second run starts at once

One process of each node streams the documents into token shards; then all ranks read the shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tinytron.cli import entry
from tinytron.data import documents, prepare
from tinytron.distributed.agreement import together
from tinytron.errors import ConfigError
from tinytron.text import sources
from tinytron.text.tokenizers import END_TOKENS, load_hub_tokenizer
from tinytron.training import Config, Trainer, build_config, parse_args
from tinytron.training.arguments import show_config
from tinytron.training.dry_run import dry_run


class ExampleTrainer(Trainer):
    """Turns text into token shards, and leaves the rest to the built-in data path."""

    def _init_dataset(self, config: Config) -> None:
        # An override may as well just set self.train_dataset (and self.val_dataset, if there is one): a torch Dataset
        # with a length, whose items are rows of seq_len + 1 token ids or {"input_ids": ..., "labels": ...}.
        path, world = config.data.dataset_path, self.state.groups["world"]
        builtin = together(lambda: config.data.use_mock_data or has_token_shards(path), world)
        prepare.require_same(
            builtin, world, f"--dataset_path {path} has train_*.bin on some nodes only; copy them to all"
        )
        if builtin:
            return super()._init_dataset(config)

        recipe, folder = together(lambda: plan(config), world)
        leader = os.environ.get("LOCAL_RANK", "0") == "0"
        facts = prepare.prepare_together(folder, lambda f: write_shards(recipe, f, config), world, leader=leader)
        check_vocabulary(facts["vocab_size"], recipe, config)  # shards of an earlier run may be for a larger model
        self._say(f"{facts['documents']:,} documents, {facts['tokens']:,} tokens: {folder}")
        super()._init_dataset(replace(config, data=replace(config.data, dataset_path=str(folder))))


def variable(name: str, default: str) -> Any:
    """A dataclass field that reads the environment variable ``name``; empty counts as unset."""
    return field(default_factory=lambda: os.environ.get(name) or default)


def number(name: str, default: int, highest: int | None = None) -> Any:
    """The same for a whole number. Raises: ConfigError."""

    def read() -> int:
        text = os.environ.get(name) or str(default)
        if not text.isdecimal() or (highest is not None and int(text) > highest):
            rule = "a whole number" if highest is None else f"a whole number up to {highest}"
            raise ConfigError(f"environment variable {name}={text!r} must be {rule}; use {name}={default}")
        return int(text)

    return field(default_factory=read)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the tokens."""

    files: list[Path]  # none: the dataset on the hub
    seed: int
    repo: str = variable("HF_DATASET_REPO", "HuggingFaceFW/fineweb-edu")
    name: str = variable("HF_DATASET_NAME", "")
    split: str = variable("HF_SPLIT", "train")
    text_key: str = variable("HF_TEXT_KEY", "text")
    tokenizer: str = variable("HF_TOKENIZER", "gpt2")
    max_samples: int = number("HF_MAX_SAMPLES", 200_000)
    min_chars: int = number("HF_MIN_CHARS", 50)
    add_eos_token: int = number("HF_ADD_EOS_TOKEN", 1, highest=1)
    shuffle_buffer: int = number("HF_SHUFFLE_BUFFER", 0)

    def as_dict(self) -> dict[str, Any]:
        """The recipe in plain values: local files by path, size and time, what is on the hub by its name."""
        hub = [self.repo, self.name, self.split, prepare.file_states([Path(self.repo)])]
        return {
            "format": 2,  # of the code below: count it up when the same recipe gives other tokens
            "source": prepare.file_states(self.files) or hub,
            "tokenizer": [self.tokenizer, prepare.file_states([Path(self.tokenizer)])],
            "options": [self.text_key, self.max_samples, self.min_chars, self.add_eos_token],
            "shuffle": [self.shuffle_buffer, self.seed] if self.shuffle_buffer else None,
        }


def plan(config: Config) -> tuple[Recipe, Path]:
    """What to make, and in which folder."""
    path = config.data.dataset_path
    recipe = Recipe(files=documents.find_text_files(path) if path else [], seed=config.seed.seed)
    cache = os.environ.get("HF_CACHE_DIR") or "./data/prepared"
    return recipe, Path(cache) / prepare.recipe_hash(recipe.as_dict())


def has_token_shards(path: str | None) -> bool:
    """Whether the built-in data path can read ``path``."""
    return bool(path) and (str(path).endswith(".bin") or any(Path(str(path)).glob("train_*.bin")))


def write_shards(recipe: Recipe, folder: Path, config: Config) -> dict[str, Any]:
    """Documents -> texts -> token ids -> shards in ``folder``; returns what to remember of them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said, so that loader workers do not warn when they fork
    tokenizer = load_hub_tokenizer(recipe.tokenizer, option="HF_TOKENIZER=")
    ids = tokenizer.get_vocab()
    vocab_size = 1 + max(ids.values())
    check_vocabulary(vocab_size, recipe, config)
    end = []
    if recipe.add_eos_token:
        end = [ids[name] for name in (tokenizer.eos_token, *END_TOKENS) if name in ids][:1]
        if not end:
            raise ConfigError(f"HF_TOKENIZER={recipe.tokenizer} has no end-of-text token; use HF_ADD_EOS_TOKEN=0")

    def encode(texts: list[str]) -> list[list[int]]:
        made = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = made["input_ids"]
        return ids

    texts = documents.long_enough(read_texts(recipe), recipe.min_chars, "HF_MIN_CHARS=")
    texts = documents.shuffled(texts, recipe.shuffle_buffer, recipe.seed)
    texts = islice(texts, recipe.max_samples or None)
    tokens = prepare.with_progress(documents.tokenised(texts, encode, end))
    written = prepare.write_token_shards(tokens, folder, dtype=prepare.token_dtype(vocab_size))
    return {"recipe": recipe.as_dict(), "vocab_size": vocab_size, **written._asdict()}


def read_texts(recipe: Recipe) -> Iterator[str]:
    """The text of every document."""
    if recipe.files:
        return sources.read_texts(recipe.files, recipe.text_key, "HF_TEXT_KEY")
    where = f"HF_DATASET_REPO={recipe.repo} HF_DATASET_NAME={recipe.name} HF_SPLIT={recipe.split}"
    advice = "check the names and the network, or give --dataset_path a file or folder"
    rows = documents.stream_rows(where, recipe.repo, recipe.name or None, split=recipe.split, advice=advice)
    return documents.texts_of(rows, recipe.text_key, where, "HF_TEXT_KEY")


def check_vocabulary(needed: int, recipe: Recipe, config: Config) -> None:
    """Raises: ConfigError if the model has no embedding for some of the tokenizer's ids."""
    if needed > config.model.vocab_size:
        raise ConfigError(
            f"--vocab_size {config.model.vocab_size} is less than the {needed} of HF_TOKENIZER={recipe.tokenizer}; "
            f"use --vocab_size {-(-needed // 64) * 64}"
        )


def main() -> None:
    """Flags -> configuration -> trainer -> training, as in pretrain_debug.py."""
    config = build_config(parse_args())
    if config.logging.print_config:
        print(show_config(config))
        return
    if config.logging.dry_run:
        dry_run(config)
        return
    ExampleTrainer(config).train()


if __name__ == "__main__":
    entry.run(main)
