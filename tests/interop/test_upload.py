"""Uploads to a stand-in hub: what arrives, and what happens when it does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.model_hub import ModelHub, taking
from tinytron.errors import ConfigError
from tinytron.interop.upload import RECORD, HubUploader, check_repository

pytest.importorskip("huggingface_hub")
REPOSITORY = "lab/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """Takes files by the plain protocol (not xet), and the client does not wait long before it tries again."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # other tests are
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with taking() as made:
        yield made


def exported(parent: Path, step: int, shards: int = 1) -> Path:
    """A folder such as an export makes."""
    folder = parent / f"step_{step:05d}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"step": step}))
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    for number in range(shards):
        (folder / f"model-{number}-of-{shards}.safetensors").write_bytes(b"%d of %d" % (number, step))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def told(uploader: HubUploader, *, wait: bool = True) -> list[str]:
    lines: list[str] = []
    uploader.close(lines.append, wait=wait)
    return lines


def test_folders_become_revisions(hub: ModelHub, tmp_path: Path) -> None:
    uploader = HubUploader(REPOSITORY, tmp_path, endpoint=hub.url)
    first, second = exported(tmp_path, 100, shards=3), exported(tmp_path, 200, shards=2)
    uploader.add(first, ["step100"])
    uploader.add(second, ["step200", "main"])
    lines = told(uploader)
    assert lines[0] == "waiting for uploads to lab/model"
    assert lines[1:] == [
        "uploaded step_00100 to lab/model, revision step100",
        "uploaded step_00200 to lab/model, revision step200",
        "uploaded step_00200 to lab/model, revision main",
    ]
    repository = hub.repositories[REPOSITORY]
    assert repository.private
    assert repository.branches == {"step100": content(first), "step200": content(second), "main": content(second)}
    assert set(repository.commits) == {
        ("step100", "Upload step_00100"), ("step200", "Upload step_00200"), ("main", "Upload step_00200"),
    }  # fmt: skip
    assert hub.tokens == {"Bearer hf_secret"}
    assert json.loads((tmp_path / RECORD).read_text()) == {REPOSITORY: ["step100", "step200", "main"]}


def test_old_weights_do_not_stay_beside_new_ones(hub: ModelHub, tmp_path: Path) -> None:
    uploader = HubUploader(REPOSITORY, tmp_path, endpoint=hub.url, private=False)
    assert not hub.repositories[REPOSITORY].private
    hub.repositories[REPOSITORY].branches["main"] = {"model-9-of-9.safetensors": b"old", "NOTES.md": b"the user's"}
    folder = exported(tmp_path, 5)
    uploader.add(folder, ["main"])
    told(uploader)
    assert hub.repositories[REPOSITORY].branches["main"] == {**content(folder), "NOTES.md": b"the user's"}


def test_a_failed_upload_is_tried_again(hub: ModelHub, tmp_path: Path) -> None:
    uploader = HubUploader(REPOSITORY, tmp_path, endpoint=hub.url)
    hub.refuse = lambda method, path: 403 if "/commit/step100" in path else None
    first, second = exported(tmp_path, 100), exported(tmp_path, 200)
    before = content(first)
    uploader.add(first, ["step100"])
    lines = told(uploader)
    assert len(lines) == 3
    assert lines[1].startswith("error: step_00100 was not uploaded to lab/model as step100 (")
    assert lines[1].endswith("); training continues, the folder stays here, and the next upload tries again")
    assert lines[2] == "not uploaded to lab/model yet: step100; the same command tries again"
    assert content(first) == before
    hub.refuse = lambda method, path: None
    uploader.add(second, ["step200"])
    assert told(uploader)[1:] == [
        "uploaded step_00100 to lab/model, revision step100",
        "uploaded step_00200 to lab/model, revision step200",
    ]
    assert hub.repositories[REPOSITORY].branches["step100"] == content(first)


def test_the_next_process_knows_what_arrived(hub: ModelHub, tmp_path: Path) -> None:
    uploader = HubUploader(REPOSITORY, tmp_path, endpoint=hub.url)
    uploader.add(exported(tmp_path, 100), ["step100"])
    told(uploader)
    again = HubUploader(REPOSITORY, tmp_path, endpoint=hub.url)
    assert (again.has("step100"), again.has("step200")) == (True, False)
    assert not HubUploader("lab/other", tmp_path, endpoint=hub.url).has("step100")
    hub.refuse = lambda method, path: 403 if "/branch/" in path else None
    again.add(tmp_path / "step_00100", ["step100"])  # made anew: what arrived before is no longer it
    told(again)
    assert not again.has("step100")
    (tmp_path / RECORD).write_text("{damaged")
    assert not again.has("step100")


def test_nobody_waits_for_an_upload(hub: ModelHub, tmp_path: Path) -> None:
    going, release = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> None:
        if "/commit/" in path:
            going.set()
            release.wait(30)

    hub.refuse = hold
    uploader = HubUploader(REPOSITORY, tmp_path, endpoint=hub.url)
    uploader.add(exported(tmp_path, 100), ["step100"])
    assert going.wait(30)
    assert uploader.report() == []
    assert told(uploader, wait=False) == ["not uploaded to lab/model yet: step100; the same command tries again"]
    release.set()


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses_is_an_error_at_once(hub: ModelHub, tmp_path: Path, status: int) -> None:
    hub.refuse = lambda method, path: status
    with pytest.raises(
        ConfigError, match=r"^--hub_model_id lab/model: the hub refuses access \(.+\); set HF_TOKEN to a token"
    ):
        HubUploader(REPOSITORY, tmp_path, endpoint=hub.url)


def test_a_hub_that_is_away_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    uploader = HubUploader(REPOSITORY, tmp_path, endpoint="http://127.0.0.1:9")
    (line,) = uploader.report()
    assert line.startswith("error: the hub does not answer (")
    uploader.add(exported(tmp_path, 100), ["step100"])
    assert told(uploader)[-1] == "not uploaded to lab/model yet: step100; the same command tries again"


@pytest.mark.parametrize("name", ["model", "a/b/c", "/b", "a/", "a b/c", "../c", ".a/b", "https://huggingface.co/a/b"])
def test_names_are_checked(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not the name of a repository on the hub; use owner/name$"):
        HubUploader(name, tmp_path)


def test_a_name_has_at_most_96_characters() -> None:
    check_repository(f"{'a' * 48}/{'b' * 47}")
    with pytest.raises(ConfigError, match="is not the name of a repository on the hub; use owner/name"):
        check_repository(f"{'a' * 48}/{'b' * 48}")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(
        ConfigError, match=r"--hub_model_id lab/model needs huggingface_hub: pip install huggingface_hub"
    ):
        HubUploader(REPOSITORY, tmp_path)
