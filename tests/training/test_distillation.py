"""Distillation: steps equal the formula written out in torch, with teachers of our own and of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, config_of, losses, read_logs, whole_weights
from tests.interop import families
from tests.training.test_contrastive import MOE
from tests.training.test_kl_divergence import FLAGS as KL_FLAGS
from tests.training.test_kl_divergence import LR, ROWS, STEPS, S
from tinytron.config import configuration
from tinytron.data import MockDataset
from tinytron.errors import TinytronError
from tinytron.model import GPT
from tinytron.training import Config
from tinytron.training.distillation import DistillationTrainer, DistillationTrainerConfig
from tinytron.utils.model import count_parameters

Pools = Callable[[int], Ranks]
VOCAB, WEIGHT, TEMPERATURE = families.VOCAB, 0.7, 2.0
FLAGS: tuple[object, ...] = (*KL_FLAGS, "--vocab_size", VOCAB, "--exp_name", "distill")
LAYOUTS: dict[str, tuple[int, tuple[object, ...], str]] = {
    "one": (1, (), "llama"),
    "dp 2, recomputed": (2, ("--recompute", "full"), "gpt2"),
    "sep 2": (2, ("--sep_size", 2), "qwen3"),
    "dp 2 x sep 2, no ZeRO": (4, ("--sep_size", 2, "--no-use_distributed_optimizer"), "neox"),
    "experts teach, ep 2": (2, ("--ep_size", 2), "mixtral"),
    "experts learn": (1, MOE, "llama"),
}


class Student(DistillationTrainer[DistillationTrainerConfig, GPT]):
    """All samples are one global batch."""

    def _init_data(self, spec: Config) -> None:
        self.train_dataset = MockDataset(ROWS, S, VOCAB, seed=3)
        self.val_dataset = MockDataset(3, S, VOCAB, seed=4)


def run(log_dir: Path, teacher: Path, *flags: object, **options: Any) -> Run:
    """Train. A job for the pool."""
    given = {"teacher": str(teacher), "weight": WEIGHT, "temperature": TEMPERATURE, **options}
    with configuration({"distillation": given}):
        trainer = Student(config_of(*FLAGS, "--log_dir", log_dir, *flags))
    trainer.train()
    (frozen,) = trainer._frozen_models(trainer.config) or ()
    if isinstance(trainer.reference, GPT):
        assert count_parameters(frozen) == count_parameters(trainer.reference.config)
    weights = whole_weights(trainer)
    log, records = read_logs(trainer.log_dir) if trainer.master_process else ("", [])
    return Run(trainer.log_dir, trainer.step, log, records, weights)


def twin(teacher: Any, flags: tuple[object, ...], divergence: str = "forward") -> tuple[list[tuple[float, float]], GPT]:
    """The same steps from whole logits, the teacher's by transformers: losses and divergences, and the model."""
    config = config_of(*FLAGS, *flags)
    model = GPT(config.model, dtype=torch.float64, seed=config.seed.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    samples = [MockDataset(ROWS, S, VOCAB, seed=3)[i] for i in range(ROWS)]
    ids, labels = (torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        theirs = F.log_softmax(teacher(ids).logits / TEMPERATURE, -1)
    found = []
    for _ in range(STEPS):
        logits: Any = model(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        mine = F.log_softmax(logits / TEMPERATURE, -1)
        p, q = (theirs, mine) if divergence == "forward" else (mine, theirs)
        kl = (p.exp() * (p - q)).sum(-1).mean()
        found.append((float(loss.detach()), float(kl.detach())))
        ((1 - WEIGHT) * loss + WEIGHT * TEMPERATURE**2 * kl).backward()
        optimizer.step()
        optimizer.zero_grad()
    return found, model


def check(result: Run, expected: list[tuple[float, float]], model: GPT) -> None:
    """Losses, divergences and weights agree."""
    records = [record for record in result.records if record["stage"] == "train"]
    # Rotary angles of transformers are fp32.
    assert [record["loss"] for record in records] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [record["kl"] for record in records] == pytest.approx([kl for _, kl in expected], rel=1e-5)
    assert expected[-1][1] < expected[0][1]
    for name, value in model.named_parameters():
        torch.testing.assert_close(result.extra[name], value, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.sample(4)
def test_steps_are_those_of_the_formula(ranks: Pools, tmp_path: Path, layout: str) -> None:
    world, flags, name = LAYOUTS[layout]
    teacher = families.save(name, tmp_path / "teacher")
    expected, model = twin(teacher, flags if "learn" in layout else ())
    check(ranks(world).run(run, tmp_path, tmp_path / "teacher", *flags)[0], expected, model)


def test_the_other_direction(ranks: Pools, tmp_path: Path) -> None:
    teacher = families.save("llama", tmp_path / "teacher")
    expected, model = twin(teacher, (), "reverse")
    check(ranks(1).run(_reverse, tmp_path, tmp_path / "teacher")[0], expected, model)


def _reverse(log_dir: Path, teacher: Path) -> Run:
    return run(log_dir, teacher, divergence="reverse")


def test_a_foreign_teacher(ranks: Pools, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OPTConfig(
        **sizes, word_embed_proj_dim=8, max_position_embeddings=32, init_std=0.5, dropout=0.0
    )
    teacher = transformers.OPTForCausalLM(config).double().eval()
    teacher.save_pretrained(tmp_path / "teacher")
    expected, model = twin(teacher, ())
    check(ranks(2).run(run, tmp_path, tmp_path / "teacher")[0], expected, model)


def test_continued_bit_equal_and_validated(ranks: Pools, tmp_path: Path) -> None:
    families.save("llama", tmp_path / "teacher")
    flags = ("--do_val", "--val_every_steps", 2)
    whole = ranks(2).run(run, tmp_path / "whole", tmp_path / "teacher", *flags)[0]
    ranks(2).run(run, tmp_path / "parts", tmp_path / "teacher", *flags, "--max_steps", 3)
    parts = ranks(2).run(run, tmp_path / "parts", tmp_path / "teacher", *flags)[0]
    assert all(torch.equal(parts.extra[name], value) for name, value in whole.extra.items())
    assert losses(parts.log) == losses(whole.log)
    assert all(record["kl"] > 0 for record in whole.records if record["stage"] == "val")


LONGER = ("--seq_len", 40, "--block_size", 40, "--total_batch_size", 320)


@pytest.mark.parametrize(
    ("flags", "options", "text"),
    [
        (("--vocab_size", 50), {}, "has 41 tokens, but the student has 50; use a teacher with the same tokenizer"),
        (LONGER, {"teacher": "gpt2"}, "is for sequences of at most 32 tokens, but --seq_len is 40"),
        ((), {"weight": 0.0}, "distillation.weight=0.0 must be above 0 and at most 1; use 0.5"),
        ((), {"temperature": -1.0}, "distillation.temperature=-1.0 must be above 0; use 1"),
        ((), {"divergence": "other"}, "distillation.divergence=other must be forward or reverse; use forward"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, flags: tuple[object, ...], options: dict[str, Any], text: str) -> None:
    name = options.pop("teacher", "llama")
    families.save(name, tmp_path / "teacher")
    with pytest.raises(TinytronError, match=text.replace("(", r"\(")):
        run(tmp_path, tmp_path / "teacher", *flags, **options)
