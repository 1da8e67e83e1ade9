"""DPO: the gradients and steps of a per-pair loss written out in torch, on every layout; continued, validated; mistakes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, config_of, losses, read_logs, whole_weights
from tests.interop import families
from tinytron.config import configuration
from tinytron.data.pairs import PackedPairs, Pair, PairDataset, TokenRow
from tinytron.errors import TinytronError
from tinytron.model import GPT
from tinytron.training import Config
from tinytron.training.backbone import BackbonedTrainer
from tinytron.training.contrastive import (
    NAMES,
    BackbonedContrastiveTrainer,
    ContrastiveTrainer,
    ContrastiveTrainerConfig,
    dpo,
)

Pools = Callable[[int], Ranks]
ROW, PAIRS, STEPS, LR, BETA = 7, 8, 4, 0.01, 0.3
S = 12  # two answers of ROW - 1 training pairs
FLAGS: tuple[object, ...] = (
    *("--exp_name", "dpo", "--precision", "fp64", "--seq_len", S, "--batch_size", 2, "--total_batch_size", PAIRS * S),
    *("--max_steps", STEPS, "--max_lr", LR, "--lr_schedule", "constant", "--warmup_steps", 0, "--log_every", 1),
    *("--grad_clip_value", 0, "--vocab_size", 61, "--num_layer", 2, "--num_attention_heads", 4, "--hidden_size", 16),
    *("--num_key_value_heads", 2, "--intermediate_size", 24, "--init_std", 0.1, "--dataset_path", "pairs"),
)
MOE: tuple[object, ...] = (
    *("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8),
    *("--moe_aux_loss_coef", 0),
)
LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {
    "one": (1, ()),
    "dp 2": (2, ()),
    "sep 2": (2, ("--sep_size", 2)),
    "dp 2, no ZeRO, recomputed": (2, ("--no-use_distributed_optimizer", "--recompute", "full")),
    "dp 2 x sep 2": (4, ("--sep_size", 2)),
    "experts": (1, MOE),
    "experts, ep 2": (2, (*MOE, "--ep_size", 2)),
}


class Pairs(PairDataset):
    """Pairs from a formula: prompts of 1 to 3 tokens without loss, answers of unequal length, fractional weights."""

    def __init__(self, count: int = PAIRS, seed: int = 0) -> None:
        self.row_size, self.count, self.seed = ROW, count, seed

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        return f"formula:{self.count}:{self.seed}"

    def __getitem__(self, index: int) -> Pair:
        random = np.random.default_rng([self.seed, index])
        prompt = int(random.integers(1, 4))
        ids = random.integers(0, 41, (2, ROW))
        ids[1, :prompt] = ids[0, :prompt]
        sides = []
        for side in range(2):
            length = int(random.integers(prompt + 1, ROW + 1))
            weights = torch.zeros(ROW)
            weights[prompt:length] = torch.tensor(random.choice([1.0, 1.0, 0.5], ROW))[prompt:length]
            sides.append(TokenRow(torch.tensor(ids[side]), weights, length))
        return Pair(*sides)


class Dpo(ContrastiveTrainer[ContrastiveTrainerConfig, GPT]):
    """Trains on ``Pairs``: all of them are one global batch."""

    def _init_data(self, spec: Config) -> None:
        self.train_dataset = PackedPairs(Pairs(), spec.train.seq_len)
        self.val_dataset = PackedPairs(Pairs(5, seed=1), spec.train.seq_len)


def run(log_dir: Path, *flags: object, smoothing: float = 0.0) -> Run:
    """Train; ``extra`` are the weights before and after. A job for the pool."""
    tree = {"optimization": {"dpo": {"beta": BETA, "label_smoothing": smoothing}}}
    with configuration(tree):
        trainer = Dpo(config_of(*FLAGS, "--max_epochs", STEPS, "--log_dir", log_dir, *flags))
    trainer.train()
    weights = whole_weights(trainer)
    log, records = read_logs(trainer.log_dir) if trainer.master_process else ("", [])
    return Run(trainer.log_dir, trainer.step, log, records, weights)


def smoothed(log_dir: Path, *flags: object) -> Run:
    return run(log_dir, *flags, smoothing=0.2)


def _log_prob(model: GPT, row: TokenRow) -> torch.Tensor:
    """The weighted log-probability of one row by itself, from whole logits."""
    logits: Any = model(row.ids[None, :-1])
    found = F.log_softmax(logits[0], -1).gather(1, row.ids[1:, None])[:, 0]
    return (found * row.weights[1:].double()).sum()


def twin(smoothing: float = 0.0, flags: tuple[object, ...] = ()) -> tuple[list[dict[str, float]], GPT]:
    """The same steps, pair by pair, with a copy of the model as the reference."""
    config = config_of(*FLAGS, *flags)
    model = GPT(config.model, dtype=torch.float64, seed=config.seed.seed)
    reference = copy.deepcopy(model).eval()
    decays = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    found = []
    for _ in range(STEPS):
        rows = []
        for pair in (Pairs()[i] for i in range(PAIRS)):
            policy = [_log_prob(model, row) for row in pair]
            with torch.no_grad():
                base = [_log_prob(reference, row) for row in pair]
            better, worse = (BETA * (p - b) for p, b in zip(policy, base, strict=True))
            loss = -F.logsigmoid(better - worse) * (1 - smoothing) - F.logsigmoid(worse - better) * smoothing
            rows.append(torch.stack([loss, better, worse, (better > worse).double(), better - worse, *policy]))
        means = torch.stack(rows).mean(0)
        found.append(dict(zip(("loss", *NAMES), means.tolist(), strict=True)))
        means[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return found, model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.sample(4)
def test_steps_are_those_of_the_formula_pair_by_pair(ranks: Pools, tmp_path: Path, layout: str) -> None:
    world, flags = LAYOUTS[layout]
    expected, model = twin(flags=flags if "experts" in layout else ())
    result = ranks(world).run(run, tmp_path, *flags)[0]
    records = [record for record in result.records if record["stage"] == "train"]
    for record, values in zip(records, expected, strict=True):
        if record["step"] == 1:  # every margin is 0, up to rounding, which decides which answer is the better one
            values.pop("rewards/accuracy")
        assert {name: record[name] for name in values} == pytest.approx(values, rel=1e-9, abs=1e-12)
    assert expected[0]["rewards/margin"] == 0.0 < expected[-1]["rewards/margin"]
    for name, value in model.named_parameters():
        assert torch.allclose(result.extra[name], value, rtol=1e-8, atol=1e-11), name


def test_label_smoothing(ranks: Pools, tmp_path: Path) -> None:
    expected, _ = twin(smoothing=0.2)
    result = ranks(2).run(smoothed, tmp_path)[0]
    assert list(losses(result.log).values()) == pytest.approx([values["loss"] for values in expected], rel=1e-6)


def test_the_derivative_is_that_of_the_loss() -> None:
    margins = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    for smoothing in (0.0, 0.3):
        loss, slope = dpo(margins, 0.7, smoothing)
        (grad,) = torch.autograd.grad(loss.sum(), margins)
        assert torch.allclose(grad, torch.stack([slope, -slope], 1))


def test_a_continued_run_keeps_its_reference(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--do_val", "--val_every_steps", 2)
    whole = ranks(2).run(run, tmp_path / "whole", *flags)[0]
    ranks(2).run(run, tmp_path / "parts", *flags, "--max_steps", 2)
    parts = ranks(2).run(run, tmp_path / "parts", *flags)[0]
    assert parts.log == whole.log
    assert all(torch.equal(parts.extra[name], value) for name, value in whole.extra.items())
    assert len(losses(whole.log, "val")) == 2
    other = ranks(1).run(run, tmp_path / "one", *flags)[0]
    assert losses(other.log, "val") == pytest.approx(losses(whole.log, "val"), rel=1e-9)


@pytest.mark.parametrize("damage", ["lost", "cut", "other"])
def test_a_lost_reference_is_computed_again(ranks: Pools, tmp_path: Path, damage: str) -> None:
    whole = ranks(2).run(run, tmp_path / "whole")[0]
    part = ranks(2).run(run, tmp_path / "parts", "--max_steps", 2)[0]
    file = part.folder / "reference.pt"
    if damage == "lost":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:50])
    else:
        torch.save({"train": torch.zeros(3, 2)}, file)
    again = ranks(2).run(run, tmp_path / "parts")[0]
    assert again.log == whole.log


class Split(Dpo):
    """No validation pairs of its own."""

    def _init_data(self, spec: Config) -> None:
        self.train_dataset = PackedPairs(Pairs(16), spec.train.seq_len)


def _split(log_dir: Path) -> tuple[dict[int, float], torch.Tensor]:
    trainer = Split(config_of(*FLAGS, "--split_rate", 0.75, "--do_val", "--max_steps", 1, "--log_dir", log_dir))
    trainer.train()
    found = losses(read_logs(trainer.log_dir)[0]) if trainer.master_process else {}
    return found, trainer.val_dataset.dataset.reference  # type: ignore[union-attr]


def test_pairs_that_are_split_off_have_a_reference(ranks: Pools, tmp_path: Path) -> None:
    found, reference = ranks(2).run(_split, tmp_path)[0]
    assert found[1] == pytest.approx(np.log(2))
    assert bool((reference != 0).all())


def _backboned(log_dir: Path, folder: Path) -> Run:
    class Tuned(BackbonedContrastiveTrainer[Any, GPT], Dpo):
        pass

    sizes = ("--exp_name", "dpo", "--precision", "fp64", "--seq_len", S, "--batch_size", 2, "--total_batch_size", 96)
    trainer = Tuned(config_of(*sizes, "--max_steps", 2, "--init_from", folder, "--log_dir", log_dir, "--log_every", 1))
    assert isinstance(trainer, BackbonedTrainer)
    trainer.train()
    log, records = read_logs(trainer.log_dir) if trainer.master_process else ("", [])
    return Run(trainer.log_dir, trainer.step, log, records, None)


def test_it_starts_from_a_backbone(ranks: Pools, tmp_path: Path) -> None:
    families.save("llama tied biased", tmp_path / "hf")
    result = ranks(2).run(_backboned, tmp_path / "log", tmp_path / "hf")[0]
    assert losses(result.log)[1] == pytest.approx(np.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"beta": 0}, r"optimization\.dpo\.beta=0\.0 must be above 0; use 0\.1"),
        ({"label_smoothing": 0.5}, r"optimization\.dpo\.label_smoothing=0\.5 must be at least 0 and below 0\.5; use 0"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, float], text: str) -> None:
    tree = {"optimization": {"dpo": options}}
    with configuration(tree), pytest.raises(TinytronError, match=text):
        Dpo(config_of(*FLAGS, "--log_dir", tmp_path))


def test_data_that_are_not_pairs(tmp_path: Path) -> None:
    plain = ContrastiveTrainer[ContrastiveTrainerConfig, GPT]
    without = [flag for flag in FLAGS if flag not in ("--dataset_path", "pairs")]
    with pytest.raises(TinytronError, match="ContrastiveTrainer needs pairs; give --dataset_path"):
        plain(config_of(*without, "--log_dir", tmp_path))
    (tmp_path / "pairs").mkdir()
    with pytest.raises(TinytronError, match=r"has no pairs; make them with the job data/tokenize_contrastive_dataset"):
        plain(config_of(*FLAGS, "--dataset_path", tmp_path / "pairs", "--log_dir", tmp_path))
    with pytest.raises(TinytronError, match=r"pairs of rows of 7 tokens need --seq_len 12 or more, but it is 10"):
        PackedPairs(Pairs(), 10)
