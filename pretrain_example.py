"""Pre-train on any Hugging Face dataset and tokenizer, or on your own text: how to give ``Trainer`` other data.

python pretrain_example.py --num_layer 4 ...                  fineweb-edu from the hub, tokenized by gpt2
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

One process of each node turns the documents into token shards, as scripts/tokenize_dataset.py does; then all ranks read the
shards. Interrupted? The same command continues.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tinytron.cli import entry, pretrain
from tinytron.data.manifest import read_manifest
from tinytron.data.shards import split_of
from tinytron.distributed.agreement import agree, agree_slowly, require_same
from tinytron.errors import ConfigError, DataError, TinytronError
from tinytron.text.inputs import load_tokenizer
from tinytron.text.options import TokenizeOptions
from tinytron.text.sources import file_states, find_text_files
from tinytron.text.state import recipe_hash
from tinytron.text.tokenize import finished, tokenize_dataset
from tinytron.training import Config, Trainer
from tinytron.training.world import first_on_node
from tinytron.utils.paths import expanded

MARKER = "prepared.json"  # in folders of earlier versions, which have no manifest


class ExampleTrainer(Trainer):
    """Turns text into token shards, and leaves the rest to the built-in data path."""

    def _init_dataset(self, config: Config) -> None:
        # An override may as well just set self.train_dataset (and self.val_dataset, if there is one): a torch Dataset
        # with a length, whose items are rows of seq_len + 1 token ids or {"input_ids": ..., "labels": ...}.
        path, world = config.data.dataset_path, self.state.groups["world"]
        builtin = agree(lambda: config.data.use_mock_data or has_token_shards(path), world)
        require_same(builtin, world, f"--dataset_path {path} has train_*.bin on some nodes only; copy them to all")
        if builtin:
            return super()._init_dataset(config)

        recipe, folder = agree(lambda: plan(config), world)
        agree_slowly(lambda: write_shards(recipe, folder, config) if first_on_node() else None, world)
        facts = agree(lambda: facts_of(folder), world)
        check_vocabulary(facts["vocab_size"], recipe, config)  # shards of an earlier run may be for a larger model
        self._say(f"{facts['documents']:,} documents, {facts['tokens']:,} tokens: {folder}")
        super()._init_dataset(replace(config, data=replace(config.data, dataset_path=str(folder))))


def variable(name: str, default: str) -> Any:
    """A dataclass field that reads the environment variable ``name``; empty counts as unset."""
    return field(default_factory=lambda: expanded(os.environ.get(name) or default))


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
    """Everything that decides the tokens."""

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
        hub = [self.repo, self.name, self.split, file_states([Path(self.repo)])]
        return {
            "format": 2,  # of the code below: count it up when the same recipe gives other tokens
            "source": file_states(self.files) or hub,
            "tokenizer": [self.tokenizer, file_states([Path(self.tokenizer)])],
            "options": [self.text_key, self.max_samples, self.min_chars, self.add_eos_token],
            "shuffle": [self.shuffle_buffer, self.seed] if self.shuffle_buffer else None,
        }

    def options(self, path: str | None, folder: Path) -> TokenizeOptions:
        """The flags of scripts/tokenize_dataset.py that make the same shards."""
        tokenizer = "tokenizer_path" if Path(self.tokenizer).is_file() else "tokenizer_name"
        source: dict[str, Any] = {"dataset_path": path}
        if not self.files:
            in_a_folder = "default" if Path(self.repo).is_dir() else None  # so that it is read as a dataset
            source = {"dataset_path": self.repo, "dataset_name": self.name or in_a_folder}
            source |= {"dataset_split": self.split, "streaming": True}
        return TokenizeOptions(
            **source,
            **{tokenizer: self.tokenizer},
            dataset_text_key=self.text_key,
            max_samples=self.max_samples or None,
            min_chars=max(1, self.min_chars),
            shuffle_buffer=self.shuffle_buffer,
            seed=self.seed,
            eot_position="append" if self.add_eos_token else "none",
            split_name="train",
            output_dir=str(folder),
            num_proc=0,
        )

    def renamed(self, text: str) -> str:
        """An error of the tokenizer pipeline with our variables for its flags."""
        names = {
            "--dataset_text_key": "HF_TEXT_KEY",
            "--min_chars ": "HF_MIN_CHARS=",
            "--tokenizer_path ": "HF_TOKENIZER=",
        }
        names |= {"--tokenizer_name ": "HF_TOKENIZER=", "--eot_position none": "HF_ADD_EOS_TOKEN=0"}
        if not self.files:
            names |= {"--dataset_path ": "HF_DATASET_REPO=", "--dataset_name ": "HF_DATASET_NAME="}
            names |= {"--dataset_split ": "HF_SPLIT="}
        for flag, name in names.items():
            text = text.replace(flag, name)
        return text


def plan(config: Config) -> tuple[Recipe, Path]:
    """The recipe, and the folder of its shards."""
    path = config.data.dataset_path
    recipe = Recipe(files=find_text_files(path) if path else [], seed=config.seed.seed)
    cache = expanded(os.environ.get("HF_CACHE_DIR") or "./data/prepared")
    return recipe, Path(cache) / recipe_hash(recipe.as_dict())


def has_token_shards(path: str | None) -> bool:
    """Whether the built-in data path can read ``path``."""
    if not path or path.endswith(".bin"):
        return bool(path)
    return any(split_of(file.name) == "train" for file in Path(path).glob("*.bin"))


def write_shards(recipe: Recipe, folder: Path, config: Config) -> None:
    """Fill ``folder`` with token shards, unless an earlier run has done so. One process at a time."""
    if finished(folder) is not None or (folder / MARKER).exists():
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said, so that loader workers do not warn when they fork
    options = recipe.options(config.data.dataset_path, folder)
    try:
        tokenizer = load_tokenizer(options)
        check_vocabulary(tokenizer.vocab_size, recipe, config)
        if tokenizer.vocab_size > 2**16:
            options = replace(options, token_dtype="uint32")
        outcome = tokenize_dataset(options, say=say, tokenizer=tokenizer, repair=True)
    except TinytronError as error:
        raise type(error)(recipe.renamed(str(error))) from error
    if outcome.fresh:
        facts = facts_of(folder)
        say(f"prepared {facts['documents']:,} documents, {facts['tokens']:,} tokens")


def say(text: str) -> None:
    """Progress."""
    print(text, flush=True)


def facts_of(folder: Path) -> dict[str, int]:
    """Documents, tokens and vocabulary of finished shards. Raises: DataError if this process does not see them."""
    if (manifest := read_manifest(folder)) is not None:
        counts = {"documents": manifest.documents["train"], "tokens": manifest.tokens["train"]}
        return counts | {"vocab_size": manifest.tokenizer.vocab_size}
    if (folder / MARKER).exists():
        facts: dict[str, int] = json.loads((folder / MARKER).read_text())
        return facts
    raise DataError(f"{folder}: not prepared as seen from every process; use a folder that they all see")


def check_vocabulary(needed: int, recipe: Recipe, config: Config) -> None:
    """Raises: ConfigError if the model has no embedding for some of the tokenizer's ids."""
    if needed > config.model.vocab_size:
        raise ConfigError(
            f"--vocab_size {config.model.vocab_size} is less than the {needed} of HF_TOKENIZER={recipe.tokenizer}; "
            f"use --vocab_size {-(-needed // 64) * 64}"
        )


if __name__ == "__main__":
    entry.run(lambda: pretrain.main(trainer=ExampleTrainer))
