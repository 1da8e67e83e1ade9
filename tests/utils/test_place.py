"""Processes that srun or mpirun started without torchrun find their place, or say in one line why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, SCRIPT, TINY, losses
from tinytron.errors import ConfigError
from tinytron.utils.place import first_host, torchrun_variables

SLURM = {
    "SLURM_STEP_NUM_TASKS": "9", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "gpu-[003-005]", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "1", "PMIX_NAMESPACE": "1506607105",
}  # fmt: skip
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (SLURM, "5 9 1 4 gpu-003"),
        (SLURM | {"SLURM_NODEID": "2", "SLURM_PROCID": "8", "SLURM_LOCALID": "0"}, "8 9 0 1 gpu-003"),
        (SLURM | {"MASTER_ADDR": "10.0.0.1"}, "5 9 1 4 10.0.0.1"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "8"}, "5 8 1 8 127.0.0.1"),
        (OPEN_MPI, "1 2 1 2 127.0.0.1"),
        # mpirun on two nodes of SLURM: its daemon is task 1 of 2 there
        (
            SLURM | OPEN_MPI | {"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NODELIST": "a,b"},
            "1 4 1 2 a",
        ),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "MASTER_ADDR": "h"},
            "1 2 0 1 h",
        ),
        (HYDRA, "3 4 3 4 127.0.0.1"),
        (SLURM | HYDRA | {"SLURM_STEP_NUM_TASKS": "4"}, "3 4 3 4 127.0.0.1"),
    ],
)  # fmt: skip
def test_the_variables_of_torchrun(environment: dict[str, str], place: str) -> None:
    found = torchrun_variables(environment)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert " ".join(found[name] for name in names) == place
    assert set(found) == {*names, "MASTER_PORT"}
    assert 20_000 <= int(found["MASTER_PORT"]) < 30_000


def test_the_port_is_the_jobs_or_the_users() -> None:
    of_job = [torchrun_variables(SLURM | {"SLURM_PROCID": rank, "SLURM_JOB_ID": job})["MASTER_PORT"]
              for rank, job in (("5", "77"), ("4", "77"), ("5", "78"))]  # fmt: skip
    assert of_job[0] == of_job[1] != of_job[2]
    assert torchrun_variables(SLURM | {"MASTER_PORT": "1234"})["MASTER_PORT"] == "1234"


@pytest.mark.parametrize(
    "environment",
    [
        {}, SLURM | {"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {"PMI_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "a,b"},  # the script of sbatch
    ],
)  # fmt: skip
def test_a_process_that_is_alone_or_was_told_is_left_alone(environment: dict[str, str]) -> None:
    assert torchrun_variables(environment) == {}


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1, .* (the number of processes is not known)"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2, .* (SLURM_PROCID is not a number)"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "x"}, "(OMPI_COMM_WORLD_LOCAL_RANK is not a number)"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"}, "(OMPI_COMM_WORLD_RANK=2 and OMPI_.*LOCAL_RANK=1 do not fit it)"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "OMPI_COMM_WORLD_LOCAL_RANK=1 do not fit it)"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "(nothing tells the address of the first node)"),
        ({k: v for k, v in HYDRA.items() if k != "MPI_LOCALNRANKS"}, "(nothing tells the address of the first node)"),
        (SLURM | HYDRA, "(SLURM_STEP_NUM_TASKS is another number of processes than PMI_SIZE)"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "(nothing tells the address of the first node)"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_one_line(environment: dict[str, str], reason: str) -> None:
    pattern = reason.replace("(", r"\(").replace(")", r"\)") + "; start one per node, which runs torchrun, or set RANK"
    with pytest.raises(ConfigError, match=pattern) as error:
        torchrun_variables(environment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[7,9-11]", "n7"),
        ("n[007-9]-ib,b", "n007-ib"),
        ("r[1-2]n[3-4],x", "r1n3"),
        ("", None),
    ],
)
def test_the_first_node_of_a_list(text: str, host: str | None) -> None:
    assert first_host({"SLURM_JOB_NODELIST": text}) == host
    assert first_host({"SLURM_JOB_NODELIST": "z", "SLURM_STEP_NODELIST": text}) == (host or "z")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed: apt-get install openmpi-bin")
def test_processes_of_mpirun_train_together(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = []
    for processes in (0, 2):
        prefix = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(processes)] if processes else []
        flags = [*map(str, TINY), "--max_steps", "2", "--log_dir", str(tmp_path / str(processes))]
        done = subprocess.run(
            [*prefix, sys.executable, str(SCRIPT), *flags],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (log,) = (tmp_path / str(processes)).glob("*/log.txt")
        logs.append(losses(log.read_text()))
    assert len(logs[0]) == 2
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
