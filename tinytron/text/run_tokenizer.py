"""The tokenizer of a run's data, found next to its token shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinytron.data.manifest import TOKENIZER, TokenizerFacts, read_manifest
from tinytron.data.mixture_file import read_mixture
from tinytron.data.remote import local_dataset_path
from tinytron.errors import ConfigError
from tinytron.text.tokenizers import TextTokenizer, from_file, from_hub, from_tiktoken
from tinytron.utils.remote import is_remote
from tinytron.utils.texts import whole_characters


@dataclass(frozen=True)
class RunTokenizer:
    """A tokenizer and how documents are separated: ``end`` is the id of the end-of-text token, if there is one;
    ``prepend`` says that texts begin with it."""

    tokenizer: TextTokenizer
    end: int | None
    prepend: bool

    def ids(self, text: str) -> list[int]:
        """The ids of a text from whatever source, with ``?`` for what is no character."""
        return [int(number) for number in self.tokenizer.encode([whole_characters(text)])[0]]

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a text as the model has seen texts: after the end-of-text token where they begin with it, and always
        for an empty text. Raises: ConfigError for an empty text if there is no such token."""
        ids = self.ids(text)
        if self.end is not None and (self.prepend or not ids):
            return [self.end, *ids]
        if not ids:
            raise ConfigError(
                "the prompt is empty, and the tokenizer has no end-of-text token to begin with; give a text"
            )
        return ids

    def check(self, vocab_size: int) -> None:
        """Raises: ConfigError if the tokenizer gives ids that a model of ``vocab_size`` tokens lacks."""
        if self.tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the tokenizer {self.tokenizer.name} has {self.tokenizer.vocab_size} tokens, the model --vocab_size "
                f"{vocab_size}; use the tokenizer that its data was made with"
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
        """The record of the tokenizer in the first manifest, if there is one. Raises: DataError for a damaged manifest."""
        manifests = (read_manifest(folder) for folder in self.folders)
        return next((manifest.tokenizer for manifest in manifests if manifest is not None), None)


def tokenizers_of_data(dataset_path: str | None) -> DataTokenizers:
    """The tokenizers next to the local token shards of ``--dataset_path``: of all sources of a mixture, in their order.
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


def find_tokenizer(
    dataset_path: str | None,
    given: Path | None = None,
    eot_id: int | None = None,
    eot_position: str = "prepend",
    option: str = "--tokenizer",
) -> RunTokenizer:
    """The tokenizer in the file (or folder) ``given``, else that of the run's data: the first ``tokenizer.json`` next to
    its shards, or the one that its manifest names. ``eot_id`` and ``eot_position`` are those of the run's configuration,
    used where there is no manifest.

    Raises: ConfigError if there is none, naming ``option``, which gives one; DataError if it cannot be read.
    """
    found = tokenizers_of_data(dataset_path)
    facts, file = found.facts(), next(iter(found.files), None)
    if given is not None:
        file = given / TOKENIZER if given.is_dir() else given
    if file is not None:
        tokenizer = from_file(file)
    elif facts is not None and facts.kind == "encoding_name":
        tokenizer = from_tiktoken(facts.name)
    elif facts is not None and facts.kind == "tokenizer_name":
        tokenizer = from_hub(facts.name)
    else:
        where = (
            f"{found.folders[0]} has no {TOKENIZER}"
            if found.folders
            else "the run's data (mock data, or your own) names none"
        )
        raise ConfigError(f"no tokenizer: {where}; give {option} path/to/{TOKENIZER}")
    if facts is not None:
        return RunTokenizer(tokenizer, facts.eot_id, facts.eot_position == "prepend")
    if eot_id is not None:
        return RunTokenizer(tokenizer, eot_id, eot_position == "prepend")
    try:
        _, end = tokenizer.end_of_text()
    except ConfigError:
        return RunTokenizer(tokenizer, None, False)
    return RunTokenizer(tokenizer, end, bool(found.folders) and eot_position == "prepend")


def tokenizer_of_run(config: dict[str, dict[str, object]], given: Path | None = None) -> RunTokenizer:
    """``find_tokenizer`` for a run's saved configuration, checked against its model's vocabulary. Raises: as there."""
    data, model = config.get("data", {}), config["model"]
    path, eot_id = data.get("dataset_path"), data.get("eot_id")
    found = find_tokenizer(
        path if isinstance(path, str) else None,
        given,
        eot_id if isinstance(eot_id, int) else None,
        str(data.get("eot_position", "prepend")),
    )
    size = model.get("vocab_size")
    if isinstance(size, int):
        found.check(size)
    return found
