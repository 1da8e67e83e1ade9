"""Submitting to Kubernetes, with a stand-in for kubectl whose pods are processes of this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.dispatch.conftest import Place
from tests.dispatch.test_submit import SUBMIT, TOKEN, Said, _until, said  # noqa: F401  # a fixture
from tinytron.dispatch.hosts import hosts_of
from tinytron.dispatch.kubernetes import PodShell
from tinytron.dispatch.reading import read_settings
from tinytron.dispatch.record import read_all
from tinytron.dispatch.work import Work, name_of
from tinytron.errors import ConfigError, HostError

KUBECTL = f"""#!{sys.executable}
import json, os, pathlib, subprocess, sys, yaml
home = pathlib.Path(os.environ["HOME"])
words = [w for w in sys.argv[1:] if not w.startswith(("--context=", "--namespace="))]
with open(home / "kubectl.log", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
pods = home / "pods"
def running(pid):
    try:
        return pathlib.Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
def command(pod):  # Kubernetes reads $$ as $
    (one,) = pod["spec"]["containers"]
    return [word.replace("$$", "$") for word in one["command"]], {{e["name"]: e.get("value", "") for e in one["env"]}}
if words[0] == "run":
    spec = json.loads(next(w for w in words if w.startswith("--overrides="))[len("--overrides="):])["spec"]
    assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == "claim-1"
    sys.exit(subprocess.run(spec["containers"][0]["command"]).returncode)
if words[0] == "apply":
    made = yaml.safe_load(sys.stdin)
    kind, spec = made["kind"], made["spec"]
    (home / "applied.yaml").write_text(yaml.safe_dump(made))
    if kind == "JobSet":
        inner = spec["replicatedJobs"][0]["template"]["spec"]
        count, pod = inner["completions"], inner["template"]
    else:
        count, pod = spec["tasks"][0]["replicas"], spec["tasks"][0]["template"]
    argv, env = command(pod)
    pids = []
    for rank in range(count):
        place = {{"PET_NODE_RANK": str(rank)}} if kind == "JobSet" else {{"VC_TASK_INDEX": str(rank)}}
        null = subprocess.DEVNULL
        started = subprocess.Popen(argv, env={{**os.environ, **env, **place}}, stdin=null, stdout=null, stderr=null)
        pids.append(started.pid)
    pods.mkdir(exist_ok=True)
    (pods / made["metadata"]["name"]).write_text(json.dumps(pids))
if words[:2] == ["get", "pods"]:
    file = pods / words[3].partition("=")[2]
    if file.exists():
        phases = ["Running" if running(pid) else "Succeeded" for pid in json.loads(file.read_text())]
        print(" ".join(phases), end="")
elif words[0] == "get":
    assert words[1] in ("jobsets.jobset.x-k8s.io", "jobs.batch.volcano.sh")
    if (pods / words[2]).exists():
        print(f"{{words[1]}}/{{words[2]}}")
if words[0] == "delete":
    for pid in json.loads((pods / words[2]).read_text()):
        if running(pid):
            os.kill(pid, 15)
"""


def _write(place: Place, kind: str, **more: Any) -> None:
    place.tool("kubectl", KUBECTL)
    claim = f"{place.home}/claim"
    cluster = {
        "root": f"{claim}/root",
        "work": f"{claim}/work",
        "python": str(place.python),
        "wandb": {"env": "MY_KEY"},
    }
    host = {"type": kind, "cluster": "k8s", "image": "registry.example/tinytron:1", "pvc_name": "claim-1"}
    host |= {"pvc_mount_path": claim, "namespace": "research", "context": "lab", "chips": {"h100": 2}, **more}
    content = {"clusters": {"k8s": cluster}, "hosts": {"pods": host}}
    (place.home / ".tinytron.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", TOKEN)


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("kind", ["kubernetes", "volcano"])
def test_submit_watch_and_pull(place: Place, said: Said, kind: str) -> None:  # noqa: F811
    _write(place, kind, num_nodes=2, gpus_per_node=2, queue="team", tolerations=[{"key": "gpu"}])
    status, out, err = said(*SUBMIT, "--chip", "h100", "-n", "4", "say.text=$(touch x) $HOME $$ '\"")
    assert (status, err) == (0, "")
    assert "host: pods (pods has 0 free; queued)" in out
    _until(said, "mine", "finished (0)")
    submission = read_all()[-1]
    for log in (submission.log, f"{submission.log}.node1"):
        assert "the job speaks" in Path(log).read_text()
    called = place.called
    assert called["argv"][-1] == "say.text=$(touch x) $HOME $$ '\""
    env = called["env"]
    assert (env["NUM_NODES"], env["NUM_GPUS"], env["MASTER_PORT"], env["WANDB_API_KEY"]) == ("2", "2", "29500", TOKEN)
    assert env["MASTER_ADDR"].startswith(f"{submission.id}-node-0")
    assert not list(place.home.rglob("x"))
    applied = (place.home / "applied.yaml").read_text()
    made = yaml.safe_load(applied)
    assert made["metadata"] == made["metadata"] | {"name": submission.id, "namespace": "research"}
    for text in (applied, (place.home / "kubectl.log").read_text()):
        assert TOKEN not in text
    assert '"--context=lab", "--namespace=research"' in (place.home / "kubectl.log").read_text()
    folder = Path(submission.root) / "checkpoints/general/default/mine"
    (folder / "run").mkdir(parents=True)
    (folder / "run/log.jsonl").write_text("{}\n")
    (folder / "run/00001_model.pt").write_text("large")
    assert said("pull", "mine", "--out", "here")[0] == 0
    assert {path.name for path in Path("here").rglob("*") if path.is_file()} == {
        "log.jsonl",
        ".pulled",
        Path(submission.log).name,
    }


@pytest.mark.usefixtures("key")
def test_logs_and_cancel(place: Place, said: Said) -> None:  # noqa: F811
    _write(place, "kubernetes", env={"ACT": "wait"})
    assert said(*SUBMIT, "-n", "0")[0:3:2] == (0, "")
    _until(said, "mine", "running")
    while not (place.home / "called.json").exists():
        pass
    assert said("cancel", "mine")[0] == 0
    _until(said, "mine", "cancelled")
    assert (place.home / "signals").read_text() == "SIGTERM\n"
    assert not list(Path(read_all()[-1].here).glob("secret.*"))


@pytest.mark.usefixtures("key")
def test_a_dry_run_shows_the_manifest_and_asks_nobody(place: Place, said: Said) -> None:  # noqa: F811
    _write(place, "kubernetes")
    status, out, _ = said(*SUBMIT, "--chip", "h100", "-n", "2", "--dry_run")
    assert status == 0
    assert "kind: JobSet" in out
    assert TOKEN not in out
    assert not (place.home / "kubectl.log").exists()


@pytest.mark.usefixtures("key")
def test_what_it_cannot_run_is_one_line(place: Place, said: Said) -> None:  # noqa: F811
    _write(place, "kubernetes", num_nodes=2)
    for words, text in (
        (
            ("-n", "3", "--chip", "h100"),
            "-n 3 on pods: its nodes have 2 x h100, so more than one node needs a multiple of ",
        ),
        (("-n", "6", "--chip", "h100", "--target", "pods"), "-n 6 on pods takes 3 nodes, but its num_nodes is 2"),
        (("-n", "1", "--chip", "a100"), "pods does not have 1 x a100"),
    ):
        status, _, err = said(*SUBMIT, *words)
        assert status == 2
        assert text in err


@pytest.mark.parametrize(
    ("host", "cluster", "text"),
    [
        ({"pvc_name": None}, {}, r"hosts\.pods\.pvc_name is required: .* write pvc_name: data"),
        (
            {},
            {"root": "/other"},
            r"root /other is not below .*claim, where the pods of hosts\.pods .* use .*claim/root",
        ),
        ({}, {"mount": "redis://h/0"}, r"mount: pods of hosts\.pods cannot mount JuiceFS; make its volume the claim"),
    ],
)
def test_folders_must_be_on_the_claim(place: Place, host: dict[str, Any], cluster: dict[str, Any], text: str) -> None:
    _write(place, "kubernetes")
    file = place.home / ".tinytron.yaml"
    content = yaml.safe_load(file.read_text())
    content["hosts"]["pods"] |= host
    content["clusters"]["k8s"] |= cluster
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=text):
        read_settings()


@pytest.mark.parametrize("name", ["Mine_1", "9.9", "_", "a" * 90, "x" * 30 + "." * 9])
def test_names_fit(name: str) -> None:
    first, second = (name_of(Work(name, ()), run) for run in ("1", "2"))
    assert first != second
    for made in (first, second):
        assert len(made) <= 40
        assert made[0].isalpha()
        assert made.replace("-", "").isalnum()
        assert made == made.lower()


def test_cancel_deletes_a_job_whose_files_cannot_be_reached(
    place: Place,
    said: Said,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", TOKEN)
    _write(place, "kubernetes", env={"ACT": "wait"})
    assert said(*SUBMIT, "-n", "0")[0:3:2] == (0, "")

    def full(*_: Any, **__: Any) -> None:
        raise HostError("the pod cannot be scheduled")

    monkeypatch.setattr(PodShell, "run_into", full)
    status, _, err = said("cancel", "mine")
    assert (status, "the pod cannot be scheduled" in err) == (2, True)
    assert '"delete"' in (place.home / "kubectl.log").read_text()


def test_hosts_of_all_kinds_but_tpu_are_submitted_to(place: Place) -> None:
    _write(place, "volcano")
    assert [(host.name, host.kind) for host in hosts_of(read_settings())] == [("pods", "volcano")]
    assert os.environ["HOME"] == str(place.home)
