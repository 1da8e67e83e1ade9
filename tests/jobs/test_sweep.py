"""Sweeps: which runs they make, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT
from tests.jobs.conftest import TINY
from tinytron.cli.main import main
from tinytron.errors import ConfigError
from tinytron.jobs.places import check_name
from tinytron.jobs.sweep import MOST_RUNS, grid


def test_every_combination_with_a_name() -> None:
    found = grid(["optim.max_lr=1e-3,2e-3", "model.num_layer=8, 12"])
    assert [variant.suffix for variant in found] == [
        "max_lr_1e-3-num_layer_8", "max_lr_1e-3-num_layer_12", "max_lr_2e-3-num_layer_8", "max_lr_2e-3-num_layer_12",
    ]  # fmt: skip
    assert found[1].words == ("optim.max_lr=1e-3", "model.num_layer=12")
    assert grid([])[0] == ("", ())


def test_commas_in_brackets_and_quotes_belong_to_a_value() -> None:
    (one, other) = grid(["train.batch_warmup_sizes=[1,2],[3,{a: 4,b: 5}]"])
    assert (one.words, other.words) == (
        ("train.batch_warmup_sizes=[1,2]",),
        ("train.batch_warmup_sizes=[3,{a: 4,b: 5}]",),
    )
    assert [variant.words[0] for variant in grid(["a.b='x,y',\"z,\""])] == ["a.b='x,y'", 'a.b="z,"']


def test_names_are_folders_and_differ() -> None:
    values = ["/a/b", "a b", "a/b", "$(rm -rf)", "\n", "..", "x" * 300, "y" * 300]
    found = grid([f"data.dataset_path={','.join(repr(value) for value in values)}"])
    names = [f"base-{variant.suffix}" for variant in found]
    assert len(set(names)) == len(values)
    for name in names:
        assert check_name("name", name) == name
        assert len(name) < 120


@pytest.mark.parametrize(
    ("sweep", "text"),
    [
        (["max_lr"], "--sweep max_lr must be an option, = and values, such as optim.max_lr=1e-3,2e-3"),
        (["=1,2"], "--sweep =1,2 must be an option, = and values"),
        (["a.b="], "--sweep a.b= must be an option, = and values"),
        (["a.b=1,,2"], "--sweep a.b=1,,2 must be an option, = and values"),
        (["a.b=1,1"], "--sweep a.b=1,1 names the value 1 twice; leave one out"),
        (["a.b=1", "a.b=2"], "--sweep names a.b twice; give all of its values together: a.b=2,..."),
        (
            [f"a.b={','.join(map(str, range(101)))}", "c=1,2,3,4,5,6,7,8,9,10"],
            f"makes 1010 runs, more than {MOST_RUNS}",
        ),
    ],
)
def test_what_is_no_sweep(sweep: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        grid(sweep)


@pytest.mark.slow
def test_a_sweep_runs_each_and_compares_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configure", "gpt/train/pretrain", "run.yaml", *TINY, "train.do_val=true"]) == 0
    words = ["run", "s", "run.yaml", "out", "--sweep", "optim.max_lr=2e-3,1e-2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUM_GPUS": "0"}
    command = [sys.executable, "-m", "tinytron", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    started = [line for line in lines if line.startswith("run ") and " of 2: " in line]
    assert started == ["run 1 of 2: s-max_lr_2e-3", "run 2 of 2: s-max_lr_1e-2"]
    rows = [line.split() for line in lines if line.startswith("s-max_lr_")]
    assert [(float(row[1]), row[2]) for row in rows] == [(2e-3, "finished"), (1e-2, "finished")]
    assert lines[-1].startswith("best: s-max_lr_")
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert "saved" not in again.stdout  # all of them are finished
    assert again.stdout.splitlines()[-1] == lines[-1]
