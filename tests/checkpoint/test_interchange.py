"""Checkpoints of compiled and eager models, of ZeRO on and off, of bf16 and fp32 load into each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Run, config_of, losses
from tests.helpers.stopping import owned, run_until, said_until, whole
from tinytron.training import Trainer

Pools = Callable[[int], Ranks]
FLAGS: tuple[object, ...] = ("--save_every_steps", 2, "--log_every", 1, "--lr_schedule", "constant")
WAYS: dict[str, tuple[object, ...]] = {
    "eager": (),
    "compiled": ("--use_compile",),
    "replicated": ("--no-use_distributed_optimizer",),
    "bf16": ("--precision", "bf16"),
}
PAIRS = [("eager", "compiled"), ("eager", "replicated"), ("eager", "bf16"), ("bf16", "replicated")]


def _loaded(log_dir: Path, *flags: object) -> Run:
    """A trainer that resumed and did no step."""
    trainer = Trainer(config_of(*TINY, "--log_dir", log_dir, *flags))
    return Run(trainer.log_dir, trainer.step, "", [], owned(trainer))


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        *(pytest.param(*p, marks=pytest.mark.slow if "compiled" in p else ()) for p in PAIRS),
        *(pytest.param(b, a, marks=pytest.mark.slow if "compiled" in (a, b) else ()) for a, b in PAIRS),
    ],
)
@pytest.mark.sample(3)
def test_each_loads_the_others_checkpoints(ranks: Pools, tmp_path: Path, saved_by: str, loaded_by: str) -> None:
    first = ranks(2).run(run_until, tmp_path, 0, *FLAGS, "--max_steps", 2, *WAYS[saved_by])
    load = (*FLAGS, *WAYS[loaded_by], "--resume_path", first[0].folder)  # the precision is in a folder's name
    loaded = ranks(2).run(_loaded, tmp_path, *load, "--max_steps", 2)
    mine, theirs = whole(loaded), whole(first)
    assert mine.keys() == theirs.keys()
    for key, values in theirs.items():
        np.testing.assert_array_equal(mine[key], values, err_msg=key)
    result, said = ranks(2).run(said_until, tmp_path, 0, *load, "--max_steps", 4)[0]
    assert "resuming after step 2" in said
    if "bf16" in (saved_by, loaded_by):
        precisions = ("bf16", "fp32") if saved_by == "bf16" else ("fp32", "bf16")
        assert "changed since the checkpoint: train.precision: {} in the checkpoint, {} now".format(*precisions) in said
    unbroken = ranks(2).run(run_until, tmp_path / "unbroken", 0, *FLAGS, "--max_steps", 4, *WAYS[loaded_by])[0]
    mine_losses, theirs_losses = losses(result.log), losses(unbroken.log)
    tolerance = 0.01 if "bf16" in (saved_by, loaded_by) else 1e-5
    assert {3, 4} <= mine_losses.keys()
    assert mine_losses == pytest.approx({step: theirs_losses[step] for step in mine_losses}, rel=tolerance)
    weights = torch.load(result.folder / "00004_model.pt", weights_only=True)
    assert not [name for name in weights if "_orig_mod" in name or name.startswith("module.")]
