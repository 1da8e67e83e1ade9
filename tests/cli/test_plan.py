"""``tinytron plan`` of an existing model: a Hugging Face folder, a name on the hub, a run, the config.json of a run."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Run, train
from tests.interop.families import save
from tinytron.cli.main import main
from tinytron.interop.importing import import_model
from tinytron.interop.load import architecture_of
from tinytron.training import Trainer

Pools = Callable[[int], Ranks]
BATCH = ("--seq_len", "16", "--batch_size", "2", "--total_batch_size", "256", "--precision", "fp32")


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def shown(*words: object) -> str:
        assert main(["plan", *map(str, words)]) == 0
        return capsys.readouterr().out

    return shown


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_a_folder_is_planned_like_its_import_and_its_architecture(
    plan: Callable[..., str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of ranks, without its weights."""
    save(name, tmp_path / "hf", torch.float32)
    import_model(str(tmp_path / "hf"), tmp_path / "own", torch.float32)
    flags: list[str] = []
    for option, value in dataclasses.asdict(architecture_of(str(tmp_path / "hf"))).items():
        if isinstance(value, bool):
            flags.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, tuple):
            flags += [f"--{option}", *map(str, value)] if value else []
        elif value is not None:
            flags.append(f"--{option}={value}")
    (tmp_path / "hf" / "model.safetensors").unlink()

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert allow_patterns == ["config.json"]  # weights are not downloaded for a plan
        return str(tmp_path / "hf")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    for more in ((), ("--dry_run_world_size", "4")):
        expected = plan(*flags, *BATCH, *more)
        for source in (tmp_path / "hf", tmp_path / "own", "owner/model", "hf://owner/model@v1"):
            assert plan("--init_from", source, *BATCH, *more) == expected
    assert plan("--init_from", tmp_path / "hf", *BATCH, "--batch_size", "4") != plan(
        "--init_from", "owner/model", *BATCH
    )


def test_a_run_is_planned_from_its_folder_and_from_its_config(
    ranks: Pools, plan: Callable[..., str], tmp_path: Path
) -> None:
    run: Run = ranks(1).run(train, Trainer, tmp_path / "log", "--max_steps", 1, "--do_save")[0]
    expected = plan(*TINY)
    assert plan("--config", run.folder / "config.json") == expected
    batch = TINY[TINY.index("--precision") : TINY.index("--block_size")]
    assert plan("--init_from", run.folder, *batch) == expected
    shutil.rmtree(run.folder / f"{1:05d}_opt")
    assert plan("--init_from", run.folder / "00001_model.pt", *batch) == expected


def test_the_flag_of_other_commands_names_that_of_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--checkpoint", "gpt2"]) == 2
    assert "unknown argument --checkpoint; it is --init_from for the weights of a model, or --resume_path" in (
        capsys.readouterr().err
    )
