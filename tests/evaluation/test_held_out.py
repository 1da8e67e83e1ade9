"""``tinytron evaluate --data``: the loss that a run logs, on shards; that of a naive loop, on texts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.corpus import make_texts, make_tokenizer, tokenize, write_jsonl
from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, train
from tests.interop.test_tokens import write_run
from tests.training.test_evals import EXPERTS, FLAGS
from tinytron.checkpoint import load_model
from tinytron.cli.main import main
from tinytron.interop.export import export
from tinytron.model import GPT
from tinytron.text.run_tokenizer import tokenizer_of_run
from tinytron.training import Trainer

pytest.importorskip("tokenizers")
Pools = Callable[[int], Ranks]
TEXT = "the quick brown fox, says naïve 猫s 🙂, jumps over a lazy dog and sleeps all day\n" * 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data``: token shards with a fifth for validation; ``train``: others without; ``after``: the end comes last; a run
    (``run``) on ``data``."""
    root = tmp_path_factory.mktemp("held_out")
    make_tokenizer(root / "tokenizer.json")
    texts = write_jsonl(root / "texts.jsonl", make_texts(120))
    tokenize(texts, root / "tokenizer.json", root / "data", "--val_fraction", 0.2, "--num_tokens_per_file", 100000)
    tokenize(texts, root / "tokenizer.json", root / "train")
    tokenize(texts, root / "tokenizer.json", root / "after", "--eot_position", "append")
    write_run(root / "run", root / "data")
    (root / "text.txt").write_text(TEXT)
    return root


def evaluate(checkpoint: Path, data: object, out: Path, *flags: object) -> dict[str, Any]:
    """The results of ``--data``, one path or a list of them."""
    paths = data if isinstance(data, list) else [data]
    words = ["evaluate", "--checkpoint", checkpoint, "--data", *paths, "--out", out / "results.json", *flags]
    assert main([*map(str, words)]) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())["data"]
    return found


MASKED = ("--document_mask", "--no-cross_document_loss")
LAYOUTS: list[tuple[int, tuple[object, ...]]] = [
    (1, ()),
    (2, MASKED),
    (1, (*MASKED, "--packing", "best_fit")),
    (1, (*EXPERTS, "--packing", "best_fit")),
]


@pytest.mark.parametrize(("world", "flags"), LAYOUTS)
def test_it_is_the_validation_loss_of_the_run(
    ranks: Pools, made: Path, tmp_path: Path, world: int, flags: tuple[object, ...]
) -> None:
    every = (*FLAGS, "--dataset_path", made / "data", "--do_val", "--do_save", "--precision", "fp32", *flags)
    run: Run = ranks(world).run(train, Trainer, tmp_path / "log", *every)[0]
    (logged,) = [record for record in run.records if record["stage"] == "val"]
    found = evaluate(run.folder, made / "data", tmp_path, "--batch_tokens", 200)
    assert (found["split"], found["seq_len"], found["tokens"]) == ("val", 32, logged["tokens"])
    values = {name for name, value in logged.items() if isinstance(value, float)} - {"time"}
    assert values >= {"loss", "perplexity", "bits_per_byte"}
    assert EXPERTS[0] not in flags or any("aux" in name or "moe" in name for name in values), values
    for name in values:
        assert found[name] == pytest.approx(logged[name], rel=1e-5), name


def naive(model: GPT, ids: list[int], seq_len: int) -> tuple[float, int]:
    """The loss of every token but the first, in nats, window by window, and their number."""
    nats = 0.0
    with torch.no_grad():
        for first in range(0, len(ids) - 1, seq_len):
            window = torch.tensor(ids[first : first + seq_len + 1])
            logits = model(window[None, :-1])
            nats += float(torch.nn.functional.cross_entropy(logits[0].double(), window[1:], reduction="sum"))
    return nats, len(ids) - 1


def test_texts_by_a_naive_loop(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For a run, a weights file and a Hugging Face folder; every byte is counted."""
    model, config = load_model(made / "run")
    ids = tokenizer_of_run(config, None, made / "run").prompt_ids(TEXT)
    export(made / "run", tmp_path / "hf")
    for checkpoint in (made / "run", made / "run" / "00000_model.pt", tmp_path / "hf"):
        for seq_len, batch_tokens in ((32, 8192), (7, 20), (7, 1)):
            nats, count = naive(model, ids, seq_len)
            flags = ("--seq_len", seq_len, "--batch_tokens", batch_tokens, "--dtype", "fp32")
            found = evaluate(checkpoint, made / "text.txt", tmp_path, *flags)
            assert (found["tokens"], found["split"], found["seq_len"]) == (count, None, seq_len)
            assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
            assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)
            shown = capsys.readouterr().out
            assert f"text.txt: loss {found['loss']:.4f} nats per token, perplexity" in shown
            assert f"{found['bits_per_byte']:.4f} bits per byte over {count:,} tokens in samples of {seq_len}" in shown


@pytest.mark.parametrize("position", ["data", "after"])
def test_documents_are_separated_as_in_training(made: Path, tmp_path: Path, position: str) -> None:
    run = write_run(tmp_path / "run", made / position)
    model, config = load_model(run)
    tokenizer = tokenizer_of_run(config, None, run)
    texts = ["the quick", "", "brown fox", "a"]
    parts = [tokenizer.ids(text) for text in texts if text]
    ids = [0, *parts[0], 0, *parts[1], 0, *parts[2]]
    nats, count = naive(model, ids if position == "data" else ids[1:], 32)
    found = evaluate(run, write_jsonl(tmp_path / "texts.jsonl", texts), tmp_path)
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    rows = write_jsonl(tmp_path / "rows.jsonl", texts, "body")
    assert evaluate(run, rows, tmp_path, "--text_key", "body")["loss"] == found["loss"]


def test_the_split(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Validation shards if there are some; a pattern may name the training shards."""
    data = made / "data"
    found = {str(path): evaluate(made / "run", path, tmp_path) for path in (data, data / "train_*.bin", made / "train")}
    assert [(value["split"], value["tokens"]) for value in found.values()] == [
        ("val", found[str(data)]["tokens"]),
        ("train", found[str(data / "train_*.bin")]["tokens"]),
        ("train", found[str(made / "train")]["tokens"]),
    ]
    assert found[str(data)]["tokens"] < found[str(data / "train_*.bin")]["tokens"]
    assert found[str(data)] | {"path": ""} == evaluate(made / "run", data / "val_*.bin", tmp_path) | {"path": ""}
    assert f"{made / 'train'} (train split): loss " in capsys.readouterr().out


def test_tasks_and_data_together(made: Path, tmp_path: Path) -> None:
    item = {"context": "the", "choices": [" quick", " dog"], "answer": 0}
    (tmp_path / "sky.jsonl").write_text(json.dumps(item))
    evaluate(made / "run", made / "text.txt", tmp_path, "--tasks", tmp_path / "sky.jsonl")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["results"]["sky"]["items"] == 1
    assert set(content) == {"checkpoint", "torch", "results", "data"}


def test_shards_need_no_tokenizer(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "data", tmp_path / "data")
    (tmp_path / "data" / "tokenizer.json").unlink()
    run = write_run(tmp_path / "run", None)
    found = evaluate(run, tmp_path / "data", tmp_path)
    assert "bits_per_byte" not in found
    assert found["loss"] == pytest.approx(evaluate(run, made / "data", tmp_path)["loss"])
    with_bytes = evaluate(run, tmp_path / "data", tmp_path, "--tokenizer", made / "tokenizer.json")
    assert with_bytes["bits_per_byte"] == evaluate(run, made / "data", tmp_path)["bits_per_byte"]


REFUSED: list[tuple[tuple[object, ...], str]] = [
    ((), "nothing to evaluate; give --tasks FILE.jsonl, --evaluations NAME, --data PATH, or several"),
    (("--data", "nowhere"), "--data nowhere is not a folder and matches no file"),
    (("--data", "DATA", "--seq_len", 33), "--seq_len 33 must be 1 to 32, the longest sequence that the model accepts"),
    (("--data", "DATA", "--seq_len", 0), "--seq_len 0 must be 1 to 32"),
    (("--data", "EMPTY"), "has no train_*.bin; name a folder with token shards"),
    (("--data", "SHORT"), "short.txt has 0 tokens; give a longer text, of at least 2"),
    (("--data", "ROWS"), "line 1 has no key 'text'; set --text_key to one that it has: id, body"),
    (("--data", "DATA", "--tokenizer", "OTHER"), "was made with another tokenizer than the model's: "),
]


@pytest.mark.parametrize(("words", "text"), REFUSED)
def test_what_it_refuses(
    made: Path, tmp_path: Path, words: tuple[object, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("")
    names = {"DATA": made / "data", "EMPTY": tmp_path / "empty", "SHORT": tmp_path / "short.txt"}
    names["ROWS"] = write_jsonl(tmp_path / "rows.jsonl", ["a"], "body")
    names["OTHER"] = make_tokenizer(tmp_path / "tokenizer.json", ("<other>", "</s>"))
    given = [str(names.get(str(word), word)) for word in words]
    assert main(["evaluate", "--checkpoint", str(made / "run"), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


def test_texts_need_a_tokenizer_and_numbers_must_be_finite(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", None)
    words = ["evaluate", "--checkpoint", str(run), "--data"]
    assert main([*words, str(made / "text.txt")]) == 2
    assert "no tokenizer: " in capsys.readouterr().err
    weights = {name: weight * math.nan for name, weight in load_model(run)[0].state_dict().items()}
    torch.save(weights, run / "00000_model.pt")
    assert main([*words, str(made / "data")]) == 2
    assert "the model's losses are NaN or infinite" in capsys.readouterr().err
