"""Translates a tokenizer.json to the keys of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinytron.data.manifest import TOKENIZER
from tinytron.errors import ConfigError
from tinytron.interop.tokenizer import TokenizerFiles
from tinytron.text.tokenizer_files import TOKENIZER_CONFIG, read_tokenizer, token_text, vocabulary_of
from tinytron.utils.texts import without_bom

_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5  # llama_token_type
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_LLAMA3: "llama3", _LLAMA3.replace("{1,3}", ""): "qwen2"}  # patterns of the step before ByteLevel
_KNOWN = "ByteLevel alone, after Digits, or after the pattern of Llama 3 or Qwen 2"


def tokenizer_metadata(tokenizer: TokenizerFiles, vocab_size: int) -> dict[str, Any]:
    """The tokenizer keys of a model with ``vocab_size`` rows, for all ids up to the last one that has a token: token texts
    and types, merges, how texts are split, the tokens that begin and end them, and the chat template.

    Raises: ConfigError if the tokenizer is not a byte-level BPE, splits or changes texts in a way that llama.cpp cannot, or
    has no token that ends texts.
    """
    path = next((path for path in tokenizer.files if path.name == TOKENIZER), None)
    if path is None:
        known = "" if tokenizer.record is None else f" (the data was made with {tokenizer.record.name})"
        raise ConfigError(f"--gguf needs a {TOKENIZER}{known}, but found none; use --tokenizer path/to/{TOKENIZER}")
    try:
        content = read_tokenizer(path)
        vocabulary = vocabulary_of(content)
        model, added = content["model"], content.get("added_tokens") or []
        specials = {int(token["id"]): bool(token["special"]) for token in added}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}: {error}); use a {TOKENIZER}") from error
    pre = _pre_tokenizer(content, path)
    texts = {number: text for text, number in vocabulary.items() if number < vocab_size}
    ids = range(max(texts) + 1)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [texts.get(number, f"[UNUSED{number}]") for number in ids],
        "tokenizer.ggml.token_type": [_type(number, texts, specials) for number in ids],
        "tokenizer.ggml.merges": merges,
        **_special_tokens(tokenizer, vocabulary),
        **_chat_template(tokenizer.files),
    }


def _type(number: int, texts: dict[int, str], specials: dict[int, bool]) -> int:
    if number not in texts:
        return _UNUSED
    if number not in specials:
        return _NORMAL
    return _CONTROL if specials[number] else _USER


def _pre_tokenizer(content: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for the way ``path`` splits texts into words."""

    def refuse(value: str, rule: str) -> ConfigError:
        return ConfigError(f"--gguf: {path} has {value}, but llama.cpp {rule}; use another tokenizer")

    model = content["model"]
    if (kind := model.get("type", "BPE")) != "BPE" or model.get("byte_fallback"):
        shown = f"the model {kind}" if kind != "BPE" else "byte_fallback"
        raise refuse(shown, "gets only byte-level BPE from Tinytron")
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":  # llama.cpp does not normalize; most text is NFC
        raise refuse(f"the normalizer {normalizer.get('type')}", "has no normalizers")
    whole = content.get("pre_tokenizer") or {}
    steps = whole.get("pretokenizers", []) if whole.get("type") == "Sequence" else [whole]
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel":
        raise refuse(f"the pre-tokenizer {last.get('type')}", f"supports {_KNOWN}")
    if last.get("add_prefix_space"):
        raise refuse("add_prefix_space", "puts no space before a text")
    name = _split_name(before, bool(last.get("use_regex", True)), bool(model.get("ignore_merges")))
    if name is None:
        parts = [str(step.get("pattern", {}).get("Regex", step.get("type"))) for step in before]
        raise refuse(f"the pre-tokenizer {' and '.join([*parts, 'ByteLevel'])}", f"supports {_KNOWN}")
    return name


def _split_name(before: list[dict[str, Any]], words: bool, ignore_merges: bool) -> str | None:
    """The name for the steps ``before`` a ByteLevel that splits into GPT-2's words if ``words``. Tokenizers of Llama 3 that
    keep whole words of the vocabulary (``ignore_merges``) have their own name."""
    if not before and words and not ignore_merges:
        return "gpt-2"
    if len(before) != 1:
        return None
    (step,) = before
    if step.get("type") == "Digits":
        return "starcoder" if words and step.get("individual_digits") and not ignore_merges else None
    plain = step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
    family = _SPLITS.get(step.get("pattern", {}).get("Regex", "")) if plain and not words else None
    if family == "llama3":
        return "llama-bpe" if ignore_merges else "dbrx"
    return None if ignore_merges else family


def _special_tokens(tokenizer: TokenizerFiles, vocabulary: dict[str, int]) -> dict[str, Any]:
    """The ids that end, begin and pad texts, and whether a token is put before each text."""
    facts = tokenizer.facts
    if facts.end is None:
        raise ConfigError(
            "--gguf: no token is known that ends a text, and llama.cpp would use id 11; "
            f"use --tokenizer with a {TOKENIZER_CONFIG} that names an eos_token"
        )
    first = facts.end if facts.prepend else facts.first
    begins = next(number for number in (first, facts.begin, facts.end) if number is not None)
    config = _config(tokenizer.files)
    pad = facts.pad if facts.pad is not None else vocabulary.get(token_text(config.get("pad_token")) or "")
    unknown = vocabulary.get(token_text(config.get("unk_token")) or "")
    # A GGUF file has room for two more end tokens.
    names = ("eos", "eot", "eom")
    ids: dict[str, int | None] = {
        **dict(zip(names, facts.ends, strict=False)), "bos": begins, "padding": pad, "unknown": unknown,
    }  # fmt: skip
    found: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number is not None
    }
    return found | {"tokenizer.ggml.add_bos_token": first is not None, "tokenizer.ggml.add_eos_token": False}


def _config(files: tuple[Path, ...]) -> dict[str, Any]:
    path = next((path for path in files if path.name == TOKENIZER_CONFIG), None)
    try:
        content = {} if path is None else json.loads(without_bom(path.read_bytes()))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _chat_template(files: tuple[Path, ...]) -> dict[str, str]:
    """The template of a conversation; if a tokenizer_config.json names several, the default one."""
    found: Any = _config(files).get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    for path in files:
        if path.name == "chat_template.jinja":
            found = path.read_text(encoding="utf-8")
    return {"tokenizer.chat_template": found} if isinstance(found, str) and found else {}
