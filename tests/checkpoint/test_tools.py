"""``tinytron checkpoint``: what it shows is there, what it calls damaged is, what it deletes was to go."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from tests.helpers.errors import says
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT, TINY, Run, config_of
from tests.helpers.stopping import StoppingTrainer, run_until, whole
from tinytron.checkpoint.files import CheckpointFiles, checksum
from tinytron.checkpoint.load import load_weights, read_file
from tinytron.checkpoint.report import _size
from tinytron.checkpoint.tools import consolidate, covered, problems
from tinytron.cli.main import main
from tinytron.model import GPT
from tinytron.training import Config
from tinytron.utils import progress
from tinytron.utils.lock import lock_folder

Pools = Callable[[int], Ranks]
FLAGS: tuple[object, ...] = ("--max_steps", 4, "--save_every_steps", 1, "--do_val", "--val_every_steps", 2)
EXPERTS: tuple[object, ...] = (
    *("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8),
    *("--moe_bias_update_rate", 0.1, "--precision", "bf16"),
)
NORM = "final_norm.weight"
MUON: tuple[object, ...] = ("--optimizer", "muon", "--muon_normuon")


@pytest.fixture(scope="module")
def saved(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of 2 ranks with checkpoints 1 to 4, of experts and Muon. Copied by the tests, never changed."""
    flags = (*FLAGS, *EXPERTS, *MUON, "--ep_size", 2)
    folder: Path = ranks(2).run(run_until, tmp_path_factory.mktemp("saved"), 0, *flags)[0].folder
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy, of which nobody holds the lock."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def _forge(files: CheckpointFiles, change: Callable[[dict[str, Any]], None], path: Path | None = None) -> None:
    """Change what ``path`` (default: the metadata) holds; a part gets a checksum to match."""
    meta = read_file(files.meta)
    if path is None:
        change(meta)
    else:
        weights = path == files.model
        content = torch.load(path) if weights else pickle.loads(path.read_bytes())
        change(content if weights else content.state_dict_metadata)
        torch.save(content, path) if weights else path.write_bytes(pickle.dumps(content))
        meta["files"][str(path.relative_to(files.folder))] = checksum(path)
    torch.save(meta, files.meta)


# inspect


def test_inspect_has_a_line_per_checkpoint_and_leftover(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "00001_model.pt").unlink()
    (run / "00002_meta.pt").write_bytes(b"nothing")
    (run / "00003_meta.pt").unlink()
    (run / "00009_model.pt.tmp").write_bytes(b"half")
    assert main(["checkpoint", "inspect", str(run)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["1"].endswith("incomplete: 00001_model.pt missing")
    assert "unreadable: " in lines["2"]
    assert "00002_meta.pt cannot be read" in lines["2"]
    assert lines["4"].split()[1] == "384"
    assert lines["4"].endswith(" 2  complete")
    assert {"00003_model.pt", "00003_opt", "00009_model.pt.tmp"} <= lines.keys()
    assert "3" not in lines

    assert main(["checkpoint", "inspect", "--json", str(run)]) == 0
    told = json.loads(capsys.readouterr().out)
    by_step = {checkpoint["step"]: checkpoint for checkpoint in told["checkpoints"]}
    parts = [run / "00004_model.pt", run / "00004_meta.pt", *(run / "00004_opt").iterdir()]
    assert by_step[4]["bytes_total"] == sum(path.stat().st_size for path in parts)
    assert by_step[4]["bytes_weights"] == parts[0].stat().st_size
    assert by_step[4]["val_loss"] == read_file(run / "00004_meta.pt")["val_loss"] > 0
    assert by_step[4]["bytes_per_parameter"] == by_step[4]["bytes_total"] / by_step[4]["parameters"]
    assert (by_step[4]["world_size"], by_step[2]["world_size"]) == (2, None)
    assert {"name": "00009_model.pt.tmp", "bytes": 4} in told["leftovers"]


@pytest.mark.parametrize("part", ["00004_model.pt", "00004_meta.pt", "00004_opt"])
def test_inspect_tells_all_of_one_checkpoint(saved: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", "--json", str(saved / part)]) == 0
    told = json.loads(capsys.readouterr().out)
    tensors = {tensor["name"]: tensor for tensor in told["tensors"]}
    model = GPT(config_of(*TINY, *EXPERTS).model)
    assert {name: tensor["shape"] for name, tensor in tensors.items()} == {
        name: list(tensor.shape) for name, tensor in model.state_dict().items()
    }
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    assert (told["optimizer"], told["precision"], told["layout"]["ep_size"]) == ("muon", "bf16", 2)
    assert tensors["lm_head.weight"]["tied_to"] == "wte.weight"
    assert tensors["blocks.1.mlp.router.bias"]["states"] == {}
    states = ("main", "momentum_buffer", "second_moment")
    assert tensors["blocks.1.mlp.experts.down_proj"]["states"] == dict.fromkeys(states, "float32")

    assert main(["checkpoint", "inspect", str(saved / part)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "blocks.*.mlp.experts.down_proj 2 4x16x8 bfloat16 main momentum_buffer second_moment (float32)" in text
    assert f"{len(tensors)} tensors, {told['parameters']:,} parameters" in text
    assert "2 ranks, sep 1, ep 2, states sharded" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (1000, "1 kB"), (1023, "1.02 kB"), (1.5e6, "1.5 MB"), (2e9, "2 GB"), (3.25e15, "3,250.0 TB")],
)
def test_sizes_are_in_powers_of_a_thousand(count: float, text: str) -> None:
    assert _size(count) == text


# verify


def test_verify_passes_what_was_written(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(saved)]) == 0
    assert capsys.readouterr().out == "".join(f"checkpoint {step}: ok\n" for step in (1, 2, 3, 4))


@pytest.mark.parametrize("file", ["_model.pt", "_meta.pt", "_opt/.metadata", "_opt/__0_0.distcp", "_opt/__1_0.distcp"])
@pytest.mark.parametrize("damage", [_flip, Path.unlink])
def test_verify_names_the_damaged_file(
    run: Path, file: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / f"00002{file}"
    damage(path)
    whole_folder = file != "_meta.pt" or damage is _flip  # without metadata it is no checkpoint of the folder
    assert main(["checkpoint", "verify", str(run if whole_folder else run / "00002_model.pt")]) == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if not line.endswith(": ok")]
    assert len(bad) == 1
    assert bad[0].startswith(f"checkpoint 2: {path} cannot be read (")
    assert main(["checkpoint", "verify", str(run / "00003_opt")]) == 0


def test_verify_names_every_damaged_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("00004_model.pt", "00004_opt/__0_0.distcp"):
        _flip(run / name)
    assert main(["checkpoint", "verify", str(run / "00004_meta.pt")]) == 1
    said = capsys.readouterr().out
    assert "00004_model.pt cannot be read" in said
    assert "00004_opt/__0_0.distcp cannot be read" in said


def test_verify_wants_every_element_of_every_parameter(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lose_half(entries: dict[str, Any]) -> None:
        entries["wte.weight/exp_avg"].chunks.pop()
        del entries[f"{NORM}/main"]
        entries["blocks.0.mlp.router.weight/main"].size = torch.Size([65])

    def lose_sums(meta: dict[str, Any]) -> None:
        meta["files"] = {name: value for name, value in meta["files"].items() if "_opt" not in name}

    def misshape(meta: dict[str, Any]) -> None:
        meta["parameters"][NORM] = [17]

    for step, change in ((1, lose_half), (2, lose_sums), (3, misshape)):
        files = CheckpointFiles(run, step)
        _forge(files, change, files.optimizer / ".metadata" if change is lose_half else None)
    assert main(["checkpoint", "verify", str(run)]) == 1
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert f"{run / '00001_opt'} has 512 of the 976 elements of wte.weight/exp_avg" in first
    assert f"{run / '00001_opt'} lacks final_norm.weight" in first
    assert f"{run / '00001_opt'} has 64 of the 65 elements of blocks.0.mlp.router.weight/main" in first
    assert f"{run / '00002_opt/__1_0.distcp'} has no checksum in 00002_meta.pt" in second
    assert f"{run / '00003_opt'} has 16 elements of final_norm.weight/main, but the parameter 17" in third
    assert last == "checkpoint 4: ok"


class Frozen(StoppingTrainer):
    """Leaves a weight as it is."""

    def _init_model(self, config: Config) -> None:
        super()._init_model(config)
        self.raw_model.get_parameter(NORM).requires_grad_(False)


def _frozen(log_dir: Path) -> Run:
    return run_until(log_dir, 0, "--max_steps", 1, cls=Frozen)


def test_a_weight_that_is_not_trained_has_no_states_to_miss(ranks: Pools, tmp_path: Path) -> None:
    files = CheckpointFiles(ranks(1).run(_frozen, tmp_path)[0].folder, 1)
    assert problems(files) == []
    content = torch.load(consolidate(files), weights_only=True)
    assert torch.equal(content["model"][NORM], torch.ones(16))
    assert NORM not in content["optimizer"].keys() | content["meta"]["parameters"].keys()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5))))
def test_what_ranks_wrote_twice_counts_once(ranges: list[tuple[int, int]]) -> None:
    chunks = [ChunkStorageMetadata(torch.Size([start]), torch.Size([length])) for start, length in ranges]
    assert covered(chunks) == len({i for start, length in ranges for i in range(start, start + length)})


# consolidate

RECIPES: dict[str, tuple[object, ...]] = {
    "adam": ("--precision", "bf16"),
    "untied": ("--no-tied_lm_head", "--no-use_distributed_optimizer"),
    "experts": (*EXPERTS, "--ep_size", 2),
    "experts_muon": (*EXPERTS, *MUON, "--ep_size", 2),
    "experts_muon_unsharded": (*EXPERTS, *MUON, "--ep_size", 2, "--no-use_distributed_optimizer"),
    "muon_sequence_parallel": (*EXPERTS, *MUON, "--sep_size", 2, "--ep_size", 1),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_consolidated_tensors_are_those_of_the_trainer(
    ranks: Pools, tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--max_steps", 2, *RECIPES[recipe])
    results = ranks(2).run(run_until, tmp_path / "log", 0, *flags)
    folder, expected = results[0].folder, whole(results)
    assert main(["checkpoint", "consolidate", str(folder)]) == 0
    path = folder / "00002_consolidated.pt"
    assert capsys.readouterr().out == f"wrote {path}, {path.stat().st_size:,} bytes\n"
    assert not list(folder.glob("*.tmp"))
    content = torch.load(path, weights_only=True)
    assert (content["step"], content["meta"]["run"]["world_size"]) == (2, 2)

    weights = read_file(folder / "00002_model.pt")
    found = {f"{name}/main": content["model"][name] for name in content["model"] if f"{name}/main" in expected}
    states = {f"{name}/{key}": value for name, states in content["optimizer"].items() for key, value in states.items()}
    assert not found.keys() & states.keys()
    found |= states
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key].dtype == torch.float32
        flat = found[key].reshape(-1).numpy()
        np.testing.assert_array_equal(np.broadcast_to(flat, values.shape) if flat.size == 1 else flat, values, key)
    assert list(content["model"]) == list(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(content["model"][name].to(weight.dtype), weight, rtol=0, atol=0)
    model = GPT(config_of(*TINY, *flags).model)
    load_weights(model, content["model"], str(path))
    tied = content["model"]["lm_head.weight"].data_ptr() == content["model"]["wte.weight"].data_ptr()
    assert tied == (recipe != "untied")


def test_consolidate_writes_where_it_is_told(saved: Path, tmp_path: Path) -> None:
    before = _contents(saved)
    assert main(["checkpoint", "consolidate", str(saved / "00003_opt"), "--out", str(tmp_path / "x.pt")]) == 0
    content = read_file(tmp_path / "x.pt")
    assert content["step"] == content["meta"]["step"] == 3
    assert not {"files", "rng"} & content["meta"].keys()  # of the other files, and of ranks
    assert _contents(saved) == before


def test_consolidate_needs_room(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _contents(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1000, 20_000):  # for a tensor; for the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            assert main(["checkpoint", "consolidate", str(run)]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert capsys.readouterr().err == "error: [Errno 27] File too large\n"
        assert _contents(run) == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda weights: weights.pop(NORM), f"it has states of {NORM}, which 00004_model.pt lacks"),
        (lambda weights: weights.update({NORM: torch.zeros(17)}), f"{NORM}/main and {NORM} differ in size"),
    ],
)
def test_consolidate_refuses_states_of_another_model(
    run: Path, change: Callable[[dict[str, Any]], None], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = CheckpointFiles(run, 4)
    _forge(files, change, files.model)
    assert main(["checkpoint", "consolidate", str(run)]) == 2
    assert capsys.readouterr().err == f"error: {run / '00004_opt'} cannot be read ({expected})\n"


# prune


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (("--keep_last", "1"), [4]),
        (("--keep_last", "0"), [1, 2, 3, 4]),
        (("--keep_last", "1", "--keep_every", "3"), [3, 4]),
        (("--keep_last", "1", "--keep_best"), [2, 4]),
    ],
)
def test_prune_deletes_what_is_not_to_be_kept(
    run: Path, flags: tuple[str, ...], kept: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    _forge(CheckpointFiles(run, 2), lambda meta: meta.update(val_loss=0.5))
    (run / "00002_model.pt.tmp").write_bytes(b"half")
    shutil.copytree(run / "00001_opt", run / "00007_opt")
    before = _contents(run)
    assert main(["checkpoint", "prune", str(run), *flags, "--dry_run"]) == 0
    announced = capsys.readouterr().out
    assert _contents(run) == before
    assert main(["checkpoint", "prune", str(run), *flags]) == 0
    said = capsys.readouterr().out
    after = _contents(run)
    assert {int(name[:5]) for name in after if name[0] == "0"} == set(kept)
    assert after.items() <= before.items()
    freed = sum(map(len, before.values())) - sum(map(len, after.values()))
    gone = "".join(f"removed checkpoint {step}\n" for step in (1, 2, 3, 4) if step not in kept)
    left = "".join(f"removed {name}, left by an interrupted save\n" for name in ("00002_model.pt.tmp", "00007_opt"))
    assert said == f"{gone}{left}{freed:,} bytes freed\n"
    assert announced == said.replace("removed", "would remove").replace("freed", "would be freed")


_held: list[IO[str]] = []  # in a rank


def _hold(folder: Path) -> int:
    _held.append(lock_folder(folder, "never shown"))
    return os.getpid()


def _release() -> None:
    _held.pop().close()


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
def test_prune_is_refused_while_a_run_holds_the_folder(
    ranks: Pools, run: Path, dry: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(run)
    (holder,) = ranks(1).run(_hold, run)
    assert main(["checkpoint", "prune", str(run), "--keep_last", "1", *dry]) == 2
    ranks(1).run(_release)
    said = capsys.readouterr().err
    assert said.startswith(f"error: run folder {run} is in use by process {holder} on ")
    assert said.endswith("; stop it, or let it prune with --keep_last\n")
    assert _contents(run) == before
    assert main(["checkpoint", "prune", str(run), "--keep_last", "1", *dry]) == 0


def test_prune_keeps_all_while_the_newest_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _flip(run / "00004_opt/__1_0.distcp")
    before = _contents(run)
    assert main(["checkpoint", "prune", str(run), "--keep_last", "1"]) == 2
    assert "; nothing is deleted while the newest checkpoint is damaged" in capsys.readouterr().err
    assert _contents(run) == before


# Errors.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "... COMMAND; see --help"),
        (["inspct", "."], "argument COMMAND: invalid choice: 'inspct'"),
        (["prune", "RUN"], "... --keep_last; see --help"),
        (["prune", "RUN", "--keep_last", "-1"], "--keep_last -1 must be at least 0"),
        (["prune", "RUN", "--keep_last", "1", "--keep_every", "-1"], "--keep_every -1 must be at least 0"),
        (["prune", "EMPTY", "--keep_last", "1"], "EMPTY holds no checkpoint; ... log/<run>"),
        (
            ["prune", "RUN/00004_model.pt", "--keep_last", "1"],
            "RUN/00004_model.pt holds no checkpoint; ... run folder",
        ),
        (["inspect", "EMPTY"], "EMPTY holds no checkpoint"),
        (["verify", "EMPTY"], "EMPTY holds no checkpoint"),
        (["consolidate", "EMPTY"], "EMPTY holds no checkpoint"),
        (
            ["consolidate", "RUN", "--out", "EMPTY/00004_model.pt"],
            "--out EMPTY/00004_model.pt ... part of a checkpoint",
        ),
        (["consolidate", "RUN", "--out", "EMPTY/no/x"], "[Errno 2] No such file or directory"),
        (["consolidate", "RUN/00002_meta.pt"], "RUN/00002_model.pt cannot be read (it has"),
        (["inspect", "RUN/00003_meta.pt"], "RUN/00003_model.pt cannot be read ("),
        (
            ["verify", "RUN/00009_model.pt"],
            "RUN/00009_model.pt ... neither ... log/<run>",
        ),
        (
            ["inspect", "RUN/config.json"],
            "RUN/config.json ... neither ... log/<run>",
        ),
    ],
)
def test_an_error_is_one_line(
    run: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = run / "empty"
    empty.mkdir()
    for step in (2, 3):
        (run / f"0000{step}_model.pt").write_bytes(b"nothing")
    fill = lambda text: text.replace("RUN", str(run)).replace("EMPTY", str(empty))  # noqa: E731
    assert main(["checkpoint", *map(fill, arguments)]) == 2
    said = capsys.readouterr().err
    assert re.search(says(f"error: {fill(expected)} ..."), said, re.DOTALL), said
    assert said.count("\n") == 1


def test_long_verification_shows_its_progress(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", -1.0)
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert re.search(r"^verifying checkpoint \d+: .* left$", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.slow
def test_the_command_ends_with_the_status(run: Path) -> None:
    _flip(run / "00002_model.pt")
    arguments = [("verify", run / "00004_opt"), ("verify", run), ("verify", run / "nothing"), ("prune", "--help")]
    command = [sys.executable, "-m", "tinytron", "checkpoint"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([*command, *a], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for a in arguments
    ]
    ended = [(*process.communicate(timeout=60), process.returncode) for process in started]
    assert [code for _, _, code in ended] == [0, 1, 2, 0]
    assert ended[0][:2] == ("checkpoint 4: ok\n", "")
    assert "00002_model.pt cannot be read" in ended[1][0]
    assert ended[2][1].startswith("error: ")
    assert "--dry_run" in ended[3][0]
