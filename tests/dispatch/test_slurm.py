"""SLURM's files and commands, with stand-ins for its programs. tests/slurm/ has the real ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.dispatch.conftest import Place, code
from tests.dispatch.test_submit import Said, _write
from tests.dispatch.test_submit import said as said
from tinytron.dispatch.choose import Rule, choose
from tinytron.dispatch.hosts import hosts_of
from tinytron.dispatch.reading import settings_of
from tinytron.dispatch.record import read_all
from tinytron.dispatch.shell import Shell
from tinytron.dispatch.ship import Shipment
from tinytron.dispatch.slurm import SlurmHost, free_chips, sbatch_option
from tinytron.dispatch.submit import Order, submit_all
from tinytron.dispatch.work import Request, Work
from tinytron.errors import ConfigError, HostError

SINFO = """n1                  idle     gpu:h100:8(S:0-1)    gpu:h100:0(IDX:N/A)
n1                  idle     gpu:h100:8(S:0-1)    gpu:h100:0(IDX:N/A)
n2                  mix      gpu:h100:8,nic:2     gpu:h100:3(IDX:0-2),nic:0
n3                  down*    gpu:h100:8           gpu:h100:0(IDX:N/A)
n4                  alloc    gpu:a100:4           gpu:a100:4(IDX:0-3)
n5                  idle     (null)               (null)
"""


def _host(place: Place, **more: Any) -> SlurmHost:
    cluster = {"root": f"{place.home}/root", "work": f"{place.home}/scratch", "python": str(place.python)}
    host = {"type": "slurm", "cluster": "lab", "chips": {"h100": 8}, **more}
    (found,) = hosts_of(settings_of({"clusters": {"lab": cluster}, "hosts": {"hpc": host}}))
    assert isinstance(found, SlurmHost)
    return found


def _batch(host: SlurmHost, request: Request, *names: str) -> str:
    jobs = [host.prepare(Work(name, (b"",)), request, f"run-{name}", "t", {}, {}) for name in names]
    return host.batch_script(jobs, request, f"general-default-{names[0]}")


def test_free_chips_of_each_node_count_once() -> None:
    assert free_chips(SINFO, "gpu:h100") == 13
    assert free_chips(SINFO, "gpu:a100") == 0
    assert free_chips(SINFO, "gpu") == 13
    with pytest.raises(HostError, match="sinfo says 'what'; expected node, state, gres and used gres"):
        free_chips("what", "gpu")


def test_the_batch_file_of_two_nodes(place: Place) -> None:
    host = _host(
        place, partitions=["a", {"name": "b", "default": True, "constraint": "ib&h100"}], account="me",
        exclude=["n1", "n2"], time="1:00:00", qos="high", cpus=16, env={"A": "b c"},
        annotations={"comment": 'say "hi" \\ there', "exclusive": True},
    )  # fmt: skip
    text = _batch(host, Request(16, "h100", mem="8G"), "mine")
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "job-name=general-default-mine",
        f'output="{place.home}/scratch/logs/general-default-mine-%j.out"',
        *("open-mode=append", "nodes=2", "ntasks-per-node=1", "gres=gpu:h100:8", "cpus-per-task=16", "mem=8G"),
        *("time=1:00:00", "partition=b", 'constraint="ib&h100"', "account=me", "qos=high", "exclude=n1,n2"),
        *("signal=B:USR1@300", 'comment="say \\"hi\\" \\\\ there"', "exclusive", "requeue"),
    ]
    assert "export A='b c'" in text
    (place.home / "b.sh").write_text(text)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(place.home / "b.sh")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    assert subprocess.run(["bash", "-n", str(place.home / "b.sh")], check=False).returncode == 0


def test_nodes_cpu_jobs_and_arrays(place: Place) -> None:
    text = _batch(_host(place, cpu_partitions=["cpu"]), Request(0), "mine")
    assert "#SBATCH --partition=cpu" in text
    assert "--gres" not in text
    assert "#SBATCH --nodes=1" in text
    text = _batch(_host(place), Request(2), "a", "b", "c")
    assert "#SBATCH --array=0-2" in text
    assert "general-default-a-%A_%a.out" in text
    assert "#SBATCH --gres=gpu:2" in text
    with pytest.raises(ConfigError, match=r"-n 12 on hpc: its nodes have 8 x h100, .* use -n 8"):
        _batch(_host(place), Request(12, "h100"), "mine")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("comment", "a\n#SBATCH --uid=0", "must not have line ends or control characters"),
        ("comment\n", None, "must not have line ends or control characters"),
        ("wrap=x", "y", "must be letters and -, such as comment"),
    ],
)
def test_an_option_that_would_become_two_is_refused(name: str, value: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sbatch_option(name, value)


def _tools(place: Place, free: str, state: str = "") -> None:
    place.tool("sinfo", f"#!/bin/sh\necho 'n1 idle gpu:h100:8 gpu:h100:{free}'\n")
    place.tool("sbatch", '#!/bin/sh\necho "$@" >"$HOME/sbatch"\ncp "$2" "$HOME/submitted"\necho "17;cluster"\n')
    place.tool("squeue", f'#!/bin/sh\necho "{state}"\n')
    place.tool("scancel", '#!/bin/sh\necho "$@" >"$HOME/scancel"\n')


def test_submit_queue_state_and_cancel(place: Place, said: Said) -> None:
    _tools(place, free="8", state="PENDING Priority")
    _write(place, {"hpc": {"type": "slurm", "chips": {"h100": 8}}})
    status, out, err = said("submit", "mine", "run.yaml", "--load", "module_with_jobs", "--cpu", "4")
    assert (status, err) == (0, "")
    assert "host: hpc (hpc has 0 free; queued)" in out
    assert f"as 17; log: {place.home}/scratch/logs/general-default-mine-17.out" in out
    assert "#SBATCH --cpus-per-task=4\n" in (place.home / "submitted").read_text()
    assert "17  queued (Priority)" in said("status")[1]
    _tools(place, free="0", state="RUNNING None")
    assert "17  preparing" in said("status")[1]
    _tools(place, free="0")
    assert "17  lost" in said("status")[1]
    Path(read_all()[-1].here, "exit_status").write_text("137\n")
    assert "17  failed (137)" in said("status")[1]
    Path(read_all()[-1].here, "exit_status").unlink()
    assert said("cancel", "mine")[0] == 0
    assert "17  cancelled" in said("status")[1]
    assert (place.home / "scancel").read_text() == "17\n"


def test_a_scheduler_that_does_not_answer_is_no_lost_job(place: Place, said: Said) -> None:
    _tools(place, free="0", state="RUNNING None")
    _write(place, {"hpc": {"type": "slurm"}})
    said("submit", "mine", "run.yaml", "--load", "module_with_jobs")
    place.tool("squeue", "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    status, out, _ = said("status")
    assert status == 1
    assert "17  unknown" in out
    assert "squeue: slurm_load_jobs error: Unable to contact slurm controller" in out
    place.tool("squeue", "#!/bin/sh\necho 'squeue: warning: old' >&2\necho RUNNING None\n")
    assert "17  preparing" in said("status")[1]
    place.tool("squeue", "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    assert "17  lost" in said("status")[1]


def test_secrets_are_not_in_the_environment_that_slurm_keeps(
    place: Place, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tools(place, free="0", state="PENDING Priority")
    place.tool("sbatch", '#!/bin/sh\nenv >"$HOME/sbatch"\necho 17\n')
    monkeypatch.setenv("MY_KEY", "s3cret")
    _write(place, {"hpc": {"type": "slurm"}}, wandb={"env": "MY_KEY"})
    assert said("submit", "mine", "run.yaml", "--load", "module_with_jobs")[0] == 0
    assert "s3cret" not in (place.home / "sbatch").read_text()


def test_the_batch_file_runs_the_script_forwards_usr1_and_requeues(place: Place) -> None:
    """By bash, with srun as a plain process: SLURM's own part is in tests/slurm."""
    skip = 'while [ "$1" != bash ]; do shift; done'
    place.tool("srun", f'#!/bin/bash\necho "$@" >"$HOME/srun"\n{skip}\nexport SLURM_NODEID=0\nexec "$@"\n')
    place.tool(
        "scontrol", '#!/bin/sh\ncase $1 in show) echo first; echo second ;; *) echo "$@" >>"$HOME/scontrol" ;; esac\n'
    )
    host = _host(place, env={"ACT": "wait"})
    job = host.prepare(Work("mine", (b"job: x\n",)), Request(8, "h100"), "run-1", code().tree, {}, {})
    host.send([job], code())
    script = place.home / "job.sbatch"
    script.write_text(host.batch_script([job], Request(8, "h100"), "t"))
    (Path(job.here) / "exit_status").write_text("1\n")  # an earlier start wrote it
    env = {**os.environ, "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "10042", "SLURM_NNODES": "2"}
    env |= {"MASTER_ADDR": "the laptop's", "NUM_GPUS": "1", "NODE_RANK": "5"}
    with subprocess.Popen(["bash", str(script)], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "the job speaks\n"
        process.send_signal(10)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "stopped before the time limit; this job is queued again" in out
    assert (place.home / "scontrol").read_text() == "requeue 10042\n"
    assert (place.home / "signals").read_text() == "SIGUSR1\n"
    assert not (Path(job.here) / "exit_status").exists()
    assert "--kill-on-bad-exit=1 --nodes=2 --ntasks=2 --ntasks-per-node=1" in (place.home / "srun").read_text()
    link = os.readlink(Path(job.status) / "output.log")
    assert link == f"{place.home}/scratch/logs/t-10042.out"
    called = place.called["env"]
    place_of = {name: called[name] for name in ("MASTER_ADDR", "MASTER_PORT", "NUM_NODES", "NODE_RANK", "NUM_GPUS")}
    assert place_of == {
        **{"MASTER_ADDR": "first", "MASTER_PORT": "20042", "NUM_NODES": "2", "NODE_RANK": "0", "NUM_GPUS": "8"}
    }


def test_too_few_lines_are_one_error(place: Place, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    _tools(place, free="0", state="PENDING")
    _write(place, {"hpc": {"type": "slurm"}})
    said("submit", "mine", "run.yaml", "--load", "module_with_jobs")
    monkeypatch.setattr(Shell, "run", lambda *words: "Welcome\n")
    assert "hpc gave 1 lines instead of 3; see what this machine prints" in said("status")[1]


@pytest.mark.parametrize(("code", "before", "again"), [(138, 0, True), (143, 2, True), (138, 3, False), (1, 0, False)])
def test_a_job_that_had_not_begun_is_queued_again_a_few_times(
    place: Place, code: int, before: int, again: bool
) -> None:
    stop = f'#!/bin/bash\ntrap "exit {code}" USR1\necho ready\nfor _ in {{1..300}}; do sleep 0.1; done\n'
    place.tool("srun", stop)
    place.tool("scontrol", '#!/bin/sh\necho "$@" >>"$HOME/scontrol"\n')
    host = _host(place, env={"MASTER_ADDR": "first"})
    job = host.prepare(Work("mine", (b"job: x\n",)), Request(8, "h100"), "run-1", "t", {}, {})
    Path(job.here).mkdir(parents=True)
    script = place.home / "job.sbatch"
    script.write_text(host.batch_script([job], Request(8, "h100"), "t"))
    Path(job.here, "tries").write_text(str(before))
    env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_RESTART_COUNT": "9"}
    with subprocess.Popen(["bash", str(script)], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(10)
        process.communicate(timeout=30)
    assert process.returncode == code
    assert (place.home / "scontrol").exists() == again
    assert Path(job.here, "exit_status").exists() != again
    assert again or Path(job.here, "exit_status").read_text() == f"{code}\n"  # nothing will continue it
    assert Path(job.here, "tries").read_text() == (f"{before + 1}\n" if code != 1 else "0\n")


@pytest.mark.parametrize(
    ("code", "failed", "again"), [(75, "", True), (143, "", True), (143, "failed", False), (143, "cancelled", False)]
)
def test_a_job_that_lost_the_processes_of_a_node_is_queued_again(
    place: Place, code: int, failed: str, again: bool
) -> None:
    """SLURM does that when it clears up a node that was lost and is back. After an error it stops the other nodes, too."""
    host = _host(place, env={"MASTER_ADDR": "first"})
    job = host.prepare(Work("mine", (b"job: x\n",)), Request(8, "h100"), "run-1", "t", {}, {})
    Path(job.here).mkdir(parents=True)
    place.tool("srun", f"#!/bin/bash\n{f'touch {job.here!r}/{failed}' if failed else ''}\nexit {code}\n")
    place.tool("scontrol", '#!/bin/sh\necho "$@" >>"$HOME/scontrol"\n')
    script = place.home / "job.sbatch"
    script.write_text(host.batch_script([job], Request(8, "h100"), "t"))
    done = subprocess.run(
        ["bash", str(script)],
        env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert (place.home / "scontrol").exists() == again
    assert ("the processes of one node were asked to stop; this job is queued again" in done.stdout) == again
    assert Path(job.here, "exit_status").exists() != again


def test_a_sweep_is_one_array_with_one_record_each(place: Place) -> None:
    _tools(place, free="0")
    host = _host(place)
    works = [Work(name, (b"job: x\n",)) for name in ("a", "b")]
    order = Order(Request(1, "h100"), Rule(), {})
    done = submit_all(works, host.whole, order, Shipment(code(), "c", ()), {}, lambda text: None, name="lr")
    assert [one.id for one in done] == ["17_0", "17_1"]
    assert [Path(one.log).name for one in done] == ["general-default-lr-17_0.out", "general-default-lr-17_1.out"]
    assert [one.name for one in read_all()] == ["a", "b"]
    text = (place.home / "submitted").read_text()
    assert all(one.here in text for one in done)


def test_the_first_with_free_chips_is_chosen_and_else_the_queue(place: Place) -> None:
    cluster = {"root": "/r", "work": f"{place.home}/w"}
    hosts: dict[str, Any] = {
        "box": {"type": "plain", "cluster": "lab", "chips": {"h100": 4}},
        "hpc": {"type": "slurm", "cluster": "lab", "chips": {"h100": 8}},
        "far": {"type": "slurm", "cluster": "lab", "chips": {"a100": 8}, "ssh": "far"},
    }
    settings = settings_of({"clusters": {"lab": cluster}, "hosts": hosts, "priority": ["hpc"]})
    place.tool("nvidia-smi", "#!/bin/sh\necho '10, NVIDIA H100'\n")
    place.tool("ssh", "#!/bin/sh\nexit 255\n")

    def chosen(request: Request, rule: Rule | None = None) -> tuple[str, str]:
        host, why = choose(settings, hosts_of(settings), request, rule or Rule())
        return host.name, why

    _tools(place, free="0")
    assert chosen(Request(4, "h100")) == ("hpc", "8 free")
    _tools(place, free="8")
    assert chosen(Request(1, "h100")) == ("box", "1 free")
    assert chosen(Request(2, "h100")) == ("hpc", "hpc has 0 free; box has 1 free; far does not have 2 x h100; queued")
    assert chosen(Request(2, "h100"), Rule(target="box")) == ("box", "as --target says")
    assert chosen(Request(0)) == ("hpc", "a CPU job")
    with pytest.raises(ConfigError, match="far cannot be reached"):
        chosen(Request(8, "a100"))
