"""Copying to and from remote folders: whole files or none, again after errors that pass, one line for those that do not."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.helpers.storage import SECRET, S3Server, point_to, write
from tinytron.errors import ConfigError, StorageError
from tinytron.utils import remote
from tinytron.utils.remote import RemoteFolder, is_remote, local_folder, staging_folder

FILES = {"log.txt": "one", "00004_opt/.metadata": "table", "00004_opt/__0_0.distcp": "state"}


def failing(monkeypatch: pytest.MonkeyPatch, folder: RemoteFolder, method: str, fail: Callable[..., Any]) -> list[str]:
    """Let the file system's ``method`` call ``fail(path)`` first; returns the list of paths it is called with."""
    real, calls = getattr(folder._fs, method), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        fail(*args)
        return real(*args, **kwargs)

    monkeypatch.setattr(folder._fs, method, wrapped)
    return calls


def test_which_paths_are_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYTRON_CACHE", str(tmp_path))
    assert [is_remote(p) for p in ("s3://b/a", "gs://b", "memory://x", "file:///a", "./log/", "/a")] == [True] * 3 + [
        False
    ] * 3
    assert local_folder("file:///data/x") == Path("/data/x")
    assert local_folder("./log/") == Path("log")
    staged = local_folder("s3://bucket/a/b")
    assert staged == staging_folder("s3://bucket/a/b/")
    assert staged.parent == tmp_path
    assert staged.name.startswith("s3_bucket_a_b-")
    assert staged != local_folder("s3://bucket/a_b")
    monkeypatch.delenv("TINYTRON_CACHE")
    assert local_folder("s3://b").parent == Path.home() / ".cache" / "tinytron"


def test_push_list_pull_move_remove(storage: str, tmp_path: Path) -> None:
    folder = RemoteFolder(storage)
    assert folder.list() == {}
    names = write(tmp_path / "here", FILES)
    folder.push(tmp_path / "here", names)
    assert folder.list() == {name: len(text) for name, text in FILES.items()}
    folder.pull(names, tmp_path / "there")
    assert {name: (tmp_path / "there" / name).read_text() for name in names} == FILES
    assert sorted(p.name for p in (tmp_path / "there").rglob("*") if p.is_file()) == [
        *(".metadata", "__0_0.distcp", "log.txt")
    ]
    folder.move(f"{storage}.1")
    assert folder.list() == {}
    other = RemoteFolder(f"{storage}.1")
    assert len(other.list()) == 3
    other.remove(["log.txt", "never_there"])
    assert sorted(other.list()) == sorted(names[1:])


def test_an_interrupted_pull_goes_on(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, there = RemoteFolder(storage), tmp_path / "there"
    names = write(tmp_path / "here", {f"train_{n}.bin": f"shard {n}" for n in range(6)})
    folder.push(tmp_path / "here", names)
    monkeypatch.setattr(remote, "TRANSFERS", 1)

    def interrupt(path: str, target: str) -> None:
        if path[-5] >= "3":
            Path(target).write_text("sha")  # the connection breaks in the middle of it
            raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        calls = failing(patch, folder, "get_file", interrupt)
        with pytest.raises(StorageError, match=r"cannot read train_3.bin \(reset by peer\)"):
            folder.pull(names, there)
        assert sum(call.endswith("train_3.bin") for call in calls) == len(remote.PAUSES) + 1
    assert sorted(p.name for p in there.iterdir()) == names[:3]
    calls = failing(monkeypatch, folder, "get_file", lambda *_: None)
    folder.pull(names, there)
    assert [Path(c).name for c in calls] == names[3:]
    assert [(there / name).read_text() for name in names] == [f"shard {n}" for n in range(6)]


def test_a_file_of_another_size_or_hash_is_fetched_again(storage: str, tmp_path: Path) -> None:
    folder, there = RemoteFolder(storage), tmp_path / "there"
    folder.push(tmp_path / "here", write(tmp_path / "here", {"a": "right"}))
    digest = hashlib.sha256(b"right").hexdigest()
    for old, sha256, new in (("wrong", {}, "wrong"), ("wrong", {"a": digest}, "right"), ("longer", {}, "right")):
        write(there, {"a": old})
        folder.pull(["a"], there, sha256)
        assert (there / "a").read_text() == new
    write(there, {"a": "wrong"})
    with pytest.raises(StorageError, match=f"a .its sha256 is {digest} instead of 0.$"):
        folder.pull(["a"], there, {"a": "0"})
    assert [(p.name, p.read_text()) for p in there.iterdir()] == [("a", "wrong")]


def test_short_reads_and_passing_errors_are_tried_again(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, left = RemoteFolder(storage), [ConnectionError("reset"), TimeoutError("slow")]

    def fail(*_: Any) -> None:
        if left:
            raise left.pop()

    calls = failing(monkeypatch, folder, "put_file", fail)
    folder.push(tmp_path, write(tmp_path, {"a": "12345"}))
    assert len(calls) == 3
    real = folder._fs.get_file
    cut = iter([True, False])

    def short(path: str, target: str) -> None:
        real(path, target)
        if next(cut):
            Path(target).write_text("123")

    monkeypatch.setattr(folder._fs, "get_file", short)
    folder.pull(["a"], tmp_path / "there")
    assert (tmp_path / "there" / "a").read_text() == "12345"


def test_missing_files_are_not_waited_for(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (100.0,))
    folder = RemoteFolder(storage)
    with pytest.raises(StorageError, match=r": cannot read nothing \(it is not there\)"):
        folder.pull(["nothing"], tmp_path)
    with pytest.raises(StorageError, match="cannot write nothing"):
        folder.push(tmp_path, ["nothing"])


def test_what_the_user_did_wrong_is_said(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server
) -> None:
    with pytest.raises(StorageError, match=r"^s3://no-such/a: cannot list it \(The specified bucket does not exist\)$"):
        RemoteFolder("s3://no-such/a").list()
    with pytest.raises(StorageError, match=r"^s3://no-such/a: cannot write x \(The specified bucket does not exist\)$"):
        RemoteFolder("s3://no-such/a").push(tmp_path, write(tmp_path, {"x": ""}))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StorageError, match=r"cannot list it \(Unable to locate credentials\)$"):
        RemoteFolder(s3).list()
    point_to(s3_server, monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setattr(remote, "PAUSES", (0.0,))
    with pytest.raises(StorageError, match="Could not connect") as caught:
        RemoteFolder(s3).list()
    assert SECRET not in str(caught.value)


def test_an_extra_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = vars(sys.modules["fsspec.registry"])["_registry"]  # of classes that have been imported
    for module, protocol in (("s3fs", "s3"), ("gcsfs", "gs")):
        monkeypatch.delitem(known, protocol, raising=False)
        monkeypatch.setitem(sys.modules, module, None)
    for url, extra in (("s3://b/a", "s3"), ("gs://b/a", "gcs")):
        with pytest.raises(ConfigError, match=rf"^{url}: .* not installed; pip install tinytron\[{extra}\]$"):
            RemoteFolder(url)


def test_urls_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^nope://b/a: Protocol not known: nope; use s3://"):
        RemoteFolder("nope://b/a")
    with pytest.raises(ConfigError, match="URL holds a password") as caught:
        RemoteFolder("ftp://me:hunter2@host/a")
    assert "hunter2" not in str(caught.value)
