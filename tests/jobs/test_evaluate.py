"""The jobs ``gpt/evaluate`` and ``backbone/evaluate``, and ``tinytron evaluate --evaluations``, on one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.corpus import make_texts, make_tokenizer, tokenize, write_jsonl
from tests.interop.test_tokens import write_run
from tinytron.cli.main import main
from tinytron.errors import TinytronError
from tinytron.interop.export import export
from tinytron.quick import quick

pytest.importorskip("tokenizers")
ROWS = [{"question1": "Who is it?", "question2": f"Which one is {n}?", "label": n % 2} for n in range(5)]
NAMES = ["arithmetic", "qqp", "qqp_ppl"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run (``run``), the same as a model of Hugging Face (``hf``), and ``data/qqp.jsonl``."""
    root = tmp_path_factory.mktemp("jobs")
    make_tokenizer(root / "tokenizer.json")
    tokenize(write_jsonl(root / "texts.jsonl", make_texts(60)), root / "tokenizer.json", root / "shards")
    write_run(root / "run", root / "shards")
    export(root / "run", root / "hf")
    (root / "data").mkdir()
    (root / "data" / "qqp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


def results(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(file.read_text())["results"]
    assert all(result.pop("seconds") >= 0 for result in found.values())
    return found


def run_job(key: str, out: Path, **options: Any) -> dict[str, dict[str, Any]]:
    with quick(key, str(out), "ev") as j:
        j.options.override([f"{name.replace('__', '.')}={value}" for name, value in options.items()])
        j()
    return results(out / "checkpoints/general/default/ev/results.json")


def test_both_jobs_and_the_command_agree(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"eval__evaluations": f"[{','.join(NAMES)}]", "eval__length": 4, "eval__data_dir": made / "data"}
    gpt = run_job("gpt/evaluate", tmp_path / "gpt", **common, eval__checkpoint=made / "run")
    assert list(gpt) == NAMES
    assert {name: result["count"] for name, result in gpt.items()} == dict.fromkeys(NAMES, 4)
    assert [result["higher_is_better"] for result in gpt.values()] == [True, True, False]
    shown = capsys.readouterr().out
    assert [line.split()[:3] for line in shown.splitlines() if line.startswith("qqp")] == [
        ["qqp", f"{gpt['qqp']['score']:.4f}", "higher"],
        ["qqp_ppl", f"{gpt['qqp_ppl']['score']:.4f}", "lower"],
    ]
    backbone = {"architecture__backbone__weights": made / "hf", "architecture__backbone__implementation": "llama"}
    other = run_job("backbone/evaluate", tmp_path / "hf", **common, **backbone)
    words = [
        "--checkpoint",
        made / "run",
        "--evaluations",
        *NAMES,
        "--eval_length",
        4,
        "--eval_data_dir",
        made / "data",
    ]
    assert main(["evaluate", *map(str, words), "--out", str(tmp_path / "results.json")]) == 0
    for found in (other, results(tmp_path / "results.json")):
        for name, result in gpt.items():
            assert found[name] == {**result, "score": pytest.approx(result["score"], rel=1e-5)}


def test_a_finished_job_is_not_run_again(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"eval__evaluations": "[qqp_ppl]", "eval__data_dir": made / "data", "eval__checkpoint": made / "run"}
    first = run_job("gpt/evaluate", tmp_path, **given)
    capsys.readouterr()
    assert run_job("gpt/evaluate", tmp_path, **given) == first
    assert "ev is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "options", "text"),
    [
        ("gpt/evaluate", {}, "eval.checkpoint and restore name no model; give one of them"),
        ("backbone/evaluate", {}, "architecture.backbone.weights and restore name no model"),
        ("gpt/evaluate", {"eval__evaluations": "[]", "eval__checkpoint": "RUN"}, "evaluates nothing; name one"),
        (
            "gpt/evaluate",
            {"eval__evaluations": "[qqq]", "eval__checkpoint": "RUN"},
            "no evaluation qqq; did you mean qqp?",
        ),
        ("gpt/evaluate", {"eval__length": 0, "eval__checkpoint": "RUN"}, "eval.length=0 must be at least 1, or -1"),
        (
            "gpt/evaluate",
            {"eval__batch_tokens": 0, "eval__checkpoint": "RUN"},
            "eval.batch_tokens=0 must be at least 1",
        ),
        ("gpt/evaluate", {"eval__dtype": "int8", "eval__checkpoint": "RUN"}, "eval.dtype=int8 must be one of "),
        ("gpt/evaluate", {"eval__checkpoint": "nowhere"}, "nowhere is not a local folder"),
        (
            "backbone/evaluate",
            {"architecture__backbone__weights": "HF", "architecture__backbone__implementation": "qwen"},
            "architecture.backbone.implementation=qwen, but ",
        ),
    ],
)
def test_what_they_refuse(made: Path, tmp_path: Path, key: str, options: dict[str, Any], text: str) -> None:
    places = {"RUN": made / "run", "HF": made / "hf"}
    given = {"eval__evaluations": "[arithmetic]", **{n: places.get(str(v), v) for n, v in options.items()}}
    with pytest.raises(TinytronError) as error:
        run_job(key, tmp_path, **given)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_refuses(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        ((), "nothing to evaluate; give --tasks FILE.jsonl, --evaluations NAME, --data PATH, or several"),
        (("--evaluations", "qqp", "--eval_length", "0"), "--eval_length 0 must be at least 1"),
        (("--evaluations", "qqq"), "there is no evaluation qqq; did you mean qqp?"),
    ):
        assert main(["evaluate", "--checkpoint", str(made / "run"), *words]) == 2
        assert text in capsys.readouterr().err
