"""The quickstart: shards made once with the right files held out, and a report in bits per byte."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers")

from tests.helpers.corpus import Naive, contents, make_texts, tokens_of
from tests.helpers.runs import ROOT, TINY, config_of, follow
from tinytron.errors import DataError
from tinytron.quickstart import prepare
from tinytron.text.tokenize import finished
from tinytron.utils.model import train_flops_per_token

FLAGS = {"num_layer": 1}


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``tinytron.quickstart.prepare``, which counts in ``calls`` how often it chose a model."""
    module: Any = prepare
    monkeypatch.setattr(module, "calls", 0, raising=False)

    def choose(train_tokens: int, vocab_size: int) -> dict[str, Any]:
        module.calls += 1
        return {**FLAGS, "train_tokens": train_tokens, "vocab_size": vocab_size, "call": module.calls}

    monkeypatch.setattr(module, "really_choose", module.choose_model, raising=False)
    monkeypatch.setattr(module, "choose_model", choose)
    return prepare


def _write(folder: Path, count: int) -> list[Path]:
    """``count`` files of text, and one that is not text."""
    folder.mkdir()
    each = 160 // count + 3  # in all more than the least that the quickstart takes
    texts = make_texts(count * each, longest=400)
    for number in range(count):
        (folder / f"{number:03d}.txt").write_text("\n".join(texts[number * each : number * each + each]))
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("count", [50, 3])
def test_the_shards_are_the_documents_of_the_split(quickstart: Any, tmp_path: Path, count: int) -> None:
    files, folder = _write(tmp_path / "texts", count), tmp_path / "out"
    flags = quickstart.prepare(folder, files, 300, "texts")
    documents = list(quickstart.read_documents(files))
    assert len(documents) == count
    train, held_out = quickstart.split(documents)
    whole = sorted(text for _, text in documents)
    if count == 50:  # whole files, about a 20th of the text
        assert sorted(train + held_out) == whole
        assert 1 < len(held_out) < 6
    else:  # the end of each
        assert sorted(a + b for a, b in zip(train, held_out, strict=True)) == whole
    naive = Naive(folder / "tokenizer.json")
    assert tokens_of(folder) == naive.tokens(train)
    assert tokens_of(folder, "val") == naive.tokens(held_out)
    assert flags == {**FLAGS, "train_tokens": len(tokens_of(folder)), "vocab_size": 300, "call": 1}


def test_a_second_call_finds_everything_done_and_damage_is_repaired(quickstart: Any, tmp_path: Path) -> None:
    files, folder = _write(tmp_path / "texts", 45), tmp_path / "out"
    first = quickstart.prepare(folder, files, 300, "texts")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert quickstart.prepare(folder, files, 300, "texts") == first
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    whole = contents(folder)
    (folder / "val_000000.bin").unlink()
    assert quickstart.prepare(folder, files, 300, "texts")["call"] == 2
    assert finished(folder) is not None
    changed = {name for name, content in contents(folder).items() if content != whole[name]}
    assert changed == {"prepared.json"}


def test_an_interrupted_call_is_continued(quickstart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, folder = _write(tmp_path / "texts", 45), tmp_path / "out"
    tokenize = quickstart.tokenize_dataset

    def dying(*args: object, **kwargs: Any) -> None:
        tokenize(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "tokenize_dataset", dying)
        with pytest.raises(KeyboardInterrupt):
            quickstart.prepare(folder, files, 300, "texts")
    assert not (folder / "prepared.json").exists()
    shard = (folder / "train_000000.bin").stat().st_mtime_ns
    quickstart.prepare(folder, files, 300, "texts")
    assert (folder / "train_000000.bin").stat().st_mtime_ns == shard


def test_a_folder_of_an_earlier_version_is_used_as_it_is(quickstart: Any, tmp_path: Path) -> None:
    (tmp_path / "prepared.json").write_text(json.dumps({"flags": {"num_layer": 9}, "shards": {"train_000000.bin": 3}}))
    assert quickstart.prepare(tmp_path, [], 300, "texts") == {"num_layer": 9}


@pytest.mark.parametrize(
    ("fp32", "bf16", "precision", "hidden", "tokens", "steps", "every"),
    [
        (234, 1022, "bf16", 256, 8192, 311, 78),  # the machine of the README
        (234, 10_000, "bf16", 256, 8192, 420, 105),
        (60, 420, "bf16", 192, 4096, 386, 193),
        (210, 1, "fp32", 192, 4096, 386, 193),
        (2000, 1, "fp32", 256, 8192, 420, 105),
        (1, 1, "bf16", 192, 4096, 100, 50),
    ],
)
def test_the_model_follows_the_machine(
    quickstart: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    fp32: float, bf16: float, precision: str, hidden: int, tokens: int, steps: int, every: int,
) -> None:  # fmt: skip
    rates = {torch.float32: fp32 * 1e9, torch.bfloat16: 1e9 * bf16 + 1}
    monkeypatch.setattr(quickstart, "measured_matmul_rate", lambda _, dtype: rates[dtype])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = quickstart.really_choose(3_000_000, 4096)
    config = config_of(*(word for name, value in flags.items() for word in (f"--{name}", value)))
    assert (config.train.precision, config.model.hidden_size) == (precision, hidden)
    assert (config.train.total_batch_size, config.train.max_steps) == (tokens, steps)
    assert (config.train.val_every_steps, config.ckpt.save_every_steps) == (every, every)
    assert config.model.resolved_head_dim == 64
    assert config.optim.max_lr == 100 * config.optim.min_lr
    printed = capsys.readouterr().err
    assert f"layers of {hidden}, {steps} steps of {tokens:,} tokens by Muon" in printed
    assert ("too slow for a larger model" in printed) == (hidden == 192)


def test_the_costs_of_the_models(quickstart: Any) -> None:
    for size in (quickstart.LARGER, quickstart.SMALLER):
        flags = size.flags | {"vocab_size": 4096}
        config = config_of(*(word for name, value in flags.items() for word in (f"--{name}", value)))
        assert size.flops == pytest.approx(train_flops_per_token(config.model, 256), rel=0.03)


def test_prompts_are_lines_of_the_held_out_text(quickstart: Any, tmp_path: Path) -> None:
    files, folder = _write(tmp_path / "texts", 45), tmp_path / "out"
    quickstart.prepare(folder, files, 300, "texts")
    prompts = json.loads((folder / "prepared.json").read_text())["prompts"]
    held_out = quickstart.split(list(quickstart.read_documents(files)))[1]
    lines = [line for text in held_out for line in text.splitlines()]
    assert len(set(prompts)) == 3
    for prompt in prompts:
        assert 0 < len(prompt) <= 60
        assert any(line.strip().startswith(prompt) for line in lines)


@pytest.mark.parametrize(
    ("texts", "prompts"),
    [
        (["one line\n\nword\n", "a b\nc d\ne f\ng h"], ["one line", "c d", "g h"]),
        (["x y"], ["x y"]),
        (["word"], ["word"]),
        (["a" * 70 + " b"], ["a" * 60]),
        (["ab " * 30], [("ab " * 20).strip()]),
    ],
)
def test_what_makes_a_prompt(quickstart: Any, texts: list[str], prompts: list[str]) -> None:
    assert quickstart.prompts_from(texts) == prompts


def test_too_little_text(quickstart: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match=r"DATA=a.txt holds 5 bytes of UTF-8 text; give at least 100,000 to learn from"):
        quickstart.prepare(tmp_path / "out", [tmp_path / "a.txt"], 300, "a.txt")


@pytest.mark.slow
def test_the_report_is_in_bits_per_byte(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    _write(tmp_path / "texts", 45)
    # The report's prompts have up to 60 characters.
    sizes = ("--seq_len", 64, "--block_size", 64, "--total_batch_size", 128, "--max_steps", 4, "--vocab_size", 300)
    own = (*(flag for flag in TINY if flag != "--use_mock_data"), *sizes, "--log_dir", tmp_path / "log")
    words = ("--data", tmp_path / "texts", "--out", tmp_path, *own)
    done = subprocess.run(
        [sys.executable, "-m", "tinytron", "quickstart", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = done.stdout
    (path,) = (shards.parent for shards in tmp_path.glob("*/prepared.json"))
    (folder,) = (tmp_path / "log").iterdir()
    loss = float((folder / "log.txt").read_text().splitlines()[-1].split()[-1])
    tokens = tokens_of(path, "val")
    count = (len(tokens) - 1) // 64 * 64
    text = Naive(path / "tokenizer.json").tokenizer.decode(tokens[1 : count + 1]).encode()
    assert f"validation loss after 4 steps: {loss:.4f} nats per token" in report
    assert f"the same {len(text):,} held-out bytes in bits per byte" in report
    (line,) = (line for line in report.splitlines() if "this model" in line)
    assert float(line.split()[-1]) == pytest.approx(loss * count / math.log(2) / len(text), abs=2e-3)
    prompts = json.loads((path / "prepared.json").read_text())["prompts"]
    assert len(prompts) == 3
    assert all(f"--- sample ---\n{prompt}" in report for prompt in prompts)
    assert "import os" not in report
    assert "\nlook: " in report
    assert f"watch {folder} (its curves on a page in the browser" in report
    assert follow(report).startswith("the")
    assert (folder / "loss.png").stat().st_size > 1000
