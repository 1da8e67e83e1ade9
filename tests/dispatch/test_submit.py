"""The commands as a user types them, with this machine as the host, and with stand-ins for SLURM and for GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.dispatch.conftest import Place, without_tool
from tests.dispatch.test_gpus_and_storage import NVIDIA
from tests.jobs.conftest import MODULE
from tinytron.checkpoint.files import CheckpointFiles
from tinytron.cli.main import main
from tinytron.dispatch.record import read_all
from tinytron.dispatch.shell import Shell
from tinytron.utils.texts import watch_command

Said = Callable[..., tuple[int, str, str]]
TOKEN = "s3cret-t0ken"

MADE = ("configure", "say/text", "run.yaml", "say.text=hi", "--load", "module_with_jobs")
SUBMIT = ("submit", "mine", "run.yaml", "--load", "module_with_jobs")


@pytest.fixture
def said(repository: Path, capfd: pytest.CaptureFixture[str]) -> Said:
    """A function that runs a command in a repository with a job's file, and gives status, output and errors."""
    (repository / "module_with_jobs.py").write_text(MODULE)
    (repository / ".gitignore").write_text("*\n")
    subprocess.run(["git", "add", "-f", "module_with_jobs.py"], check=True)  # it has to travel
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "x"], check=True)
    sys.path.insert(0, str(repository))
    assert main([*MADE, "--chip", "h100", "-n", "1"]) == 0
    capfd.readouterr()

    def run(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        return status, *capfd.readouterr()

    return run


def _write(place: Place, hosts: dict[str, Any], **more: Any) -> None:
    cluster = {"root": f"{place.home}/root", "work": f"{place.home}/scratch", "python": str(place.python), **more}
    content = {"clusters": {"lab": cluster}, "hosts": {n: {"cluster": "lab", **h} for n, h in hosts.items()}}
    (place.home / ".tinytron.yaml").write_text(yaml.safe_dump(content))


def _until(said: Said, name: str, state: str) -> str:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        status, out, err = said("status", name)
        assert (status, err) == (0, "")
        if f" {state}" in out:
            return out
        time.sleep(0.2)
    raise AssertionError(out)


def test_submit_watch_and_pull(place: Place, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", TOKEN)
    root = place.home / "root\\1"
    cluster = {"root": str(root), "wandb": {"env": "MY_KEY"}, "env": {"A": "cluster", "B": "cluster"}}
    _write(place, {"box": {"type": "plain"}}, **cluster)
    words = (*SUBMIT, "-n", "0", "--env", "B=mine", "say.text=$(touch x)")
    status, out, err = said(*words)
    assert (status, err) == (0, "")
    assert "code: commit" in out
    assert "not sent" not in out  # the options travel by themselves
    assert "host: box (a CPU job)" in out
    assert "submitted general/default/mine to box as " in out
    shown = _until(said, "mine", "finished (0)")
    assert "general/default/mine  box" in shown
    called = place.called
    assert called["argv"][2:4] == ["run", "mine"]
    assert called["argv"][-1] == "say.text=$(touch x)"
    assert (called["env"]["A"], called["env"]["B"], called["env"]["NUM_GPUS"]) == ("cluster", "mine", "0")
    assert called["env"]["WANDB_API_KEY"] == TOKEN
    submission = read_all()[-1]
    assert Path(submission.here, "config.yaml").read_bytes() == Path("run.yaml").read_bytes()
    assert Path(called["env"]["PYTHONPATH"].split(":")[0], "code.py").read_text() == "first\n"
    name = Path(submission.log).name
    assert name.startswith("general_default_mine_20")
    assert name.endswith(".log")
    assert Path(submission.status, "output.log").resolve() == Path(submission.log)

    run = root / "checkpoints/general/default/mine/mine_12345678"
    run.mkdir(parents=True)
    (run / "log.jsonl").write_text("{}\n")
    (run / "hf-1").mkdir()
    (run / "hf-1" / "config.json").write_text("an export")
    files = CheckpointFiles(run, 1)
    files.optimizer.mkdir()
    for path in (files.model, files.meta, files.optimizer / "__0_0.distcp", files.optimizer / ".metadata"):
        path.write_text("large")
    for state in ("done.json", ".lock", "latest"):
        (run / state).write_text("of the host")
    for _ in range(2):  # pulled files are replaced
        status, out, err = said("pull", "mine", "--out", "here")
        assert (status, err) == (0, "")
        pulled = {path.name for path in Path("here").rglob("*") if path.is_file()}
        assert pulled == {"log.jsonl", name, "config.json", ".pulled"}
        (run / "log.jsonl").write_text("{}\n{}\n")
    assert Path("here/checkpoints/general/default/mine/mine_12345678/log.jsonl").read_text() == "{}\n{}\n"
    assert out.endswith(watch_command("here/checkpoints/general/default/mine/mine_12345678") + "\n")
    ours = Path("output/checkpoints/general/default/mine/mine_12345678/log.jsonl")
    ours.parent.mkdir(parents=True)
    ours.write_text("of a run here")
    status, out, err = said("pull", "mine", "--out", "output")
    assert status == 2
    assert "has a run of this machine; pull to another folder, such as pulled" in err
    assert ours.read_text() == "of a run here"
    for path in place.home.rglob("*"):  # no file has the token, now that the job is over
        if path.is_file() and path.name != "called.json":
            assert TOKEN.encode() not in path.read_bytes(), path


def test_logs_and_cancel(place: Place, said: Said, capfd: pytest.CaptureFixture[str]) -> None:
    _write(place, {"box": {"type": "plain", "env": {"ACT": "wait"}}})
    assert said("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0")[0] == 0
    _until(said, "mine", "running")
    while not (place.home / "called.json").exists():
        time.sleep(0.1)
    assert main(["logs", "mine"]) == 0
    assert "the job speaks" in capfd.readouterr().out
    submission = read_all()[-1]
    assert "s ago" in said("status")[1]
    assert said("cancel", "mine")[0] == 0
    assert "cancelled (0)" in _until(said, "mine", "cancelled")
    assert (place.home / "signals").read_text() == "SIGTERM\n"
    os.remove(submission.log)
    assert main(["logs", "mine"]) == 1
    assert "there is no log yet" in capfd.readouterr().err


def test_a_job_has_become_its_script_when_submit_returns(place: Place, said: Said) -> None:
    """While a process becomes another program it has no command line for a moment, and would be called lost."""
    place.tool("nohup", f'#!/bin/sh\nsleep 1\nexec {shutil.which("nohup")} "$@"\n')
    _write(place, {"box": {"type": "plain", "env": {"ACT": "wait"}}})
    assert said("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0")[0] == 0
    submission = read_all()[-1]
    command = Path(f"/proc/{submission.id}/cmdline").read_text().split("\0")
    assert command == ["bash", f"{submission.here}/run.sh", ""]
    said("cancel", "mine")
    _until(said, "mine", "cancelled")


def test_a_job_that_was_killed_is_lost_and_its_number_may_be_anothers(place: Place, said: Said) -> None:
    _write(place, {"box": {"type": "plain", "env": {"ACT": "wait"}}})
    said("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0")
    _until(said, "mine", "running")
    os.kill(int(read_all()[-1].id), 9)
    _until(said, "mine", "lost")
    file = next((place.home / ".tinytron/submissions").glob("*.json"))
    file.write_text(file.read_text().replace(f'"id": "{read_all()[-1].id}"', f'"id": "{os.getpid()}"'))
    assert "does not run (lost)" in said("cancel", "mine")[1]  # and we are still here
    _until(said, "mine", "cancelled")


def test_a_host_may_print_lines_on_login(place: Place, said: Said) -> None:
    place.tool("ssh", '#!/bin/sh\necho "Welcome to the machine"\nfor last in "$@"; do :; done\nexec sh -c "$last"\n')
    place.tool("nvidia-smi", NVIDIA)
    _write(place, {"box": {"type": "plain", "ssh": "box"}})
    assert "box: reached; 3 x NVIDIA H100 80GB HBM3 (2 free); has" in said("dispatch", "check")[1]
    for count in (1, 2):
        status, _, err = said("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0")
        assert (status, err) == (0, "")
        _until(said, "mine", "finished (0)")
        (archive,) = (place.home / "scratch/code").glob("*.tar.gz")
        if count == 1:
            os.utime(archive, (1, 1))
    assert archive.stat().st_mtime == 1  # the code was there already
    run = place.home / "root/checkpoints/general/default/mine"
    run.mkdir(parents=True)
    (run / "text").write_text("whole")
    assert said("pull", "mine")[0] == 0
    assert Path("pulled/checkpoints/general/default/mine/text").read_text() == "whole"
    place.tool("ssh", "#!/bin/sh\necho This account is closed\n")
    assert "box did not run bash, but said 'This account is closed'" in said("dispatch", "check")[1]


def test_code_that_arrived_in_part_is_sent_again(place: Place, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(place, {"box": {"type": "plain"}})
    words = ("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0")
    whole = Shell.run

    def cut(shell: Shell, script: str, data: bytes = b"", seconds: float = 120.0) -> str:
        return whole(shell, script, data[: len(data) * 6 // 10], seconds)

    monkeypatch.setattr(Shell, "run", cut)
    status, _, err = said(*words)
    assert (status, "tar: Unexpected EOF in archive" in err) == (2, True), err
    assert list((place.home / "scratch/code").iterdir()) == []
    monkeypatch.setattr(Shell, "run", whole)
    assert said(*words)[0] == 0
    _until(said, "mine", "finished (0)")


def test_a_dry_run_shows_everything_but_secrets_and_does_nothing(
    place: Place, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", TOKEN)
    _write(place, {"box": {"type": "plain", "ssh": "nowhere.invalid"}}, wandb={"env": "MY_KEY"})
    status, out, err = said("submit", "mine", "run.yaml", "--load", "module_with_jobs", "--dry_run")
    assert (status, err) == (0, "")
    assert "/config.yaml\njob: " in out
    assert "# --- From here on, every job's script is the same." in out
    assert "setsid nohup bash" in out
    assert "/secret.WANDB_API_KEY, which only you can read: not shown" in out
    assert TOKEN not in out
    assert read_all() == []
    assert not (place.home / "scratch").exists()


def test_a_sweep_submits_each_combination_under_its_name(place: Place, said: Said) -> None:
    _write(place, {"box": {"type": "plain"}})
    words = ("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0", "--sweep", "say.text=one,two words")
    status, out, err = said(*words)
    assert (status, err) == (0, "")
    names = [one.name for one in read_all()[-2:]]
    assert names == ["mine-text_one", "mine-text_two_words"]
    for name, text in zip(names, ("one", "two words"), strict=True):
        assert f"submitted general/default/{name} to box as " in out
        _until(said, name, "finished (0)")
        (script,) = (Path(one.here, "run.sh").read_text() for one in read_all() if one.name == name)
        assert text in script
    status, out, err = said(*words[:-1], "say.text=one,one")
    assert (status, err) == (2, "error: --sweep say.text=one,one names the value one twice; leave one out\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("-n", "-1"), "-n -1 must be a whole number of at least 0; use -n 8, or -n 0 for a CPU job"),
        (("--env", "A"), "--env A must be a name, = and a value, such as --env NCCL_DEBUG=INFO"),
        (("--env", "A B=1"), "--env: 'A B' must be letters, digits and _"),
        (("--cpu", "0"), "--cpu 0 must be at least 1; use --cpu 8"),
        (("--mem", "4G", "-n", "0"), "--mem and --cpu are for schedulers, but box is a plain host; leave them out"),
        (("--target", "bax"), "is not a host or cluster of"),
        (("--cluster", "lap"), "--cluster lap is not a cluster; did you mean lab?; use one of lab"),
        (("--exclude-cluster", "lab"), "no host is left to submit to"),
        (("--chip", "a100"), "no host can run 1 x a100 now: box does not have 1 x a100; ask for less, or wait"),
        (("-n", "2"), "no host can run 2 x h100 now: box has 1 free"),
        (("nme=1",), "there is no option nme"),
        (("-s", "none.yaml"), "none.yaml cannot be read"),
    ],
)
def test_a_mistake_is_one_line(place: Place, said: Said, words: tuple[str, ...], says: str) -> None:
    place.tool("nvidia-smi", NVIDIA.replace("20, NVIDIA", "5000, NVIDIA"))
    _write(place, {"box": {"type": "plain", "chips": {"h100": 3}}})
    status, out, err = said("submit", "mine", "run.yaml", "--load", "module_with_jobs", *words)
    assert status == 2, out
    assert says in err
    assert len(err.splitlines()) == 1
    assert read_all() == []


def test_a_secret_that_is_not_set_is_one_line(place: Place, said: Said) -> None:
    _write(place, {"box": {"type": "plain"}}, hf_token={"env": "NO_SUCH"})
    _, _, err = said("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0")
    assert "the environment variable NO_SUCH is not set, but the cluster's settings take HF_TOKEN from it" in err


def test_unknown_names(place: Place, said: Said) -> None:
    assert "nothing was submitted from here yet" in said("status")[1]
    _write(place, {"box": {"type": "plain"}})
    said("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0")
    assert "nothing was submitted as mina; did you mean mine?" in said("status", "mina")[2]
    _until(said, "mine", "finished")
    said("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0", "-g", "other")
    assert "mine may be general/default/mine or general/other/mine; give the whole name" in said("logs", "mine")[2]
    _until(said, "general/other/mine", "finished")
    assert "does not exist yet; there is nothing to pull" in said("pull", "general/other/mine")[2]


def test_a_host_that_cannot_be_reached_is_one_line(place: Place, said: Said) -> None:
    place.tool("ssh", "#!/bin/sh\ncat >/dev/null\necho 'Connection refused' >&2\nexit 255\n")
    _write(place, {"box": {"type": "plain", "ssh": "me@box"}})
    _, _, err = said("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0", "--target", "box")
    assert (
        err == "error: me@box cannot be reached (Connection refused); make `ssh me@box true` work without a password\n"
    )
    status, out, err = said("dispatch", "check")
    assert status == 1
    assert "box: error: me@box cannot be reached" in out


def test_dispatch_check_says_what_each_host_has(place: Place, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    place.tool("nvidia-smi", NVIDIA)
    without_tool(monkeypatch, "juicefs")
    tpu = {"type": "tpu", "zone": "z", "project": "p", "accelerator_type": "v4-8"}
    _write(place, {"box": {"type": "plain"}, "tpu": tpu}, mount="redis://h/0", python=None)
    status, out, err = said("dispatch", "check")
    assert (status, err) == (1, "")
    assert "is valid: 1 cluster, 2 hosts" in out
    assert "box: reached; missing: juicefs" in out
    assert "tpu: valid; tpu is a type that nothing is submitted to; see tinytron bootstrap --target tpu" in out
    status, _, err = said(*SUBMIT, "--target", "tpu")
    assert status == 2
    assert "--target tpu is a TPU machine, and the trainer has no TPU backend" in err
    _write(place, {"box": {"type": "plain"}})
    status, out, _ = said("dispatch", "check")
    assert status == 0
    assert "box: reached; 3 x NVIDIA H100 80GB HBM3 (2 free); has " in out


def test_nothing_in_dispatch_imports_torch() -> None:
    code = "import sys, tinytron.dispatch.submit, tinytron.dispatch.slurm, tinytron.dispatch.plain; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
