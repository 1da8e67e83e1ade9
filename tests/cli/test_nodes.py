"""The launch scripts for real: two nodes on this machine, and the mixture of experts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, Finished, finish, free_port, losses

DENSE, MOE = "scripts/debug_gpt_0.25b/pretrain.sh", "scripts/debug_gpt_0.3b_a0.17b/pretrain.sh"
TINY = [  # without --intermediate_size: a preset of which every option is overridden is an error
    *("--num_layer", "2", "--num_attention_heads", "4", "--num_key_value_heads", "2", "--hidden_size", "32"),
    *(
        "--vocab_size",
        "61",
        "--block_size",
        "32",
        "--precision",
        "fp32",
        "--log_every",
        "1",
    ),
    *("--max_steps", "3", "--init_std", "0.1"),
]
EXPERTS = [*TINY, "--moe_intermediate_size", "16", "--num_experts", "4"]


def _start(script: str, folder: Path, flags: Sequence[str], env: Mapping[str, object]) -> subprocess.Popen[str]:
    base: dict[str, object] = {
        "NUM_GPUS": 0,
        "BATCH_SIZE": 1,
        "SEQ_LEN": 32,
        "GBS": 8,
        "OMP_NUM_THREADS": 1,
        "MAX_LR": 0.01,
    }
    base["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the scripts take the active python
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NUM_NODES")
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("PET_")}
    return subprocess.Popen(
        ["bash", script, *flags, "--log_dir", str(folder)],
        cwd=ROOT,
        env={**kept, **{name: str(value) for name, value in {**base, **env}.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(script: str, folder: Path, flags: Sequence[str], **env: object) -> Finished:
    return finish(_start(script, folder, flags, env), timeout=120)


def _losses(folder: Path) -> dict[int, float]:
    (log,) = folder.glob("*/log.txt")
    return losses(log.read_text())


def _two_nodes(script: str, folder: Path, flags: Sequence[str], **env: object) -> list[Finished]:
    """The script once per node, as on two machines that share the log folder."""
    shared = {"NUM_NODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NPROC": 2, **env}
    nodes = [_start(script, folder, flags, {**shared, "NODE_RANK": rank}) for rank in (0, 1)]
    return [finish(node, timeout=120) for node in nodes]


CASES = {
    "dense": (DENSE, TINY, {}),
    "sep over nodes": (DENSE, [*TINY, "--batch_size", "2"], {"SEP_SIZE": 4}),
    "experts over nodes": (MOE, [*EXPERTS, "--ep_size", "4"], {"SEP_SIZE": 2}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow  # CI starts two nodes in the tests of platforms below
def test_two_nodes_log_the_losses_of_one(tmp_path: Path, name: str) -> None:
    script, flags, env = CASES[name]
    nodes = _two_nodes(script, tmp_path / "two", flags, **env)
    assert [(node.code, node.stderr) for node in nodes] == [(0, "")] * 2, nodes
    assert "step 3/3" in nodes[0].stdout
    assert nodes[1].stdout == ""  # one process of all writes
    one = _run(script, tmp_path / "one", flags, **env, NPROC=4)
    assert one.code == 0, one.stderr
    assert list(_losses(tmp_path / "one")) == [1, 2, 3]
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize("kind", ["PET", pytest.param("node counts", marks=pytest.mark.slow)])
def test_nodes_of_a_platform_are_one_world(tmp_path: Path, kind: str) -> None:
    """The variables of PyTorchJob, and node counts in WORLD_SIZE and RANK with the documented words before the command."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = []
    for rank in (0, 1):
        env: dict[str, object] = {**place, "WORLD_SIZE": 2, "RANK": rank}
        if kind == "PET":
            env |= {f"PET_{name}": value for name, value in place.items()}
            env |= {"PET_NNODES": 2, "PET_NODE_RANK": rank, "PET_NPROC_PER_NODE": 2}
        else:
            env |= {"NUM_NODES": 2, "NODE_RANK": rank, "NPROC": 2}
        nodes.append(_start(DENSE, tmp_path, [*TINY, "--print_topology"], env))
    done = [finish(node, timeout=120) for node in nodes]
    assert [(node.code, node.stderr) for node in done] == [(0, "")] * 2, done
    assert "topology: 4 processes = dp 4 x sep 1" in done[0].stdout
    assert "step 3/3" in done[0].stdout
    assert done[1].stdout == ""


def test_counts_of_unknown_things_are_one_error(tmp_path: Path) -> None:
    done = _run(DENSE, tmp_path, TINY, WORLD_SIZE=2, RANK=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500)
    assert done.code == 2
    assert done.stderr.startswith(
        "error: WORLD_SIZE=2 and RANK=1 are set, but NUM_NODES is not; if they count nodes, use "
    )
    assert "NUM_NODES=$WORLD_SIZE NODE_RANK=$RANK" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_moe_script_trains(tmp_path: Path) -> None:
    """Experts spread over the sequence group, as documented; the losses are those of one process."""
    both = [_run(MOE, tmp_path / str(n), EXPERTS, NPROC=n, SEP_SIZE=n) for n in (2, 1)]
    assert [(run.code, run.stderr) for run in both] == [(0, "")] * 2
    found = [_losses(tmp_path / str(n)) for n in (2, 1)]
    assert list(found[0]) == [1, 2, 3]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][3] < found[0][1]


@pytest.mark.slow
def test_a_mistake_on_two_nodes_is_one_line_on_each(tmp_path: Path) -> None:
    nodes = _two_nodes(DENSE, tmp_path, [*TINY, "--sep_size", "8", "--num_attention_heads", "8"])
    for node in nodes:
        assert node.code != 0
        lines = node.stderr.splitlines()
        assert len(lines) == 1, node.stderr
        assert lines[0].startswith("error: --sep_size 8 must divide the number of processes, 4; use one of [1, 2, 4]")
