"""``--train_chars``: a token for each character, from text to generation and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

import tokenizers

from tests.helpers.corpus import contents, tokenize, tokens_of, write_jsonl
from tests.helpers.runs import TINY, run_well
from tinytron.cli.main import main
from tinytron.data.manifest import read_manifest
from tinytron.errors import ConfigError, DataError
from tinytron.text.characters import characters_of, train_characters
from tinytron.text.run_tokenizer import find_tokenizer
from tinytron.text.token_bytes import token_bytes
from tinytron.text.tokenizers import BPE_END, TextTokenizer, from_file

TEXTS = ["To be,\r\nor not\tto be: é 猫 🙂\x00", "nothing <|endoftext|> ends", "e\u0301 is not é"]
ALPHABET = sorted(set("".join(TEXTS)))


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, TextTokenizer]:
    path = tmp_path / "tokenizer.json"
    path.write_text(train_characters(TEXTS, BPE_END).to_str(), encoding="utf-8")
    return path, from_file(path)


def test_every_character_is_one_token_and_comes_back(made: tuple[Path, TextTokenizer]) -> None:
    path, tokenizer = made
    assert (tokenizer.vocab_size, tokenizer.specials) == (len(ALPHABET) + 1, {BPE_END: len(ALPHABET)})
    encoded = tokenizer.encode([*TEXTS, ""])
    assert [list(ids) for ids in encoded] == [[ALPHABET.index(c) for c in text] for text in (*TEXTS, "")]
    assert [tokenizer.decode([int(i) for i in ids]) for ids in encoded] == [*TEXTS, ""]
    library = tokenizers.Tokenizer.from_file(str(path))
    library.encode_special_tokens = True  # text that spells a special token is text
    assert [library.encode(text).ids for text in TEXTS] == [list(ids) for ids in encoded[:-1]]
    assert token_bytes(path.read_bytes()) == [*(len(c.encode()) for c in ALPHABET), 0]


@pytest.mark.parametrize("missing", ["z", "ñ", "\ud800", "\U0010ffff", "\x01"])
def test_other_characters_are_an_error(made: tuple[Path, TextTokenizer], missing: str) -> None:
    path, tokenizer = made
    with pytest.raises(DataError, match=rf"\(U\+{ord(missing):04X}\) is not one of the {len(ALPHABET)} characters of"):
        tokenizer.encode(["not", f"no{missing}t"])
    if missing == "z":
        library = tokenizers.Tokenizer.from_file(str(path))
        with pytest.raises(Exception, match="Missing"):  # other programs do not drop it in silence either
            library.encode("noz")


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file["model"].update(unk_token="e"),
        lambda file: file["model"]["vocab"].update({"to": 99}),
        lambda file: file.update(normalizer={"type": "Lowercase"}),
        lambda file: file.update(pre_tokenizer={"type": "Whitespace"}),
        lambda file: file.update(pre_tokenizer=None),
        lambda file: file["model"].update(type="WordPiece"),
        lambda file: file.pop("model"),
    ],
)
def test_other_tokenizers_are_left_to_the_library(change: Any) -> None:
    file = json.loads(train_characters(TEXTS, None).to_str())
    assert characters_of(file) == {character: number for number, character in enumerate(ALPHABET)}
    change(file)
    assert characters_of(file) is None


def test_shards_have_all_characters_of_both_splits(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "train.jsonl", TEXTS)
    held_out = write_jsonl(tmp_path / "val.jsonl", ["only here: ü"])
    flags = (texts, None, tmp_path / "out", "--train_chars", "--val_path", held_out, "--num_proc", 2)
    manifest = tokenize(*flags).manifest
    assert manifest is not None
    alphabet = sorted(set("".join((*TEXTS, "only here: ü"))))
    end = len(alphabet)
    assert (manifest.tokenizer.kind, manifest.tokenizer.name) == ("train_chars", "true")
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.eot_id) == (end + 1, end)
    assert tokens_of(tmp_path / "out") == [i for text in TEXTS for i in (end, *map(alphabet.index, text))]
    assert tokens_of(tmp_path / "out", "val") == [end, *map(alphabet.index, "only here: ü")]
    assert "--train_chars true" in manifest.command

    before = contents(tmp_path / "out")
    assert not tokenize(*flags).fresh
    assert contents(tmp_path / "out") == before
    with pytest.raises(ConfigError, match="--train_bpe 300, where the folder has --train_chars true"):
        tokenize(*flags[:3], "--train_bpe", 300, *flags[4:], "--token_dtype", "uint16")


def test_without_a_token_between_documents_there_are_only_characters(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    tokenize(texts, None, tmp_path / "out", "--train_chars", "--eot_position", "none")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.eot_id) == (len(ALPHABET), None)
    assert tokens_of(tmp_path / "out") == [ALPHABET.index(c) for text in TEXTS for c in text]
    found = find_tokenizer(str(tmp_path / "out"))
    assert found.prompt_ids("to") == [ALPHABET.index("t"), ALPHABET.index("o")]
    with pytest.raises(ConfigError, match="the prompt is empty"):
        found.prompt_ids("")


def test_two_tokenizers_are_too_many(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--train_bpe and --train_chars are too many"):
        tokenize(tmp_path / "a.jsonl", None, tmp_path, "--train_chars", "--train_bpe", 300)
    with pytest.raises(ConfigError, match=r"no tokenizer given; give one of .*--train_chars"):
        tokenize(tmp_path / "a.jsonl", None, tmp_path, "--no-train_chars")


def test_a_model_of_characters_generates_and_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"{number}: to be or not to be, that is the question: " * 4 for number in range(30)]
    data = tmp_path / "data"
    tokenize(write_jsonl(tmp_path / "a.jsonl", texts), None, data, "--train_chars", "--val_fraction", 0.2)
    size = 1 + len(set("".join(texts)))
    flags = (*TINY, "--vocab_size", size, "--dataset_path", data, "--do_val", "--max_steps", 2)
    run_well(*(flag for flag in flags if flag != "--use_mock_data"), cwd=tmp_path)
    (folder,) = (tmp_path / "log").iterdir()
    assert "bits_per_byte" in (folder / "log.jsonl").read_text()

    generate = ["generate", "--checkpoint", str(folder), "--max_new_tokens", "5"]
    assert main([*generate, "--prompt", "to be"]) == 0
    assert "to be" in capsys.readouterr().out
    assert main([*generate, "--prompt", "TO"]) == 2
    error = capsys.readouterr().err
    assert "'T' (U+0054) is not one of the" in error
    assert error.count("\n") == 1

    transformers = pytest.importorskip("transformers")
    out = tmp_path / "hf"
    assert main(["export", "--checkpoint", str(folder), "--out", str(out)]) == 0
    opened, own = transformers.AutoTokenizer.from_pretrained(str(out)), find_tokenizer(str(data))
    assert opened("to be").input_ids == own.prompt_ids("to be")
    assert opened.decode(own.ids("to be"), clean_up_tokenization_spaces=False) == "to be"
