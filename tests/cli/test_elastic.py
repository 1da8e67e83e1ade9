"""Runs that lose nodes and get them back."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from tests.helpers.runs import ROOT, TINY, descendants, finish, free_port, losses, read_logs, run
from tests.helpers.runs import start as start_run
from tinytron.cli import elastic, launch
from tinytron.cli.elastic import is_elastic, make_elastic, numbers_of_nodes
from tinytron.errors import ConfigError

# Slow while there is a file called hold. Each step writes its number and the number of processes, and every rank the
# hashes of the sequences that it got: step, the start of these workers (by their port), hashes.
SCRIPT = """
import os, time, zlib
from pathlib import Path
from tinytron.cli import entry
from tinytron.training import Trainer, build_config, parse_args


class Slow(Trainer):
    def train_step(self, microbatches):
        if self.master_process:
            Path("progress.new").write_text(f"{self.step} {self.state.layout.world_size}")
            Path("progress.new").replace("progress")
        hashes = [zlib.crc32(row.numpy().tobytes()) for batch in microbatches for row in batch.input_ids]
        with open(f"rows_{os.getpid()}", "a") as file:
            print(self.step, os.environ.get("MASTER_PORT"), *hashes, file=file)
        if Path("hold").exists():
            time.sleep(1)
        super().train_step(microbatches)


entry.run(lambda: Slow(build_config(parse_args())).train())
"""
FLAGS = (
    *TINY,
    "--precision",
    "fp64",
    "--max_steps",
    240,
    "--log_every",
    1,
    "--save_every_steps",
    4,
    "--max_epochs",
    200,
)
PLACE = {"rdzv_backend": "c10d", "rdzv_endpoint": "host:29400", "standalone": False}


def _args(nnodes: str, **options: object) -> argparse.Namespace:
    return argparse.Namespace(**{"nnodes": nnodes, "max_restarts": 3, **PLACE, **options})


def test_a_range_of_nodes_is_elastic() -> None:
    assert [is_elastic(_args(nodes)) for nodes in ("2", "2:2", "1:2")] == [False, False, True]
    assert not is_elastic(_args("2", max_restarts=0, rdzv_backend="static"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rdzv_backend": "static"}, r"--nnodes 1:2 needs a place where nodes can meet again; add --rdzv_backend c10d"),
        ({"rdzv_endpoint": ""}, r"--nnodes 1:2 needs a place where nodes can meet again"),
        ({"max_restarts": 0}, r"--nnodes 1:2 restarts .*, but --max_restarts is 0; use .* such as --max_restarts 10"),
    ],
)
def test_options_that_do_not_go_with_it(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        is_elastic(_args("1:2", **options))


@pytest.mark.parametrize("nodes", ["0:2", "1:2:", "2:1", "a:b", "1:", ":2", "0", "-1:2", "1:2:3", " 1:2", "x"])
def test_a_number_of_nodes_is_at_least_1_and_a_range_goes_up(nodes: str) -> None:
    with pytest.raises(
        ConfigError, match=f"--nnodes {nodes} .PET_NNODES. must be .* 1 <= MIN <= MAX; use --nnodes 2, or"
    ):
        is_elastic(_args(nodes))
    with pytest.raises(ConfigError, match="1 <= MIN <= MAX"):
        launch.main([f"--nnodes={nodes}", "--max_restarts", "2", "-m", "tinytron"])
    assert numbers_of_nodes("3") == (3, 3)
    assert numbers_of_nodes("1:4") == (1, 4)


class _LeaveError(Exception):
    pass


@pytest.mark.parametrize(("asked", "statuses", "ends"), [
    (False, (1, -9), None), (False, (75, None), None), (True, (75, 75), _LeaveError), (False, (1, 2), SystemExit),
])  # fmt: skip
def test_who_meets_the_others_again(
    asked: bool, statuses: tuple[int | None, ...], ends: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    restarted: list[object] = []
    closed: list[object] = []
    monkeypatch.setattr(SimpleElasticAgent, "_restart_workers", lambda agent, group: restarted.append(group))
    monkeypatch.setattr(LocalElasticAgent, "_stop_workers", None)
    handlers = {n: SimpleNamespace(proc=SimpleNamespace(returncode=status)) for n, status in enumerate(statuses)}

    def leave() -> None:
        if asked:
            raise _LeaveError

    make_elastic(lambda: cast(Any, SimpleNamespace(subprocess_handlers=handlers)), leave, 2)
    agent = cast(Any, SimpleNamespace(_shutdown=lambda *how: closed.append(how)))
    with pytest.raises(ends) if ends else contextlib.nullcontext():
        cast(Any, SimpleElasticAgent)._restart_workers(agent, "group")
    assert restarted == ([] if ends else ["group"])
    cast(Any, LocalElasticAgent)._stop_workers(agent, "group")
    assert closed == [(signal.SIGTERM, elastic.SAVING_SECONDS)]


LAUNCH = ("-m", "tinytron", "launch", "--nnodes", "1:2", "--nproc_per_node", "1", "--max_restarts", "9")


def _await(what: str, true: Callable[[], object], agents: list[subprocess.Popen[str]], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        ended = [agent.communicate() for agent in agents if agent.poll() is not None]
        assert not ended, f"an agent ended while waiting for {what}: {ended}"
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.1)


def _kill(agent: subprocess.Popen[str]) -> None:
    """Kill the agent and its workers, as if the node lost its power."""
    if agent.poll() is None:
        pids = [agent.pid, *descendants(agent.pid)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that the agent cannot restart its workers
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    agent.communicate()


def _rows(folder: Path) -> dict[int, dict[str, list[str]]]:
    """By step and start of workers: the hashes of the sequences of all ranks, sorted."""
    found: dict[int, dict[str, list[str]]] = {}
    for file in folder.glob("rows_*"):
        for line in file.read_text().splitlines():
            step, started, *hashes = line.split()
            rows = found.setdefault(int(step), {}).setdefault(started, [])
            rows += hashes
            rows.sort()
    return found


def _check_the_batches(disturbed: dict[int, dict[str, list[str]]], whole: dict[int, dict[str, list[str]]]) -> None:
    """Each step that was completed had exactly the sequences of the undisturbed run."""
    assert sorted(disturbed) == sorted(whole) == list(range(240))
    assert len({started for starts in disturbed.values() for started in starts}) == 4
    for step, starts in disturbed.items():
        (expected,) = whole[step].values()
        assert len(expected) == 8
        assert expected in starts.values()
        for rows in starts.values():  # one that was killed may miss the other's part
            assert rows == expected or (len(rows) == 4 and set(rows) < set(expected))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers of an agent in /proc")
def test_a_run_loses_a_node_gets_it_back_and_lets_it_go(tmp_path: Path) -> None:
    """Two agents. One is killed with its workers, comes back, and then leaves after a notice."""
    (tmp_path / "slow.py").write_text(SCRIPT)
    (tmp_path / "hold").touch()
    port = free_port()
    place = (
        "--rdzv_backend",
        "c10d",
        "--rdzv_id",
        "job",
        "--rdzv_endpoint",
        f"127.0.0.1:{port}",
        "--local_addr",
        "127.0.0.1",
    )
    conf = ("--rdzv_conf", "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3")
    launch = (*LAUNCH, *place, *conf)
    # A micro-batch of 8 fits one process, not two: --fit_batch makes it 4 there.
    own = (*FLAGS, "--batch_size", 8, "--fit_batch", "--log_dir", tmp_path / "log")
    command = [sys.executable, *launch, "slow.py", *map(str, own)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {k: v for k, v in environment.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *more],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    seen = 0

    def trains(processes: int) -> bool:
        """True once that many processes train, three steps after the last such moment or more."""
        nonlocal seen
        with contextlib.suppress(OSError):
            step, world = map(int, (tmp_path / "progress").read_text().split())
            if world == processes and step >= seen + 3:
                seen = step
                return True
        return False

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    agents = [start()]
    try:
        _await("store", listens, agents)  # the first agent has it
        agents.append(start())
        _await("two processes", lambda: trains(2), agents)
        _kill(agents.pop())
        _await("one process after the loss", lambda: trains(1), agents)
        agents.append(start("--preempt_file", "notice"))
        _await("two processes again", lambda: trains(2), agents)
        leaving = agents.pop()
        (tmp_path / "notice").touch()
        said, _ = leaving.communicate(timeout=120)
        assert leaving.returncode == 128 + signal.SIGTERM, said
        assert "preemption notice at notice: the run saves and ends after this step\n" in said
        assert said.endswith("stopped by SIGTERM\n")
        _await("one process after the farewell", lambda: trains(1), agents)
        (tmp_path / "hold").unlink()
        said, _ = agents[0].communicate(timeout=180)
        assert agents[0].returncode == 0, said
    finally:
        for agent in agents:
            _kill(agent)
    (folder,) = (tmp_path / "log").iterdir()
    found = losses(read_logs(folder)[0])
    assert list(found) == list(range(1, 241))
    (tmp_path / "whole").mkdir()
    flags = (*FLAGS, "--batch_size", 8, "--log_dir", "log")
    whole = run(*flags, cwd=tmp_path / "whole", script=tmp_path / "slow.py")
    assert whole.code == 0, whole.stderr
    (other,) = (tmp_path / "whole" / "log").iterdir()
    _check_the_batches(_rows(tmp_path), _rows(tmp_path / "whole"))
    assert found == pytest.approx(losses(read_logs(other)[0]), rel=1e-7)


@pytest.mark.slow
def test_a_notice_stops_a_run_as_sigterm_does(tmp_path: Path) -> None:
    flags = ("--max_steps", 10**6, "--max_epochs", 10**6, "--save_every_steps", 5, "--preempt_file", "notice")
    process = start_run(*TINY, *flags, cwd=tmp_path)
    _await("checkpoint", lambda: list(tmp_path.glob("log/*/*_meta.pt")), [process])
    (tmp_path / "notice").touch()
    stopped = finish(process, timeout=120)
    assert stopped.code == 0
    assert stopped.stderr == "preemption notice at notice: the run saves and ends after this step\n"
    assert "stopped by SIGTERM: saved; run the same command again to resume" in stopped.stdout


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_one_line_and_not_tried_again(tmp_path: Path) -> None:
    place = ("--rdzv_backend", "c10d", "--rdzv_id", "job", "--rdzv_endpoint", f"127.0.0.1:{free_port()}")
    conf = ("--rdzv_conf", "last_call_timeout=1", "--local_addr", "127.0.0.1")
    launch = (*LAUNCH, *place, *conf)
    own = (*TINY, "--batch_size", 3, "--log_dir", tmp_path)
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tinytron", "pretrain", *map(str, own)], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --total_batch_size 96")


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers of an agent in /proc")
@pytest.mark.usefixtures("real_processes")  # torch reads the level of its messages when it is imported
def test_the_loss_of_the_node_where_launchers_meet_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text(
        "import os, time\nopen(f'{os.getpid()}-of-{os.environ[\"WORLD_SIZE\"]}', 'w')\ntime.sleep(600)\n"
    )
    port = free_port()
    place = ("--rdzv_backend", "c10d", "--rdzv_id", "job", "--rdzv_endpoint", f"127.0.0.1:{port}")
    conf = ("--local_addr", "127.0.0.1", "--rdzv_conf", "last_call_timeout=2")
    agents = []

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def start() -> None:
        command = [sys.executable, *LAUNCH, *place, *conf, "sleep.py"]
        agents.append(subprocess.Popen(
            command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ))  # fmt: skip

    try:
        start()
        _await("store", listens, agents)  # the first launcher has it
        start()
        _await("two workers", lambda: len(list(tmp_path.glob("*-of-2"))) == 2, agents)
        _kill(agents[0])
        said, _ = agents[1].communicate(timeout=120)
    finally:
        for agent in agents:
            if agent.poll() is None:
                _kill(agent)
    assert said == (
        f"error: the node 127.0.0.1:{port} where the launchers meet is gone; start the same command on all nodes again\n"
    )
    assert agents[1].returncode == 1
