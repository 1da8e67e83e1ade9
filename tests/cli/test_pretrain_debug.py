"""The documented commands, shrunk, with plain python and under the launchers."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import TINY, Finished, finish, losses, run_ranks, run_well, start

GOLDEN = [
    *("--exp_name", "debug_test", "--use_mock_data", "--mock_data_num_samples", "64", "--total_batch_size", "2048"),
    *("--batch_size", "2", "--seq_len", "128", "--num_layer", "2", "--num_attention_heads", "8"),
    *("--num_key_value_heads", "4", "--hidden_size", "128", "--intermediate_size", "256", "--vocab_size", "512"),
    *("--sep_size", "1", "--max_epochs", "1", "--debug"),
]
SMALL = [str(flag) for flag in TINY]
NO_DATA_FLAG = [flag for flag in SMALL if flag != "--use_mock_data"]
VALIDATED = [*SMALL, "--max_epochs", "2", "--do_val", "--val_every_steps", "3"]
RUNS: dict[str, tuple[list[str], int]] = {
    "golden": (GOLDEN, 1),
    "golden on 2": (GOLDEN, 2),
    "world 1": (VALIDATED, 1),
    "world 2": (VALIDATED, 2),
    "world 4": (VALIDATED, 4),
    "replicated": ([*VALIDATED, "--no-use_distributed_optimizer", "--bucket_size_mb", "0.002"], 2),
    "other micro-batch": ([*VALIDATED, "--batch_size", "1"], 2),
    "workers": ([*VALIDATED, "--num_workers", "2"], 1),
    "profiler": ([*SMALL, "--use_profiler", "--steps_to_profile", "2", "3"], 1),
    "profiler, short run": ([*SMALL, "--use_profiler", "--steps_to_profile", "15", "20"], 1),
    "profiler, first step": ([*SMALL, "--use_profiler", "--steps_to_profile", "1", "1"], 2),
    "print_config": ([*SMALL, "--print_config"], 1),
    "dry_run": ([*SMALL, "--dry_run"], 2),
    "help": (["--help-all"], 1),
    "no data given": ([*NO_DATA_FLAG, "--debug"], 1),
}

SLOW = ("world 4", "profiler, short run", "replicated", "other micro-batch", "profiler, first step")


def _some(names: Iterable[str]) -> list[Any]:
    """``names`` as parameters, of which those in ``SLOW`` are marked so."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Finished, Path]]:
    """Result and working directory of every run that the selected tests look at."""
    here = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params.get("name") for item in here if hasattr(item, "callspec")}
    chosen = [name for name in RUNS if name not in SLOW or name in asked]
    places = {name: tmp_path_factory.mktemp("run") for name in chosen}
    return {name: (run_ranks(*RUNS[name][0], cwd=place, world=RUNS[name][1]), place) for name, place in places.items()}


def _log(place: Path) -> str:
    (path,) = place.glob("log/*/log.txt")
    return path.read_text()


@pytest.mark.parametrize("name", _some(RUNS))
def test_the_run_succeeds_quietly(runs: dict[str, tuple[Finished, Path]], name: str) -> None:
    result, _ = runs[name]
    assert result.code == 0, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stderr == "" or name.startswith("profiler")  # torch's profiler has remarks of its own
    printed = [line for line in result.stdout.splitlines() if not line.startswith("step")]
    assert name in ("help", "print_config", "dry_run") or len(printed) == len(set(printed)), (
        "only one process may print"
    )


@pytest.mark.parametrize("name", ["golden", "golden on 2"])
def test_the_golden_command_trains_four_steps(runs: dict[str, tuple[Finished, Path]], name: str) -> None:
    result, place = runs[name]
    assert list(losses(_log(place))) == [1, 2, 3, 4]
    assert losses(_log(place))[1] == pytest.approx(6.24, abs=0.05)  # about ln 512
    assert "warm-up cut" not in result.stdout  # the default fits the run; no flag was given
    assert {p.name for p in place.glob("log/debug_test_*/*")} == {
        *("config.json", "log.txt", "log.jsonl", "messages.jsonl", ".lock")
    }


@pytest.mark.parametrize("name", _some(["world 2", "world 4", "replicated", "other micro-batch"]))
def test_every_layout_logs_the_same(runs: dict[str, tuple[Finished, Path]], name: str) -> None:
    (_, one), (_, other) = runs["world 1"], runs[name]
    for stage, steps in (("train", [1, 2, 3, 4, 5, 6, 7, 8]), ("val", [3, 6, 8])):
        assert losses(_log(other), stage) == pytest.approx(losses(_log(one), stage), rel=1e-5)
        assert list(losses(_log(other), stage)) == steps
    assert [p.name for p in one.glob("log/*")] == [p.name for p in other.glob("log/*")]  # one folder for all layouts


def test_loader_processes_change_nothing(runs: dict[str, tuple[Finished, Path]]) -> None:
    assert _log(runs["workers"][1]) == _log(runs["world 1"][1])


@pytest.mark.parametrize(
    ("name", "note", "steps"),
    [
        ("profiler", "profiling steps 2 to 3", 2),
        pytest.param("profiler, short run", "profiling steps 1 to 4: the run has only 4", 4, marks=pytest.mark.slow),
        pytest.param("profiler, first step", "profiling steps 1 to 1", 1, marks=pytest.mark.slow),
    ],
)
def test_the_profiler_writes_a_trace_of_its_steps(
    runs: dict[str, tuple[Finished, Path]], name: str, note: str, steps: int
) -> None:
    result, place = runs[name]
    assert note in result.stdout
    traces = sorted(place.glob("log/*/rank*_trace.json"))
    assert [p.name for p in traces] == [f"rank{rank}_trace.json" for rank in range(RUNS[name][1])]
    for path in traces:
        events = json.loads(path.read_text())["traceEvents"]
        assert sum(str(event.get("name", "")).startswith("ProfilerStep#") for event in events) == steps
        assert any("aten::mm" in str(event.get("name", "")) for event in events)


def test_print_config_prints_and_does_nothing_else(runs: dict[str, tuple[Finished, Path]]) -> None:
    result, place = runs["print_config"]
    shown = json.loads(result.stdout)
    assert shown["train"]["seq_len"] == 12
    assert shown["logging"]["exp_name"] == "tiny"
    assert list(place.iterdir()) == []
    (made,) = runs["world 1"][1].glob("log/*/config.json")
    assert json.loads(made.read_text())["config"]["train"]["seq_len"] == 12
    assert made.parent.name == f"tiny_{json.loads(made.read_text())['config_hash']}"


def test_dry_run_plans_the_launched_world_once_and_does_nothing_else(runs: dict[str, tuple[Finished, Path]]) -> None:
    result, place = runs["dry_run"]
    assert result.stdout.count("2 x cpu = dp 2 x sep 1") == 1
    assert "| **forward and backward** |" in result.stdout
    assert list(place.iterdir()) == []


def test_help_names_every_documented_flag(runs: dict[str, tuple[Finished, Path]]) -> None:
    text = runs["help"][0].stdout
    for flag in (flag for flag in GOLDEN if flag.startswith("--")):
        assert re.search(rf"^  --(\[no-\])?{flag[2:]}\b", text, re.MULTILINE), flag  # booleans are --[no-]flag


def test_without_a_data_flag_it_says_that_the_data_is_mock(runs: dict[str, tuple[Finished, Path]]) -> None:
    result, place = runs["no data given"]
    assert "no --dataset_path given: training on mock data" in result.stdout
    assert len(losses(_log(place))) == 4


# Under real launchers.


@pytest.mark.slow
def test_our_launcher(runs: dict[str, tuple[Finished, Path]], tmp_path: Path) -> None:
    finished = run_well(*VALIDATED, cwd=tmp_path, processes=2)
    assert finished.stderr == ""
    assert _log(tmp_path) == _log(runs["world 2"][1])


@pytest.mark.slow
def test_torchrun_itself(runs: dict[str, tuple[Finished, Path]], tmp_path: Path) -> None:
    run_well(*VALIDATED, cwd=tmp_path, processes=2, launcher="torch.distributed.run")
    assert _log(tmp_path) == _log(runs["world 2"][1])


@pytest.mark.usefixtures("real_processes")
def test_ctrl_c_saves_and_ends_in_one_line(tmp_path: Path) -> None:
    process = start(*SMALL, "--max_steps", 10**6, "--log_every", 1, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob("log/*/log.txt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    finished = finish(process, timeout=20)
    assert finished.code == 130
    heard = r"Ctrl-C: the run saves and ends after this (step|micro-batch); press Ctrl-C again to end it at once\n"
    assert re.fullmatch(f"({heard})?", finished.stderr)
    last = finished.stdout.splitlines()[-1]
    where = r"step \d+ \| stopped by Ctrl-C(?: in step \d+, which does not count)?"
    assert re.fullmatch(f"{where}: saved; run the same command again to resume", last)
    assert len(list(tmp_path.glob("log/*/*_meta.pt"))) == 1
