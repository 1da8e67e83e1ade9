"""scripts/shakespeare_char: nanoGPT's configuration, its text, and the table of three runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from tests.helpers.runs import ROOT, config_of
from tinytron.data.formats import open_shard
from tinytron.errors import DataError

TEXT = "".join(f"{n}. To be, or not to be: that is the question.\n" for n in range(200))


@pytest.fixture
def compare() -> Any:
    path = ROOT / "scripts" / "shakespeare_char" / "compare.py"
    spec = importlib.util.spec_from_file_location("shakespeare_compare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_run_is_what_nanogpt_documents(compare: Any) -> None:
    """config/train_shakespeare_char.py with the flags of the README's section on CPUs."""
    config = config_of(*compare.RUNS["nanogpt"][1], *compare.COMMON)
    model, train, optim = config.model, config.train, config.optim
    sizes = (model.num_layer, model.num_attention_heads, model.num_key_value_heads, model.hidden_size)
    assert (*sizes, model.intermediate_size, model.block_size) == (4, 4, 4, 128, 512, 64)
    kinds = (model.norm_type, model.mlp_type, model.position_type, model.bias, model.tied_lm_head, model.dropout)
    assert kinds == ("layer", "gelu", "learned", False, True, 0.0)
    assert (train.batch_size, train.seq_len, train.total_batch_size, train.max_steps) == (12, 64, 768, 2000)
    assert (optim.optimizer, optim.max_lr, optim.min_lr, optim.warmup_steps) == ("adam", 1e-3, 1e-4, 100)
    assert (optim.adam_beta1, optim.adam_beta2, optim.weight_decay, train.grad_clip_value) == (0.9, 0.99, 0.1, 1.0)
    assert (optim.lr_schedule, config.train.precision) == ("cosine", "fp32")


def test_the_others_are_of_the_same_size_and_batch(compare: Any) -> None:
    first, *others = (config_of(*flags, *compare.COMMON) for _, flags in compare.RUNS.values())
    assert len(others) == 2
    for config in others:
        assert config.train == first.train
        assert (config.model.hidden_size, config.model.num_layer, config.model.resolved_head_dim) == (128, 4, 64)
    assert [config.optim.optimizer for config in others] == ["adam", "muon"]
    assert others[0].optim == first.optim


def test_the_last_tenth_is_held_out_in_characters(compare: Any, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text(TEXT)
    flags = compare.prepare(tmp_path / "input.txt", tmp_path / "data")
    folder, size = Path(flags[1]), int(flags[3])
    assert size == len(set(TEXT))
    alphabet = sorted(set(TEXT))
    made = ["".join(alphabet[i] for i in open_shard(folder / f"{split}_000000.bin")) for split in ("train", "val")]
    assert "".join(made) == TEXT
    assert len(made[1]) == pytest.approx(len(TEXT) / 10, abs=50)  # whole lines


def test_text_that_is_not_there(compare: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"DATA=gone.txt is not a file; name a text file, such as DATA=input.txt"):
        compare.find_text("gone.txt", tmp_path)
    gone = (tmp_path / "gone.txt").as_uri()
    with pytest.raises(DataError, match=r"gone.txt cannot be downloaded \(.*\); .* DATA=path/to/input.txt"):
        compare.find_text(None, tmp_path / "data", gone)
    assert not (tmp_path / "data").exists()
    (tmp_path / "there.txt").write_text(TEXT)
    there = (tmp_path / "there.txt").as_uri()
    path = compare.find_text(None, tmp_path / "data", there)
    assert path.read_text() == TEXT
    assert compare.find_text(None, tmp_path / "data", gone) == path  # kept


@pytest.mark.slow
def test_three_runs_and_a_table(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text(TEXT)
    flags = ("--folder", tmp_path / "data", "--log_dir", tmp_path / "log", "--data", tmp_path / "input.txt", "--")
    command = [sys.executable, "scripts/shakespeare_char/compare.py", *flags, "--max_steps", 3, "--num_layer", 1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):  # the second finds everything done
        done = subprocess.run(
            [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stderr
        table = done.stdout.splitlines()[-3:]
        assert all(re.fullmatch(r".{44}     3  \d\.\d{4}", row) for row in table), table
    assert len(list((tmp_path / "log").iterdir())) == 3
    command += ["--hidden_size", 7]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 2
    assert "error: --num_attention_heads 4 must divide --hidden_size 7" in done.stderr
