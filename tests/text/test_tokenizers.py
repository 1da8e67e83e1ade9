"""Every kind of tokenizer gives the ids of plain text and finds its end-of-text token."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.corpus import EOT, Naive, make_texts, make_tokenizer, tokenize, tokens_of, write_jsonl

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
tiktoken = pytest.importorskip("tiktoken")

from tinytron.errors import ConfigError, DataError  # noqa: E402
from tinytron.text.run_tokenizer import RunTokenizer  # noqa: E402
from tinytron.text.tokenizers import (  # noqa: E402
    BPE_END,
    encode_documents,
    first_bytes,
    from_file,
    from_hub,
    from_tiktoken,
    pieces_of,
    train_bpe,
)

TEXTS = make_texts(20)
PLUGIN = """
def tiny():
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    return {"name": "tiny", "pat_str": r"\\w+|\\W+", "mergeable_ranks": ranks, "special_tokens": {"<|endoftext|>": 300}}

ENCODING_CONSTRUCTORS = {"tiny_of_the_tests": tiny}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json, and a folder as transformers saves it, whose end-of-text token is another."""
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer(folder / "tokenizer.json", (EOT, "<stop>"))
    make_tokenizer(folder / "endless.json", ())
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<stop>")
    fast.save_pretrained(str(folder / "saved"))
    write_jsonl(folder / "c.jsonl", TEXTS)
    return folder


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An encoding of tiktoken that needs no download."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "tiktoken_ext").mkdir()
    (folder / "tiktoken_ext" / "tiny_of_the_tests.py").write_text(PLUGIN)
    sys.path.insert(0, str(folder))
    tiktoken.registry.ENCODING_CONSTRUCTORS = None  # look again
    yield
    sys.path.remove(str(folder))
    tiktoken.registry.ENCODING_CONSTRUCTORS = None


def _ids(encode: Any, texts: list[str]) -> list[list[int]]:
    return [np.asarray(ids).tolist() for ids in encode(texts)]


def test_files_and_folders_give_plain_ids_also_in_another_process(made: Path) -> None:
    naive = Naive(made / "tokenizer.json")
    expected = [ids[1:] for ids in naive.documents(TEXTS)]
    assert not any(naive.eot in ids for ids in expected)  # although one text spells it
    for tokenizer in (from_file(made / "tokenizer.json"), from_hub(str(made / "saved"))):
        assert _ids(tokenizer.encode, TEXTS) == expected
        assert _ids(pickle.loads(pickle.dumps(tokenizer.encode)), TEXTS) == expected
        assert tokenizer.vocab_size == naive.tokenizer.get_vocab_size()
        assert tokenizer.sha256 == hashlib.sha256(tokenizer.serialized).hexdigest()
    assert from_file(made / "tokenizer.json").serialized == (made / "tokenizer.json").read_bytes()


def test_a_tokenizer_in_python_gives_plain_ids(tmp_path: Path) -> None:
    class Letters(transformers.PreTrainedTokenizer):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(eos_token="<end>", **options)

        @property
        def vocab_size(self) -> int:
            return 26

        def get_vocab(self) -> dict[str, int]:
            return {chr(97 + i): i for i in range(26)} | {"<end>": 26}

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return self.get_vocab().get(token, 0)

    from tinytron.text.tokenizers import _Slow

    assert _ids(_Slow(Letters()), ["abz", "b"]) == [[0, 1, 25], [1]]


def test_the_end_of_text_token(made: Path) -> None:
    assert from_hub(str(made / "saved")).end_of_text() == ("<stop>", 1)  # its own
    file = from_file(made / "tokenizer.json")
    assert file.end_of_text() == (EOT, 0)  # a known one
    assert file.end_of_text("<stop>") == ("<stop>", 1)
    name = made / "tokenizer.json"
    with pytest.raises(
        ConfigError,
        match=rf"--eot_token <eot> is not a token of --tokenizer_path {name}; .* of <\|endoftext\|>, <stop>$",
    ):
        file.end_of_text("<eot>")
    with pytest.raises(
        ConfigError, match=r"no end-of-text token is known in --tokenizer_path .*; use --eot_position none"
    ):
        from_file(made / "endless.json").end_of_text()


def test_a_model_needs_as_many_tokens_as_its_tokenizer(made: Path) -> None:
    tokenizer = from_file(made / "tokenizer.json")
    RunTokenizer(tokenizer, None, False).check(tokenizer.vocab_size)
    with pytest.raises(ConfigError, match=f"has {tokenizer.vocab_size} tokens, but the model has --vocab_size"):
        RunTokenizer(tokenizer, None, False).check(tokenizer.vocab_size - 1)


@pytest.mark.usefixtures("plugin")
def test_tiktoken(made: Path, tmp_path: Path) -> None:
    tokenizer = from_tiktoken("tiny_of_the_tests")
    assert (tokenizer.vocab_size, tokenizer.end_of_text(), tokenizer.specials) == (301, (EOT, 300), {EOT: 300})
    assert _ids(tokenizer.encode, ["then", EOT]) == [[257, ord("n")], [ord(c) for c in EOT]]
    assert tokenizer.token_id("the") == 257
    assert tokenizer.token_id("no such token") is None
    for workers in (0, 2):  # a worker loads the plugin too
        out = tmp_path / str(workers)
        tokenize(made / "c.jsonl", None, out, "--encoding_name", "tiny_of_the_tests", "--num_proc", workers)
        expected = [[300, *tiktoken.get_encoding("tiny_of_the_tests").encode_ordinary(text)] for text in TEXTS]
        assert tokens_of(out) == [token for ids in expected for token in ids]
        assert not (out / "tokenizer.json").exists()
    with pytest.raises(
        ConfigError, match=r"--encoding_name tiny is not an encoding of tiktoken; use one of .*gpt2.*tiny_of"
    ):
        from_tiktoken("tiny")


def test_training(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 280)
    assert (tokenizer.get_vocab_size(), tokenizer.token_to_id(BPE_END)) == (280, 0)
    text = "never seen: ß\x00 \n\t 猫"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    with pytest.raises(
        ConfigError, match="a vocabulary of 256 is too small for the 256 bytes and an end-of-text token; use 4096"
    ):
        train_bpe(TEXTS, 256)
    assert list(first_bytes(["ab", "é", "c", "d"], 4)) == ["ab", "é"]
    assert list(first_bytes(["ab"], 4)) == ["ab"]


def test_documents_in_a_row() -> None:
    def encode(texts: list[str]) -> list[list[int]]:
        return [[ord(c) for c in text] for text in texts]

    tokens, lengths = encode_documents(["ab", "", "c"], encode, 7, "prepend", np.dtype("<u2"))
    assert (tokens.tolist(), lengths.tolist(), tokens.dtype) == ([7, 97, 98, 7, 7, 99], [3, 1, 2], np.uint16)
    tokens, _ = encode_documents(["ab", "", "c"], encode, 7, "append", np.dtype("<u4"))
    assert (tokens.tolist(), tokens.dtype) == ([97, 98, 7, 7, 99, 7], np.uint32)
    assert encode_documents([], encode, 7, "append", np.dtype("<u4"))[0].dtype == np.uint32


def test_what_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"--tokenizer_path .*broken.json: .*; give a tokenizer.json file"):
        from_file(tmp_path / "broken.json")
    with pytest.raises(DataError, match=r"--tokenizer_path .*gone.json: .*No such file"):
        from_file(tmp_path / "gone.json")
    with pytest.raises(DataError, match=r"--tokenizer_name nobody/nothing: .*; give a hub name, a local folder or"):
        from_hub("nobody/nothing")
    for name, load in (("tiktoken", from_tiktoken), ("transformers", from_hub)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf'the package {name} is needed .*pip install "tinytron\[data\]"'):
            load("x")


def _special_pieces(kind: str) -> Any:
    """A tokenizer in whose model the end-of-text token is a piece like others."""
    models, trainers, before = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    options = {"vocab_size": 200, "special_tokens": ["<unk>", "</s>"], "show_progress": False}
    if kind == "unigram":
        made, trainer = tokenizers.Tokenizer(models.Unigram()), trainers.UnigramTrainer(**options, unk_token="<unk>")
        made.pre_tokenizer, made.decoder = before.Metaspace(), tokenizers.decoders.Metaspace()
    else:
        model, of = {"word level": (models.WordLevel, trainers.WordLevelTrainer)}.get(
            kind, (models.WordPiece, trainers.WordPieceTrainer)
        )
        made, trainer = tokenizers.Tokenizer(model(unk_token="<unk>")), of(**options)
        made.pre_tokenizer = before.WhitespaceSplit()
    made.train_from_iterator([*TEXTS, "<eos>"], trainer)  # also as a word
    return made


@pytest.mark.parametrize("kind", ["unigram", "word level", "word piece"])
def test_text_that_spells_a_special_token_stays_text(kind: str, tmp_path: Path) -> None:
    made = _special_pieces(kind)
    made.save(str(tmp_path / "tokenizer.json"))
    found = from_file(tmp_path / "tokenizer.json")
    end = made.token_to_id("</s>")
    assert found.end_of_text() == ("</s>", end)
    texts = ["the </s> fox", "fox</s>dog", "</s>", "the</s> </s>lazy"]
    words = [made.token_to_id(token) for token in (EOT, "<eos>")]
    assert not set(words).intersection(*_ids(found.encode, [f"a {EOT} b", "a <eos> b"]))
    for encode in (found.encode, pickle.loads(pickle.dumps(found.encode))):
        ids = _ids(encode, texts)
        assert all(end not in row for row in ids)
        assert all(ids)
    # All other texts are as they were.
    plain = [text for text in TEXTS if EOT not in text]
    assert _ids(found.encode, plain) == [row.ids for row in made.encode_batch(plain, add_special_tokens=False)]


def _bpe_with_an_end(special: bool) -> Any:
    """A BPE whose merges spell ``</s>``, which is also an added token, and one more added token that text may spell."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"] if special else [])
    made.train_from_iterator(["fox </s> dog </s>"] * 20, trainer)
    made.add_tokens([EOT])
    return made


@pytest.mark.parametrize("special", [True, False])
def test_merges_and_added_tokens_do_not_make_an_end_of_text(special: bool, tmp_path: Path) -> None:
    made = _bpe_with_an_end(special)
    made.save(str(tmp_path / "tokenizer.json"))
    found = from_file(tmp_path / "tokenizer.json")
    ends = {made.token_to_id("</s>"), made.token_to_id(EOT)}
    assert None not in ends
    plain = made.encode_batch(["fox dog"], add_special_tokens=False)
    assert _ids(found.encode, ["fox dog"]) == [row.ids for row in plain]
    assert ends.intersection(*_ids(found.encode, [f"fox </s> {EOT} dog"])) == set()


def test_a_piece_that_the_configuration_names_as_the_end_is_one(tmp_path: Path) -> None:
    made = _special_pieces("word level")
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "fox"}))
    found = from_file(tmp_path / "tokenizer.json")
    end = made.token_to_id("fox")
    assert found.end_of_text() == ("fox", end)
    assert end not in _ids(found.encode, ["the fox"])[0]
    with pytest.raises(
        DataError, match=f"texts contain the token {made.token_to_id('the')}, which should only separate documents"
    ):
        encode_documents(["the fox"], found.encode, made.token_to_id("the"), "append", np.dtype("<u2"))


def test_a_long_text_is_encoded_in_pieces_with_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["short", " ".join(make_texts(30)), "also short"]
    bpe = train_bpe(texts, 300)
    longest: list[int] = []

    def encode(texts: list[str]) -> list[list[int]]:
        longest.append(max(map(len, texts)))
        return [made.ids for made in bpe.encode_batch(texts)]

    whole = encode_documents(texts, encode, 7, "append", np.dtype("<u2"))
    monkeypatch.setattr("tinytron.text.tokenizers.LONG_CHARS", 200)
    longest.clear()
    in_pieces = encode_documents(texts, encode, 7, "append", np.dtype("<u2"))
    assert max(longest) <= 200 < len(texts[1])
    for one, other in zip(whole, in_pieces, strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("text", ["x" * 1001, "a b" * 400, " " * 500, "\n\n word" * 90, ""])
def test_pieces_are_the_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinytron.text.tokenizers.LONG_CHARS", 100)
    pieces = list(pieces_of(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 100 for piece in pieces) or text == ""


def test_a_tokenizer_is_trained_on_no_more_of_a_long_text_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinytron.text.tokenizers.LONG_CHARS", 100)
    assert sum(map(len, first_bytes(["ab " * 1000], 250))) <= 300


def test_the_dropout_of_a_file_is_switched_off(made: Path, tmp_path: Path) -> None:
    content = json.loads((made / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "the quick brown fox"
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert len({tuple(library.encode(text).ids) for _ in range(30)}) > 1
    expected = _ids(from_file(made / "tokenizer.json").encode, [text])
    for encode in (
        from_file(tmp_path / "tokenizer.json").encode,
        from_hub(str(tmp_path / "tokenizer.json")).encode,
        pickle.loads(pickle.dumps(from_file(tmp_path / "tokenizer.json").encode)),
    ):
        assert _ids(encode, [text] * 30) == expected * 30
