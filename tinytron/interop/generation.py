"""generation_config.json: the generation settings that come with a Hugging Face model and are exported again."""

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
    """The generation_config.json of ``folder``, or ``None``."""
    path = folder / GENERATION
    return path if path.is_file() else None


def with_generation_ends(facts: TokenFacts, path: Path | None) -> TokenFacts:
    """``facts`` with the extra end tokens that generation_config.json names: transformers stops at each of them, while
    config.json often names only one, which stays the first."""
    named = TokenFacts.of_import(_settings(path)).ends
    return replace(facts, ends=tuple(dict.fromkeys([*facts.ends, *named])))


def generation_settings(
    path: Path | None, facts: TokenFacts, unused: Iterable[int]
) -> tuple[dict[str, Any], list[str]]:
    """The content of an exported generation_config.json, and a line for each setting that training changed. Imported
    settings (``path``) are kept, except that the end and begin tokens of the training data (``facts``) replace those of
    the model, and that the ids ``unused``, which no token has, are never sampled."""
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
    """True if both name the same tokens; the order of several ends does not matter."""
    ids = [value if isinstance(value, list) else [value] for value in (before, now)]
    return sorted(ids[0], key=str) == sorted(ids[1], key=str)


def _settings(path: Path | None) -> dict[str, Any]:
    try:
        return {} if path is None else read_json(path)
    except CheckpointError:  # the model works without these settings
        return {}
