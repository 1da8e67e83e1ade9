"""The tokenizer of a run's data, found next to its token shards, and the facts about its tokens that generation,
evaluation and export share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinytron.data.manifest import TOKENIZER, TokenizerFacts, read_manifest
from tinytron.data.mixture_file import read_mixture
from tinytron.data.remote import local_dataset_path
from tinytron.errors import ConfigError, DataError
from tinytron.text.tokenizer_files import (
    named_end,
    read_tokenizer,
    specials_of,
    tokenizer_file,
    usual_ends,
    vocabulary_of,
)
from tinytron.text.tokenizers import TextTokenizer, from_file, from_hub, from_tiktoken
from tinytron.utils.remote import is_remote
from tinytron.utils.texts import whole_characters

TOKENS = "tokens"  # section of a run's or an imported model's configuration with the facts about its tokens


@dataclass(frozen=True)
class RunTokenizer:
    """A tokenizer and how documents are separated: ``end`` is the id of the end-of-text token, if it has one; ``prepend``
    says that texts begin with it. ``more_ends`` also stop generation. ``begin`` is a different id that texts begin with, as
    in some imported models (Llama's ``<s>``)."""

    tokenizer: TextTokenizer
    end: int | None
    prepend: bool
    more_ends: tuple[int, ...] = ()
    begin: int | None = None

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a generated text."""
        return self.more_ends if self.end is None else (self.end, *self.more_ends)

    def ids(self, text: str) -> list[int]:
        """The ids of a text from any source, with ``?`` for invalid characters."""
        return [int(number) for number in self.tokenizer.encode([whole_characters(text)])[0]]

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a text in the form that the model was trained on: after the token that texts begin with. An empty text
        always begins with the end-of-text token if it has no other. Raises: ConfigError for an empty text without any
        such token."""
        ids = self.ids(text)
        if self.begin is not None:
            return [self.begin, *ids]
        if self.end is not None and (self.prepend or not ids):
            return [self.end, *ids]
        if not ids:
            raise ConfigError(
                "the prompt is empty, and the tokenizer has no end-of-text token to begin with; give a text"
            )
        return ids

    def check(self, vocab_size: int) -> None:
        """Raises: ConfigError if the tokenizer has ids that a model of ``vocab_size`` tokens does not have."""
        if self.tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the tokenizer {self.tokenizer.name} has {self.tokenizer.vocab_size} tokens, but the model has "
                f"--vocab_size {vocab_size}; use the tokenizer that its data was made with"
            )


@dataclass(frozen=True)
class DataTokenizers:
    """The tokenizer of each of the ``folders`` of token shards that a run reads."""

    folders: tuple[Path, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The tokenizer.json of every folder that has one."""
        return tuple(path for folder in self.folders if (path := folder / TOKENIZER).is_file())

    def facts(self) -> TokenizerFacts | None:
        """The record of the tokenizer in the first manifest, or ``None``. Raises: DataError for a damaged manifest."""
        manifests = (read_manifest(folder) for folder in self.folders)
        return next((manifest.tokenizer for manifest in manifests if manifest is not None), None)


def tokenizers_of_data(dataset_path: str | None) -> DataTokenizers:
    """The tokenizers next to the local token shards of ``--dataset_path``; for a mixture, of all its sources in order.
    Raises: ConfigError for a damaged mixture file."""
    if dataset_path is None:
        return DataTokenizers(())
    if dataset_path.endswith(".json"):
        mixture = read_mixture(Path(dataset_path.removeprefix("file://")))
        return DataTokenizers(tuple(_folder(source.path) for source in mixture.sources))
    return DataTokenizers((_folder(dataset_path),))


def _folder(path: str) -> Path:
    place = Path(local_dataset_path(path) if is_remote(path) else path.removeprefix("file://"))
    return place if place.is_dir() else place.parent


@dataclass(frozen=True)
class TokenFacts:
    """Facts about tokens that a model has learned: ``ends``, the first of which separates documents, and whether texts
    begin with it (``prepend``). ``begin`` and ``pad`` are the ones that an imported model names, and ``first`` is the token
    that its tokenizer puts before every text, unless that is the end. All are ids, or ``None``. ``inherited`` facts come
    from an imported model and were not replaced by data."""

    ends: tuple[int, ...] = ()
    prepend: bool = False
    begin: int | None = None
    pad: int | None = None
    first: int | None = None
    inherited: bool = False

    @property
    def end(self) -> int | None:
        """The id that separates documents."""
        return next(iter(self.ends), None)

    @classmethod
    def of_end(cls, end: int | None, prepend: bool) -> TokenFacts:
        """Facts of data whose documents ``end`` separates."""
        return cls() if end is None else cls((end,), prepend, end if prepend else None)

    @classmethod
    def of_import(cls, ids: Mapping[str, Any]) -> TokenFacts:
        """The facts in a Hugging Face config.json, or in ``TOKENS``; values that are not ids are ignored."""

        def numbers(key: str) -> tuple[int, ...]:
            value = ids.get(f"{key}_token_id")
            values = value if isinstance(value, list) else [value]
            return tuple(number for number in values if type(number) is int and number >= 0)

        begin, pad, first = (next(iter(numbers(key)), None) for key in ("bos", "pad", "first"))
        prepend, inherited = (ids.get(key) is True for key in ("prepend", "inherited"))
        return cls(numbers("eos"), prepend, begin, pad, first, inherited)

    def put_before(self, number: int | None) -> TokenFacts:
        """These facts for a tokenizer that puts ``number`` before every text (``None``: nothing known)."""
        if number is not None and number == self.end:
            return replace(self, prepend=True)
        return replace(self, first=number)

    def as_import(self) -> dict[str, Any]:
        """The ids under the keys of a Hugging Face config.json; several ends become a list."""
        ends: Any = list(self.ends) if len(self.ends) > 1 else self.end
        return {"bos_token_id": self.begin, "eos_token_id": ends, "pad_token_id": self.pad}

    def as_section(self) -> dict[str, Any]:
        """The content of the section ``TOKENS``."""
        more = {"prepend": self.prepend, "first_token_id": self.first, "inherited": self.inherited}
        return {**self.as_import(), **more}


def token_facts(
    data: DataTokenizers,
    file: Path | None,
    *,
    given: Path | None = None,
    eot_id: int | None = None,
    prepend: bool = False,
    imported: Mapping[str, Any] | None = None,
) -> TokenFacts:
    """The facts from the first place that has them: those kept by a run or an import (``imported``), the manifest of the
    ``data``, the run's ``eot_id``, the manifest in the folder of the ``given`` tokenizer, or the tokenizer in ``file``.
    ``prepend`` says whether the documents of a run's data begin with the end, if no manifest does. Raises: DataError for a
    damaged manifest."""
    known = TokenFacts.of_import(imported or {})
    if known.ends:
        return known
    record = data.facts()
    if record is None and eot_id is None and given is not None:
        found = read_manifest(given if given.is_dir() else given.parent)
        record = None if found is None else found.tokenizer
    if record is not None:
        return TokenFacts.of_end(record.eot_id, record.eot_position == "prepend")
    if eot_id is not None:
        return TokenFacts.of_end(eot_id, prepend)
    found_end = None if file is None else _own_end(file)
    own = TokenFacts.of_end(found_end, prepend and bool(data.folders)).put_before(known.first)
    return replace(own, inherited=known.inherited)


def _own_end(file: Path) -> int | None:
    try:
        content = read_tokenizer(file)
        vocabulary, specials = vocabulary_of(content), specials_of(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    candidates = (named_end(file), *usual_ends(specials))
    return next((vocabulary[token] for token in candidates if token in vocabulary), None)


def find_tokenizer(
    dataset_path: str | None,
    given: Path | None = None,
    eot_id: int | None = None,
    eot_position: str = "prepend",
    option: str = "--tokenizer",
    *,
    checkpoint: Path | None = None,
    imported: Mapping[str, Any] | None = None,
) -> RunTokenizer:
    """The tokenizer in the file (or folder) ``given``, else the one that a run or an import has kept next to the
    ``checkpoint`` (``imported`` are the facts about its tokens), else the one of the run's data: the first
    ``tokenizer.json`` next to its shards, or the one that its manifest names. ``eot_id`` and ``eot_position`` come from the
    run's configuration and are the last resort.

    Raises: ConfigError if no tokenizer is found, naming ``option``, which gives one; DataError if it cannot be read.
    """
    found, record, file = tokenizer_sources(dataset_path, given, checkpoint, imported)
    if file is not None:
        tokenizer = from_file(file)
    elif record is not None and record.kind == "encoding_name":
        tokenizer = from_tiktoken(record.name)
    elif record is not None and record.kind == "tokenizer_name":
        tokenizer = from_hub(record.name)
    else:
        where = "the run's data (mock data, or your own) does not name one"
        if found.folders:
            where = f"the data {dataset_path} has none, and the run kept none"
        elif imported is not None:
            where = f"neither the data of the model nor {checkpoint} has one"
        raise ConfigError(f"no tokenizer: {where}; give {option} path/to/{TOKENIZER}")
    prepend = eot_position == "prepend"
    facts = token_facts(found, file, given=given, eot_id=eot_id, prepend=prepend, imported=imported)
    return RunTokenizer(tokenizer, facts.end, facts.prepend, facts.ends[1:], facts.first)


def tokenizer_sources(
    dataset_path: str | None, given: Path | None, checkpoint: Path | None, imported: Mapping[str, Any] | None
) -> tuple[DataTokenizers, TokenizerFacts | None, Path | None]:
    """Where to look for a run's tokenizer: its data (empty if the run has kept a copy, so that it does not matter whether
    the data has moved or changed), the record of the tokenizer, and the tokenizer.json to use, if it has that form. Raises:
    ConfigError or DataError for a damaged mixture or manifest."""
    copy = None if checkpoint is None else (checkpoint if checkpoint.is_dir() else checkpoint.parent) / TOKENIZER
    if copy is not None and not copy.is_file():
        copy = None
    if given is None and imported is not None and copy is not None:
        return DataTokenizers(()), None, copy
    try:
        found = tokenizers_of_data(dataset_path)
        record = found.facts() or kept_record(imported)
    except (ConfigError, DataError, OSError):
        if given is None and copy is None and kept_record(imported) is None:
            raise
        found, record = DataTokenizers(()), kept_record(imported)
    if given is not None:
        return found, record, tokenizer_file(given)
    own = next(iter(found.files), None)
    return found, record, copy if own is None and record is None else own


def kept_record(imported: Mapping[str, Any] | None) -> TokenizerFacts | None:
    """The record of a tokenizer that is not a file, as kept by a run in ``TOKENS``."""
    try:
        return TokenizerFacts(**(imported or {})["tokenizer"])
    except (KeyError, TypeError):
        return None


def tokenizer_of_run(
    config: dict[str, dict[str, object]], given: Path | None = None, checkpoint: Path | None = None
) -> RunTokenizer:
    """``find_tokenizer`` for a run's saved configuration, checked against its model's vocabulary. Raises: the same."""
    data, model = config.get("data", {}), config["model"]
    path, eot_id = data.get("dataset_path"), data.get("eot_id")
    found = find_tokenizer(
        path if isinstance(path, str) else None,
        given,
        eot_id if isinstance(eot_id, int) else None,
        str(data.get("eot_position", "prepend")),
        checkpoint=checkpoint,
        imported=config.get(TOKENS),
    )
    size = model.get("vocab_size")
    if isinstance(size, int):
        found.check(size)
    return found
