"""The chat pipeline: its dialogues, and (slow) all of it on a tiny model, twice."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.corpus import make_texts, make_tokenizer, tokenize, write_jsonl
from tests.helpers.runs import ROOT, config_of
from tinytron.training import Trainer


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "chat_small" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dialogues_and_pairs_are_about_the_same_functions() -> None:
    script = load("dialogues")
    found = script.chosen(300)
    assert len({(f.module, f.name) for f in found}) == 300
    assert found == script.chosen(300)
    rows, pairs = list(script.dialogues(found)), list(script.pairs(found))
    assert len(rows) == 900
    assert len({row["messages"][0]["content"] for row in rows}) == 900
    for pair, row in zip(pairs, rows, strict=False):
        assert pair["chosen"][0] == row["messages"][1]
        assert pair["chosen"] != pair["rejected"]


@pytest.mark.slow
def test_the_whole_pipeline_and_again(tmp_path: Path) -> None:
    """A second call finds all work done. The answers are bad, but transformers writes the same."""
    make_tokenizer(tmp_path / "tokenizer.json")
    tokenize(write_jsonl(tmp_path / "texts.jsonl", make_texts(50)), tmp_path / "tokenizer.json", tmp_path / "data")
    sizes = (*("--num_layer", 1, "--hidden_size", 16, "--num_attention_heads", 2), "--num_key_value_heads", 1)
    flags = ("--intermediate_size", 24, "--vocab_size", 400, "--seq_len", 256, "--max_steps", 2)
    where = (
        "--log_dir",
        tmp_path / "log",
        "--dataset_path",
        tmp_path / "data",
        "--total_batch_size",
        1024,
        "--batch_size",
        2,
    )
    trainer = Trainer(config_of(*sizes, *flags, *where, "--precision", "fp32"))
    trainer.train()
    model = trainer.log_dir
    del trainer
    work = tmp_path / "work"
    work.mkdir()
    for name in ("scripts", "tinytron", "pyproject.toml", "constraints.txt"):
        (work / name).symlink_to(ROOT / name)
    environment = {**os.environ, "MODEL": str(model), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run(
            ["bash", "scripts/chat_small/train.sh"],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "transformers writes the same text" in done.stdout
    assert "already trained" in done.stdout
    assert json.loads((work / "log/chat_small/export/config.json").read_text())["model_type"] == "llama"
