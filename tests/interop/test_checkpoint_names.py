"""Names that ``--checkpoint`` takes: a safetensors file, a name on the hub, a URL, and mistyped ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.corpus import make_texts, make_tokenizer, tokenize, write_jsonl
from tests.helpers.hub import serving
from tests.helpers.runs import ROOT
from tests.interop.families import change_config, save
from tests.interop.test_folders import rewrite
from tests.interop.test_open import word_tokenizer
from tests.interop.test_tokens import write_run
from tinytron.checkpoint.files import CheckpointFiles, checksum
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.cli.main import main
from tinytron.errors import CheckpointError, ConfigError, StorageError, TinytronError
from tinytron.interop.export import export
from tinytron.interop.open import local_checkpoint, open_model
from tinytron.utils.remote import RemoteFolder

pytest.importorskip("tokenizers")


def refusal(name: object, kind: type[TinytronError] = CheckpointError) -> str:
    with pytest.raises(kind, match=r"^.+$") as caught:
        local_checkpoint(str(name))
    return str(caught.value)


def same(one: Path | str, other: Path | str) -> bool:
    """Whether both names open the same model."""
    weights, expected = (open_model(name)[0].state_dict() for name in (one, other))
    return weights.keys() == expected.keys() and all(torch.equal(weights[n], expected[n]) for n in weights)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save("llama", tmp_path / "llama", torch.float32)
    change_config(tmp_path / "llama", bos_token_id=1, eos_token_id=39)
    word_tokenizer(tmp_path / "llama")
    return tmp_path / "llama"


# Local files.


def test_a_safetensors_file_is_the_model_in_its_folder(llama: Path, tmp_path: Path) -> None:
    assert local_checkpoint(llama / "model.safetensors") == llama
    assert local_checkpoint(f"file://{llama}") == llama
    save("llama", tmp_path / "parts", torch.float32, max_shard_size="8KB")
    assert local_checkpoint(min((tmp_path / "parts").glob("*.safetensors"))) == tmp_path / "parts"


def test_a_safetensors_file_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "model.safetensors", llama / "adapter.safetensors")
    text = refusal(llama / "adapter.safetensors")
    assert f"adapter.safetensors is not part of the model in {llama}, whose weights are in model.safetensors" in text
    shutil.copy(llama / "model.safetensors", tmp_path / "alone.safetensors")
    assert "alone.safetensors does not describe its model; put the model's config.json" in refusal(
        tmp_path / "alone.safetensors"
    )


@pytest.mark.parametrize(
    "name", ["/nowhere/run", "no such run", "a/b/c", "00100_model.pt", "model.safetensors", "s3:/x"]
)
def test_what_is_neither_here_nor_a_hub_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = refusal(name)
    assert text.startswith(
        f"{name} does not exist; give a run folder (log/<run>), a weights file in it (00100_model.pt), "
    )
    for accepted in ("a Hugging Face folder", "EleutherAI/pythia-160m, hf://owner/model", "s3://bucket/log/<run>"):
        assert accepted in text


# The hub.


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A hub that has the model as ``gpt2`` and ``owner/tiny``; which repositories and revisions were asked for."""
    asked: list[tuple[str, Any]] = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        if repository not in ("gpt2", "owner/tiny"):
            raise OSError("Cannot reach the hub\nand much more")
        cache = tmp_path / "cache" / repository
        cache.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for path in llama.glob(pattern):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("owner/tiny", "owner/tiny", None),
        ("owner/tiny@v1", "owner/tiny", "v1"),
        ("hf://owner/tiny", "owner/tiny", None),
        ("hf://owner/tiny@refs/pr/2", "owner/tiny", "refs/pr/2"),
    ],
)
def test_a_hub_name(hub: list[tuple[str, Any]], llama: Path, name: str, repository: str, revision: str | None) -> None:
    folder = local_checkpoint(name)
    assert set(hub) == {(repository, revision)}
    assert same(folder, llama)
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "generation_config.json"}


def test_a_folder_here_comes_before_the_hub(hub: list[tuple[str, Any]], llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "gpt2")
    assert local_checkpoint("gpt2") == Path("gpt2")
    assert hub == []
    local_checkpoint("hf://gpt2")
    assert hub[0] == ("gpt2", None)


def test_a_mistyped_run_is_not_looked_for_on_the_hub(hub: list[tuple[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    assert refusal("log/run", ConfigError) == (
        "log/run does not exist in the folder log; if the hub has a model of that name, use hf://log/run"
    )
    assert hub == []
    assert "the hub download failed (Cannot reach the hub); use a local folder" in refusal("hf://log/run", ConfigError)


def test_a_hub_that_cannot_be_reached_is_one_line(
    hub: list[tuple[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3")
    for words in (["evaluate", "--data", "text.txt"], ["generate", "--prompt", "w1"], ["export", "--out", "new"]):
        assert main([*words, "--checkpoint", "owner/none"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            "error: owner/none is not a local folder, and the hub download failed (Cannot reach the hub); "
            "use a local folder"
        )
    assert not (tmp_path / "new").exists()


def test_the_commands_take_a_hub_name(
    hub: list[tuple[str, Any]], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in range(1, 30)))
    (tmp_path / "task.jsonl").write_text(json.dumps({"context": "w1", "choices": [" w2", " w3"], "answer": 0}))
    results = []
    for name in ("owner/tiny", str(llama)):
        words = ["--checkpoint", name, "--data", "text.txt", "--tasks", "task.jsonl"]
        assert main(["evaluate", *words]) == 0
        out = tmp_path / "results.json" if name == "owner/tiny" else llama / "results.json"
        results.append(json.loads(out.read_text()))
    assert results[0]["checkpoint"] == "owner/tiny"
    assert results[0] | {"checkpoint": str(llama)} == results[1]
    capsys.readouterr()
    texts = []
    for name in ("owner/tiny", str(llama)):
        assert main(["generate", "--checkpoint", name, "--prompt", "w1 w2", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["export", "--checkpoint", "owner/tiny", "--out", "exported"]) == 0
    assert same(tmp_path / "exported", llama)


@pytest.mark.slow
def test_the_hub_as_its_own_client_asks_it(llama: Path, tmp_path: Path) -> None:
    """huggingface_hub against a stand-in server: from the command line to a loss."""
    pytest.importorskip("huggingface_hub")
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4")
    files = {f"lab/tiny/{path.name}": path.read_bytes() for path in llama.iterdir()}
    with serving(files) as hub:
        more = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        environment = {**os.environ, **more, "PYTHONPATH": str(ROOT)}

        def evaluate(name: str) -> subprocess.CompletedProcess[str]:
            words = [sys.executable, "-m", "tinytron", "evaluate", "--checkpoint", name, "--data", "text.txt"]
            return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

        found = evaluate("hf://lab/tiny")
        assert found.returncode == 0, found.stderr
        assert main(["evaluate", "--checkpoint", str(llama), "--data", str(tmp_path / "text.txt")]) == 0
        data = json.loads((tmp_path / "results.json").read_text())["data"]
        assert data | {"path": ""} == json.loads((llama / "results.json").read_text())["data"] | {"path": ""}
        absent = evaluate("lab/absent")
        assert absent.returncode == 2
        assert (
            "error: lab/absent is not a local folder, and the hub download failed (" in absent.stderr.splitlines()[-1]
        )


# URLs.


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 2 and 4, and a later one without metadata; it keeps its tokenizer."""
    make_tokenizer(tmp_path / "tokenizer.json")
    tokenize(write_jsonl(tmp_path / "texts.jsonl", make_texts(20)), tmp_path / "tokenizer.json", tmp_path / "data")
    folder = write_run(tmp_path / "run", tmp_path / "data")
    shutil.copy(tmp_path / "data" / "tokenizer.json", folder)
    weights = torch.load(folder / "00000_model.pt")
    (folder / "00000_model.pt").unlink()
    for step in (2, 4, 6):
        files = CheckpointFiles(folder, step)
        torch.save({name: weight + step for name, weight in weights.items()}, files.model)
        if step < 6:
            commit(files)
    return folder


def commit(files: CheckpointFiles) -> None:
    config = json.loads((files.folder / "config.json").read_text())["config"]
    sums = {files.model.name: checksum(files.model)}
    torch.save(CheckpointMeta(step=files.step, run={"config": config}, files=sums).as_dict(), files.meta)


def push(folder: Path, url: str) -> RemoteFolder:
    remote = RemoteFolder(url)
    remote.push(folder, [path.name for path in folder.iterdir()])
    return remote


def test_the_newest_complete_checkpoint_of_a_remote_run(storage: str, run: Path, tmp_path: Path) -> None:
    push(run, f"{storage}/runs/a")
    told: list[str] = []
    source = local_checkpoint(f"{storage}/runs/a/", told.append)
    assert told == [f"fetching 00004_model.pt from {storage}/runs/a"]
    assert same(source, run / "00004_model.pt")
    names = {path.name for path in source.parent.iterdir()}
    assert names == {"00004_model.pt", "00004_meta.pt", "config.json", "tokenizer.json"}
    assert same(f"{storage}/runs/a/00002_model.pt", run / "00002_model.pt")
    assert same(f"{storage}/runs/a/00002_meta.pt", run / "00002_model.pt")
    assert same(f"{storage}/runs/a/00006_model.pt", run / "00006_model.pt")


def test_a_remote_run_without_metadata_has_its_newest_weights(storage: str, run: Path, tmp_path: Path) -> None:
    for path in run.glob("*_meta.pt"):
        path.unlink()
    push(run, storage)
    assert same(storage, run / "00006_model.pt")


@pytest.mark.parametrize("committed", [True, False])
def test_a_run_that_began_again_is_fetched_again(storage: str, run: Path, tmp_path: Path, committed: bool) -> None:
    """Its files have the same names and sizes."""
    remote, files = push(run, storage), CheckpointFiles(run, 4)
    url = f"{storage}/{files.model.name}"
    if not committed:
        remote.remove([files.meta.name])
    local_checkpoint(url)
    weights = torch.load(files.model)
    torch.save({name: weight * 2 for name, weight in weights.items()}, files.model)
    commit(files)
    remote.push(run, [files.model.name, *([files.meta.name] if committed else [])])
    assert same(url, files.model)


def test_remote_weights_are_compared_with_their_record(storage: str, run: Path, tmp_path: Path) -> None:
    remote, files = push(run, storage), CheckpointFiles(run, 4)
    torch.save({name: weight * 2 for name, weight in torch.load(files.model).items()}, files.model)
    remote.push(run, [files.model.name])
    assert "cannot read 00004_model.pt (its sha256 is " in refusal(storage, StorageError)


@pytest.mark.parametrize("shards", ["5GB", "4KB"])
def test_a_remote_export(storage: str, run: Path, tmp_path: Path, shards: str) -> None:
    export(run / "00004_model.pt", tmp_path / "hf", max_shard_size=10**9 if shards == "5GB" else 4000)
    remote = push(tmp_path / "hf", f"{storage}/hf")
    assert same(f"{storage}/hf", tmp_path / "hf")
    first = min((tmp_path / "hf").glob("*.safetensors")).name
    assert same(f"{storage}/hf/{first}", tmp_path / "hf")
    rewrite_all(tmp_path / "hf")
    remote.push(tmp_path / "hf", [path.name for path in (tmp_path / "hf").glob("*.safetensors")])
    assert same(f"{storage}/hf", tmp_path / "hf")


def rewrite_all(folder: Path) -> None:
    """Other numbers in files of the same sizes."""
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


def test_pickled_remote_weights(storage: str, llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    expected = open_model(llama)[0].state_dict()
    (llama / "model.safetensors").unlink()
    push(llama, storage)
    for name, weight in open_model(storage)[0].state_dict().items():
        assert torch.equal(weight, expected[name])


def test_urls_that_hold_no_checkpoint(storage: str, run: Path, tmp_path: Path) -> None:
    push(run, f"{storage}/runs/a")
    assert f"{storage}/runs has no checkpoint itself, but has the folders a; name a run folder" in refusal(
        f"{storage}/runs"
    )
    assert f"{storage}/nowhere has no checkpoint; name" in refusal(f"{storage}/nowhere")
    assert "00003_model.pt does not exist; name a run folder, or" in refusal(f"{storage}/runs/a/00003_model.pt")
    assert "holds a password" in refusal("s3://me:secret@bucket/run", ConfigError)


def test_the_commands_take_a_url(
    storage: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push(run, f"{storage}/run")
    monkeypatch.chdir(tmp_path)
    local = str(run / "00004_model.pt")
    for name in (f"{storage}/run", local):
        assert main(["evaluate", "--checkpoint", name, "--data", str(tmp_path / "data")]) == 0
    results = [json.loads(path.read_text()) for path in (tmp_path / "results.json", run / "results.json")]
    assert results[0] == results[1] | {"checkpoint": f"{storage}/run"}
    assert main(["export", "--checkpoint", f"{storage}/run", "--out", str(tmp_path / "exported")]) == 0
    assert same(tmp_path / "exported", local)
    assert "tokenizer.json" in {path.name for path in (tmp_path / "exported").iterdir()}
    assert main(["generate", "--checkpoint", f"{storage}/run", "--prompt", "the", "--max_new_tokens", "2"]) == 0
    assert "fetching 00004_model.pt" in capsys.readouterr().err


def test_the_same_weights_are_not_fetched_twice(storage: str, run: Path, tmp_path: Path) -> None:
    push(run, storage)
    source = local_checkpoint(storage)
    before = source.stat().st_mtime_ns
    assert local_checkpoint(storage).stat().st_mtime_ns == before


def test_rewriting_is_seen(llama: Path, tmp_path: Path) -> None:
    """The comparison that these tests rest on tells models apart."""
    shutil.copytree(llama, tmp_path / "other")
    rewrite(tmp_path / "other", lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1})
    assert not same(llama, tmp_path / "other")
