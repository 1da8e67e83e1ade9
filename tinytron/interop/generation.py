"""generation_config.json: the settings of text generation that come with a Hugging Face model and go out with an export."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinytron.checkpoint.load import read_json
from tinytron.errors import CheckpointError
from tinytron.text.run_tokenizer import TokenFacts

GENERATION = "generation_config.json"


def generation_file(folder: Path) -> Path | None:
    """The generation_config.json of ``folder``, if there is one."""
    path = folder / GENERATION
    return path if path.is_file() else None


def with_generation_ends(facts: TokenFacts, path: Path | None) -> TokenFacts:
    """``facts`` with the further ends that generation_config.json names: transformers stops at those, and config.json often
    names only one of them, which stays the first."""
    named = TokenFacts.of_import(_settings(path)).ends
    return replace(facts, ends=tuple(dict.fromkeys([*facts.ends, *named])))


def generation_settings(
    path: Path | None, facts: TokenFacts, unused: Iterable[int]
) -> tuple[dict[str, Any], list[str]]:
    """The content of an exported generation_config.json, and a line for each setting that training changed. What came in
    (``path``) stays, except that the end and the begin of the training data (``facts``) replace those of the model, and
    that the ids ``unused``, which no token has, are never sampled."""
    settings, notes = _settings(path), list[str]()
    if not settings:
        settings = {"do_sample": True, **{key: value for key, value in facts.as_import().items() if value is not None}}
    elif facts.ends and not facts.inherited:
        trained = facts.as_import()
        for key in ("eos_token_id", "bos_token_id"):
            before, now = settings.pop(key, None), trained[key]
            if before is not None and not _same(before, now):
                notes.append(
                    f"{GENERATION}: {key} was {before} and is {'none' if now is None else now}, as in the training data"
                )
            elif before is not None:
                now = before
            if now is not None:
                settings[key] = now
    if suppressed := sorted({*(settings.get("suppress_tokens") or []), *unused}):
        settings["suppress_tokens"] = suppressed
    return settings, notes


def _same(before: Any, now: Any) -> bool:
    """Whether both name the same tokens; the order of several ends does not matter."""
    ids = [value if isinstance(value, list) else [value] for value in (before, now)]
    return sorted(ids[0], key=str) == sorted(ids[1], key=str)


def _settings(path: Path | None) -> dict[str, Any]:
    try:
        return {} if path is None else read_json(path)
    except CheckpointError:  # a model does not depend on it
        return {}
