"""``tinytron run`` on several nodes: the command on each of them is one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, Finished, finish, free_port
from tests.jobs.conftest import TINY
from tinytron.cli.entry import TO_BE_CONTINUED
from tinytron.cli.main import main
from tinytron.cli.nodes import Nodes, nodes_of
from tinytron.errors import ConfigError


def _node(*words: str, **env: object) -> subprocess.Popen[str]:
    base = {"PYTHONPATH": f"{ROOT}:.", "OMP_NUM_THREADS": 1, "NUM_GPUS": 0, **env}
    variables = {**os.environ, **{name: str(value) for name, value in base.items()}}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "tinytron", "run", *words], env=variables, stdout=pipe, stderr=pipe, text=True
    )


def _start_two_nodes(*words: str) -> list[subprocess.Popen[str]]:
    place = {"NUM_NODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    second, first = (_node(*words, **place, NODE_RANK=rank) for rank in (1, 0))  # the second has to wait
    return [first, second]


def _two_nodes(*words: str) -> list[Finished]:
    return [finish(node, timeout=120) for node in _start_two_nodes(*words)]


def _records(out: str, name: str) -> list[dict[str, object]]:
    (log,) = Path(out).glob(f"checkpoints/general/default/{name}/{name}_*/log.jsonl")
    kept = ("step", "loss", "grad_norm", "lr")
    return [{key: r[key] for key in kept if key in r} for r in map(json.loads, log.read_text().splitlines())]


@pytest.mark.slow
def test_stages_on_two_nodes_are_one_run(module: str) -> None:
    """A stage of one process runs on the first node only; the next one trains on both, as in two processes of one node."""
    main(["configure", "say/text", "say.yaml", "--load", module, "say.text=hello"])
    assert main(["configure", "gpt/train/pretrain", "train.yaml", *TINY]) == 0
    words = ("pipe", "say.yaml", "two", "-s", "train.yaml", "--load", module)
    first, second = _two_nodes(*words)
    assert [(node.code, node.stderr) for node in (first, second)] == [(0, "")] * 2, (first, second)
    assert "said hello" in first.stdout
    assert "waiting for the first node, which runs pipe_stage0 alone" in second.stdout
    assert "said" not in second.stdout
    assert "2 x cpu" in first.stdout
    assert "step 3/3" in first.stdout
    assert "step 3/3" not in second.stdout
    again = _two_nodes(*words)
    assert [node.stdout.count("is finished") for node in again] == [2, 2]

    one = finish(_node("pipe", "say.yaml", "one", "-s", "train.yaml", "--load", module, NPROC=2))
    assert one.code == 0, one.stderr
    assert len(_records("one", "pipe_stage1")) >= 3
    assert _records("two", "pipe_stage1") == _records("one", "pipe_stage1")


@pytest.mark.slow
def test_a_run_that_another_node_stopped_is_not_taken_for_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configure", "gpt/train/pretrain", "train.yaml", *TINY, "train.max_steps=100000"]) == 0
    first, second = _start_two_nodes("long", "train.yaml", "out")
    end = time.monotonic() + 120
    while not list(Path("out").rglob("log.jsonl")) and time.monotonic() < end:
        time.sleep(0.2)
    second.send_signal(signal.SIGTERM)
    told = finish(first)
    assert told.code == TO_BE_CONTINUED, told
    assert "stopped by SIGTERM: saved" in told.stdout
    assert finish(second).code in (0, 143)


@pytest.mark.parametrize(
    ("environment", "nodes", "flags"),
    [
        ({}, Nodes(), ["--standalone"]),
        ({"NUM_NODES": "1", "PET_NNODES": "2"}, Nodes(), ["--standalone"]),
        (
            {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n0"},
            Nodes(2, 1, "n0", 29500),
            ["--nnodes", "2", "--node_rank", "1", "--master_addr", "n0", "--master_port", "29500"],
        ),
        (
            {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "n0", "PET_MASTER_PORT": "1"},
            Nodes(4, 3, "n0", 1),
            ["--nnodes", "4", "--node_rank", "3", "--master_addr", "n0", "--master_port", "1"],
        ),
    ],
)
def test_the_environment_says_where_a_node_is(environment: dict[str, str], nodes: Nodes, flags: list[str]) -> None:
    assert nodes_of(environment) == nodes
    assert nodes.rendezvous == flags


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"NUM_NODES": "two"}, "environment variable NUM_NODES='two' must be a whole number; use NUM_NODES=1"),
        ({"PET_NNODES": ""}, "environment variable PET_NNODES='' must be a whole number; use PET_NNODES=1"),
        ({"NUM_NODES": "0"}, "NUM_NODES=0 must be at least 1; use NUM_NODES=1 on one machine"),
        ({"NUM_NODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 must be below NUM_NODES=2; number the nodes from 0"),
        ({"NUM_NODES": "2"}, "NUM_NODES=2 nodes need the address of the first one; set MASTER_ADDR, such as"),
    ],
)
def test_a_wrong_place_is_one_error(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        nodes_of(environment)
