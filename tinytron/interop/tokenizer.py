"""The files of a tokenizer that go with exported and imported weights, and the facts about its tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tinytron.checkpoint.load import read_json
from tinytron.checkpoint.model import CONFIG, is_saved_model, saved_model
from tinytron.data.manifest import TOKENIZER, TokenizerFacts
from tinytron.errors import CheckpointError, ConfigError, DataError
from tinytron.interop.hub import model_folder
from tinytron.text.run_tokenizer import (
    TOKENS,
    DataTokenizers,
    TokenFacts,
    token_facts,
    tokenizer_sources,
)
from tinytron.text.tokenizer_files import TOKENIZER_CONFIG, leading_id, read_vocabulary, token_text, without_tokens
from tinytron.utils.texts import without_bom

_MAP = "special_tokens_map.json"
# What transformers may look for in a folder; ``vocab.json`` and ``merges.txt`` make old tokenizers.
TOKENIZER_FILES = (
    TOKENIZER, TOKENIZER_CONFIG, _MAP, "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "spiece.model", "chat_template.jinja",
)  # fmt: skip
_VOCABULARIES = (TOKENIZER, "vocab.json", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class TokenizerFiles:
    """Files to copy; the ``facts`` that generation uses, too; the texts of the tokens that end and begin documents, where
    they are known; the ids of the model that no token has (``unused``), as far as that is known; the ``record`` in the
    data's manifest; and why files were ``left_behind``."""

    files: tuple[Path, ...]
    facts: TokenFacts = field(default_factory=TokenFacts)
    end_token: str | None = None
    begin_token: str | None = None
    unused: tuple[int, ...] = ()
    record: TokenizerFacts | None = None
    left_behind: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether the files make a tokenizer, rather than say something about one."""
        return any(path.name in _VOCABULARIES for path in self.files)

    def as_section(self) -> dict[str, Any]:
        """The section ``TOKENS`` of a run's configuration."""
        record = None if self.files or self.record is None else asdict(self.record)
        return {**self.facts.as_section(), "tokenizer": record}

    def write(self, out: Path, block_size: int) -> None:
        """Copy the files to ``out``, with the tokens that end and begin documents in their configuration; a tokenizer.json
        without one gets what else transformers needs. transformers then puts the same token before a text as
        ``RunTokenizer.prompt_ids``. Raises: OSError."""
        for path in self.files:
            shutil.copyfile(path, out / path.name)
        named = {"eos_token": self.end_token, "bos_token": self.begin_token}
        tokens: dict[str, str | bool] = {key: text for key, text in named.items() if text is not None}
        names = {path.name for path in self.files}
        if TOKENIZER in names and self.facts.first is None:
            tokens |= self._write_begin(out / TOKENIZER)
        if TOKENIZER_CONFIG in names:
            _set_tokens(out / TOKENIZER_CONFIG, tokens, add=True)
        elif TOKENIZER in names:
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
            config["clean_up_tokenization_spaces"] = False
            config["model_input_names"] = ["input_ids", "attention_mask"]  # decoders refuse token_type_ids
            (out / TOKENIZER_CONFIG).write_text(json.dumps({**config, **tokens}, indent=2))
        if _MAP in names:
            _set_tokens(out / _MAP, tokens, add=False)

    def _write_begin(self, path: Path) -> dict[str, bool]:
        """Let the copied tokenizer.json ``path`` put before a text what training did: the end-of-text token if documents
        begin with it, and otherwise nothing. Returns what tokenizer_config.json says about that. A tokenizer that does so
        already stays as it is."""
        wanted = self.facts.end if self.facts.prepend else None
        if _leading_id(path) != wanted:
            token = self.end_token if self.facts.prepend else None
            if wanted is not None and token is None:  # an id without a text cannot be put there
                return {}
            content = json.loads(without_bom(path.read_bytes()))
            kept = without_tokens(content.get("post_processor"))
            added = [] if wanted is None or token is None else [_template(token, wanted)]
            content["post_processor"] = {"type": "Sequence", "processors": [*kept, *added]} if kept or added else None
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False))
            return {"add_bos_token": wanted is not None}
        return {} if wanted is None else {"add_bos_token": True}


def _template(token: str, number: int) -> dict[str, Any]:
    """A post-processor that puts ``token`` before every text."""

    def part(kind: str, name: str, type_id: int) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": type_id}}

    first = [part("SpecialToken", token, 0), part("Sequence", "A", 0)]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, part("SpecialToken", token, 1), part("Sequence", "B", 1)],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _set_tokens(path: Path, tokens: Mapping[str, str | bool], *, add: bool) -> None:
    """Set ``tokens`` in a JSON file where it has others, with ``add`` also where it has none."""
    try:
        config = json.loads(path.read_bytes())
    except ValueError:  # not for us to mend
        return
    if not isinstance(config, dict):
        return
    wrong = {
        key: value
        for key, value in tokens.items()
        if value not in (config.get(key), token_text(config.get(key))) and (add or key in config)
    }
    if wrong:
        path.write_text(json.dumps({**config, **wrong}, indent=2, ensure_ascii=False))


def exported_tokenizer(
    vocab_size: int,
    data: Mapping[str, Any],
    *,
    given: Path | None = None,
    checkpoint: Path | None = None,
    imported: Mapping[str, Any] | None = None,
) -> TokenizerFiles:
    """What goes with a model of ``vocab_size`` tokens: the files of ``--tokenizer`` (``given``), else those of the token
    shards that a run was trained on (of the first folder of a mixture that has one), else those next to an imported
    ``checkpoint``; as far as they are known and still there. ``data`` is the run's section of that name, ``imported`` what
    an import knows of its tokens.

    Raises: ConfigError if there is nothing at ``given``, or a tokenizer has ids that the model does not.
    """
    try:
        found, record, file = tokenizer_sources(data.get("dataset_path"), given, checkpoint, imported)
    except (ConfigError, DataError, OSError):  # the weights do not depend on data that is gone or damaged
        if given is not None:
            raise
        found, record, file = DataTokenizers(()), None, None
    files: tuple[Path, ...] = ()
    what = f"the tokenizer of {data.get('dataset_path') or checkpoint}"
    if given is not None:
        files, what = _given_files(given), f"--tokenizer {given}"
    elif file is not None:
        files = (file,) if file in found.files else files_in(file.parent)
    vocabulary = _vocabulary(files, vocab_size, what)
    prepend = data.get("eot_position", "prepend") == "prepend"
    facts = token_facts(found, file, given=given, eot_id=data.get("eot_id"), prepend=prepend, imported=imported)
    texts = {number: token for token, number in vocabulary.items()}
    if record is not None and record.eot_id is not None and record.eot_token is not None:
        texts.setdefault(record.eot_id, record.eot_token)
    begin_id = facts.end if facts.prepend else facts.begin
    end, begin = (texts.get(-1 if number is None else number) for number in (facts.end, begin_id))
    return TokenizerFiles(files, facts, end, begin, _unused(vocabulary.values(), record, vocab_size), record)


def tokenizer_of_data(dataset_path: str | None, vocab_size: int) -> TokenizerFiles:
    """``exported_tokenizer`` for the data ``dataset_path`` alone."""
    return exported_tokenizer(vocab_size, {"dataset_path": dataset_path})


def run_tokens(vocab_size: int, data: Mapping[str, Any], sources: Sequence[str]) -> TokenizerFiles:
    """The tokenizer and the facts that a run keeps, for the day when its data has moved: those of the ``data``, or where
    that tells nothing those of the first of the ``sources`` that has any: the checkpoint that it continues from, and the
    weights that it begins with. A source that cannot be read is passed over: loading it says why."""
    try:
        found = exported_tokenizer(vocab_size, data)
    except ConfigError:  # not what training depends on
        found = TokenizerFiles(())
    for source in sources:
        if found.files or found.record is not None:
            break
        try:
            inherited = initial_tokens(source, vocab_size)
        except (CheckpointError, ConfigError):
            continue
        found = replace(inherited, facts=found.facts) if found.facts.ends else inherited
    return found


def initial_tokens(name: str, vocab_size: int) -> TokenizerFiles:
    """A run of ``vocab_size`` tokens inherits this from the weights ``name`` that it begins with (``--init_from``): the
    facts about their tokens, and the files of their tokenizer unless it has ids that the run does not. Raises: ConfigError
    or CheckpointError if the weights cannot be had."""
    if is_saved_model(Path(name)):
        saved = saved_model(Path(name), check=False)
        tokens = saved.section(TOKENS)
        try:
            return exported_tokenizer(vocab_size, saved.section("data"), checkpoint=saved.file, imported=tokens)
        except ConfigError as error:
            return TokenizerFiles((), TokenFacts.of_import(tokens), left_behind=str(error))
    folder = model_folder(name, weights=False, more=TOKENIZER_FILES)
    facts, files = imported_facts(folder), files_in(folder)
    try:
        _vocabulary(files, vocab_size, name)
    except ConfigError as error:
        return TokenizerFiles((), facts, left_behind=str(error))
    return TokenizerFiles(files, facts)


def imported_facts(folder: Path) -> TokenFacts:
    """The facts about the tokens of the Hugging Face model in ``folder``, and what its tokenizer puts before every text.
    Raises: CheckpointError without a config.json."""
    facts = TokenFacts.of_import(read_json(folder / CONFIG))
    return facts.put_before(_leading_id(folder / TOKENIZER))


def _leading_id(path: Path) -> int | None:
    try:
        return leading_id(path)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):  # told when the file is used
        return None


def files_in(folder: Path) -> tuple[Path, ...]:
    """The files of a tokenizer in ``folder``."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def _given_files(path: Path) -> tuple[Path, ...]:
    files = (path,) if path.is_file() else files_in(path)
    if not files or (path.is_file() and path.name != TOKENIZER):
        raise ConfigError(f"--tokenizer {path} is neither a {TOKENIZER} nor a folder with a tokenizer's files")
    return files


def _vocabulary(files: tuple[Path, ...], vocab_size: int, what: str) -> dict[str, int]:
    """The tokens of the tokenizer.json among ``files``; none without one. Raises: ConfigError for ids that the model does
    not have."""
    path = next((path for path in files if path.name == TOKENIZER), None)
    if path is None:
        return {}
    try:
        vocabulary = read_vocabulary(path)
        largest = max(vocabulary.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{what} cannot be read ({type(error).__name__}: {error})") from error
    if largest >= vocab_size:
        raise ConfigError(
            f"{what} has ids up to {largest}, the model {vocab_size} tokens; use the one it was trained with"
        )
    return vocabulary


def _unused(known: Iterable[int], record: TokenizerFacts | None, vocab_size: int) -> tuple[int, ...]:
    """The ids of the model that no token has. Without a vocabulary the ``record`` tells how large it is."""
    used = set(known)
    if not used and record is not None:
        used = set(range(record.vocab_size))
    return tuple(number for number in range(vocab_size) if number not in used) if used else ()
