"""``--ema_decay``: averaged weights are validated, exported and continued; training is what it is without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import train
from tests.helpers.stopping import run_until, whole
from tinytron.checkpoint import CheckpointFiles
from tinytron.checkpoint.model import averages_of, saved_model
from tinytron.checkpoint.tools import consolidate
from tinytron.cli.export import main
from tinytron.errors import CheckpointError, ConfigError
from tinytron.interop.weights import HFWeights
from tinytron.training import Trainer

Pools = Callable[[int], Ranks]
RUN: tuple[object, ...] = ("--max_steps", 4, "--do_val", "--val_every_steps", 2, "--log_every", 1)
AVERAGED: tuple[object, ...] = (*RUN, "--ema_decay", 0.6)


class Averaged(Trainer):
    """After training, the validation loss of the averages as weights of their own."""

    def report(self) -> float:
        before = {name: weight.clone() for name, weight in self.raw_model.state_dict().items()}
        with self.optimizer.averaged():
            averages = {name: weight.clone() for name, weight in self.raw_model.state_dict().items()}
        assert all(torch.equal(weight, before[name]) for name, weight in self.raw_model.state_dict().items())
        assert any(not torch.equal(weight, before[name]) for name, weight in averages.items())
        self.raw_model.load_state_dict(averages)
        return self.evals.validate(9, self.model, self._loss, self._normalizer, self.data.validation())[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2])
def test_the_averages_are_validated_and_training_is_not_disturbed(
    ranks: Pools, tmp_path: Path, world: int, precision: str
) -> None:
    flags = ("--precision", precision, "--sep_size", world)
    plain = ranks(world).run(train, Trainer, tmp_path / "plain", *RUN, *flags)[0]
    result = ranks(world).run(train, Averaged, tmp_path / "averaged", *AVERAGED, *flags)[0]
    assert result.log == plain.log
    validated = [record for record in result.records if record["stage"] == "val"]
    assert [record["step"] for record in validated] == [2, 4]
    assert validated[1]["ema_loss"] == pytest.approx(result.extra, rel=1e-6)
    assert validated[1]["ema_loss"] != validated[1]["loss"]
    assert not any("ema_loss" in record for record in plain.records)


def test_averages_begin_with_the_flag_and_end_without_it(ranks: Pools, tmp_path: Path) -> None:
    """A run that continues another one's checkpoint by ``--resume_path`` starts averages, or drops those in the file."""
    without = ranks(2).run(run_until, tmp_path / "a", 0, *RUN, "--max_steps", 2)[0]
    flags = ("--resume_path", without.folder, "--max_steps", 3)
    began = ranks(2).run(run_until, tmp_path / "b", 0, *AVERAGED, *flags)
    state = whole(began)
    names = {key.removesuffix("/ema") for key in state if key.endswith("/ema")}
    assert names == {key.removesuffix("/main") for key in state if key.endswith("/main")}
    for name in names:  # after one step
        assert (state[f"{name}/ema"] == state[f"{name}/main"]).all()
    ended = ranks(2).run(run_until, tmp_path / "c", 0, *RUN, "--resume_path", began[0].folder, "--max_steps", 4)
    assert not any(key.endswith("/ema") for key in whole(ended))


@pytest.fixture(scope="module")
def run(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with averages and an untied head, made once; not to be changed."""
    flags = (*AVERAGED, "--no-tied_lm_head", "--precision", "bf16")
    return ranks(2).run(run_until, tmp_path_factory.mktemp("averages"), 0, *flags)[0].folder


def test_the_averages_are_exported(run: Path, tmp_path: Path) -> None:
    content = torch.load(consolidate(CheckpointFiles(run, 4), tmp_path / "whole.pt"), weights_only=True)
    main(["--checkpoint", str(run), "--out", str(tmp_path / "averaged"), "--ema"])
    main(["--checkpoint", str(run), "--out", str(tmp_path / "last")])
    averaged, last = HFWeights(tmp_path / "averaged"), HFWeights(tmp_path / "last")
    for theirs, ours in (("model.embed_tokens.weight", "wte.weight"), ("lm_head.weight", "lm_head.weight")):
        assert torch.equal(averaged.get(theirs), content["optimizer"][ours]["ema"].bfloat16())
        assert not torch.equal(averaged.get(theirs), last.get(theirs))


def test_a_tied_head_stays_tied(ranks: Pools, tmp_path: Path) -> None:
    folder = ranks(1).run(run_until, tmp_path, 0, *AVERAGED)[0].folder
    saved = saved_model(folder)
    weights = saved.weights()
    averages = averages_of(saved)
    assert averages.keys() == weights.keys()
    for name, weight in averages.items():
        assert not torch.equal(weight, weights[name]), name
    assert averages["lm_head.weight"] is averages["wte.weight"]


def test_what_has_no_averages_says_so(ranks: Pools, run: Path, tmp_path: Path) -> None:
    plain = ranks(1).run(run_until, tmp_path / "plain", 0, *RUN)[0].folder
    for source in (plain, consolidate(CheckpointFiles(run, 4), tmp_path / "whole.pt")):
        with pytest.raises(CheckpointError, match=r"has no averaged weights next to it; use .* or drop --ema"):
            main(["--checkpoint", str(source), "--out", str(tmp_path / "out"), "--ema"])
    with pytest.raises(ConfigError, match=r"--ema writes folders, and --gguf f16 a file; export a folder"):
        main(["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--ema", "--gguf", "f16"])
    assert not (tmp_path / "out").exists()
