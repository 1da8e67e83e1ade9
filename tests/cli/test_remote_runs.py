"""Whole runs whose log folder and data are behind URLs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Finished, finish, free_port, run, run_well, start, train
from tests.helpers.storage import SECRET, S3Server, point_to
from tinytron.data import write_shard
from tinytron.training import Trainer
from tinytron.utils.remote import RemoteFolder

Pools = Callable[[int], Ranks]
RUN: tuple[object, ...] = (*TINY, "--lr_schedule", "constant", "--save_every_steps", 2, "--log_every", 1)
SHARDS: tuple[object, ...] = ("--no-use_mock_data", "--do_val", "--val_every_steps", 2)


def make_shards(folder: Path) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("train_0", 300), ("train_1", 200), ("val_0", 100)):
        write_shard(folder / f"{name}.bin", generator.integers(0, 61, count))
    return folder


def logs_there(url: str, name: str = "log.txt") -> tuple[str, list[int]]:
    """The run's log there, and the steps of its complete checkpoints."""
    remote = RemoteFolder(url)
    names = list(remote.list())
    (log,) = [n for n in names if n.endswith(f"/{name}")]
    steps = [int(Path(n).name[:5]) for n in names if n.endswith("_meta.pt")]
    return remote._fs.cat_file(f"{remote._root}/{log}").decode(), sorted(steps)


def test_a_run_goes_on_from_its_remote_folder(storage: str, ranks: Pools, tmp_path: Path) -> None:
    data = make_shards(tmp_path / "data")
    RemoteFolder(f"{storage}/data").push(data, [p.name for p in data.iterdir()])
    flags = (*RUN, *SHARDS, "--dataset_path", f"{storage}/data", "--log_dir", f"{storage}/runs")
    first = run_well(*flags, "--max_steps", 2, cwd=tmp_path)
    assert f"copied to {storage}/runs/tiny_" in first.stdout
    shutil.rmtree(tmp_path / "cache")
    second = run_well(*flags, "--max_steps", 4, cwd=tmp_path)
    assert f"fetching checkpoint 2 from {storage}/runs/tiny_" in second.stdout
    assert "resuming after step 2" in second.stdout
    unbroken = ranks(1).run(train, Trainer, tmp_path, *RUN, *SHARDS, "--dataset_path", data, "--max_steps", 4)
    (staged,) = (tmp_path / "cache").glob("*/tiny_*/log.txt")
    assert staged.read_text() == unbroken[0].log
    assert logs_there(f"{storage}/runs") == (unbroken[0].log, [2, 4])
    assert SECRET not in first.stdout + first.stderr + second.stdout + second.stderr
    assert first.stderr + second.stderr == ""


def _begin_anew(folder: Path, url: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYTRON_CACHE", str(folder / "cache"))
        patch.setenv("LOCAL_RANK", str(dist.get_rank()))
        for flags in (("--max_steps", 4), ("--max_steps", 2, "--no-resume"), ("--max_steps", 2, "--debug")):
            train(Trainer, url, *RUN, *flags)  # type: ignore[arg-type]  # a flag's value


def test_a_run_that_starts_anew_leaves_the_old_one(ranks: Pools, tmp_path: Path) -> None:
    url = f"local://{tmp_path}/runs"
    ranks(2).run(_begin_anew, tmp_path, url)
    names = sorted(RemoteFolder(url).list())
    runs = sorted({name.partition("/")[0] for name in names})
    steps = {run: [Path(n).name[:5] for n in names if n.startswith(f"{run}/") and "_meta" in n] for run in runs}
    assert sorted(steps.values()) == [[], ["00002"], ["00002", "00004"]]  # that of --debug has another name
    assert [run for run in runs if run.endswith(".1")] == [run for run in runs if len(steps[run]) == 2]
    assert len([name for name in names if name.endswith("/log.txt")]) == 3


def two_nodes(*flags: object, cwd: Path) -> list[Finished]:
    """One process on each of two machines, as far as their staging folders go."""
    port = str(free_port())
    nodes = []
    for rank in ("0", "1"):
        env = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        nodes.append(start(*flags, cwd=cwd, env={**env, "TINYTRON_CACHE": str(cwd / f"node{rank}")}))
    return [finish(node) for node in nodes]


@pytest.mark.slow
def test_two_processes_and_then_two_nodes(storage: str, ranks: Pools, tmp_path: Path) -> None:
    flags = (*RUN, "--log_dir", f"{storage}/runs")
    run_well(*flags, "--max_steps", 2, cwd=tmp_path, processes=2)
    assert logs_there(f"{storage}/runs")[1] == [2]
    nodes = two_nodes(*flags, "--max_steps", 4, cwd=tmp_path)
    assert [node.code for node in nodes] == [0, 0], nodes
    assert "resuming after step 2" in nodes[0].stdout
    unbroken = ranks(2).run(train, Trainer, tmp_path, *RUN, "--max_steps", 4)
    assert logs_there(f"{storage}/runs") == (unbroken[0].log, [2, 4])
    names = sorted(Path(n).name for n in RemoteFolder(f"{storage}/runs").list() if "00004_opt" in n)
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    parts = [sorted(p.name for p in (tmp_path / f"node{n}").glob("*/*/00004_opt/__*")) for n in (0, 1)]
    assert parts == [["__0_0.distcp"], ["__1_0.distcp"]]  # what made the storage necessary


@pytest.mark.slow
def test_a_bucket_that_is_not_there(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYTRON_CACHE", str(tmp_path))
    finished = run(*RUN, "--log_dir", "s3://no-such/runs", cwd=tmp_path, timeout=60)
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: s3://no-such/runs/tiny_")
    assert line.endswith("cannot list it (The specified bucket does not exist)")


STOPPING = """
import pathlib, time
from tinytron.cli import entry
from tinytron.training import Trainer, build_config, parse_args
from tinytron.utils import remote

remote.PAUSES = (0.0,)


class T(Trainer):
    def _maybe_save(self):
        super()._maybe_save()
        if self.step == 2:
            self.saver.checkpoints.finish()
            pathlib.Path("at_two").touch()
            while not pathlib.Path("stopped").exists():
                time.sleep(0.05)


entry.run(lambda: T(build_config(parse_args())).train())
"""


@pytest.mark.slow
def test_training_outlives_the_storage(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = S3Server()
    point_to(server, monkeypatch)
    monkeypatch.setenv("TINYTRON_CACHE", str(tmp_path))
    (script := tmp_path / "script.py").write_text(STOPPING)
    process = start(*RUN, "--max_steps", 4, "--log_dir", s3, cwd=tmp_path, script=script)
    while not (tmp_path / "at_two").exists() and process.poll() is None:
        time.sleep(0.05)
    server.stop()
    (tmp_path / "stopped").touch()
    finished = finish(process)
    assert finished.code == 0, finished
    assert "Could not connect" in finished.stderr
    assert all(line.startswith("error: s3://") for line in finished.stderr.splitlines()), finished.stderr
    assert len(finished.stderr.splitlines()) == 4  # clearing the place, parts, metadata; and the logs at the end
    (folder,) = tmp_path.glob("*/tiny_*")
    assert (folder / "00004_meta.pt").exists()
    assert len((folder / "log.txt").read_text().splitlines()) == 4
    server = S3Server(server.port)
    try:
        assert logs_there(s3)[1] == [2]
        again = run_well(*RUN, "--max_steps", 4, "--log_dir", s3, cwd=tmp_path)
        assert "already trained" in again.stdout
        assert logs_there(s3) == ((folder / "log.txt").read_text(), [2, 4])
    finally:
        server.stop()
