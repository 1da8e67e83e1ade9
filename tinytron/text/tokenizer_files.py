"""Reads what a tokenizer's files say about its tokens, without the package that made them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tinytron.data.manifest import TOKENIZER
from tinytron.utils.texts import without_bom

TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<eot>")  # used if a tokenizer names none


def usual_ends(specials: Collection[str]) -> list[str]:
    """``END_TOKENS``, with those in ``specials`` first: an ordinary word of the vocabulary is the last resort."""
    return sorted(END_TOKENS, key=lambda token: token not in specials)


def read_tokenizer(path: Path) -> dict[str, Any]:
    """The content of a tokenizer.json. Raises: OSError; ValueError if it is not JSON."""
    content: dict[str, Any] = json.loads(without_bom(path.read_bytes()))
    return content


def vocabulary_of(content: Mapping[str, Any]) -> dict[str, int]:
    """The tokens in the ``content`` of a tokenizer.json, including added ones, and their ids. Raises: ValueError, KeyError,
    TypeError or AttributeError if the file has another form."""
    vocab = content["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((piece, number) for number, (piece, *_) in enumerate(vocab))
    tokens = {str(token): int(number) for token, number in pairs}
    for added in content.get("added_tokens") or []:
        tokens.setdefault(str(added.get("content", f"<{added['id']}>")), int(added["id"]))
    return tokens


def read_vocabulary(path: Path) -> dict[str, int]:
    """``vocabulary_of`` the tokenizer.json ``path``. Raises: the same as ``read_tokenizer`` and ``vocabulary_of``."""
    return vocabulary_of(read_tokenizer(path))


def specials_of(content: Mapping[str, Any]) -> set[str]:
    """The special tokens in the ``content`` of a tokenizer.json. Raises: the same as ``vocabulary_of``."""
    return {str(added.get("content")) for added in content.get("added_tokens") or [] if added.get("special")}


def token_text(value: Any) -> str | None:
    """The text of a token in tokenizer_config.json, which is a text or an object with its ``content``."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def named_end(path: Path) -> str | None:
    """The ``eos_token`` that the tokenizer_config.json next to a tokenizer.json names, or ``None``."""
    return token_text(_config_next_to(path).get("eos_token"))


def named_tokens(path: Path) -> dict[str, str]:
    """The special tokens that the tokenizer_config.json next to a tokenizer.json names, such as ``bos_token``."""
    config = _config_next_to(path)
    found = {key: token_text(config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {key: token for key, token in found.items() if token is not None}


def chat_template_next_to(path: Path) -> str | None:
    """The chat template in chat_template.jinja or tokenizer_config.json next to a tokenizer.json, or ``None``."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (path.parent / CHAT_TEMPLATE).read_text(encoding="utf-8")
    return default_template(_config_next_to(path).get("chat_template"))


def default_template(value: Any) -> str | None:
    """The template for dialogues without tools: ``value``, or of several named ones ``default``."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    found = value.get("default") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _config_next_to(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(without_bom((path.parent / TOKENIZER_CONFIG).read_bytes()))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def leading_id(path: Path) -> int | None:
    """The id that the post-processor of the tokenizer.json ``path`` puts before every text, or ``None``. In transformers 5
    it alone decides, whatever ``add_bos_token`` in tokenizer_config.json says. Raises: the same as ``read_vocabulary``."""
    return _first_of(read_tokenizer(path).get("post_processor"))


def _first_of(processor: dict[str, Any] | None) -> int | None:
    """The id that a post-processor puts first."""
    if processor is None:
        return None
    kind = processor["type"]
    if kind == "Sequence":  # each processor works on the result of the previous one
        found = [number for part in processor["processors"] if (number := _first_of(part)) is not None]
        return found[-1] if found else None
    if kind in ("BertProcessing", "RobertaProcessing"):
        return int(processor["cls"][1])
    if kind == "TemplateProcessing" and "SpecialToken" in (first := processor["single"][0]):
        return int(processor["special_tokens"][first["SpecialToken"]["id"]]["ids"][0])
    return None


def without_tokens(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a post-processor that put no tokens around a text, such as ``ByteLevel``."""
    if processor is None or processor["type"] in ("BertProcessing", "RobertaProcessing", "TemplateProcessing"):
        return []
    if processor["type"] == "Sequence":
        return [kept for part in processor["processors"] for kept in without_tokens(part)]
    return [processor]


def tokenizer_file(place: Path) -> Path:
    """The tokenizer.json that ``place`` is or contains."""
    return place / TOKENIZER if place.is_dir() else place
