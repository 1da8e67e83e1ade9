"""Two stages with a KL penalty: the steps of the formula written out in torch, on every layout, also when continued."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, config_of, losses, read_logs, whole_weights
from tests.training.test_contrastive import MOE
from tinytron.checkpoint.load import read_file
from tinytron.config import configuration
from tinytron.data import MockDataset
from tinytron.errors import TinytronError
from tinytron.model import GPT
from tinytron.training import Config
from tinytron.training.kl_divergence import KLDivergenceTrainer, KLDivergenceTrainerConfig

Pools = Callable[[int], Ranks]
ROWS, S, STEPS, BOUNDARY, LR, BETA = 8, 12, 5, 2, 0.05, 0.7
FLAGS: tuple[object, ...] = (
    *("--exp_name", "kl", "--precision", "fp64", "--seq_len", S, "--batch_size", 2, "--total_batch_size", ROWS * S),
    *("--max_steps", STEPS, "--max_lr", LR, "--lr_schedule", "constant", "--warmup_steps", 0, "--log_every", 1),
    *("--grad_clip_value", 0, "--vocab_size", 61, "--num_layer", 2, "--num_attention_heads", 4, "--hidden_size", 16),
    *("--num_key_value_heads", 2, "--intermediate_size", 24, "--init_std", 0.1, "--max_epochs", STEPS),
)
LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {
    "one": (1, ()),
    "dp 2, recomputed": (2, ("--recompute", "full")),
    "sep 2": (2, ("--sep_size", 2)),
    "dp 2 x sep 2, no ZeRO": (4, ("--sep_size", 2, "--no-use_distributed_optimizer")),
    "experts": (1, MOE),
    "experts, ep 2": (2, (*MOE, "--ep_size", 2)),
}


class Stages(KLDivergenceTrainer[KLDivergenceTrainerConfig, GPT]):
    """All samples are one global batch."""

    def _init_data(self, spec: Config) -> None:
        self.train_dataset = MockDataset(ROWS, S, 61, seed=3)
        self.val_dataset = MockDataset(3, S, 61, seed=4)


def run(log_dir: Path, *flags: object, stage_tokens: int = BOUNDARY * ROWS * S - 1, beta: float = BETA) -> Run:
    """Train. A job for the pool."""
    tree = {"training": {"stage_tokens": stage_tokens}, "optimization": {"kl": {"beta": beta}}}
    with configuration(tree):
        trainer = Stages(config_of(*FLAGS, "--log_dir", log_dir, *flags))
    trainer.train()
    assert trainer._frozen_models(trainer.config) == (trainer.config.model,)
    weights = whole_weights(trainer)
    log, records = read_logs(trainer.log_dir) if trainer.master_process else ("", [])
    return Run(trainer.log_dir, trainer.step, log, records, weights)


def twin(flags: tuple[object, ...] = ()) -> tuple[list[tuple[float, float]], GPT, GPT]:
    """The same steps from whole logits: losses and divergences, the model, and the reference."""
    config = config_of(*FLAGS, *flags)
    model = reference = GPT(config.model, dtype=torch.float64, seed=config.seed.seed)
    decays = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    samples = [MockDataset(ROWS, S, 61, seed=3)[i] for i in range(ROWS)]
    ids, labels = (torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels"))
    found = []
    for step in range(STEPS):
        if step == BOUNDARY:
            reference = copy.deepcopy(model)
        logits: Any = model(ids)
        log_p = F.log_softmax(logits, -1)
        loss = F.nll_loss(log_p.flatten(0, 1), labels.flatten())
        kl = torch.zeros((), dtype=torch.float64)
        if step >= BOUNDARY:
            with torch.no_grad():
                other: Any = reference(ids)
            kl = (log_p.exp() * (log_p - F.log_softmax(other, -1))).sum(-1).mean()
        found.append((float(loss.detach()), float(kl.detach())))
        (loss + BETA * kl).backward()
        optimizer.step()
        optimizer.zero_grad()
    return found, model, reference


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.sample(4)
def test_steps_are_those_of_the_formula(ranks: Pools, tmp_path: Path, layout: str) -> None:
    world, flags = LAYOUTS[layout]
    expected, model, reference = twin(flags if "experts" in layout else ())
    result = ranks(world).run(run, tmp_path, *flags)[0]
    records = [record for record in result.records if record["stage"] == "train"]
    assert [record["loss"] for record in records] == pytest.approx([loss for loss, _ in expected], rel=1e-9)
    assert [record.get("kl") for record in records[:BOUNDARY]] == [None] * BOUNDARY
    found = [record["kl"] for record in records[BOUNDARY:]]
    assert found == pytest.approx([kl for _, kl in expected[BOUNDARY:]], rel=1e-7, abs=1e-12)
    assert 0 <= found[0] < 1e-12 < found[1] < found[2]
    for name, value in model.named_parameters():
        assert torch.allclose(result.extra[name], value, rtol=1e-7, atol=1e-10), name
    kept = read_file(result.folder / "boundary_0_1.pt")
    for name, value in reference.named_parameters():
        assert torch.allclose(kept[name], value, rtol=1e-7, atol=1e-10), name


def test_runs_continue_in_both_stages(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--do_val", "--val_every_steps", 4, "--save_every_steps", 3)
    whole = ranks(2).run(run, tmp_path / "whole", *flags)[0]
    assert sorted(losses(whole.log, "val")) == [BOUNDARY, 4, STEPS]
    assert (whole.folder / f"{BOUNDARY:05d}_model.pt").is_file()
    for steps in (BOUNDARY + 1, BOUNDARY + 2):  # saved in the second stage
        folder = tmp_path / f"parts{steps}"
        ranks(2).run(run, folder, *flags, "--max_steps", steps)
        parts = ranks(2).run(run, folder, *flags, "--sep_size", 2)[0]
        assert losses(parts.log)[STEPS] == pytest.approx(losses(whole.log)[STEPS], rel=1e-9)
    same = tmp_path / "same"
    ranks(2).run(run, same, *flags, "--max_steps", 4)
    again = ranks(2).run(run, same, *flags)[0]
    assert all(torch.equal(again.extra[name], value) for name, value in whole.extra.items())
    (again.folder / "boundary_0_1.pt").unlink()  # the checkpoint of that step has the same weights
    more, further = (ranks(2).run(run, folder, *flags, "--max_steps", 6)[0] for folder in (same, tmp_path / "whole"))
    assert more.log == further.log
    (again.folder / f"{BOUNDARY:05d}_model.pt").unlink()
    for error in ranks(2).run(_error_of, same, *flags, "--max_steps", 8):
        assert "boundary_0_1.pt is missing" in error
        assert f"go back to a checkpoint of step {BOUNDARY} or less" in error


def test_the_second_stage_with_adapters_continues_bit_equal(ranks: Pools, tmp_path: Path) -> None:
    """The reference keeps its adapters apart, as before the interruption."""
    first = ranks(1).run(run, tmp_path / "first", "--max_steps", 3)[0]
    flags = ("--init_from", first.folder / "00003_model.pt", "--lora_rank", 2, "--exp_name", "adapted")
    whole = ranks(1).run(run, tmp_path / "whole", *flags)[0]
    ranks(1).run(run, tmp_path / "parts", *flags, "--max_steps", 4)
    parts = ranks(1).run(run, tmp_path / "parts", *flags)[0]
    assert all(torch.equal(parts.extra[name], value) for name, value in whole.extra.items())


def _error_of(log_dir: Path, *flags: object, **options: Any) -> str:
    try:
        run(log_dir, *flags, **options)
    except TinytronError as error:
        return str(error)
    return ""


def test_options_out_of_range(tmp_path: Path) -> None:
    tokens = ROWS * S
    for options, text in (
        ({"stage_tokens": 0}, "training.stage_tokens=0 must be at least 1"),
        ({"beta": -1.0}, "optimization.kl.beta=-1.0 must be at least 0; use 0.1"),
        (
            {"stage_tokens": STEPS * tokens},
            f"training.stage_tokens={STEPS * tokens} is {STEPS} steps, but the run has {STEPS}; use at most "
            f"{(STEPS - 1) * tokens}",
        ),
    ):
        assert _error_of(tmp_path, **options).startswith(text)
