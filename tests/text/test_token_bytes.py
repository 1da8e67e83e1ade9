"""The bytes of every token id: what decoding gives, without the package that decodes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.corpus import EOT, make_texts, make_tokenizer
from tinytron.errors import DataError
from tinytron.text.run_tokenizer import TOKENIZER
from tinytron.text.token_bytes import token_bytes, token_bytes_of_data

tokenizers = pytest.importorskip("tokenizers")
TEXTS = [text.replace(EOT, "") for text in make_texts(30)]


def sentence_piece(model: Any, special: str = "<unk>") -> Any:
    """As Llama's: spaces as U+2581, bytes for what is not in the vocabulary."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([special])
    return tokenizer


def byte_fallback() -> Any:
    alphabet = sorted(set("".join(TEXTS).replace(" ", "\u2581")) - {"猫", "🙂"})
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet, "\u2581\u2581", "th"]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [("\u2581", "\u2581"), ("t", "h")]
    return sentence_piece(tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))


def unigram(falls_back: bool = True, space: str = "\u2581") -> Any:
    pieces = [*sorted(set("".join(TEXTS)) - {" ", "猫"}), space, "\u2581the", "own"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)] if falls_back else []
    model = tokenizers.models.Unigram(
        [("<unk>", 0.0), *((piece, -float(len(piece))) for piece in pieces)], 0, falls_back
    )
    return sentence_piece(model)


def byte_level(folder: Path) -> Any:
    tokenizer = tokenizers.Tokenizer.from_file(str(make_tokenizer(folder / "made.json")))
    tokenizer.no_truncation()
    tokenizer.add_tokens(["quick"])  # not special
    return tokenizer


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "unigram"])
def test_they_add_up_to_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer = {"byte level": lambda: byte_level(tmp_path), "byte fallback": byte_fallback, "unigram": unigram}[kind]()
    sizes = token_bytes(tokenizer.to_str().encode())
    assert sizes is not None
    assert len(sizes) == tokenizer.get_vocab_size()
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        assert sum(sizes[i] for i in ids) == len(text.encode())
    special = EOT if kind == "byte level" else "<unk>"
    assert sizes[tokenizer.token_to_id(special)] == 0


def test_an_added_token_counts_the_bytes_of_its_text(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    tokenizer.add_tokens(["naïve"])
    sizes = token_bytes(tokenizer.to_str().encode())
    assert sizes is not None
    assert (sizes[tokenizer.token_to_id("quick")], sizes[tokenizer.token_to_id("naïve")]) == (5, 6)


def test_tokens_that_do_not_say_their_bytes() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    assert token_bytes(tokenizer.to_str().encode()) is None


def test_characters_without_a_token_leave_no_figure(tmp_path: Path) -> None:
    """Unknown text would count nothing, and a space of three bytes three."""
    tokenizer = unigram(falls_back=False)
    assert tokenizer.decode(tokenizer.encode("a 猫").ids) != "a 猫"
    assert token_bytes(tokenizer.to_str().encode()) is None
    assert token_bytes(unigram(space="#").to_str().encode()) is None
    content = json.loads(make_tokenizer(tmp_path / "made.json").read_text())
    content["model"]["vocab"].pop("Ā")  # the byte 0
    assert token_bytes(json.dumps(content).encode()) is None


@pytest.mark.parametrize(
    ("normalizer", "exact"), [("NFC", True), ("NFKC", False), ("NFD", False), ("Lowercase", False)]
)
def test_text_that_is_changed_first_leaves_no_figure(normalizer: str, exact: bool, tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    made = getattr(tokenizers.normalizers, normalizer)()
    for each in (made, tokenizers.normalizers.Sequence([tokenizers.normalizers.NFC(), made])):
        tokenizer.normalizer = each
        assert (token_bytes(tokenizer.to_str().encode()) is not None) == exact


def test_the_tokenizer_of_all_shards(tmp_path: Path) -> None:
    for name in ("web", "code", "bare"):
        (tmp_path / name).mkdir()
    for name in ("web", "code"):
        make_tokenizer(tmp_path / name / TOKENIZER)

    def found(*names: str) -> list[int] | None:
        sources = [{"name": name, "path": name, "weight": 1} for name in names]
        (tmp_path / "mixture.json").write_text(json.dumps({"sources": sources}))
        return token_bytes_of_data(str(tmp_path / "mixture.json"))

    expected = token_bytes((tmp_path / "web" / TOKENIZER).read_bytes())
    assert token_bytes_of_data(str(tmp_path / "web")) == expected == found("web", "code")
    assert token_bytes_of_data(None) is token_bytes_of_data(str(tmp_path / "bare")) is found("web", "bare") is None
    make_tokenizer(tmp_path / "code" / TOKENIZER, (EOT, "<more>"))
    assert found("web", "code") is None


@pytest.mark.parametrize("content", ["", "[]", '{"model": {}}', '{"model": {"vocab": {}}, "decoder": 3}'])
def test_a_damaged_tokenizer(content: str, tmp_path: Path) -> None:
    (tmp_path / TOKENIZER).write_text(content)
    with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer \(.*\); tokenize again with --overwrite"):
        token_bytes_of_data(str(tmp_path))
    shutil.rmtree(tmp_path)
