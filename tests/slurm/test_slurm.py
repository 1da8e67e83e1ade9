"""A real SLURM: two nodes, an array, a job that is killed and queued again, one that meets its time limit. Their logs are
bit for bit those of a run without interruption."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.dispatch.conftest import Place, git
from tests.dispatch.conftest import place as place
from tests.dispatch.test_sshd import Watcher
from tests.helpers.runs import ROOT
from tests.jobs.conftest import TINY
from tests.slurm.conftest import SBIN, Cluster
from tinytron.cli.main import main
from tinytron.dispatch.choose import Rule
from tinytron.dispatch.reading import read_settings
from tinytron.dispatch.record import Submission, read_all
from tinytron.dispatch.ship import pack
from tinytron.dispatch.submit import Order, submit_all
from tinytron.dispatch.work import Request, Work

pytestmark = pytest.mark.slow
TOKEN = "s3cret-t0ken"
STEPS = 160
JOB = """
import os, time
from tinytron.registry import job
from tinytron.training import Trainer

@job("slow/train")
class Slow(Trainer):
    \"\"\"Train, slowly.\"\"\"
    def _maybe_save(self):
        super()._maybe_save()
        time.sleep(float(open(os.environ["SLOW"]).read()))
"""


class Lab:
    """A laptop on which SLURM's commands work, with a repository and a job's file."""

    def __init__(self, place: Place, slurm: Cluster) -> None:
        self.place, self.slurm = place, slurm
        self.slow = place.home / "slow"  # seconds of sleep after each step
        self.slow.write_text("0")
        self.repository = place.home / "repository"
        self.repository.mkdir()
        (self.repository / "slow_jobs.py").write_text(JOB)
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
            git(self.repository, *words)

    def settings(self, **host: Any) -> None:
        """Write the settings; SLURM runs on this machine, and its H100s are processes on the CPU."""
        env = {"NUM_GPUS": 0, "NPROC": 1, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": 1}
        env["SLOW"] = str(self.slow)
        cluster = {"root": f"{self.place.home}/root", "work": f"{self.place.home}/scratch", "env": env}
        cluster |= {"python": host.pop("python", sys.executable), "wandb": {"env": "MY_KEY"}}
        hpc = {"type": "slurm", "cluster": "lab", "chips": {"h100": 1}, "mem": "1000M", **host}
        content = {"clusters": {"lab": cluster}, "hosts": {"hpc": hpc}}
        (self.place.home / ".tinytron.yaml").write_text(yaml.safe_dump(content))

    def submit(self, name: str, *words: str) -> Submission:
        """Submit a two-node run."""
        assert (
            main(["submit", name, "run.yaml", "--clean", "--load", "slow_jobs", "-n", "2", "--chip", "h100", *words])
            == 0
        )
        return read_all()[-1]

    def kill_rank(self, rank: int) -> None:
        """SIGKILL for one of the processes that train."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if b"--run-process" in path.read_bytes() and _rank(path) == str(rank):
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def records(self, name: str) -> list[dict[str, Any]]:
        """The log of a run, without times."""
        (log,) = self.place.home.glob(f"root/checkpoints/general/default/{name}/{name}_*/log.jsonl")
        kept = ("step", "loss", "grad_norm", "lr", "tokens")
        found = [{k: v for k, v in json.loads(line).items() if k in kept} for line in log.read_text().splitlines()]
        return [record for record in found if "loss" in record]

    def until(self, condition: Callable[[], object], what: str, seconds: float = 400) -> None:
        """Wait. Raises: AssertionError after ``seconds``, with everything that was logged."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(path.read_text() for path in self.place.home.glob("scratch/logs/*"))
                queue = self.slurm.run("scontrol", "show", "job", check=False)
                raise AssertionError(f"{what} did not happen:\n{queue}\n{logs}\n{self.slurm.logs()}")
            time.sleep(0.5)

    def state(self, one: Submission) -> str:
        """The state that ``tinytron status`` shows."""
        from tinytron.dispatch.submit import states_of

        return getattr(states_of([one])[one.run_id], "state", "unreachable")

    def log(self, one: Submission) -> str:
        """The log so far."""
        with contextlib.suppress(FileNotFoundError):
            return Path(one.log).read_text()
        return ""


@pytest.fixture
def lab(place: Place, slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    monkeypatch.setenv("PATH", f"{place.home}/bin:{SBIN}")
    monkeypatch.setenv("MY_KEY", TOKEN)
    found = Lab(place, slurm)
    monkeypatch.chdir(found.repository)
    monkeypatch.syspath_prepend(str(found.repository))
    options = [
        *TINY,
        f"train.max_steps={STEPS}",
        "ckpt.save_every_steps=10",
        "train.val_every_steps=50",
        "--load",
        "slow_jobs",
    ]
    assert main(["configure", "slow/train", "run.yaml", *options]) == 0
    return found


def test_two_nodes_interrupted_three_times_log_what_an_uninterrupted_run_logs(lab: Lab) -> None:
    """The time limit first: SLURM sends USR1, the run saves, and the job queues itself again. Then a process is killed with
    SIGKILL, the job fails, and ``scontrol requeue`` continues it from its last checkpoint. At last a node is lost: SLURM
    queues the job again, and starts it when the node is back."""
    lab.settings(time="3:00", signal_seconds=60)
    lab.slow.write_text("0.7")
    watcher = Watcher(TOKEN)
    one = lab.submit("cut")
    lab.until(lambda: "queued again" in lab.log(one), "the time limit")
    assert "stopped by SIGUSR1" in lab.log(one)
    lab.until(lambda: lab.state(one) in ("preempted, queued", "running", "preparing"), "the queue", 60)
    lab.slurm.run("scontrol", "update", f"JobId={one.id}", "TimeLimit=60")  # on a slow machine it would be met again
    lab.slow.write_text("0.5")
    lab.until(lambda: lab.log(one).count("resuming after step") == 1, "the second start")
    seen = lab.log(one).count("| saved")
    lab.until(lambda: lab.log(one).count("| saved") > seen, "a checkpoint")
    lab.kill_rank(1)
    lab.until(lambda: lab.state(one) == "failed", "the failure", 90)
    assert "was killed by SIGKILL" in lab.log(one)
    lab.slurm.run("scontrol", "requeue", one.id)
    lab.until(lambda: lab.log(one).count("resuming after step") == 2, "the third start")
    seen = lab.log(one).count("| saved")
    lab.until(lambda: lab.log(one).count("| saved") > seen, "another checkpoint")
    lab.slurm.lose("n2")
    lab.until(lambda: "queued" in lab.state(one), "the loss of the node", 120)
    lab.slow.write_text("0")
    lab.slurm.daemon("slurmd", "-D", "-N", "n2")
    lab.until(lambda: lab.state(one) == "finished", "the end")
    assert lab.log(one).count("resuming after step") == 3
    assert watcher.stop() == []

    two = lab.submit("whole")
    lab.until(lambda: lab.state(two) == "finished", "the uninterrupted run")
    assert "2 x cpu" in lab.log(two)
    assert "resuming" not in lab.log(two)
    assert len(lab.records("whole")) >= STEPS
    assert lab.records("cut") == lab.records("whole")
    for path in [*lab.place.home.rglob("*"), *lab.slurm.folder.rglob("*.log")]:
        if path.is_file() and "submission" not in path.name:
            assert TOKEN.encode() not in path.read_bytes(), path


def test_an_array_runs_each_of_its_jobs(lab: Lab) -> None:
    """A sweep with a stand-in for Python, so that SLURM's part is all that takes time."""
    lab.settings(python=str(lab.place.python), env={"ACT": "0"})
    works = [Work(name, (b"job: x\n",), (f"a.b={name}",)) for name in ("one", "two", "three")]
    order = Order(Request(1, "h100"), Rule(), {})
    shipment = pack(lab.repository, False)
    done = submit_all(works, read_settings(), order, shipment, os.environ, lambda text: None, name="sweep")
    for one in done:
        lab.until(lambda one=one: lab.state(one) == "finished", "the end")  # type: ignore[misc]
        assert "the job speaks" in lab.log(one)
        name = Path(one.log).name
        assert name == f"general-default-sweep-{one.id}.out"


def test_cancel_stops_a_queued_and_a_running_job(lab: Lab) -> None:
    lab.settings(python=str(lab.place.python), env={"ACT": "wait"})
    running, queued = lab.submit("running"), lab.submit("queued")
    lab.until(lambda: lab.state(running) == "running", "the start")
    assert lab.state(queued) == "queued"
    for one in (queued, running):
        assert main(["cancel", one.name]) == 0
    lab.until(lambda: lab.state(running) == "cancelled", "the end")
    lab.until(lambda: lab.state(queued) == "cancelled", "the end of the queued one")
    assert "SIGTERM" in (lab.place.home / "signals").read_text()


def test_options_arrive_as_they_are_written(lab: Lab) -> None:
    """sbatch reads its lines itself: quotes, backslashes and spaces in a comment and in a path."""
    comment = """it's "quoted" \\ and $(touch pwned) `touch pwned` # all of it; %j"""
    lab.settings(python=str(lab.place.python), annotations={"comment": comment})
    one = lab.submit("options")
    lab.until(lambda: lab.state(one) == "finished", "the end")
    assert f"Comment={comment}" in lab.slurm.run("scontrol", "show", "job", one.id)
    assert " " in one.log
    assert not list(lab.place.home.rglob("pwned"))


def _rank(path: Path) -> str:
    return next((w[5:] for w in (path.parent / "environ").read_text().split("\0") if w.startswith("RANK=")), "")
