"""Exports during training: what --export_every writes beside which checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from tests.helpers.errors import says
from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, losses, run_well, train, user_error
from tinytron.checkpoint import CheckpointFiles
from tinytron.checkpoint.save import CheckpointSaver
from tinytron.errors import ConfigError
from tinytron.interop.weights import HFWeights
from tinytron.model.modules.loss import LossSums, fused_linear_cross_entropy
from tinytron.training import Config, Trainer
from tinytron.training.run import exports as exporting

Pools = Callable[[int], Ranks]
RUN: tuple[object, ...] = ("--save_every_steps", 1, "--export_every", 2, "--max_steps", 5, "--keep_last", 1)
EXPERTS: tuple[object, ...] = (
    *("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8, "--ep_size", 2),
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("world", "flags"), [(1, ()), (2, EXPERTS)])
def test_due_checkpoints_and_the_last_are_exported(
    ranks: Pools, tmp_path: Path, world: int, flags: tuple[object, ...]
) -> None:
    run = ranks(world).run(train, Trainer, tmp_path, *RUN, *flags)[0]
    assert names(run.folder / "export") == ["step_00002", "step_00004", "step_00005"]
    assert [path.name for path in run.folder.glob("*_meta.pt")] == ["00005_meta.pt"]
    weights = torch.load(run.folder / "00005_model.pt", weights_only=True)
    last, before = (HFWeights(run.folder / "export" / f"step_0000{step}") for step in (5, 4))
    assert torch.equal(last.get("model.embed_tokens.weight"), weights["wte.weight"])
    assert not torch.equal(last.get("model.embed_tokens.weight"), before.get("model.embed_tokens.weight"))
    config = run.folder / "export" / "step_00005" / "config.json"
    assert ("MixtralForCausalLM" if flags else "LlamaForCausalLM") in config.read_text()


def test_a_remote_run_folder_gets_them_too(ranks: Pools, tmp_path: Path) -> None:
    run = ranks(1).run(train, Trainer, tmp_path, *TINY, "--max_steps", 2)[0]

    class Recorder:
        pushed: tuple[str, ...] = ()

        def push_files(self, names: list[str]) -> None:
            self.pushed = tuple(names)

    mirror, config = Recorder(), config_of(*TINY, "--export_every", 5000)
    exports = exporting.Exports(config, run.folder, 2, mirror)  # type: ignore[arg-type]
    assert exports.committed(CheckpointFiles(run.folder, 2)) == f"; exported to {run.folder}/export/step_00002"
    assert set(mirror.pushed) == {f"export/step_00002/{name}" for name in names(run.folder / "export" / "step_00002")}


def test_uploads_are_reported_while_training_goes_on(tmp_path: Path) -> None:
    class Talking:
        def report(self) -> list[str]:
            return ["uploaded"]

    saver = CheckpointSaver(tmp_path, None, None, None, consumer=Talking())  # type: ignore[arg-type]
    assert saver.report() == ["uploaded"]


class Broken(Trainer):
    """Its exports fail, once with an error of the kind nobody expects."""

    def train(self) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("the export is broken\nby something")

        kept, exporting.export = exporting.export, fail  # type: ignore[assignment]
        try:
            super().train()
        finally:
            exporting.export = kept

    def _say(self, *texts: str) -> None:
        self.said = [*getattr(self, "said", []), *texts]

    def report(self) -> list[str]:
        return self.said


def test_a_failed_export_costs_no_checkpoint(ranks: Pools, tmp_path: Path) -> None:
    run = ranks(1).run(train, Broken, tmp_path, *RUN)[0]
    assert run.step == 5
    assert names(run.folder / "export") == []
    assert [path.name for path in run.folder.glob("*_meta.pt")] == ["00005_meta.pt"]
    out = run.folder / "export" / "step_00004"
    (line,) = (line for line in run.extra if line.startswith("step 4 | saved"))
    assert f"; error: not exported to {out} (the export is broken), the checkpoint is complete; removed 3" in line


@pytest.mark.slow
def test_what_a_killed_process_left_is_made_up_for(tmp_path: Path) -> None:
    """Killed between the checkpoint and its export; half of an export lies there, too."""
    flags = (*TINY, *RUN, "--log_dir", tmp_path)
    run_well(*flags, "--max_steps", 4, cwd=tmp_path)
    (folder,) = tmp_path.glob("tiny_*")
    (folder / "export" / "step_00004").rename(folder / "export" / ".step_00004.tmp.17")
    again = run_well(*flags, "--max_steps", 4, cwd=tmp_path)
    assert f"step 4 | exported to {folder}/export/step_00004\n" in again.stdout
    assert names(folder / "export") == ["step_00002", "step_00004"]
    HFWeights(folder / "export" / "step_00004")


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(61, 8)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> LossSums:
        hidden = self.table(input_ids)
        return fused_linear_cross_entropy(hidden.flatten(0, 1), self.table.weight, labels.flatten())


class ForeignTrainer(Trainer):
    def _init_model(self, config: Config) -> None:
        self.raw_model = self.model = Foreign()


def test_a_foreign_model_is_not_exported(ranks: Pools, tmp_path: Path) -> None:
    error = ranks(1).run(user_error, ForeignTrainer, tmp_path, *RUN)[0]
    assert re.search(says("ConfigError: --export_every 2 ... Foreign ... use --export_every 0"), error)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ("--export_every", 3, "--save_every_steps", 2),
            "--export_every 3 ... --save_every_steps 2 ... use 2, or --save_every_steps 3",
        ),
        (("--export_every", 2, "--no-do_save"), "--export_every 2 ... drop it, or --no-do_save"),
        (("--export_every", -1), "--export_every -1 must be at least 0"),
        (
            ("--hub_model_id", "lab/model", "--save_every_steps", 0),
            "--hub_model_id lab/model ... use --export_every 1000",
        ),
        (
            ("--hub_model_id", "model", "--export_every", 5000),
            "--hub_model_id model ... use owner/name",
        ),
        (
            (*EXPERTS[:-2], "--moe_router_score", "sigmoid", "--export_every", 5000),
            "--export_every 5000 ... mixtral ... --moe_router_score sigmoid; keep ... checkpoint ...",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(flags: tuple[object, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=says(text)):
        config_of(*TINY, *flags)


# A folder of their own, and the weights at the start.

START: tuple[object, ...] = ("--save_at_start", "--save_every_steps", 2, "--export_every", 2, "--max_steps", 3)


@pytest.mark.parametrize("world", [1, 2])
def test_the_start_is_saved_and_exported_to_a_folder_of_its_own(ranks: Pools, tmp_path: Path, world: int) -> None:
    flags = (*START, "--export_dir", tmp_path / "models", "--log_dir", tmp_path / "log")
    pool = ranks(world)
    run = pool.run(train, Trainer, tmp_path, *flags)[0]
    assert names(tmp_path / "models") == ["exported_by.json", "step0", "step2", "step3"]
    assert not (run.folder / "export").exists()
    assert [path.name for path in sorted(run.folder.glob("*_meta.pt"))] == [f"0000{n}_meta.pt" for n in (0, 2, 3)]
    start = HFWeights(tmp_path / "models" / "step0").get("model.embed_tokens.weight")
    assert torch.equal(start, torch.load(run.folder / "00000_model.pt", weights_only=True)["wte.weight"])
    plain = pool.run(train, Trainer, tmp_path / "plain", "--max_steps", 3)[0]
    assert [r for r in run.records if "loss" in r] != []
    assert losses(run.log) == losses(plain.log)  # saving first changes nothing
    # Killed in its first steps, a run begins with the saved start, and does not save it again.
    for path in run.folder.glob("*_meta.pt"):
        if not path.name.startswith("00000"):
            path.unlink()
    written = [path.stat().st_mtime_ns for path in (run.folder / "00000_model.pt", run.folder / "00002_model.pt")]
    again = pool.run(train, Trainer, tmp_path, *flags)[0]
    assert losses(again.log) == losses(run.log)
    assert (run.folder / "00000_model.pt").stat().st_mtime_ns == written[0]
    assert (run.folder / "00002_model.pt").stat().st_mtime_ns > written[1]


def test_exports_of_another_run_are_never_replaced(ranks: Pools, tmp_path: Path) -> None:
    models, pool = tmp_path / "models", ranks(2)
    flags = (*RUN, "--export_dir", models)
    kept = pool.run(train, Trainer, tmp_path, *flags)[0]
    before = (models / "step4" / "config.json").stat().st_mtime_ns
    for other in (("--seed", 7), ("--no-resume",)):
        told = pool.run(user_error, Trainer, tmp_path, *flags, *other)
        assert told[0] == told[1]
        whose = "an earlier run" if "--no-resume" in other else str(kept.folder)
        assert told[0].startswith(f"ConfigError: --export_dir {models} has step2 of {whose}; use another folder")
    (models / "exported_by.json").unlink()
    assert "has step2 of an earlier run" in pool.run(user_error, Trainer, tmp_path, *flags)[0]
    assert (models / "step4" / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ("--export_dir", "x"),
            "--export_dir x is for exports, and there are none; use --export_every 5000, or drop it",
        ),
        (("--export_dir", "s3://b/x", "--export_every", 5000), "--export_dir s3://b/x is a URL; give a local folder"),
        (("--save_at_start", "--no-do_save"), "--save_at_start saves, and --no-do_save does not; drop one of them"),
    ],
)
def test_flags_that_do_not_go_together(flags: tuple[object, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        config_of(*TINY, *flags)


def test_an_export_dir_that_cannot_be_written(ranks: Pools, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = ranks(1).run(user_error, Trainer, tmp_path, *RUN, "--export_dir", tmp_path / "file" / "models")[0]
    assert f"--export_dir {tmp_path}/file/models cannot be written (Not a directory); use another folder" in told
