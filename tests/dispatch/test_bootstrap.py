"""Self-contained scripts: they run alone, their folders may be set where they run, and for a TPU there is a second one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.dispatch.conftest import Place
from tests.dispatch.test_submit import TOKEN, Said, _write
from tests.dispatch.test_submit import said as said


def test_a_bootstrap_script_runs_alone(place: Place, said: Said, tmp_path: Path) -> None:
    _write(place, {"box": {"type": "plain", "env": {"A": "host"}}}, hf_token={"env": "HF_TOKEN"})
    words = ("bootstrap", "mine", "run.yaml", "out.sh", "--load", "module_with_jobs", "--target", "box", "say.text=a b")
    status, out, err = said(*words, "--root", f"{place.home}/else where", "--env", "B=1", "-n", "0")
    assert (status, err) == (0, "")
    assert "wrote out.sh" in out
    (tmp_path / "other").mkdir()
    done = subprocess.run(["./out.sh"], capture_output=True, text=True, env={**os.environ, "HF_TOKEN": ""})
    assert "the environment variable HF_TOKEN is not set; set it before this script starts" in done.stderr
    for _ in range(2):  # safe to repeat
        done = subprocess.run(["./out.sh"], capture_output=True, text=True, env={**os.environ, "HF_TOKEN": TOKEN})
        assert done.returncode == 0, done.stderr
    called = place.called
    assert called["argv"][5] == f"{place.home}/else where"
    assert called["argv"][-1] == "say.text=a b"
    assert (called["env"]["A"], called["env"]["B"], called["env"]["HF_TOKEN"]) == ("host", "1", TOKEN)
    assert TOKEN not in Path("out.sh").read_text()


def test_a_bootstrap_script_keeps_a_log(place: Place, said: Said) -> None:
    _write(place, {"box": {"type": "plain"}})
    words = ("bootstrap", "mine", "run.yaml", "out.sh", "--load", "module_with_jobs", "--target", "box", "-n", "0")
    assert said(*words, "--log", f"{place.home}/the logs")[0] == 0
    for rank, suffix in (("0", "log"), ("1", "node1")):
        done = subprocess.run(["./out.sh"], capture_output=True, text=True, env={**os.environ, "NODE_RANK": rank})
        assert done.stdout == "the job speaks\n"
        (log,) = (place.home / "the logs").glob(f"general_default_mine_*.{suffix}")
        assert "the job speaks\n" in log.read_text()
    (link,) = (place.home / "scratch/status").rglob("output.log")
    assert link.resolve().name.endswith(".log")
    assert len(list((place.home / "scratch/jobs/general/default/mine").iterdir())) == 1  # no part is left


def test_folders_of_a_bootstrap_script_may_be_set_where_it_runs(place: Place, said: Said) -> None:
    _write(place, {"box": {"type": "plain"}})
    assert (
        said("bootstrap", "mine", "run.yaml", "out.sh", "--load", "module_with_jobs", "--target", "box", "-n", "0")[0]
        == 0
    )
    there = place.home / "some where"
    env = {
        "TINYTRON_ROOT": str(there / "root"),
        "TINYTRON_WORK": str(there / "work"),
        "TINYTRON_DATA": str(there / "d"),
    }
    done = subprocess.run(["./out.sh"], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    called = place.called
    assert called["argv"][5] == env["TINYTRON_ROOT"]
    assert called["cwd"] == env["TINYTRON_WORK"]
    assert called["argv"][4].startswith(env["TINYTRON_WORK"])
    assert (there / "root/data").resolve() == there / "d"
    assert [path.name for path in there.iterdir() if path.name not in ("root", "work", "d")] == []
    done = subprocess.run(["./out.sh"], capture_output=True, text=True, env={**os.environ, "TINYTRON_ROOT": "out"})
    assert done.returncode == 2
    assert (
        "the folder root must be an absolute path, but it is out; use one such as TINYTRON_ROOT=/data/out"
        in done.stderr
    )


# gcloud as a stand-in: each worker is a folder, and the metadata server a stand-in for curl.
GCLOUD = """#!/bin/bash
printf '%s|' "$@" >>"$HOME/gcloud.log"; echo >>"$HOME/gcloud.log"
case "$4" in
describe) exit 1 ;;
scp) for worker in 0 1; do mkdir -p "$HOME/w$worker" && cp -p -- "$5" "$HOME/w$worker/${6#*:}"; done ;;
ssh)
    for word in "$@"; do case "$word" in --command=*) command="${word#*=}" ;; esac; done
    for worker in 0 1; do (cd "$HOME/w$worker" && WORKER="$worker" HOME="$HOME/w$worker" sh -c "$command"); done
    ;;
esac
"""
CURL = """#!/bin/sh
case "$*" in *agent-worker-number) echo "$WORKER" ;; *) echo 'a:b:10.0.0.7,a:b:10.0.0.8' ;; esac
"""


def test_a_bootstrap_for_a_tpu_also_makes_the_machine(place: Place, said: Said) -> None:
    place.tool("gcloud", GCLOUD)
    place.tool("curl", CURL)
    tpu = {"type": "tpu", "zone": "z", "project": "it's mine", "accelerator_type": "v4-16", "spot": True}
    _write(place, {"tpu": tpu}, hf_token={"env": "HF_TOKEN"}, work="~/scratch", root="~/root")
    status, out, err = said(
        "bootstrap", "Mine_1", "run.yaml", "out.sh", "--load", "module_with_jobs", "--target", "tpu"
    )
    assert (status, err) == (0, "")
    assert "wrote out.tpu.sh, which makes the TPU machine" in out
    assert "no TPU backend" in out
    assert "Untested, and the trainer has no TPU backend" in Path("out.tpu.sh").read_text()
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "out.tpu.sh"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    done = subprocess.run(["./out.tpu.sh"], capture_output=True, text=True, env={**os.environ, "HF_TOKEN": ""})
    assert "the environment variable HF_TOKEN is not set; set it first" in done.stderr
    done = subprocess.run(["./out.tpu.sh"], capture_output=True, text=True, env={**os.environ, "HF_TOKEN": TOKEN})
    assert done.returncode == 0, done.stderr
    for worker in ("0", "1"):
        called, end = place.home / f"w{worker}/called.json", time.monotonic() + 20
        while not called.exists() and time.monotonic() < end:
            time.sleep(0.1)
        env = json.loads(called.read_text())["env"]
        assert (env["NODE_RANK"], env["NUM_NODES"], env["MASTER_ADDR"]) == (worker, "2", "10.0.0.7")
        assert env["HF_TOKEN"] == TOKEN
        assert not (place.home / f"w{worker}/tinytron.begin.sh").exists()
    assert subprocess.run(["./out.tpu.sh", "delete"], capture_output=True, check=False).returncode == 0
    log = (place.home / "gcloud.log").read_text()
    assert TOKEN not in log
    machine = re.search(r"create\|(mine-1-[0-9a-f]{8})\|", log)
    assert machine is not None
    assert "|--accelerator-type=v4-16|--version=tpu-ubuntu2204-base|--spot|--zone=z|--project=it's mine|" in log
    assert f"|delete|{machine[1]}|--quiet|--zone=z|--project=it's mine|" in log


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--root and --work are needed without --target; use --root /data/out --work /tmp/work"),
        (
            ("--target", "box", "--mount", "redis://:p/a@h:1/0"),
            "--mount has an @ or a password where it is not understood",
        ),
        (("--target", "bx"), "is not a host of"),
        (("--root", "r", "--work", "/w"), "bootstrap.root r must be an absolute path or begin with ~/, as /data/root"),
        (("--target", "box", "--cache-size", "x"), "bootstrap.cache_size x must be a number with M, G or T; use 100G"),
    ],
)
def test_a_mistake_in_a_bootstrap_is_one_line(place: Place, said: Said, words: tuple[str, ...], says: str) -> None:
    _write(place, {"box": {"type": "plain"}})
    status, _, err = said("bootstrap", "mine", "run.yaml", "out.sh", "--load", "module_with_jobs", *words)
    assert status == 2
    assert says in err
    assert not Path("out.sh").exists()
