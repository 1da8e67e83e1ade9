"""benchmarks/step_time.py: the variants are one function, what is measured is written, and errors are a line."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import ROOT

FEW = ["--batch", "2", "--seq_len", "16", "--rounds", "2", "--steps", "1"]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def load(name: str) -> Any:
    return importlib.import_module(name)


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "step_time.py"), "--device", "cpu", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run with everything that is installed, and what it printed."""
    out = tmp_path_factory.mktemp("step_time") / "new" / "result"
    chosen = ["plain torch", "transformers", "tinytron"]
    models = ["--models", "tiny", "tiny-moe", "--precision", "fp32", "bf16"]
    done = run(*models, *FEW, "--no-memory", "--eager", "--variants", *chosen, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_variants_are_one_function_before_they_are_timed(written: tuple[Path, str]) -> None:
    _, printed = written
    lines = [line for line in printed.splitlines() if "same losses in fp32" in line]
    assert [line.split(":")[0] for line in lines] == [
        f"{model}, {precision}" for model in ("tiny", "tiny-moe") for precision in ("fp32", "bf16")
    ]
    assert all("plain torch" in line and "tinytron" in line for line in lines)


@pytest.mark.slow
def test_tables_are_written(written: tuple[Path, str]) -> None:
    out, printed = written
    tables = json.loads(Path(f"{out}.json").read_text())["tables"]
    assert [(table["model"], table["precision"]) for table in tables] == [
        ("tiny", "fp32"),
        ("tiny", "bf16"),
        ("tiny-moe", "fp32"),
        ("tiny-moe", "bf16"),
    ]
    for table in tables:
        assert table["flops_per_token"] > 0
        for row in table["rows"]:
            assert len(row["seconds"]) == 2
            assert min(row["seconds"]) > 0
            assert row["first_loss"] == pytest.approx(tables[0]["rows"][0]["first_loss"], abs=0.3)
        assert table["rows"][0]["name"] == "plain torch"
        assert table["rows"][-1]["name"] == "tinytron"
    markdown = Path(f"{out}.md").read_text()
    assert "## tiny-moe, bf16: 0.1M parameters, 2 x 16 tokens a step" in markdown
    assert "| **tinytron** | bf16 + fp32 main |" in markdown
    assert markdown.count("| plain torch | fp32 |") == 2
    assert "--no-memory" in markdown
    assert "| **tinytron** | bf16 + fp32 main |" in printed


@pytest.mark.slow
def test_the_chart_is_a_picture(written: tuple[Path, str]) -> None:
    pytest.importorskip("matplotlib")
    out, _ = written
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = load("step_report")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = report.write(tmp_path / "result", [], torch.device("cpu"), {}, ["python"])
    assert text.endswith("no chart without matplotlib: pip install matplotlib")
    assert (tmp_path / "result.md").exists()


def test_figures_of_a_table() -> None:
    report = load("step_report")
    base = report.Row("plain torch", "bf16", seconds=[2.0, 4.0, 2.0], cpu=[3.0, 3.0, 3.0], first_step=9.0)
    twice = report.Row("tinytron", "bf16", seconds=[1.0] * 3, cpu=[1.0] * 3, first_step=1.0, peak_bytes=3 * 2**20)
    full = report.Row("litgpt", "bf16", failure="out of memory (140 GiB)")
    table = report.Table("10m", "bf16", 10_100_000, 4, 512, 1e6, 1e10, "measured", [full, base, twice])
    assert table.rate(twice) == 2048
    assert table.mfu(twice) == pytest.approx(2048 * 1e6 / 1e10)
    assert table.ratios(twice) == [2.0, 4.0, 2.0]
    lines = table.lines()
    assert "| litgpt | bf16 | out of memory (140 GiB) | | | | | | |" in lines
    assert "| **tinytron** | bf16 | 2,048 | 2.000 | 2.00-4.00 | 3.000 | 20.5% | 3 | 1.0 s |" in lines


def test_a_variant_that_disagrees_is_an_error() -> None:
    step_time, variants = load("step_time"), load("step_variants")

    def other(case: Any, weights: Any, how: Any) -> Any:
        training = variants.plain(case, weights, how)
        training.model.layers[1].self_attn.o_proj.weight.data.mul_(1.1)
        return training

    config = step_time.model_config("tiny", 16)
    both = [variants.Variant(variants.plain), variants.Variant(other)]
    with pytest.raises(SystemExit, match=r"error: other computes something else than plain torch: its losses are "):
        step_time.check(config, torch.device("cpu"), both)

    def same(case: Any, weights: Any, how: Any) -> Any:
        return variants.plain(case, weights, how)

    twins = [variants.Variant(variants.plain, compiled=True), variants.Variant(same)]
    assert "within 0.0e+00: plain torch, same" in step_time.check(config, torch.device("cpu"), twins)


def test_a_peer_that_fails_is_a_row() -> None:
    step_time, variants = load("step_time"), load("step_variants")

    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel\nfor this")

    case = variants.Case(step_time.model_config("tiny", 16), "fp32", torch.device("cpu"))
    batches = step_time.random_batches(case.config, 1, 2, case.device)
    both = [variants.Variant(broken), variants.Variant(variants.plain)]
    failed, ran = step_time.run_in_turns(case, both, load("step_weights").initial_weights(case.config), batches, 2, 1)
    assert (failed.failure, failed.seconds, len(ran.seconds)) == ("failed: no kernel", [], 2)
    broken.__name__ = "tinytron"
    with pytest.raises(RuntimeError, match="no kernel"):
        step_time.run_in_turns(case, both, {}, batches, 1, 1)


def test_not_a_number_disagrees() -> None:
    with pytest.raises(SystemExit, match="computes something else"):
        load("step_time").compare("a", [float("nan")], "b", [1.0], 0.1)


def test_a_missing_peer_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    step_time, variants = load("step_time"), load("step_variants")
    monkeypatch.setitem(variants._MODULES, "litgpt", "no_such_litgpt")
    left = step_time.chosen_variants(["plain torch", "litgpt", "tinytron"], eager=True)
    assert [variant.name for variant in left] == ["plain torch", "plain torch, autocast", "tinytron"]
    assert capsys.readouterr().out == "left out: litgpt (No module named 'no_such_litgpt'); pip install litgpt\n"
    with pytest.raises(ValueError, match=r"nothing to measure: litgpt cannot be imported; use --variants tinytron"):
        step_time.chosen_variants(["litgpt"])


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--models", "11m"], "argument --models: invalid choice: '11m' (choose from "),
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["--variants", "jax"], "--variants jax fits none of: plain torch; plain torch, compiled; "),
        (["--rounds", "0"], "--rounds 0 must be at least 1; use 5"),
    ],
)
def test_wrong_options_are_one_line(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load("step_time").main(argv)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says what its peak was")
@pytest.mark.slow
def test_memory_is_that_of_a_model_that_trains() -> None:
    step_time, variants = load("step_time"), load("step_variants")
    config = step_time.model_config("10m", 64)
    case = variants.Case(config, "fp32", torch.device("cpu"))
    peak = step_time.peak_in_child(variants.Variant(variants.plain), case, 1)
    assert peak is not None
    assert 16 * 10.1e6 < peak < 60 * 10.1e6  # weights, gradients and two moments of 4 bytes each
