"""scripts/download_fineweb.py against a hub of our own: what it fetches, keeps, goes on with and refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")

from tests.helpers.hub import Hub, serving
from tests.helpers.runs import ROOT
from tinytron.data.formats import open_shard, write_shard

REPO = "kjj0/fineweb100B-gpt2"
Download = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    files = {}
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3))]
    for number, name in enumerate(names):
        write_shard(tmp_path / name, range(number, 3000 + number), file_format="llmc")
        files[f"{REPO}/{name}"] = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
    for number in (2, 0, 1):
        files[f"HuggingFaceFW/fineweb-edu/sample/10BT/{number:03d}_00000.parquet"] = bytes([number]) * 1000
    files["HuggingFaceFW/fineweb-edu/sample/10BT/README.md"] = b"not this"
    files["HuggingFaceFW/fineweb/sample/100BT/000_00000.parquet"] = b"other" * 100
    with serving(files) as running:
        yield running


@pytest.fixture
def download(hub: Hub, tmp_path: Path) -> Download:
    def run(*flags: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "scripts/download_fineweb.py", *map(str, flags)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return run


def test_tokens_are_fetched_checked_and_kept(hub: Hub, download: Download, tmp_path: Path) -> None:
    target = tmp_path / "tokens"
    done = download("--tokens", "gpt2", "--num_files", 2, "--target_dir", target)
    assert done.returncode == 0, done.stderr
    names = ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"]
    assert sorted(p.name for p in target.iterdir()) == names  # and no temporary folder
    assert open_shard(target / names[1])[:2].tolist() == [2, 3]
    assert "3 files in" in done.stdout
    command = f"next: python pretrain_debug.py --dataset_path '{target}/fineweb_train_*.bin' --vocab_size 50304"
    assert command in done.stdout
    assert hub.fetched() == names

    (target / names[0]).write_bytes((target / names[0]).read_bytes()[:-10])
    again = download("--tokens", "gpt2", "--num_files", 3, "--target_dir", target, "--num_workers", 1)
    assert "4 files in" in again.stdout, again.stderr
    assert "2 fetched now" in again.stdout
    assert hub.fetched() == sorted([*names, names[0], "fineweb_train_000003.bin"])
    assert len(open_shard(target / names[0])) == 3000


def test_a_connection_that_breaks_is_taken_up_where_it_was(hub: Hub, download: Download, tmp_path: Path) -> None:
    name, block = f"{REPO}/fineweb_val_000000.bin", 10 * 2**20  # what huggingface_hub writes at a time
    write_shard(tmp_path / "large.bin", np.zeros(block // 2 + 1000, np.uint16), file_format="llmc")
    hub.files[name] = (tmp_path / "large.bin").read_bytes()
    hub.cut[name] = block + 500
    temporary = tmp_path / "tmp"
    (temporary / ".cache").mkdir(parents=True)
    (temporary / ".cache" / "old.incomplete").write_text("left by a call that was killed")
    done = download("--tokens", "gpt2", "--num_files", 1, "--target_dir", tmp_path / "out", "--tmp_dir", temporary)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "fineweb_val_000000.bin").read_bytes() == hub.files[name]
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith("val_000000.bin")]
    assert ranges == [None, f"bytes={block}-"]
    assert not list(temporary.rglob("*.incomplete"))


@pytest.mark.slow
def test_a_damaged_token_file_is_refused_and_fetched_again(hub: Hub, download: Download, tmp_path: Path) -> None:
    name, target = f"{REPO}/fineweb_train_000001.bin", tmp_path / "out"
    whole = hub.files[name]
    hub.files[name] = whole[:-100]
    flags = ("--tokens", "gpt2", "--num_files", 1, "--target_dir", target)
    done = download(*flags)
    assert done.returncode == 2
    assert "the header (byte 8) declares 3000 tokens, so 7024 bytes, but the file has 6924" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (target / "fineweb_train_000001.bin").exists()
    assert download(*flags).returncode == 2
    assert hub.fetched().count("fineweb_train_000001.bin") == 2  # what has arrived damaged is not tried again
    hub.files[name] = whole
    assert download(*flags).returncode == 0
    assert (target / "fineweb_train_000001.bin").read_bytes() == whole


def test_text_is_fetched_by_sample(hub: Hub, download: Download, tmp_path: Path) -> None:
    done = download("--num_files", 2, "--target_dir", tmp_path / "edu")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "edu").iterdir()) == ["000_00000.parquet", "001_00000.parquet"]
    command = f"next: python scripts/tokenize_dataset.py --dataset_path {tmp_path}/edu --encoding_name gpt2"
    assert command in done.stdout
    done = download("--dataset", "fineweb", "--sample", "100BT", "--target_dir", tmp_path / "other")
    assert (tmp_path / "other" / "000_00000.parquet").read_bytes() == b"other" * 100, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_files", 0), "--num_files 0 must be in 1..1000000; use --num_files 1"),
        (("--tokens", "gpt2", "--num_files", 2000), "--num_files 2000 must be in 1..1028"),
        (("--num_workers", 0), "--num_workers 0 must be in 1..1000"),
        (("--num_worker", 1), "unknown argument --num_worker; did you mean --num_workers?"),
        (("--sample", "350BT"), "fineweb-edu/sample/350BT holds no parquet files; use another --sample"),
        (
            ("--tokens", "gpt2", "--target_dir", "/dev/null/x"),
            "cannot be created (Not a directory); use another folder",
        ),
        (("--tokens", "gpt2", "--num_files", 4), "fineweb_train_000004.bin: "),
    ],
)
@pytest.mark.sample(5)
def test_mistakes_are_one_line(download: Download, tmp_path: Path, flags: tuple[object, ...], message: str) -> None:
    place = () if "--target_dir" in flags else ("--target_dir", tmp_path / "out")
    done = download(*flags, *place)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
