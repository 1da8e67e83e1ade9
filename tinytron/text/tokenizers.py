"""Tokenizers of every kind with one interface: from the hub, a tokenizer.json file, tiktoken, or trained by Tinytron.

All of them return the token ids of plain texts, without the special tokens that a template adds around them. Text that
spells a special token stays text, so that no document can contain an end-of-text token.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tinytron.errors import ConfigError, DataError
from tinytron.text.characters import CharacterEncoder, characters_of
from tinytron.text.tokenizer_files import (
    END_TOKENS,
    chat_template_next_to,
    default_template,
    named_end,
    named_tokens,
    usual_ends,
)
from tinytron.utils.optional import as_data_error, require_package
from tinytron.utils.texts import without_bom

BPE_END = END_TOKENS[0]
SMALLEST_BPE = 257  # the bytes and the end-of-text token
LONG_CHARS = 2**22  # a longer text is encoded in pieces
NEAR_CHARS = 2**12  # at the end of a piece, where a space to cut at is looked for
_GAP = re.compile(r"\S(?= \S)")
Kind = Literal["tokenizer_name", "encoding_name", "tokenizer_path", "train_bpe", "train_chars"]
Ids = Sequence[int] | npt.NDArray[Any]


class Encode(Protocol):
    """Returns the token ids of every text. Can be sent to another process."""

    def __call__(self, texts: list[str]) -> Sequence[Ids]:
        """One sequence of ids per text."""


@dataclass(frozen=True)
class TextTokenizer:
    """A loaded tokenizer.

    ``vocab_size`` is one more than its largest id, and ``unused`` are the smaller ids that no token has. ``specials`` are
    the ids of its special tokens, and ``end`` is its own end-of-text token, if it names one. ``token_id`` finds the id of
    any token. ``serialized`` is its tokenizer.json, or empty if it has no such form; ``sha256`` is the hash of the
    vocabulary. ``decode`` returns the text of ids, without special tokens. ``chat_template`` is its Jinja template for
    dialogues, if it has one, and ``named`` are the special tokens that a template knows by name (``bos_token``).
    """

    kind: Kind
    name: str
    encode: Encode
    vocab_size: int
    end: str | None
    specials: dict[str, int]
    token_id: Callable[[str], int | None]
    serialized: bytes
    sha256: str
    decode: Callable[[list[int]], str]
    unused: tuple[int, ...] = ()
    chat_template: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)

    def end_of_text(self, wanted: str | None = None) -> tuple[str, int]:
        """The token that separates documents, and its id: ``wanted``, or else the tokenizer's own, or else the first of
        ``END_TOKENS`` that it has. Raises: ConfigError naming tokens that it has if none of these works."""
        candidates = list(dict.fromkeys(t for t in (self.end, *END_TOKENS, *self.specials) if t and self._has(t)))
        for token in (wanted,) if wanted is not None else (self.end, *usual_ends(self.specials)):
            if token is not None and (number := self.token_id(token)) is not None:
                return token, number
        rule, advice = "no end-of-text token is known in", ["--eot_position none"]
        if wanted is not None:
            rule, advice = f"--eot_token {wanted} is not a token of", []
        if candidates:
            advice.insert(0, f"--eot_token with one of {', '.join(candidates[:8])}")
        raise ConfigError(f"{rule} --{self.kind} {self.name}; use {', or '.join(advice) or 'another tokenizer'}")

    def _has(self, token: str) -> bool:
        return self.token_id(token) is not None


# Encoders are small picklable objects.


@dataclass(frozen=True)
class _Fast:
    tokenizer: Any  # tokenizers.Tokenizer

    def __call__(self, texts: list[str]) -> Sequence[Ids]:
        # Twice as fast as the variant that also returns offsets into the text.
        return [made.ids for made in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "tokenizer", _plain(state["tokenizer"]))  # these settings are not pickled


@dataclass(frozen=True)
class _Slow:
    tokenizer: Any  # transformers.PreTrainedTokenizer

    def __call__(self, texts: list[str]) -> Sequence[Ids]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "split_special_tokens": True}
        ids: list[list[int]] = self.tokenizer(texts, verbose=False, **options)["input_ids"]
        return ids


@dataclass(frozen=True)
class _Tiktoken:
    encoding: Any  # tiktoken.Encoding

    def __call__(self, texts: list[str]) -> Sequence[Ids]:
        return [self.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]


def _plain(tokenizer: Any) -> Any:
    """Make ``tokenizer`` encode whole texts, read special tokens in them as text, and return the same ids every time (a
    file may still have the BPE-dropout of the training that it was made for)."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


# Loading.


def from_hub(name: str, cache_dir: str | None = None, trust_remote_code: bool = False) -> TextTokenizer:
    """A tokenizer from the Hugging Face hub, a local folder or a tokenizer.json file. Raises: DataError; ConfigError
    without the package."""
    transformers = require_package("transformers")
    with as_data_error(f"--tokenizer_name {name}", "give a hub name, a local folder or a tokenizer.json file"):
        if Path(name).is_file():
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=name)
        else:
            options: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    template = default_template(getattr(tokenizer, "chat_template", None))
    named = {key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    if getattr(tokenizer, "is_fast", False):
        backend = tokenizer.backend_tokenizer
        found = _of_backend("tokenizer_name", name, backend, backend.to_str().encode(), tokenizer.eos_token)
        return replace(found, chat_template=template, named=named)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    specials = {token: vocabulary[token] for token in tokenizer.all_special_tokens if token in vocabulary}
    digest = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()
    size = 1 + max(vocabulary.values())
    return TextTokenizer(
        "tokenizer_name", name, _Slow(tokenizer), size, tokenizer.eos_token, specials, vocabulary.get, b"", digest,
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)),
        _unused(vocabulary.values(), size), template, named,
    )  # fmt: skip


def from_file(path: Path, kind: Kind = "tokenizer_path", name: str | None = None) -> TextTokenizer:
    """The tokenizer of a tokenizer.json file, with the end-of-text token that a tokenizer_config.json next to it names.
    Raises: DataError; ConfigError without the package."""
    tokenizers = require_package("tokenizers")
    with as_data_error(f"--{kind} {path}", "give a tokenizer.json file"):
        content = without_bom(path.read_bytes())
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    found = _of_backend(kind, str(path) if name is None else name, tokenizer, content, named_end(path))
    return replace(found, chat_template=chat_template_next_to(path), named=named_tokens(path))


def from_tiktoken(name: str) -> TextTokenizer:
    """An encoding of tiktoken, or of one of its plugins. Raises: ConfigError with the known encodings for an unknown name;
    DataError if it cannot be loaded."""
    tiktoken = require_package("tiktoken")
    with as_data_error(f"--encoding_name {name}"):
        known = sorted(tiktoken.list_encoding_names())
    if name not in known:
        raise ConfigError(f"--encoding_name {name} is not an encoding of tiktoken; use one of {', '.join(known)}")
    with as_data_error(
        f"--encoding_name {name}", "check the network, because it is downloaded, or use another tokenizer"
    ):
        encoding = tiktoken.get_encoding(name)
    specials = {token: encoding.encode_single_token(token) for token in sorted(encoding.special_tokens_set)}

    def token_id(token: str) -> int | None:
        try:
            return int(encoding.encode_single_token(token))
        except KeyError:
            return None

    digest = hashlib.sha256(json.dumps([encoding._pat_str, sorted(specials.items())]).encode())
    taken = set(specials.values())
    for token in encoding.token_byte_values():
        digest.update(len(token).to_bytes(4, "little") + token)
        taken.add(encoding.encode_single_token(token))
    size, sha256, hidden = encoding.max_token_value + 1, digest.hexdigest(), set(specials.values())

    def decode(ids: list[int]) -> str:
        return str(encoding.decode([number for number in ids if number not in hidden]))

    return TextTokenizer(
        "encoding_name", name, _Tiktoken(encoding), size, None, specials, token_id, b"", sha256, decode,
        _unused(taken, size),
    )  # fmt: skip


def _of_backend(kind: Kind, name: str, tokenizer: Any, serialized: bytes, end: str | None) -> TextTokenizer:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = tokenizer.get_added_tokens_decoder()
    specials = {token.content: number for number, token in sorted(added.items()) if token.special}
    sha256, size = hashlib.sha256(serialized).hexdigest(), 1 + max(vocabulary.values(), default=-1)
    encode: Encode
    is_by_words = type(tokenizer.model).__name__ == "WordLevel"  # do not parse other files, often of megabytes
    if is_by_words and (characters := characters_of(json.loads(serialized))) is not None:
        encode = CharacterEncoder(name, characters)
    else:
        plain = _without_special_pieces(tokenizer, {*specials, *END_TOKENS, *([end] if end else [])})
        encode = _Fast(_plain(plain))
    return TextTokenizer(
        kind, name, encode, size, end, specials, vocabulary.get, serialized, sha256, tokenizer.decode,
        _unused(vocabulary.values(), size),
    )  # fmt: skip


def _unused(ids: Iterable[int], size: int) -> tuple[int, ...]:
    return tuple(sorted(set(range(size)).difference(ids)))


def _without_special_pieces(tokenizer: Any, specials: Collection[str]) -> Any:
    """``tokenizer``, or a copy in which text that spells one of ``specials`` does not become its id: without such pieces in
    the model, without merges that lead to them, and with all added tokens of these names special. The token for unknown
    text stays."""
    content = json.loads(tokenizer.to_str())
    model, vocabulary = content["model"], content["model"].get("vocab") or {}
    plain = [
        token
        for token in content.get("added_tokens") or []
        if token["content"] in specials and not token.get("special")
    ]
    for token in plain:
        token["special"] = True
    if model.get("type") == "BPE" and not model.get("ignore_merges"):  # only merges lead to pieces
        merges = [m for m in model["merges"] if "".join(m.split(" ") if isinstance(m, str) else m) not in specials]
        if not plain and len(merges) == len(model["merges"]):
            return tokenizer
        model["merges"] = merges
        return type(tokenizer).from_str(json.dumps(content))
    pieces = list(vocabulary) if isinstance(vocabulary, dict) else [piece for piece, _ in vocabulary]
    unknown = model.get("unk_token") if model.get("unk_id") is None else pieces[model["unk_id"]]
    hidden = {piece for piece in pieces if piece in specials and piece != unknown}
    if not hidden:
        return type(tokenizer).from_str(json.dumps(content)) if plain else tokenizer

    def renamed(piece: str) -> str:
        return f"\ue000{piece}\ue000" if piece in hidden else piece

    if isinstance(vocabulary, dict):
        model["vocab"] = {renamed(piece): number for piece, number in vocabulary.items()}
    else:
        model["vocab"] = [[renamed(piece), score] for piece, score in vocabulary]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in hidden]
    content["post_processor"] = None  # it may refer to them
    return type(tokenizer).from_str(json.dumps(content))


# Training.


def train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """A ``tokenizers.Tokenizer``: byte-level BPE (GPT-2, section 2.2), so no text is out of vocabulary, and tokens decode
    to exactly the original bytes. Its end-of-text token is ``BPE_END``. Raises: ConfigError for a vocabulary too small for
    the bytes, or without the package."""
    if vocab_size < SMALLEST_BPE:
        raise ConfigError(
            f"a vocabulary of {vocab_size} is too small for the 256 bytes and an end-of-text token; use 4096"
        )
    tokenizers = require_package("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BPE_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first texts, long ones in pieces, up to the one that reaches ``limit`` bytes of UTF-8."""
    for piece in itertools.chain.from_iterable(map(pieces_of, texts)):
        yield piece
        limit -= len(piece.encode("utf-8", "replace"))
        if limit <= 0:
            return


# Encoding.


def pieces_of(text: str) -> Iterator[str]:
    """``text``, in pieces if it is longer than ``LONG_CHARS``: tokenizers take 50 bytes of memory for each character. It is
    cut before a space between two words, where byte-level BPE cuts too; if no space is near, anywhere."""
    start = 0
    while len(text) - start > LONG_CHARS:
        stop = start + LONG_CHARS
        stop = max((gap.end() for gap in _GAP.finditer(text, stop - NEAR_CHARS, stop)), default=stop)
        yield text[start:stop]
        start = stop
    yield text[start:]


def encode_all(texts: list[str], encode: Encode, dtype: np.dtype[Any]) -> list[npt.NDArray[Any]]:
    """The token ids of every text, however long."""
    if max(map(len, texts), default=0) <= LONG_CHARS:
        return [np.asarray(ids, dtype) for ids in encode(texts)]
    parts = [[np.asarray(encode([piece])[0], dtype) for piece in pieces_of(text)] for text in texts]
    return [np.concatenate(of_one) for of_one in parts]


def encode_documents(
    texts: list[str], encode: Encode, eot: int | None, position: str, dtype: np.dtype[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint32]]:
    """The documents' token ids, concatenated, with ``eot`` before (``prepend``) or after (``append``) each document unless
    it is ``None``, and their lengths including that token. Shapes: [tokens] of ``dtype``,
    [documents]. Raises: DataError for a text that contains ``eot``."""
    ids = encode_all(texts, encode, dtype)
    check_no_end(ids, eot)
    if eot is None:
        row = ids
        lengths = np.array([len(made) for made in row], np.uint32)
    else:
        separator = np.array([eot], dtype)
        pairs = (((separator, made) if position == "prepend" else (made, separator)) for made in ids)
        row = [array for pair in pairs for array in pair]
        lengths = np.array([len(made) + 1 for made in ids], np.uint32)
    return (np.concatenate(row) if row else np.empty(0, dtype)), lengths


def check_no_end(ids: Iterable[npt.NDArray[Any]], eot: int | None) -> None:
    """Raises: DataError if a text's ``ids`` contain ``eot``."""
    if eot is not None and any(bool((made == eot).any()) for made in ids):
        raise DataError(
            f"texts contain the token {eot}, which should only separate documents; use --eot_token with a special "
            "token, or --eot_position none"
        )
