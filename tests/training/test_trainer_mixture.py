"""Mixtures, documents and packing in training: the same on every layout, resumed exactly, and told in the log."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, losses, train, user_error
from tinytron.data import write_shard
from tinytron.training import Config, Trainer, datasets

Pools = Callable[[int], Ranks]


def text(folder: Path, tokens: int, low: int, high: int, name: str = "train_000000", seed: int = 1) -> None:
    """Documents of 3 to 20 tokens in ``low .. high - 1``; token 0 before each, and its offset in the .docs file."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    values = random.integers(low, high, tokens)
    starts = np.concatenate([[0], np.cumsum(random.integers(3, 21, tokens))])
    starts = starts[starts < tokens]
    values[starts] = 0
    write_shard(folder / f"{name}.bin", values)
    write_shard(folder / f"{name}.docs", starts, np.uint32)


def mixture(folder: Path, sources: Any = (("web", 2, {}), ("code", 1, {})), **more: Any) -> Path:
    """A mixture of sources that use different halves of the vocabulary."""
    for name, low, high in (("web", 1, 31), ("code", 31, 61)):
        if not (folder / name).exists():
            text(folder / name, 3001, low, high)
            text(folder / name, 301, low, high, "val_000000", seed=2)
    listed = [{"name": n, "path": n, **({} if w is None else {"weight": w}), **caps} for n, w, caps in sources]
    (folder / "mix.json").write_text(json.dumps({"sources": listed, **more}))
    return folder / "mix.json"


FLAGS = ("--no-use_mock_data", "--lr_schedule", "constant", "--log_every", 2, "--max_steps", 6)


def run_of(ranks: Pools, world: int, path: Path, log_dir: Path, *flags: object) -> Run:
    run: Run = ranks(world).run(train, Trainer, log_dir, *FLAGS, "--dataset_path", path, *flags)[0]
    return run


def test_the_log_tells_what_every_source_gives(ranks: Pools, tmp_path: Path) -> None:
    path = mixture(tmp_path)
    run = run_of(ranks, 1, path, tmp_path / "log", "--log_every", 1, "--do_val")
    steps = [record for record in run.records if record["stage"] == "train"]
    for record in steps:
        parts = record["sources"].values()
        assert sum(part["targets"] for part in parts) == 96
        mean = sum(part["loss"] * part["targets"] for part in parts) / 96
        assert record["loss"] == pytest.approx(mean, rel=1e-6)
        assert sum(part["tokens_seen"] for part in parts) == 96 * record["step"]
    seen = {
        name: sum(record["sources"].get(name, {"targets": 0})["targets"] for record in steps)
        for name in ("web", "code")
    }
    assert seen == {name: part["tokens_seen"] for name, part in steps[-1]["sources"].items()}
    assert seen["web"] > seen["code"] > 0
    val = run.records[-1]
    assert val["stage"] == "val"
    assert {name: part["targets"] for name, part in val["sources"].items()} == {"web": 300, "code": 300}
    mean = sum(part["loss"] / 2 for part in val["sources"].values())
    assert val["loss"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(("world", "flags"), [(2, ()), (4, ("--sep_size", 2)), (1, ("--num_workers", 2))])
def test_a_mixture_is_the_same_on_every_layout(
    ranks: Pools, tmp_path: Path, world: int, flags: tuple[object, ...]
) -> None:
    path = mixture(tmp_path)
    one, other = run_of(ranks, 1, path, tmp_path / "one"), run_of(ranks, world, path, tmp_path / "other", *flags)
    assert losses(other.log) == pytest.approx(losses(one.log), rel=1e-5)
    for ours, theirs in zip(other.records, one.records, strict=True):
        for name, part in theirs.get("sources", {}).items():
            assert ours["sources"][name] == pytest.approx(part, rel=1e-5)


STAGES = {"stages": [{"tokens": 240, "weights": {"web": 1}}, {"weights": {"web": 1, "code": 3}}]}


def test_a_mixture_goes_on_where_it_was(ranks: Pools, tmp_path: Path) -> None:
    """The stage changes inside the third step."""
    path = mixture(tmp_path, (("web", None, {}), ("code", None, {})), **STAGES)
    whole = run_of(ranks, 2, path, tmp_path / "whole")
    for steps in (2, 6):
        part = run_of(ranks, 2, path, tmp_path / "part", "--max_steps", steps)
    assert part.log == whole.log
    first = next(record for record in whole.records if "sources" in record)
    assert set(first["sources"]) == {"web"}
    assert whole.records[-1]["sources"]["code"]["tokens_seen"] > whole.records[-1]["sources"]["web"]["tokens_seen"] / 2


def test_what_is_still_to_come_of_a_mixture_may_be_changed(ranks: Pools, tmp_path: Path) -> None:
    sources = (("web", None, {}), ("code", None, {}))
    path = mixture(tmp_path, sources, **STAGES)
    run_of(ranks, 1, path, tmp_path / "log", "--max_steps", 2)
    later = {"stages": [STAGES["stages"][0], {"weights": {"web": 1, "code": 1}}]}
    assert run_of(ranks, 1, mixture(tmp_path, sources, **later), tmp_path / "log", "--max_steps", 4).step == 4
    earlier = {"stages": [{"tokens": 240, "weights": {"code": 1}}, STAGES["stages"][1]]}
    path = mixture(tmp_path, sources, **earlier)
    (error,) = ranks(1).run(user_error, Trainer, tmp_path / "log", *FLAGS, "--dataset_path", path)
    assert error.startswith("CheckpointError: ")
    assert "was trained on other data (mixture:" in error


@pytest.mark.parametrize(
    ("sources", "text"),
    [
        (
            (("web", 1, {"max_tokens": 120}),),
            "the mixture ends after 120 tokens, when web (all",
        ),
        ((("web", 1, {"max_epochs": 0.001}),), "max_epochs 0.001 of 250 samples is less than one sample"),
        ((("web", 0, {}),), "sources[0].weight"),
        ((("other", 1, {}),), "has no train_*.bin"),
    ],
)
def test_a_mixture_that_cannot_feed_the_run_is_one_error(ranks: Pools, tmp_path: Path, sources: Any, text: str) -> None:
    path = mixture(tmp_path, sources)
    (tmp_path / "other").mkdir()
    for error in ranks(2).run(user_error, Trainer, tmp_path / "log", *FLAGS, "--dataset_path", path):
        assert text in error
        assert "\n" not in error


@pytest.mark.parametrize("flags", [(), ("--num_workers", 2)])
def test_a_mixture_may_be_used_up_to_its_last_sample(ranks: Pools, tmp_path: Path, flags: tuple[object, ...]) -> None:
    """SampleOptions ahead stops there."""
    path = mixture(tmp_path, (("web", 2, {"max_tokens": 288}), ("code", 1, {"max_tokens": 288})))
    run = run_of(ranks, 2, path, tmp_path / "log", *flags)
    assert run.step == 6
    assert {part["tokens_seen"] for part in run.records[-1]["sources"].values()} == {288}


def test_a_mixture_is_not_cut_for_validation(ranks: Pools, tmp_path: Path) -> None:
    path = mixture(tmp_path)
    for name in ("web", "code"):
        (tmp_path / name / "val_000000.bin").unlink()
    (error,) = ranks(1).run(user_error, Trainer, tmp_path / "log", *FLAGS, "--dataset_path", path, "--do_val")
    assert (
        "need validation data, but MixtureDataset cannot be split; set val_dataset (for token shards: tokenize" in error
    )


# Documents and packing.


PACKED = ("--document_mask", "--no-cross_document_loss", "--packing", "best_fit")


@pytest.mark.parametrize("flags", [PACKED[:1], PACKED], ids=["masks", "packed"])
@pytest.mark.parametrize(("world", "layout"), [(2, ("--sep_size", 2)), (4, ("--sep_size", 2))])
@pytest.mark.sample(3)
def test_documents_are_the_same_on_every_layout(
    ranks: Pools, tmp_path: Path, world: int, layout: tuple[object, ...], flags: tuple[object, ...]
) -> None:
    text(tmp_path / "data", 3001, 1, 61)
    one = run_of(ranks, 1, tmp_path / "data", tmp_path / "one", *flags)
    other = run_of(ranks, world, tmp_path / "data", tmp_path / "other", *flags, *layout)
    assert losses(other.log) == pytest.approx(losses(one.log), rel=1e-5)
    plain = run_of(ranks, 1, tmp_path / "data", tmp_path / "plain")
    assert losses(plain.log) != pytest.approx(losses(one.log), rel=1e-3)


def test_the_packing_is_kept_beside_the_shards(ranks: Pools, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text(tmp_path / "data", 3001, 1, 61)
    run_of(ranks, 2, tmp_path / "data", tmp_path / "log", *PACKED)
    assert (tmp_path / "data" / "train_000000.pack12").exists()


def test_documents_that_nothing_tells_are_one_error(ranks: Pools, tmp_path: Path) -> None:
    text(tmp_path / "data", 3001, 1, 61)
    (tmp_path / "data" / "train_000000.docs").unlink()
    path = tmp_path / "data"
    for error in ranks(2).run(user_error, Trainer, tmp_path / "log", *FLAGS, "--dataset_path", path, *PACKED):
        assert "it is unknown where documents begin" in error
        assert "--eot_id" in error
    assert run_of(ranks, 2, path, tmp_path / "log", *PACKED, "--eot_id", 0).step == 6


def test_files_without_a_header_are_read_as_the_type_that_is_given(ranks: Pools, tmp_path: Path) -> None:
    text(tmp_path / "data", 3001, 1, 61)
    tokens = np.fromfile(tmp_path / "data" / "train_000000.bin", "<u2")[512:]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train.bin").write_bytes(tokens.astype("<u4").tobytes())
    (error,) = ranks(1).run(user_error, Trainer, tmp_path / "log", *FLAGS, "--dataset_path", tmp_path / "raw")
    assert "train.bin: magic number" in error
    one = run_of(ranks, 1, tmp_path / "data", tmp_path / "one")
    raw = run_of(ranks, 1, tmp_path / "raw", tmp_path / "two", "--token_dtype", "uint32")
    assert raw.log == one.log


class OfItsOwnNode(Trainer):
    """As on nodes that share no folder: every rank has a folder of its own, and is the first of its node."""

    def _init_dataset(self, config: Config) -> None:
        path = f"{config.data.dataset_path}/{self.state.rank}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datasets, "first_on_node", lambda: True)
            super()._init_dataset(replace(config, data=replace(config.data, dataset_path=path)))


def test_nodes_may_have_folders_of_their_own(ranks: Pools, tmp_path: Path) -> None:
    for rank in range(2):
        for number in range(2):
            text(tmp_path / str(rank), 901, 1, 61, seed=number, name=f"train_{number:06d}")
    run = ranks(2).run(train, OfItsOwnNode, tmp_path / "log", *FLAGS, "--dataset_path", tmp_path, *PACKED)[0]
    assert run.step == 6
    assert len([*tmp_path.glob("*/*.pack12")]) == 4


def test_nodes_must_have_the_same_shards(ranks: Pools, tmp_path: Path) -> None:
    for rank, tokens in enumerate((901, 900)):
        text(tmp_path / str(rank), tokens, 1, 61)
    for error in ranks(2).run(user_error, OfItsOwnNode, tmp_path / "log", *FLAGS, "--dataset_path", tmp_path):
        assert "has different train shards on some nodes; copy the same ones to all" in error
