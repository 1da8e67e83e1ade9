"""Progress of a tokenization, in one file with a record of its inputs, so that no other inputs can continue it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytron.data.manifest import Manifest, TokenizerFacts
from tinytron.errors import DataError
from tinytron.text.options import TokenizeOptions
from tinytron.text.sources import START, Place, files_in_brief
from tinytron.text.token_writer import SplitWriter
from tinytron.utils.training import write_atomically

STATE = "tokenize.state"
VERSION = 1
Recipe = dict[str, Any]


@dataclass(frozen=True)
class State:
    """A state as read from its file: the ``recipe``, the place in the source, how much of it is done (in its unit), the
    number of documents left out, and the states of the splits' writers."""

    recipe: Recipe
    place: Place
    done: int
    empty: int
    splits: dict[str, Any]
    content: bytes

    def restore(self, writers: Mapping[str, SplitWriter]) -> None:
        """Set the writers to the saved states. Raises: DataError if a shard is missing."""
        offset = 0
        for split, writer in writers.items():
            offset += writer.restore(self.splits[split], self.content[offset:])


def write_state(
    folder: Path,
    recipe: Recipe,
    writers: Mapping[str, SplitWriter],
    place: Place = START,
    done: int = 0,
    empty: int = 0,
) -> None:
    """Write the state file, completely or not at all: a line of JSON, then the pending data. Raises: OSError."""
    states = {split: writer.state() for split, writer in writers.items()}
    content = b"".join(pending for _, pending in states.values())
    facts = {"version": VERSION, "recipe": recipe, "place": place, "done": done, "empty": empty}
    facts |= {"splits": {split: facts for split, (facts, _) in states.items()}}
    facts |= {"sha256": hashlib.sha256(content).hexdigest()}
    head = json.dumps(facts).encode() + b"\n"
    write_atomically(folder / STATE, lambda file: (file.write(head), file.write(content)))


def read_state(folder: Path) -> State | None:
    """The state of ``folder``, or ``None`` if it has none. Raises: DataError if it is damaged."""
    path = folder / STATE
    try:
        with open(path, "rb") as file:
            facts, content = json.loads(file.readline()), file.read()
        if facts["version"] != VERSION or facts["sha256"] != hashlib.sha256(content).hexdigest():
            raise ValueError("it has another version, or is incomplete")
        place = Place(*facts["place"])
        return State(facts["recipe"], place, facts["done"], facts["empty"], facts["splits"], content)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); start again with --overwrite") from error


def recipe_of(
    options: TokenizeOptions, source: Mapping[str, Any], tokenizer: TokenizerFacts, encoder: Mapping[str, Any]
) -> Recipe:
    """Everything that determines the tokens, in plain JSON values. ``source`` and ``encoder`` identify the documents and
    how they become tokens."""
    others: dict[str, Any] = {"num_tokens_per_file": options.num_tokens_per_file, "val_fraction": options.val_fraction}
    if options.train_bpe:
        others["train_bpe_bytes"] = options.train_bpe_bytes
    # Only options in use, so that folders made by versions without these options stay valid.
    if options.split_name is not None:
        others["split_name"] = options.split_name
    if options.min_chars:
        others["min_chars"] = options.min_chars
    if options.max_samples is not None:
        others["max_samples"] = options.max_samples
    if options.max_tokens is not None:
        others["max_tokens"] = options.max_tokens
    if options.shuffle_buffer > 1:
        others |= {"shuffle_buffer": options.shuffle_buffer, "seed": options.seed}
    return {
        "source": dict(source),
        "tokenizer": dataclasses.asdict(tokenizer),
        "dtype": options.token_dtype,
        "file_format": options.file_format,
        "options": others | dict(encoder),
    }


def recipe_in(manifest: Manifest) -> Recipe:
    """The recipe of finished shards."""
    facts = dataclasses.asdict(manifest)
    return {name: facts[name] for name in ("source", "tokenizer", "dtype", "file_format", "options")}


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that name the folder for the results of ``recipe`` (plain JSON values)."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


# Keys whose last part is not the name of the flag.
FLAGS = {
    "source.path": "dataset_path",
    "source.config": "dataset_name",
    "source.split": "dataset_split",
    "source.text_key": "dataset_text_key",
    "dtype": "token_dtype",
    "tokenizer.eot_id": "eot_token",
    "source.dataset": "dataset_path",
    "options.pad_id": "pad_token",
    "options.chat_template_sha256": "chat_template",
}


def difference(wanted: Recipe, there: Recipe) -> str | None:
    """The first difference, in words: ``--token_dtype uint32, where the folder has uint16``; ``None`` if there is none."""
    if isinstance(files := there["source"].get("files"), list):  # earlier versions listed any number
        there = {**there, "source": {**there["source"], "files": files_in_brief(files)}}
    for name, (mine, other) in _leaves(wanted, there):
        if mine == other:
            continue
        if name == "source.held_out":
            return "validation data from the ends of the files (earlier versions took whole files)"
        if name.startswith("source.files"):
            return "source files that have changed"
        if name in ("tokenizer.kind", "tokenizer.name"):
            mine, other = (f"--{made['tokenizer']['kind']} {made['tokenizer']['name']}" for made in (wanted, there))
            return f"{mine}, where the folder has {other}"
        if name in ("tokenizer.sha256", "tokenizer.vocab_size"):
            return "a tokenizer that has changed"
        return f"--{FLAGS.get(name, name.split('.')[-1])} {mine}, where the folder has {other}"
    return None


def _leaves(wanted: Any, there: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(wanted, dict) and isinstance(there, dict):
        for key in {**wanted, **there}:
            yield from _leaves(wanted.get(key), there.get(key), f"{name}.{key}" if name else key)
    else:
        yield name, (wanted, there)
