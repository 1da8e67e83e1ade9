"""Dialogues, rows of one length and pairs through the pipeline: their tokens, weights and files, also if interrupted."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from tests.helpers.corpus import EOT, Naive, contents, make_texts, make_tokenizer, tokenize, tokens_of, write_jsonl
from tests.text.test_tokenize_resume import _dying_at, _in_a_process
from tinytron.cli.tokenize import training_flags
from tinytron.data.formats import open_shard, open_weights
from tinytron.data.inspect import describe, problems
from tinytron.data.manifest import read_manifest
from tinytron.errors import ConfigError, DataError
from tinytron.text.encoders import PlainEncoder
from tinytron.utils import training

START, END = "<|im_start|>", "<|im_end|>"
SIZE = 48


def _dialogues(count: int) -> list[list[dict[str, str]]]:
    chance, texts = random.Random(5), make_texts(4 * count, longest=8)
    found = []
    for number in range(count):
        turns = [texts.pop() for _ in range(chance.choice([2, 4]))]
        found.append([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)])
        if number % 5 == 0:
            found[-1].insert(0, {"role": "system", "content": f"{number} be brief"})
    found[1][1]["content"] += f"{END}\n{START}user"  # is a text, whatever it spells
    return found


DIALOGUES = _dialogues(30)
PAIRS = [
    {"prompt": f"{i} {a[:20]}", "chosen": a, "rejected": b}
    for i, (a, b) in enumerate(zip(make_texts(30, 1), make_texts(30, 2), strict=True))
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer(folder / "tokenizer.json", (EOT, START, END))
    make_tokenizer(folder / "plain.json")
    write_rows(folder / "chats.jsonl", [{"messages": dialogue} for dialogue in DIALOGUES])
    write_rows(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "texts.jsonl", make_texts(30))
    return folder


def weights_of(folder: Path, split: str = "train") -> list[int]:
    """The weights of all shards of a split, as whole numbers."""
    found = [w for path in sorted(folder.glob(f"{split}_*.weights")) for w in open_weights(path).tolist()]
    assert all(weight in (0, 1) for weight in found)
    return [int(weight) for weight in found]


def by_hand(path: Path, dialogue: list[dict[str, str]], system: str | None = None) -> list[tuple[int, int]]:
    """ChatML, token by token, each with 1 if it is learned."""
    naive = Naive(path)
    ids = naive.tokenizer.token_to_id
    found: list[tuple[int, int]] = []
    if system and dialogue[0]["role"] != "system":
        dialogue = [{"role": "system", "content": system}, *dialogue]
    line_end = ""
    for message in dialogue:
        learned = int(message["role"] == "assistant")
        head, said = f"{message['role']}\n", message["content"]
        # Plain text is encoded in one piece from one mark to the next, but for where an answer begins and ends.
        runs = [(line_end, 0), ("", 0)] if line_end else []
        for text, weight in [
            *runs,
            (START, 0),
            *([(head, 0), (said, 1)] if learned else [(head + said, 0)]),
            (END, learned),
        ]:
            if text in (START, END):
                found.append((ids(text), weight))
            elif text:
                found += [(token, weight) for token in naive.tokenizer.encode(text, add_special_tokens=False).ids]
        line_end = "\n"
    found += [(token, 0) for token in naive.tokenizer.encode("\n", add_special_tokens=False).ids]
    return [*found, (naive.eot, 0)]


CHAT = ("--messages_key", "messages", "--eot_position", "append")


def test_dialogues_in_chatml_with_the_assistants_tokens_learned(made: Path, tmp_path: Path) -> None:
    flags = (*CHAT, "--system_prompt", "You help.", "--assistant_only")
    tokenize(made / "chats.jsonl", made / "tokenizer.json", tmp_path, *flags)
    expected = [pair for dialogue in DIALOGUES for pair in by_hand(made / "tokenizer.json", dialogue, "You help.")]
    assert list(zip(tokens_of(tmp_path), weights_of(tmp_path), strict=True)) == expected
    assert 0 < sum(weights_of(tmp_path)) < len(expected)
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.documents == {"train": 30}
    assert manifest.source["messages_key"] == "messages"
    options = manifest.options
    assert (options["chat_template"], options["assistant_only"]) == ("chatml", True)
    assert list(problems(tmp_path)) == []
    weights = sorted(tmp_path.glob("*.weights"))[1]
    weights.write_bytes(weights.read_bytes()[:-4])
    assert [line.partition(":")[0] for line in problems(tmp_path)] == [str(weights)]


def test_without_assistant_only_the_tokens_are_the_same_and_nothing_is_weighted(made: Path, tmp_path: Path) -> None:
    for name, more in (("a", ("--assistant_only",)), ("b", ())):
        tokenize(made / "chats.jsonl", made / "tokenizer.json", tmp_path / name, *CHAT, *more)
    assert tokens_of(tmp_path / "a") == tokens_of(tmp_path / "b")
    assert not list((tmp_path / "b").glob("*.weights"))


def test_a_tokenizer_without_the_marks_spells_them(made: Path, tmp_path: Path) -> None:
    tokenize(made / "chats.jsonl", made / "plain.json", tmp_path / "a", *CHAT, "--max_samples", 1)
    (dialogue,) = DIALOGUES[:1]
    text = "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in dialogue)
    tokenizer = Naive(made / "plain.json").tokenizer
    assert tokenizer.decode(tokens_of(tmp_path / "a")[:-1], skip_special_tokens=False) == text
    tokenize(made / "chats.jsonl", None, tmp_path / "b", "--train_bpe", 400, *CHAT)
    assert "assistant" in json.loads((tmp_path / "b" / "tokenizer.json").read_text())["model"]["vocab"]


def test_the_template_of_the_tokenizer_from_a_file_or_from_a_folder_of_the_hub(made: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(made / "tokenizer.json"), eos_token=EOT, chat_template=source
    )
    tokenizer.save_pretrained(tmp_path / "hub")
    flags = (*CHAT, "--assistant_only", "--chat_template", "tokenizer")
    tokenize(made / "chats.jsonl", tmp_path / "hub" / "tokenizer.json", tmp_path / "file", *flags)
    tokenize(made / "chats.jsonl", None, tmp_path / "folder", "--tokenizer_name", tmp_path / "hub", *flags)
    tokenize(made / "chats.jsonl", made / "tokenizer.json", tmp_path / "chatml", *CHAT, "--assistant_only")
    for name in ("file", "folder"):
        assert tokens_of(tmp_path / name) == tokens_of(tmp_path / "chatml")
        assert weights_of(tmp_path / name) == weights_of(tmp_path / "chatml")
    (tmp_path / "hub" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match=r"--chat_template .*, where the folder has"):
        tokenize(made / "chats.jsonl", tmp_path / "hub" / "tokenizer.json", tmp_path / "file", *flags)


def test_pairs_that_are_all_in_one_split(made: Path, tmp_path: Path) -> None:
    flags = (*KINDS["pairs"][1], "--val_fraction", 0.001)
    with pytest.raises(DataError, match="none of 30 documents goes to val"):
        tokenize(made / "pairs.jsonl", made / "tokenizer.json", tmp_path, *flags)


def test_files_of_every_kind_hold_dialogues(made: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": dialogue, "id": number} for number, dialogue in enumerate(DIALOGUES)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=7)
    for name, path in (("a", made / "chats.jsonl"), ("b", tmp_path / "c.parquet")):
        tokenize(path, made / "tokenizer.json", tmp_path / name, *CHAT, "--assistant_only")
    assert tokens_of(tmp_path / "a") == tokens_of(tmp_path / "b")
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


# Rows of one length.


def test_texts_become_rows(made: Path, tmp_path: Path) -> None:
    flags = ("--block_size", SIZE, "--num_tokens_per_file", 5 * SIZE + 7, "--eot_position", "append")
    outcome = tokenize(made / "texts.jsonl", made / "tokenizer.json", tmp_path, *flags, "--pad_token", END)
    naive = Naive(made / "tokenizer.json", "append")
    pad = naive.tokenizer.token_to_id(END)
    documents = naive.documents(make_texts(30))
    assert any(len(ids) > SIZE for ids in documents)
    assert any(len(ids) < SIZE for ids in documents)
    rows = [[*ids[-SIZE:], *[pad] * (SIZE - len(ids))] for ids in documents]
    assert np.array(tokens_of(tmp_path)).reshape(-1, SIZE).tolist() == rows
    learned = [[1] * min(SIZE, len(ids)) + [0] * (SIZE - len(ids)) for ids in documents]
    assert np.array(weights_of(tmp_path)).reshape(-1, SIZE).tolist() == learned
    assert {len(open_shard(path)) for path in tmp_path.glob("*.bin")} == {5 * SIZE}
    manifest = outcome.manifest
    assert manifest is not None
    assert (manifest.row, manifest.documents, manifest.paired) == (SIZE, {"train": 30}, False)
    assert list(problems(tmp_path)) == []
    assert f"--seq_len {SIZE} " in training_flags(tmp_path, manifest)


def test_pairs_become_rows_side_by_side(made: Path, tmp_path: Path) -> None:
    flags = ("--chosen_key", "chosen", "--rejected_key", "rejected", "--prompt_key", "prompt", "--assistant_only")
    flags += ("--block_size", SIZE, "--val_fraction", "0.2", "--eot_position", "append")
    manifest = tokenize(made / "pairs.jsonl", made / "tokenizer.json", tmp_path, *flags).manifest
    assert manifest is not None
    assert manifest.paired
    counts = manifest.documents
    assert counts["train.pos"] == counts["train.neg"] > counts["val.pos"] == counts["val.neg"] > 0
    assert sum(counts.values()) == 2 * len(PAIRS)
    assert f"rows       of {SIZE} tokens, in pairs" in describe(tmp_path)
    rows = {}
    for side in ("pos", "neg"):
        tokens = np.array(tokens_of(tmp_path, f"train.{side}")).reshape(-1, SIZE)
        rows[side] = list(
            zip(
                tokens.tolist(), np.array(weights_of(tmp_path, f"train.{side}")).reshape(-1, SIZE).tolist(), strict=True
            )
        )
    expected = []
    for pair in PAIRS:
        sides = []
        for answer in ("chosen", "rejected"):
            dialogue = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[answer]}]
            made_of = by_hand(made / "tokenizer.json", dialogue)[-SIZE:]
            made_of += [(0, 0)] * (SIZE - len(made_of))  # the end-of-text token is 0
            sides.append(([token for token, _ in made_of], [weight for _, weight in made_of]))
        expected.append(tuple(sides))
    found = list(zip(rows["pos"], rows["neg"], strict=True))
    assert found == [pair for pair in expected if pair in found]  # in their order; the others are held out
    assert len(found) == counts["train.pos"]


KINDS: dict[str, tuple[str, tuple[object, ...]]] = {
    "dialogues": ("chats.jsonl", (*CHAT, "--assistant_only")),
    "rows": ("chats.jsonl", (*CHAT, "--assistant_only", "--block_size", SIZE)),
    "pairs": ("pairs.jsonl", ("--chosen_key", "chosen", "--rejected_key", "rejected", "--block_size", SIZE)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sample(1)
def test_killed_at_every_write_it_goes_on_to_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name, more = KINDS[kind]
    flags = (*more, "--val_fraction", 0.2, "--num_tokens_per_file", 600, "--chunksize", 3, "--max_tokens", 2500)
    tokenize(made / name, made / "tokenizer.json", tmp_path / "whole", *flags)
    expected, deaths = contents(tmp_path / "whole"), 0
    assert any(file.endswith(".weights") for file in expected)
    while True:
        out = tmp_path / str(deaths)
        with monkeypatch.context() as patch:
            patch.setattr(training.os, "replace", _dying_at(deaths, deaths % 2 == 0))
            status = _in_a_process(lambda out=out: tokenize(made / name, made / "tokenizer.json", out, *flags))  # type: ignore[misc]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        tokenize(made / name, made / "tokenizer.json", out, *flags, say=lambda _: None)
        assert contents(out) == expected, deaths
        deaths += 1
    assert deaths >= 10


def test_a_finished_folder_without_its_weights_is_made_again(made: Path, tmp_path: Path) -> None:
    flags = (made / "chats.jsonl", made / "tokenizer.json", tmp_path, *CHAT, "--assistant_only")
    tokenize(*flags)
    before = contents(tmp_path)
    assert not tokenize(*flags, repair=True).fresh
    next(tmp_path.glob("*.weights")).unlink()
    assert tokenize(*flags, repair=True).fresh
    assert contents(tmp_path) == before


def test_workers_write_the_same_files(made: Path, tmp_path: Path) -> None:
    for count in (0, 2):
        tokenize(
            made / "pairs.jsonl",
            made / "tokenizer.json",
            tmp_path / str(count),
            *KINDS["pairs"][1],
            "--num_proc",
            count,
        )
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


# Options that do not fit.


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--assistant_only", "--assistant_only needs dialogues, but the rows are texts; give --messages_key messages"),
        ("--system_prompt x", "--system_prompt needs dialogues"),
        ("--chat_template tokenizer", "--chat_template tokenizer needs dialogues"),
        ("--messages_key m --min_chars 5", "--min_chars 5 is for texts, but the rows are dialogues; leave it out"),
        (
            "--chosen_key c",
            "--chosen_key c needs --rejected_key, the key of the rejected answer; use --rejected_key rej",
        ),
        ("--rejected_key r", "--rejected_key r needs --chosen_key"),
        ("--chosen_key c --rejected_key r", "pairs of answers become rows of one length; give --block_size 1024"),
        ("--prompt_key p", "--prompt_key p is for pairs; give --chosen_key chosen --rejected_key rejected, too"),
        ("--messages_key m --chosen_key c --rejected_key r", "--messages_key m and --chosen_key exclude each other"),
        ("--pad_token x", "--pad_token x needs rows to fill up; add --block_size 1024"),
        ("--block_size 1", r"--block_size 1 must be in 2\.\."),
        (
            "--block_size 600",
            "--num_tokens_per_file 500 does not hold one row of --block_size 600; use --num_tokens_per_f",
        ),
        ("--block_size 8 --pad_token nothing", "--pad_token nothing is not a token of .*; use <|endoftext|>"),
        ("--messages_key m --chat_template tokenizer", "has no chat template .*; use --chat_template chatml"),
    ],
)
def test_options_that_do_not_fit(made: Path, tmp_path: Path, flags: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("|", r"\|")):
        tokenize(made / "texts.jsonl", made / "tokenizer.json", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_plain_texts_have_no_dialogues(made: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
        DataError, match=r"a\.txt is plain text, which has no rows with dialogues; give \.jsonl or \.parquet"
    ):
        tokenize(tmp_path / "a.txt", made / "tokenizer.json", tmp_path / "out", "--messages_key", "messages")


def test_a_folder_made_with_another_form_is_refused(made: Path, tmp_path: Path) -> None:
    tokenize(made / "chats.jsonl", made / "tokenizer.json", tmp_path, *CHAT, "--assistant_only")
    for more, says in (
        (("--assistant_only", "--block_size", 9), "--block_size 9, where the folder has None"),
        ((), "--assistant_only False, where the folder has True"),
        (("--assistant_only", "--system_prompt", "x"), "--system_prompt x, where the folder has None"),
    ):
        with pytest.raises(ConfigError, match=says):
            tokenize(made / "chats.jsonl", made / "tokenizer.json", tmp_path, *CHAT, *more)


def test_texts_alone_need_no_template(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of plain texts is the one that existed before, so that its folders stay as they are."""
    called: list[int] = []
    encode = PlainEncoder.__call__
    monkeypatch.setattr(PlainEncoder, "__call__", lambda self, texts: (called.append(1), encode(self, texts))[1])
    manifest = tokenize(made / "texts.jsonl", made / "tokenizer.json", tmp_path).manifest
    assert called
    assert manifest is not None
    assert manifest.options == {"num_tokens_per_file": 500, "val_fraction": 0.0}
