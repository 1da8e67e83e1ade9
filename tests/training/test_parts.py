"""The parts of a run by themselves: data pipeline, folder, saver and world; reporter and guards have files of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of
from tinytron.checkpoint.load import read_meta
from tinytron.data import Batch, MockDataset
from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.param_spec import specs_of
from tinytron.errors import ConfigError
from tinytron.training.attributes import TrainerAttributes
from tinytron.training.build import optimizer_options
from tinytron.training.pipeline import DataPipeline
from tinytron.training.run.folder import RunFolder
from tinytron.training.run.guards import Guards
from tinytron.training.run.saver import RunSaver
from tinytron.training.world import first_on_node, join_world, place_in_world

Pools = Callable[[int], Ranks]


def mock(count: int = 32) -> MockDataset:
    return MockDataset(count, 12, 61, seed=0)


def ids_of(batches: list[Batch]) -> list[Any]:
    return [batch.input_ids.tolist() for batch in batches]


# Data.


def _steps(*flags: object, first: int = 0) -> tuple[list[Any], list[Any], list[str]]:
    config = config_of(*TINY, *flags)
    data = DataPipeline(config, join_world(config), train_dataset=mock())
    steps = data.steps(first)
    taken = [ids_of(next(steps)) for _ in range(2)]
    steps.close()  # type: ignore[attr-defined]
    val = ids_of(list(data.validation())) if data.val is not None else []
    return taken, val, data.notes


def test_steps_begin_where_asked_and_validation_is_split_off(ranks: Pools) -> None:
    (from_start, val, notes), (from_second, _, _) = (ranks(1).run(_steps, "--do_val", "--split_rate", 0.75)[0],
                                               ranks(1).run(_steps_from_one)[0])  # fmt: skip
    assert from_start[1] == from_second[0]
    dataset = mock()
    assert [row for batch in val for row in batch] == [dataset[i]["input_ids"].tolist() for i in range(24, 32)]
    line = "no validation data: the last 8 of 32 samples are held out"
    assert line in notes
    ((_, nothing, notes),) = ranks(1).run(_steps)
    assert nothing == []
    assert line not in notes


def _steps_from_one() -> Any:
    return _steps("--do_val", "--split_rate", 0.75, first=1)


def _users_loader() -> tuple[bool, bool, list[Any]]:
    config = config_of(*TINY, "--max_steps", 3)
    rows = [mock()[i] for i in range(32)]
    loader = [{k: torch.stack([r[k] for r in rows[i : i + 2]]) for k in rows[0]} for i in range(0, 32, 2)]
    data = DataPipeline(config, join_world(config), train_loader=loader)
    steps = data.steps(1)
    ids = ids_of(next(steps))
    steps.close()  # type: ignore[attr-defined]
    return data.train.ours, data.train.trusted, ids


def test_a_loader_of_the_users_own_is_read_again_up_to_the_step(ranks: Pools) -> None:
    ((ours, trusted, ids),) = ranks(1).run(_users_loader)
    assert (ours, trusted) == (False, False)
    assert [row for batch in ids for row in batch] == [mock()[i]["input_ids"].tolist() for i in range(8, 16)]


def _no_data() -> str:
    config = config_of(*TINY)
    try:
        DataPipeline(config, join_world(config))
    except ConfigError as error:
        return str(error)
    return ""


def test_without_data_there_is_no_pipeline(ranks: Pools) -> None:
    assert ranks(1).run(_no_data)[0].startswith("_init_dataset set no training data")


# Folder and saver.


class Line(nn.Module):
    """A model of somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))


def _save_by_hand(log_dir: Path) -> tuple[list[str], str]:
    config = config_of(*TINY, "--log_dir", log_dir, "--keep_best", "--no-async_save")
    state = join_world(config)
    folder, model = RunFolder(config, state), Line()
    optimizer = DistributedOptimizer(torch.optim.AdamW(model.parameters()), state.groups["dp"])
    optimizer.attach(model, specs_of(model), state, optimizer_options(config, model))
    folder.begin(0, 7)
    data, guards = (
        DataPipeline(config, state, train_dataset=mock()),
        Guards(config, state, folder.path, optimizer),
    )
    said: list[str] = []
    saver = RunSaver(config, state, folder, model, optimizer, data, guards, resumed=0, say=said.append)
    assert saver.enabled
    with saver.in_background():
        said += saver.save(2, {"val_loss": 1.5})
    said += saver.save(3, {"val_loss": None})
    saver.close(said.append)
    return said, str(folder.path)


def test_a_save_says_what_the_run_is(ranks: Pools, tmp_path: Path) -> None:
    (said, path), (_, same) = ranks(2).run(_save_by_hand, tmp_path)
    assert path == same
    assert [line.split(" | ")[0] for line in said] == ["step 2", "step 3"]
    metas = [read_meta(Path(path) / f"{step:05d}_meta.pt") for step in (2, 3)]
    assert [(meta.step, meta.val_loss) for meta in metas] == [(2, 1.5), (3, None)]
    assert metas[0].data_position == {"step": 2, "samples": 16, "tokens": 192}
    assert metas[0].parameters == {"weight": [4]}
    written = json.loads((Path(path) / "config.json").read_text())
    assert {**json.loads(json.dumps(metas[0].run)), "max_steps": 7} == written


def _folder(log_dir: Path) -> tuple[list[str], bool]:
    config = config_of(*TINY, "--log_dir", log_dir)
    folder = RunFolder(config, join_world(config))
    return folder.notes, (folder.path / ".lock").exists()


def test_a_folder_is_locked_and_says_where_it_is(ranks: Pools, tmp_path: Path) -> None:
    name = f"tiny_{config_of(*TINY).config_hash()}"
    assert ranks(2).run(_folder, tmp_path) == [([f"run folder: {tmp_path / name}"], True)] * 2


# World.


def _place(sep: int) -> tuple[int, ...]:
    place = TrainerAttributes()
    place.state = join_world(config_of(*TINY, "--sep_size", sep))
    assert place.device.type == "cpu"
    assert torch.distributed.get_world_size(place.sp_group) == place.sp_world_size
    assert torch.distributed.get_rank(place.dp_group) == place.dp_rank
    return place.dp_rank, place.dp_world_size, place.sp_rank, place.sp_world_size, int(place.master_process)


@pytest.mark.parametrize(
    ("sep", "places"), [(1, [(0, 2, 0, 1, 1), (1, 2, 0, 1, 0)]), (2, [(0, 1, 0, 2, 1), (0, 1, 1, 2, 0)])]
)
def test_a_rank_knows_its_place(ranks: Pools, sep: int, places: list[tuple[int, ...]]) -> None:
    assert ranks(2).run(_place, sep) == places


@pytest.mark.parametrize("name", ["SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"])
def test_other_launchers_say_which_gpu_is_whose(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that starts with srun or mpirun sets RANK and WORLD_SIZE, and forgets LOCAL_RANK."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "1")
    assert place_in_world() == (0, 1, 0)  # of a plain start, in an allocation, say
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert place_in_world() == (5, 8, 1)
    assert not first_on_node()
    monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigError, match=f"environment variable {name}='x' must be a whole number"):
        place_in_world()
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun's counts
    assert place_in_world() == (5, 8, 0)


@pytest.mark.parametrize(("name", "alone"), [
    *((name, 1) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")),
    *((name, 0) for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK")),
])  # fmt: skip
def test_processes_that_torchrun_has_not_started_do_not_train_apart(
    name: str, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, str(alone))
    assert place_in_world() == (0, 1, 0)
    monkeypatch.setenv(name, str(alone + 1))
    text = rf"{name}={alone + 1}, but RANK is not set: .* start one per node, which runs torchrun"
    with pytest.raises(ConfigError, match=text):
        place_in_world()
    for variable, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(variable, value)
    assert place_in_world() == (3, 4, 1)
