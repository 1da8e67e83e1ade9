"""The last collectives of every rank, also while one of them waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.runs import ROOT
from tinytron.distributed.flight_recorder import write_collectives

HANG = """
import os, sys, threading, time
from pathlib import Path
import torch, torch.distributed as dist
from tinytron.distributed.flight_recorder import VARIABLES, write_collectives
os.environ |= VARIABLES
dist.init_process_group("gloo")
rank = dist.get_rank()
dist.all_reduce(torch.ones(4))
if rank == 0:
    threading.Thread(target=lambda: dist.all_reduce(torch.ones(7)), daemon=True).start()  # the other one never comes
    time.sleep(1)
print(write_collectives(Path(sys.argv[1]) / f"{rank}.json"), flush=True)
time.sleep(1 - rank)
os._exit(0)
"""


def test_a_rank_that_waits_alone_has_one_collective_more(tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    command = [sys.executable, "-m", "tinytron.cli.launch", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "hang.py"), str(tmp_path)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.count("; collectives: ") == 2, done.stderr
    entries = [json.loads((tmp_path / f"{rank}.json").read_text())["entries"] for rank in range(2)]
    sizes = [[entry["input_sizes"] for entry in found if "all_reduce" in entry["profiling_name"]] for found in entries]
    assert sizes == [[[[4]], [[7]]], [[[4]]]]


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    assert "; collectives could not be written (" in write_collectives(tmp_path / "gone" / "0.json")
