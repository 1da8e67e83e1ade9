"""The tokenizer files that accompany exported and imported weights, and the facts about their tokens."""

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
from tinytron.interop.generation import GENERATION, generation_file, with_generation_ends
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
# Files that transformers may look for in a folder; ``vocab.json`` and ``merges.txt`` are tokenizers of an older form.
TOKENIZER_FILES = (
    TOKENIZER, TOKENIZER_CONFIG, _MAP, "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "spiece.model", "chat_template.jinja",
)  # fmt: skip
_VOCABULARIES = (TOKENIZER, "vocab.json", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer that accompanies weights, and the facts about its tokens. Unknown facts are None or empty.

    ``files`` are copied, and ``generation`` is the file of generation settings of an imported model. ``facts`` are the ones
    that generation uses. ``end_token`` and ``begin_token`` are the texts of the tokens that end and begin documents, and
    ``unused`` the ids of the model that no token has. ``record`` comes from the data's manifest. ``left_behind`` says why a
    tokenizer is missing, and ``left_out`` why an imported model's settings are missing. ``own`` means that the files come
    from an imported model whose tokens training did not change: they are copied unchanged.
    """

    files: tuple[Path, ...]
    facts: TokenFacts = field(default_factory=TokenFacts)
    end_token: str | None = None
    begin_token: str | None = None
    unused: tuple[int, ...] = ()
    record: TokenizerFacts | None = None
    left_behind: str = ""
    left_out: str = ""
    generation: Path | None = None
    own: bool = False

    @property
    def kept(self) -> tuple[Path, ...]:
        """The files that a run keeps copies of."""
        return self.files if self.generation is None else (*self.files, self.generation)

    @property
    def is_complete(self) -> bool:
        """True if the files include a vocabulary, and not only settings of a tokenizer."""
        return any(path.name in _VOCABULARIES for path in self.files)

    def as_section(self) -> dict[str, Any]:
        """The section ``TOKENS`` of a run's configuration."""
        record = None if self.files or self.record is None else asdict(self.record)
        return {**self.facts.as_section(), "tokenizer": record}

    def write(self, out: Path, block_size: int) -> list[str]:
        """Copy the files to ``out``, with the tokens that end and begin documents in their configuration. A tokenizer.json
        without a configuration gets one, with the other settings that transformers needs. transformers then puts the same
        token before a text as ``RunTokenizer.prompt_ids``. The ``own`` files of an imported model stay unchanged.

        Returns a line for each setting of the files that training changed. Raises: OSError.
        """
        for path in self.files:
            shutil.copyfile(path, out / path.name)
        names = {path.name for path in self.files}
        if self.own and TOKENIZER_CONFIG in names:
            return []
        named = {"eos_token": self.end_token, "bos_token": self.begin_token}
        tokens: dict[str, Any] = {key: text for key, text in named.items() if text is not None}
        notes: list[str] = []
        if self.own and _MAP in names:  # transformers reads it only if tokenizer_config.json names no tokens
            tokens |= _object(out / _MAP) or {}
        if TOKENIZER in names and self.facts.first is None:
            begins, notes = self._write_begin(out / TOKENIZER)
            tokens |= begins
        if TOKENIZER_CONFIG in names:
            notes += _set_tokens(out / TOKENIZER_CONFIG, tokens, add=True)
        elif TOKENIZER in names:
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
            config["clean_up_tokenization_spaces"] = False
            config["model_input_names"] = ["input_ids", "attention_mask"]  # decoder-only models reject token_type_ids
            (out / TOKENIZER_CONFIG).write_text(json.dumps({**config, **tokens}, indent=2), encoding="utf-8")
        if _MAP in names and not self.own:
            _set_tokens(out / _MAP, tokens, add=False)
        return notes

    def _write_begin(self, path: Path) -> tuple[dict[str, bool], list[str]]:
        """Make the copied tokenizer.json ``path`` put the same token before a text as training did: the end-of-text token
        if documents begin with it, otherwise nothing. Returns the settings for tokenizer_config.json about that, and a line
        if the tokenizer used a different token before. A tokenizer that already does so stays unchanged."""
        wanted, before = self.facts.end if self.facts.prepend else None, _leading_id(path)
        if before == wanted:
            return ({} if wanted is None else {"add_bos_token": True}), []
        token = self.end_token if self.facts.prepend else None
        if wanted is not None and token is None:  # a template needs the token's text, not just its id
            return {}, []
        content = json.loads(without_bom(path.read_bytes()))
        kept = without_tokens(content.get("post_processor"))
        added = [] if wanted is None or token is None else [_template(token, wanted)]
        content["post_processor"] = {"type": "Sequence", "processors": [*kept, *added]} if kept or added else None
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        now = "none" if token is None else token
        note = f"{TOKENIZER}: the token before a text was {before} and is {now}, as in the training data"
        return {"add_bos_token": wanted is not None}, [] if before is None else [note]


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


def _object(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``, or ``None`` if it contains something else, which is left alone."""
    try:
        content = json.loads(without_bom(path.read_bytes()))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _set_tokens(path: Path, tokens: Mapping[str, Any], *, add: bool) -> list[str]:
    """Set ``tokens`` in a JSON file where their values differ; with ``add`` also where they are missing. Returns a line for
    each value that was replaced."""
    if (config := _object(path)) is None:
        return []
    wrong = {
        key: value
        for key, value in tokens.items()
        if value not in (config.get(key), token_text(config.get(key))) and (add or key in config)
    }
    if wrong:
        path.write_text(json.dumps({**config, **wrong}, indent=2, ensure_ascii=False), encoding="utf-8")
    return [
        f"{path.name}: {key} was {token_text(config[key]) or config[key]} and is {value}, as in the training data"
        for key, value in wrong.items()
        if config.get(key) is not None
    ]


def exported_tokenizer(
    vocab_size: int,
    data: Mapping[str, Any],
    *,
    given: Path | None = None,
    checkpoint: Path | None = None,
    imported: Mapping[str, Any] | None = None,
) -> TokenizerFiles:
    """The tokenizer of a model of ``vocab_size`` tokens: the files of ``--tokenizer`` (``given``), else those of the token
    shards that the run was trained on (of the first folder of a mixture that has them), else those next to an imported
    ``checkpoint``, as far as they are known and still exist. ``data`` is the run's section of that name, ``imported`` the
    facts about tokens that an import recorded.

    Raises: ConfigError if ``given`` has no tokenizer, or a tokenizer has ids that the model does not have.
    """
    try:
        found, record, file = tokenizer_sources(data.get("dataset_path"), given, checkpoint, imported)
    except (ConfigError, DataError, OSError):  # missing or damaged data must not prevent an export
        if given is not None:
            raise
        found, record, file = DataTokenizers(()), None, None
    files: tuple[Path, ...] = ()
    what = f"the tokenizer of {data.get('dataset_path') or checkpoint}"
    if given is not None:
        files, what = _given_files(given), f"--tokenizer {given}"
    elif file is not None:
        files = (file,) if file in found.files else files_in(file.parent)
    elif checkpoint is not None and TokenFacts.of_import(imported or {}).inherited:
        files = files_in(checkpoint.parent)  # a tokenizer in an older form, without a tokenizer.json
    vocabulary = _vocabulary(files, vocab_size, what)
    prepend = data.get("eot_position", "prepend") == "prepend"
    facts = token_facts(found, file, given=given, eot_id=data.get("eot_id"), prepend=prepend, imported=imported)
    texts = {number: token for token, number in vocabulary.items()}
    if record is not None and record.eot_id is not None and record.eot_token is not None:
        texts.setdefault(record.eot_id, record.eot_token)
    begin_id = facts.end if facts.prepend else facts.begin
    end, begin = (texts.get(-1 if number is None else number) for number in (facts.end, begin_id))
    unused = _unused(vocabulary.values(), record, vocab_size)
    generation = None if checkpoint is None else generation_file(checkpoint.parent)
    own = facts.inherited and given is None
    return TokenizerFiles(files, facts, end, begin, unused, record, generation=generation, own=own)


def tokenizer_of_data(dataset_path: str | None, vocab_size: int) -> TokenizerFiles:
    """``exported_tokenizer`` for the data ``dataset_path`` alone."""
    return exported_tokenizer(vocab_size, {"dataset_path": dataset_path})


def run_tokens(vocab_size: int, data: Mapping[str, Any], sources: Sequence[str]) -> TokenizerFiles:
    """The tokenizer and token facts that a run keeps in case its data moves: those of ``data``, or if that has none, those
    of the first of ``sources`` that has any. Sources are the checkpoint that the run continues from, and the weights that
    it starts from. A source with the same tokenizer as the data adds its other files: chat template, special tokens,
    generation settings. A source that cannot be read is skipped: loading it reports the error."""
    try:
        found = exported_tokenizer(vocab_size, data)
    except ConfigError:  # training does not depend on the tokenizer
        found = TokenizerFiles(())
    own = found.is_complete or found.record is not None
    for source in sources:
        try:
            inherited = initial_tokens(source, vocab_size)
        except (CheckpointError, ConfigError):
            continue
        if own:
            return _with_companions(found, inherited, source)
        found = replace(inherited, facts=found.facts) if found.facts.ends else inherited
        if found.files or found.record is not None:
            break
    return found


def _with_companions(found: TokenizerFiles, inherited: TokenizerFiles, source: str) -> TokenizerFiles:
    """The tokenizer of the data, plus the files of the weights ``source`` that describe the same tokens further."""
    more = tuple(path for path in inherited.files if path.name not in _VOCABULARIES)
    if not more and inherited.generation is None:
        return found
    theirs, ours = (_tokens_of(files.files) for files in (inherited, found))
    if not theirs or not theirs.items() <= ours.items():
        why = (
            f"the data has a different tokenizer than {source}, whose chat template and settings are therefore left out"
        )
        return replace(found, left_out=why)
    facts = found.facts
    if facts.end in inherited.facts.ends:  # the model's other end tokens still end its texts
        facts = replace(facts, ends=tuple(dict.fromkeys([*facts.ends, *inherited.facts.ends])))
    return replace(found, files=(*found.files, *more), facts=facts, generation=inherited.generation)


def _tokens_of(files: Sequence[Path]) -> dict[str, int]:
    path = next((path for path in files if path.name == TOKENIZER), None)
    try:
        return {} if path is None else read_vocabulary(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # reported when the file is used
        return {}


def initial_tokens(name: str, vocab_size: int) -> TokenizerFiles:
    """The tokens that a run with ``vocab_size`` tokens inherits from the weights ``name`` that it starts from
    (``--init_from``): the facts about them, and their tokenizer's files unless it has ids that the run does not have.
    Raises: ConfigError or CheckpointError if the weights cannot be read."""
    if is_saved_model(Path(name)):
        saved = saved_model(Path(name), check=False)
        tokens = saved.section(TOKENS)
        try:
            return exported_tokenizer(vocab_size, saved.section("data"), checkpoint=saved.file, imported=tokens)
        except ConfigError as error:
            return TokenizerFiles((), TokenFacts.of_import(tokens), left_behind=str(error))
    folder = model_folder(name, weights=False, more=(*TOKENIZER_FILES, GENERATION))
    facts, files = imported_facts(folder), files_in(folder)
    try:
        _vocabulary(files, vocab_size, name)
    except ConfigError as error:
        return TokenizerFiles((), facts, left_behind=str(error))
    return TokenizerFiles(files, facts, generation=generation_file(folder))


def imported_facts(folder: Path) -> TokenFacts:
    """The facts about the tokens of the Hugging Face model in ``folder``, including the token that its tokenizer puts
    before every text. Raises: CheckpointError if config.json is missing."""
    facts = replace(TokenFacts.of_import(read_json(folder / CONFIG)), inherited=True)
    facts = with_generation_ends(facts, generation_file(folder))
    return facts.put_before(_leading_id(folder / TOKENIZER))


def _leading_id(path: Path) -> int | None:
    try:
        return leading_id(path)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):  # reported when the file is used
        return None


def files_in(folder: Path) -> tuple[Path, ...]:
    """The tokenizer files in ``folder``."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def _given_files(path: Path) -> tuple[Path, ...]:
    files = (path,) if path.is_file() else files_in(path)
    if not files or (path.is_file() and path.name != TOKENIZER):
        raise ConfigError(f"--tokenizer {path} is neither a {TOKENIZER} nor a folder with a tokenizer's files")
    return files


def _vocabulary(files: tuple[Path, ...], vocab_size: int, what: str) -> dict[str, int]:
    """The tokens of the tokenizer.json among ``files``; empty without one. Raises: ConfigError for ids that the model does
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
            f"{what} has ids up to {largest}, but the model has {vocab_size} tokens; use the one it was trained with"
        )
    return vocabulary


def _unused(known: Iterable[int], record: TokenizerFacts | None, vocab_size: int) -> tuple[int, ...]:
    """The ids of the model that no token has. Without a vocabulary, the ``record`` has its size."""
    used = set(known)
    if not used and record is not None:
        used = set(range(record.vocab_size))
    return tuple(number for number in range(vocab_size) if number not in used) if used else ()
