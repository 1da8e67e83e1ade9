"""``tinytron evaluate --data`` of several sources: each by itself and all together, against loops and a run's log."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluation.test_held_out import TEXT, evaluate
from tests.helpers.corpus import make_texts, make_tokenizer, tokenize, write_jsonl
from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, train
from tests.interop.test_tokens import V, write_run
from tests.training.test_evals import EXPERTS, FLAGS
from tinytron.cli.main import main
from tinytron.data.formats import open_shard, write_weights
from tinytron.evaluation.sources import data_sources
from tinytron.evaluation.validate import ValSums, total
from tinytron.interop.open import open_model
from tinytron.text.run_tokenizer import tokenizer_of_run
from tinytron.training import Trainer
from tinytron.utils.remote import RemoteFolder

pytest.importorskip("tokenizers")
Pools = Callable[[int], Ranks]
S = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards: ``web`` and ``code`` with a validation split, ``bare`` without, all with one tokenizer; mixture files
    of all (``mixed``), of the first two (``both``) and of the last (``trained``); a run (``run``) and a text."""
    root = tmp_path_factory.mktemp("sources")
    make_tokenizer(root / "tokenizer.json")
    for name, seed, count in (("web", 1, 120), ("code", 2, 60), ("bare", 3, 30)):
        texts = write_jsonl(root / f"{name}.jsonl", make_texts(count, seed))
        held_out = () if name == "bare" else ("--val_fraction", 0.3)
        tokenize(texts, root / "tokenizer.json", root / name, *held_out)
    for file, names in (("mixed", ("web", "bare", "code")), ("both", ("web", "code")), ("trained", ("bare",))):
        sources = [{"name": name.upper(), "path": name, "weight": 1 + len(name)} for name in names]
        (root / f"{file}.json").write_text(json.dumps({"sources": sources}))
    write_run(root / "run", root / "web")
    (root / "text.txt").write_text(TEXT)
    return root


def nats_of(model: Any, ids: list[int]) -> tuple[float, int]:
    """The loss by transformers of every token but the first, in windows of S, and their number."""
    nats = 0.0
    with torch.no_grad():
        for first in range(0, len(ids) - 1, S):
            window = torch.tensor(ids[first : first + S + 1])
            logits = model(input_ids=window[None, :-1]).logits
            nats += float(torch.nn.functional.cross_entropy(logits[0].double(), window[1:], reduction="sum"))
    return nats, len(ids) - 1


def added(pairs: Iterable[tuple[float, int]]) -> tuple[float, int]:
    nats, counts = zip(*pairs, strict=True)
    return sum(nats), sum(counts)


def whole_samples(folder: Path, split: str) -> list[list[int]]:
    """The tokens of a shard, up to the end of its last whole sample."""
    shards = [np.asarray(open_shard(path)).tolist() for path in sorted(folder.glob(f"{split}_*.bin"))]
    return [tokens[: (len(tokens) - 1) // S * S + 1] for tokens in shards]


def test_every_source_and_the_total_by_transformers(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validation shards, training shards and a text, measured on the folder of a Hugging Face model."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.4, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((made / "tokenizer.json").read_bytes())
    _, sections = open_model(tmp_path / "hf")
    ids = {
        "web": whole_samples(made / "web", "val"),
        "bare": whole_samples(made / "bare", "train"),
        "text.txt": [tokenizer_of_run(sections, None, tmp_path / "hf").prompt_ids(TEXT)],
    }
    assert all(max(map(len, rows)) > 2 * S for rows in ids.values())
    expected = {name: added(nats_of(theirs, row) for row in rows) for name, rows in ids.items()}
    found = evaluate(tmp_path / "hf", [made / name for name in ids], tmp_path, "--seq_len", S, "--dtype", "fp32")
    for name, (nats, count) in expected.items():
        row = found["sources"][str(made / name)]
        assert row["tokens"] == count
        assert row["loss"] == pytest.approx(nats / count, abs=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    nats, count = added(expected.values())
    assert (found["tokens"], found["seq_len"]) == (count, S)
    assert found["loss"] == pytest.approx(nats / count, abs=1e-5)
    text = found["sources"][str(made / "text.txt")]
    assert text["bits_per_byte"] == pytest.approx(expected["text.txt"][0] / math.log(2) / len(TEXT.encode()), rel=1e-5)
    check_table(capsys.readouterr().out, found)


def check_table(shown: str, found: dict[str, Any]) -> None:
    """The table on the screen has the numbers of the results, in aligned columns."""
    rows = {**found["sources"], "total": {**found, "split": ""}}
    lines = shown.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("source "))
    assert lines[start].split() == ["source", "split", "tokens", "loss", "perplexity", "bits", "per", "byte"]
    assert len({len(line) for line in lines[start : start + 1 + len(rows)]}) == 1
    for line, (name, row) in zip(lines[start + 1 :], rows.items(), strict=False):
        numbers = [f"{row['tokens']:,}", *(f"{row[key]:.4f}" for key in ("loss", "perplexity", "bits_per_byte"))]
        split = [] if name == "total" else [row["split"] or "-"]
        assert line.split() == [name, *split, *numbers]


@pytest.mark.parametrize("flags", [(), (*EXPERTS, "--packing", "best_fit"), ("--document_mask",)])
def test_a_mixture_is_the_validation_of_the_run(
    ranks: Pools, made: Path, tmp_path: Path, flags: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of the run, by source and in all; a source without validation shards is left out there and here."""
    every = (*FLAGS, "--dataset_path", made / "mixed.json", "--do_val", "--do_save", "--precision", "fp32", *flags)
    run: Run = ranks(1).run(train, Trainer, tmp_path / "log", *every)[0]
    (logged,) = [record for record in run.records if record["stage"] == "val"]
    found = evaluate(run.folder, made / "mixed.json", tmp_path, "--batch_tokens", 200)
    assert list(found["sources"]) == list(logged["sources"]) == ["WEB", "CODE"]
    assert found["left_out"] == ["BARE"]
    assert "BARE has no validation shards and is left out" in capsys.readouterr().out
    assert found["tokens"] == logged["tokens"]
    values = {name for name, value in logged.items() if isinstance(value, float)} - {"time"}
    assert values >= {"loss", "perplexity", "bits_per_byte"}
    for name in values:
        assert found[name] == pytest.approx(logged[name], rel=1e-5), name
    for name, row in logged["sources"].items():
        assert found["sources"][name]["split"] == "val"
        assert found["sources"][name]["tokens"] == row["targets"]
        for key in ("loss", "perplexity", "bits_per_byte"):
            assert found["sources"][name][key] == pytest.approx(row[key], rel=1e-5)


def test_weights_of_targets_count_as_in_the_run(ranks: Pools, made: Path, tmp_path: Path) -> None:
    """The total is the loss that the run logs; a source's is what it is measured to be alone."""
    for name in ("web", "code"):
        (tmp_path / name).mkdir()
        for path in (made / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        for path in (tmp_path / name).glob("*.bin"):
            count = len(open_shard(path))
            write_weights(path.with_suffix(".weights"), np.arange(count) % (3 if name == "web" else 7) + 0.5)
    (tmp_path / "both.json").write_bytes((made / "both.json").read_bytes())
    every = (*FLAGS, "--dataset_path", tmp_path / "both.json", "--do_val", "--do_save", "--precision", "fp32")
    run: Run = ranks(1).run(train, Trainer, tmp_path / "log", *every)[0]
    (logged,) = [record for record in run.records if record["stage"] == "val"]
    found = evaluate(run.folder, tmp_path / "both.json", tmp_path)
    for key in ("loss", "bits_per_byte", "tokens"):
        assert found[key] == pytest.approx(logged[key], rel=1e-5)
    for name in ("web", "code"):
        alone = evaluate(run.folder, tmp_path / name, tmp_path)
        assert found["sources"][name.upper()]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    by_tokens = sum(row["loss"] * row["tokens"] for row in found["sources"].values()) / found["tokens"]
    assert abs(by_tokens - found["loss"]) > 1e-4, "the weights of these sources make no difference"


def test_a_mixture_without_validation_shards_is_measured_on_its_training_shards(made: Path, tmp_path: Path) -> None:
    found = evaluate(made / "run", made / "trained.json", tmp_path)
    alone = evaluate(made / "run", made / "bare", tmp_path)
    assert found["sources"] == {"BARE": {**found["sources"]["BARE"], "split": "train", "loss": alone["loss"]}}
    assert (found["loss"], found["left_out"]) == (alone["loss"], [])


def test_names_of_several_mixtures_and_paths(made: Path) -> None:
    measured = data_sources([str(made / name) for name in ("both.json", "mixed.json", "text.txt")])
    both, mixed = (f"{made}/{name}.json" for name in ("both", "mixed"))
    names = [f"{both}:WEB", f"{both}:CODE", f"{mixed}:WEB", f"{mixed}:CODE", f"{made}/text.txt"]
    assert [source.name for source in measured.sources] == names
    assert measured.left_out == (f"{mixed}:BARE",)


def test_urls_are_measured_as_what_they_name(storage: str, made: Path, tmp_path: Path) -> None:
    for name in ("web", "bare"):
        RemoteFolder(f"{storage}/{name}").push(made / name, [path.name for path in (made / name).iterdir()])
    RemoteFolder(storage).push(made, ["text.txt"])
    sources = [{"name": name, "path": f"{storage}/{name}", "weight": 1} for name in ("web", "bare")]
    (tmp_path / "remote.json").write_text(json.dumps({"sources": sources}))
    names = ("web", "bare/train_*.bin", "text.txt")
    there = evaluate(made / "run", [f"{storage}/{name}" for name in names], tmp_path)["sources"]
    here = evaluate(made / "run", [f"file://{made}/{name}" for name in names], tmp_path)["sources"]
    assert list(there) == [f"{storage}/{name}" for name in names]
    assert [{**row, "path": ""} for row in there.values()] == [{**row, "path": ""} for row in here.values()]
    mixture = evaluate(made / "run", tmp_path / "remote.json", tmp_path)
    assert mixture["sources"]["web"] == there[f"{storage}/web"]
    assert mixture["left_out"] == ["bare"]
    (tmp_path / "text.txt").write_text(TEXT.replace("quick", "brown"))  # as long as before
    RemoteFolder(storage).push(tmp_path, ["text.txt"])
    again = evaluate(made / "run", f"{storage}/text.txt", tmp_path)
    assert again["loss"] != there[f"{storage}/text.txt"]["loss"]


def test_bits_per_byte_of_all_need_those_of_each() -> None:
    known, unknown = ValSums(6.0, 4, 4, 4, 6.0, 3.0), ValSums(2.0, 2, 2, 2, 2.0, 0.0)
    assert (
        total([known, known]).result().bits_per_byte == known.result().bits_per_byte == pytest.approx(2 / math.log(2))
    )
    both = total([known, unknown]).result()
    assert (both.bits_per_byte, both.loss, both.tokens) == (None, 8 / 6, 6)


def test_auxiliary_values_of_all_are_divided_by_their_own_counts() -> None:
    one = ValSums(6.0, 4, 4, 4, 6.0, 0.0, {"a": (10.0, 4.0), "b": (1.0, 1.0)})
    two = ValSums(2.0, 2, 2, 2, 2.0, 0.0, {"a": (2.0, 2.0)})
    assert total([one, two]).result().aux == {"a": 2.0, "b": 1.0}


REFUSED = [
    (("DATA", "DATA"), "--data has DATA twice, and results go by that name; give it once"),
    (("DATA", "nowhere"), "--data nowhere is not a folder and matches no file"),
    (("bad.json",), "bad.json: the file has an unknown key 'source'"),
    (("lost.json",), "nowhere is not a folder and matches no file"),
    (("absent.json",), "absent.json: the mixture file cannot be read (No such file or directory); check --data"),
]


@pytest.mark.parametrize(("paths", "text"), REFUSED)
def test_what_it_refuses(
    made: Path,
    tmp_path: Path,
    paths: tuple[str, ...],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text('{"source": []}')
    (tmp_path / "lost.json").write_text('{"sources": [{"name": "a", "path": "nowhere", "weight": 1}]}')
    given = [str(made / "web") if path == "DATA" else path for path in paths]
    assert main(["evaluate", "--checkpoint", str(made / "run"), "--data", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text.replace("DATA", str(made / "web")) in line
    assert "--dataset_path" not in line
