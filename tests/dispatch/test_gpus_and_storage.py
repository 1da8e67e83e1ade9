"""GPUs that a job locks, and storage that it mounts, in the script on a host; nvidia-smi and juicefs are stand-ins."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.dispatch.conftest import Place, code, without_tool
from tests.dispatch.test_script import RUN, metadata, put, run
from tinytron.dispatch.credentials import without_password
from tinytron.dispatch.script import job_script
from tinytron.dispatch.work import Request, Work

NVIDIA = """#!/bin/bash
case "$*" in
    *=index,*) printf '0, 10, NVIDIA H100 80GB HBM3\\n1, 20, NVIDIA H100 80GB HBM3\\n2, 9000, NVIDIA H100 80GB HBM3\\n' ;;
    *) printf '10, NVIDIA H100 80GB HBM3\\n20, NVIDIA H100 80GB HBM3\\n9000, NVIDIA H100 80GB HBM3\\n' ;;
esac
"""


def test_a_job_gets_gpus_of_the_kind_that_it_asked_for(place: Place) -> None:
    text = NVIDIA.replace("0, 10, NVIDIA H100 80GB HBM3", "0, 10, NVIDIA A100-SXM4-80GB")
    place.tool("nvidia-smi", text)
    cluster = place.cluster()
    text = text.replace("1, 20, NVIDIA H100 80GB HBM3", "1, 20, NVIDIA GeForce RTX 4090").replace("2, 9000", "2, 10")
    place.tool("nvidia-smi", text)
    for kind, gpus in (("h100", "2"), ("a100", "0"), ("a100 80gb", "0"), ("rtx4090", "1"), ("4090", "1"), ("", "0")):
        work = Work(f"n{kind.replace(' ', '-')}", (b"",))
        script = job_script(work, cluster, {}, Request(1), RUN, code().tree, lock_gpus=True, gpu_kind=kind, per_node=1)
        path = put(place, cluster, work, script.replace("/tmp/tinytron-gpus", f"'{place.home}/locks'"))
        done = run(path)
        assert done.returncode == 0, done.stderr
        assert place.called["env"]["CUDA_VISIBLE_DEVICES"] == gpus
        assert place.called["env"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    work = Work("v", (b"",))
    script = job_script(work, cluster, {}, Request(1), RUN, code().tree, lock_gpus=True, gpu_kind="a10", per_node=1)
    assert (
        "has fewer than 1 GPUs of the kind a10; ask for fewer with -n" in run(put(place, cluster, work, script)).stderr
    )


@pytest.mark.slow
def test_two_jobs_do_not_share_gpus(place: Place) -> None:
    place.tool("nvidia-smi", NVIDIA)
    cluster = place.cluster()
    locks = ("/tmp/tinytron-gpus", f"'{place.home}/locks'")
    scripts = []
    for name in ("one", "two"):
        work = Work(name, (b"",))
        text = job_script(work, cluster, {"ACT": "wait"}, Request(1), RUN, code().tree, lock_gpus=True, per_node=1)
        scripts.append(put(place, cluster, work, text.replace(*locks)))
    work = Work("both", (b"",))
    text = job_script(work, cluster, {"ACT": "0"}, Request(2), RUN, code().tree, lock_gpus=True, per_node=2)
    both = put(place, cluster, work, text.replace(*locks).replace("sleep 10", "sleep 0.2"))
    running = []
    used = []
    for path in scripts:
        running.append(subprocess.Popen(["bash", str(path)], stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout is not None
        running[-1].stdout.readline()
        used.append(place.called["env"]["CUDA_VISIBLE_DEVICES"])
    assert used == ["0", "1"]  # the third one is used by another program
    waiting = subprocess.Popen(["bash", str(both)], stdout=subprocess.PIPE, text=True)
    file = place.home / "scratch/status/general/default/both" / RUN / "metadata.json"
    while not file.exists() or metadata(cluster, work)["state"] != "waiting":
        assert waiting.poll() is None
        time.sleep(0.1)
    for process in running:
        process.terminate()
        process.communicate(timeout=30)
    waiting.communicate(timeout=30)
    assert waiting.returncode == 0
    assert place.called["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    work = Work("many", (b"",))
    many = put(place, cluster, work, job_script(work, cluster, {}, Request(4), RUN, code().tree, lock_gpus=True))
    assert "has fewer than 4 GPUs" in run(many).stderr


JUICEFS = """#!/bin/bash
printf '%s ' "$@" >>"$HOME/tools"; printf '%s\\n' "password=$META_PASSWORD" >>"$HOME/tools"
case "$1" in mount) touch "$HOME/mounted" ;; umount) rm "$HOME/mounted" ;; esac
"""


def test_storage_is_mounted_checked_and_unmounted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = place.cluster(mount="redis://:p%40ss@h:6379/0", cache_size="2G", cache_dir="~/c c", all_squash="1:2")
    work = Work("n", (b"",))
    script = job_script(work, cluster, {}, Request(0), RUN, code().tree)
    assert "ss@h" not in script
    path = put(place, cluster, work, script, {"META_PASSWORD": "p@ss"})
    without_tool(monkeypatch, "juicefs")
    done = run(path)
    assert done.returncode == 2
    assert "juicefs is not installed on" in done.stderr
    put(place, cluster, work, script, {"META_PASSWORD": "p@ss"})
    place.tool("juicefs", JUICEFS.replace("mount) touch", "never) touch"))
    place.tool("mountpoint", '#!/bin/sh\n[ -e "$HOME/mounted" ]\n')
    assert "juicefs returned, but" in run(path).stderr
    put(place, cluster, work, script, {"META_PASSWORD": "p@ss"})
    place.tool("juicefs", JUICEFS)
    (place.home / "tools").unlink()
    done = run(path)
    assert done.returncode == 0, done.stderr
    root, cache = place.home / "root", place.home / "c c"
    assert (place.home / "tools").read_text().splitlines() == [
        f"mount -d --cache-size 2048 --cache-dir {cache} --all-squash 1:2 redis://h:6379/0 {root} password=p@ss",
        f"umount {root} password=p@ss",
    ]


@pytest.mark.parametrize(
    ("url", "rest", "password"),
    [
        ("redis://:a%2Fb@h:1/0", "redis://h:1/0", "a/b"),
        ("redis://me:pw@h/0", "redis://me@h/0", "pw"),
        ("redis://h:1/0", "redis://h:1/0", None),
        ("redis://me@h/0", "redis://me@h/0", None),
        ("sqlite3:///x", "sqlite3:///x", None),
        ("/some/path", "/some/path", None),
    ],
)
def test_a_password_leaves_the_url(url: str, rest: str, password: str | None) -> None:
    assert without_password(url) == (rest, password)
