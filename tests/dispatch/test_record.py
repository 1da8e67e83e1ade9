"""The laptop's memory of submissions: written before a job starts, read with care, and one active submission per name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.dispatch.conftest import Place
from tests.dispatch.test_submit import TOKEN, Said, _until, _write
from tests.dispatch.test_submit import said as said
from tinytron.dispatch.plain import PlainHost
from tinytron.dispatch.record import read_all
from tinytron.dispatch.shell import NoAnswerError, Shell

SUBMIT = ("submit", "mine", "run.yaml", "--load", "module_with_jobs", "-n", "0")


def test_a_name_that_runs_is_not_submitted_again(place: Place, said: Said) -> None:
    _write(place, {"box": {"type": "plain", "env": {"ACT": "wait"}}})
    assert said(*SUBMIT)[0] == 0
    status, _, err = said(*SUBMIT)
    assert status == 2
    assert f"general/default/mine was submitted to box as {read_all()[0].id} and is " in err
    assert "or first: tinytron cancel general/default/mine" in err
    assert len(read_all()) == 1
    said("cancel", "mine")
    _until(said, "mine", "cancelled")
    (place.home / ".tinytron.yaml").unlink()
    shutil.rmtree(place.home / "scratch")  # the host of a job that is over is not asked again
    assert "cancelled (" in said("status", "mine")[1]  # 0, or 143 if it had not begun
    assert "; there is nothing to stop" in said("cancel", "mine")[1]
    _write(place, {"box": {"type": "plain", "env": {"ACT": "wait"}}})
    assert said(*SUBMIT)[0] == 0
    said("cancel", "mine")
    _until(said, "mine", "cancelled")


@pytest.mark.parametrize("started", [True, False])
def test_a_start_without_an_answer_can_still_be_seen_and_cancelled(
    place: Place, said: Said, monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    _write(place, {"box": {"type": "plain", "env": {"ACT": "wait"}}})
    start = PlainHost.start

    def silent(*words: Any) -> list[tuple[str, str]]:
        if started:
            start(*words)
        raise NoAnswerError("box does not answer within 120 s")

    monkeypatch.setattr(PlainHost, "start", silent)
    status, _, err = said(*SUBMIT)
    assert status == 2
    assert "box does not answer within 120 s; general-default-mine may have started: see tinytron status mine" in err
    if started:
        _until(said, "mine", "running")
        while not (place.home / "called.json").exists():
            time.sleep(0.1)
        assert "the job speaks" in Path(read_all()[-1].log).read_text()
        assert "asked general/default/mine on box to stop" in said("cancel", "mine")[1]
        _until(said, "mine", "cancelled")
        assert (place.home / "signals").read_text() == "SIGTERM\n"
        return
    _until(said, "mine", "unconfirmed")
    said("cancel", "mine")
    _until(said, "mine", "cancelled")
    here = read_all()[-1].here
    done = subprocess.run(["bash", f"{here}/run.sh"], capture_output=True, text=True, check=False)
    assert done.stderr == "tinytron: cancelled before it began\n"  # if it starts after all
    assert not (place.home / "called.json").exists()
    assert '"state": "cancelled", "exit_status": 143' in Path(read_all()[-1].status, "metadata.json").read_text()


def test_a_job_whose_folder_is_gone_is_stopped(place: Place, said: Said) -> None:
    _write(place, {"box": {"type": "plain", "env": {"ACT": "wait"}}})
    said(*SUBMIT)
    _until(said, "mine", "running")
    shutil.rmtree(read_all()[-1].here)
    assert said("cancel", "mine")[0] == 0
    _until(said, "mine", "preempted")


def test_a_run_that_changes_is_pulled(place: Place, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """tar's status 1 means that a file changed meanwhile. Links out of the folder and pipes are left out."""
    tar = shutil.which("tar")
    place.tool("tar", f'#!/bin/sh\n{tar} "$@"\nstatus=$?\ncase "$1" in -cz) exit 1 ;; esac\nexit $status\n')
    _write(place, {"box": {"type": "plain"}})
    said(*SUBMIT)
    _until(said, "mine", "finished")
    run = place.home / "root/checkpoints/general/default/mine"
    run.mkdir(parents=True)
    (run / "text").write_text("whole")
    (run / "out").symlink_to("/etc/passwd")
    os.mkfifo(run / "pipe")
    status, out, err = said("pull", "mine")
    assert (status, err) == (0, "")
    assert "left out, because they are not files of the run: " in out
    assert "mine/out" in out
    assert "mine/pipe" in out
    assert Path("pulled/checkpoints/general/default/mine/text").read_text() == "whole"


@pytest.mark.parametrize("name", ["x_opt", "final", "x.pt", "latest"])
def test_a_run_may_have_a_name_of_checkpoints(place: Place, said: Said, name: str) -> None:
    _write(place, {"box": {"type": "plain"}})
    said("submit", name, *SUBMIT[2:])
    _until(said, name, "finished")
    run = place.home / f"root/checkpoints/general/default/{name}/{name}_1"
    (run / "final").mkdir(parents=True)
    (run / "final" / "model.safetensors").write_text("an export")
    (run / "00010_opt").mkdir()
    (run / "00010_opt" / "__0_0.distcp").write_text("large")
    (run / "log.jsonl").write_text("{}\n")
    assert said("pull", name)[0] == 0
    pulled = Path("pulled/checkpoints/general/default") / name / f"{name}_1"
    assert (pulled / "log.jsonl").exists()
    assert not (pulled / "00010_opt").exists()


def test_a_connection_that_breaks_after_the_start_leaves_the_record(
    place: Place, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = 'for last in "$@"; do :; done\nsh -c "$last"'
    place.tool("ssh", f'#!/bin/sh\n{last}\nstatus=$?\n[ ! -e "$HOME/broken" ] || exit 255\nexit $status\n')
    _write(place, {"box": {"type": "plain", "ssh": "box", "env": {"ACT": "wait"}}})
    send = PlainHost.send

    def sent(*words: Any) -> None:
        send(*words)
        (place.home / "broken").touch()

    monkeypatch.setattr(PlainHost, "send", sent)
    assert "may have started: see tinytron status mine" in said(*SUBMIT)[2]
    (place.home / "broken").unlink()
    assert Path(read_all()[-1].here, "run.sh").exists()
    _until(said, "mine", "running")
    said("cancel", "mine")
    _until(said, "mine", "cancelled")


def test_a_start_that_fails_is_forgotten(place: Place, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(place, {"box": {"type": "plain"}}, wandb={"env": "MY_KEY"})
    monkeypatch.setattr(PlainHost, "starting", lambda *_: "echo no room >&2; exit 1")
    monkeypatch.setenv("MY_KEY", TOKEN)
    assert "this machine: no room" in said(*SUBMIT)[2]
    assert read_all() == []
    for path in place.home.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_nothing_is_sent_if_it_cannot_be_remembered(place: Place, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(place, {"box": {"type": "plain"}})
    (place.home / ".tinytron").write_text("a file")
    asked: list[str] = []
    monkeypatch.setattr(Shell, "run", lambda self, script, *_: asked.append(script) or "")
    status, _, err = said(*SUBMIT)
    assert status == 2
    assert "submissions cannot be written" in err
    assert "it must remember mine on box; make the folder writable" in err
    assert asked == [":"]  # it was only asked whether it is there


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "barge"}, "its kind of host is barge, which this version does not know"),
        ({"kind": "kubernetes"}, "its options have no namespace"),
        ({"id": 17}, "its id is 17"),
        ({"options": {"a": 1}}, "its options is {'a': 1}"),
        ({"more": "x"}, "unexpected keyword argument 'more'"),
        (None, "its end is missing"),
    ],
)
def test_a_damaged_record_is_named_and_the_others_are_read(
    place: Place, said: Said, change: dict[str, Any] | None, says: str
) -> None:
    _write(place, {"box": {"type": "plain"}})
    said(*SUBMIT)
    _until(said, "mine", "finished")
    (file,) = (place.home / ".tinytron/submissions").glob("*.json")
    content = file.read_text()
    other = file.with_name("0-other.json")
    if change is None:
        other.write_text(content[: len(content) // 2])
    else:
        other.write_text(json.dumps({**json.loads(content), "name": "other", **change}))
    status, out, err = said("status")
    assert (status, err) == (0, "")
    assert f"left out {other}: " in out
    assert change is None or says in out
    assert "general/default/mine  box" in out
    assert "left out" in said("logs", "other")[2]
