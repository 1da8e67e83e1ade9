"""Statistics of activations, attention and losses by position against a naive computation by the twin, on every layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.helpers.parity import EXPERTS, Case, MaskedSamples, ParityTrainer
from tests.helpers.ranks import Ranks
from tests.helpers.runs import read_logs, train, user_error
from tests.hooks.test_hooks import make_batch, make_model
from tests.metrics.test_norms import OwnTrainer
from tests.naive.gpt import forward
from tinytron.data.batch import Batch
from tinytron.distributed import ParallelLayout, ParallelState
from tinytron.kernels.attention import attend
from tinytron.metrics.activations import ActivationStatistics, kurtosis
from tinytron.metrics.attention import ROWS, attention_statistics, measured_rows
from tinytron.metrics.positions import LossByPosition
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
from tinytron.training import Trainer
from tinytron.utils.sequences import Documents, documents_of, visible

Pools = Callable[[int], Ranks]
SOME = dataclasses.replace(EXPERTS, first_k_dense=1, balance_coef=0.0, z_coef=0.0)
FLAGS = ("log_activations", "log_attention", "log_loss_by_position")


def run_inside(case: Case, log_dir: Path, compiled: bool = False) -> list[dict[str, Any]]:
    """The records of a run with all statistics, on the master. A job for the pool."""
    config = case.config(log_dir)
    logging = dataclasses.replace(config.logging, **dict.fromkeys(FLAGS, True))
    training = dataclasses.replace(config.train, use_compile=compiled, max_steps=2)
    trainer = type("T", (ParityTrainer,), {"case": case})(dataclasses.replace(config, logging=logging, train=training))
    trainer.train()
    return read_logs(trainer.log_dir)[1] if trainer.master_process else []


def expected_of(case: Case) -> dict[str, float]:
    """All statistics of the first step, from the twin's activations of the whole batch, and definitions."""
    samples = MaskedSamples(case)
    ids, labels = samples.batch(samples.samples_of_steps()[0])
    config = case.config(Path("unused"))
    weights = GPT(config.model, dtype=torch.float64, seed=config.seed.seed).state_dict()
    weights["wte.weight"].requires_grad_()
    seen: dict[str, torch.Tensor] = {}
    logits = forward(weights, ids, case.shape, lambda name, x: seen.setdefault(name, x))[0].flatten(0, 1)
    loss_T = F.cross_entropy(logits, labels.flatten(), reduction="none")
    loss = loss_T.sum() / (labels != -100).sum()
    logged = [name for name in seen if name.endswith(("post_attn", "post_mlp", "pre_proj")) or name == "blocks.0.input"]
    found = {}
    for name, grad in zip(logged, torch.autograd.grad(loss, [seen[name] for name in logged]), strict=True):
        x_TF = seen[name].detach().flatten(0, 1).flatten(1)
        centered = x_TF - x_TF.mean()
        found |= {
            f"activations/{name}/norm": float(x_TF.norm(dim=1).mean()),
            f"activations/{name}/min": float(x_TF.min()),
            f"activations/{name}/max": float(x_TF.max()),
            f"activations/{name}/zeros": float((x_TF == 0).double().mean()),
            f"activations/{name}/kurtosis": float(centered.pow(4).mean() / centered.square().mean().square()),
            f"intermediate_grad_norms/{name}": float(grad.norm()),
        }
    for i in range(2):
        q, k = (seen[f"blocks.{i}.attn.{name}"].detach() for name in "qk")
        found |= naive_attention(f"attention/blocks.{i}", q, k)
    for bucket, columns in {"0-7": slice(0, 8), "8-15": slice(8, 12)}.items():
        nats, targets = loss_T.detach().view_as(labels)[:, columns].sum(), (labels[:, columns] != -100).sum()
        found[f"loss_by_position/{bucket}"] = float(nats / targets)
    return found


def naive_attention(name: str, q: torch.Tensor, k: torch.Tensor) -> dict[str, float]:
    """Entropy of every row with a loop over heads, and the largest score."""
    entropies, logits = [], []
    for n in range(q.shape[2]):
        scores = q[:, :, n] @ k[:, :, n * k.shape[2] // q.shape[2]].mT / q.shape[3] ** 0.5
        for row in range(q.shape[1]):
            visible_scores = scores[:, row, : row + 1]
            log_p = visible_scores.log_softmax(-1)
            entropies.append(-(log_p.exp() * log_p).sum(-1))
            logits.append(visible_scores.max())
    return {f"{name}/entropy": float(torch.stack(entropies).mean()), f"{name}/max_logit": float(max(logits))}


def assert_statistics(record: dict[str, Any], case: Case) -> None:
    prefixes = ("activations/", "intermediate_grad_norms/", "attention/", "loss_by_position/")
    found, expected = {k: v for k, v in record.items() if k.startswith(prefixes)}, expected_of(case)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


CASES = [
    Case(1, 2, "uneven"),
    Case(2, 2, "uneven", sep=2),
    Case(2, 1, "uneven", shard=False, recompute="full"),
    Case(2, 1, "uneven", ep=2, experts=SOME, shared_experts=1, recompute="selective"),
    Case(4, 1, "uneven", sep=2, ep=4, experts=SOME),
    Case(4, 2, "uneven", sep=4, kv_heads=1, recompute="full"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"world{c.world}sep{c.sep}ep{c.ep}-{c.recompute}")
def test_statistics_are_those_of_the_twin(ranks: Pools, tmp_path: Path, case: Case) -> None:
    records = ranks(case.world).run(run_inside, dataclasses.replace(case, precision="fp64"), tmp_path)[0]
    assert len(records) == 2
    assert_statistics(records[0], dataclasses.replace(case, precision="fp64"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=["dense", "experts"])
def test_statistics_of_compiled_runs(ranks: Pools, tmp_path: Path, case: Case) -> None:
    case = dataclasses.replace(case, precision="fp64", world=1, ep=1)
    assert_statistics(ranks(1).run(run_inside, case, tmp_path, True, timeout=400)[0][0], case)


def test_only_steps_that_are_reported_are_measured(ranks: Pools, tmp_path: Path) -> None:
    flags = [f"--{flag}" for flag in FLAGS]
    records = (
        ranks(2).run(train, Trainer, tmp_path, *flags, "--log_every", 3, "--max_steps", 4, "--no-do_save")[0].records
    )
    for key in ("activations/blocks.1.post_mlp/norm", "attention/blocks.0/entropy", "loss_by_position/0-7"):
        assert [r["step"] for r in records if key in r] == [1, 3, 4]


def _left_behind(log_dir: Path) -> list[bool]:
    """Whether anything is attached after a run. A job for the pool."""
    found = []

    class Looking(Trainer):
        def eval(self) -> float:
            found.extend(bool(getattr(m, "taps", None) or getattr(m, "watch", None)) for m in self.raw_model.modules())
            return super().eval()

    train(Looking, log_dir, "--do_val", "--max_steps", 1, *(f"--{flag}" for flag in FLAGS))
    return found


def test_nothing_is_attached_during_validation(ranks: Pools, tmp_path: Path) -> None:
    (found,) = ranks(1).run(_left_behind, tmp_path)
    assert found
    assert not any(found)


def _scaled() -> list[dict[str, float]]:
    """The statistics of one pass, plain and with a loss scale that changes before they are read. A job for the pool."""
    state = ParallelState.create(ParallelLayout(1), torch.device("cpu"))
    model, (ids, labels), found = make_model(), make_batch(), []
    for factor in (1.0, 1024.0):
        scale = torch.tensor(factor)
        measured = ActivationStatistics(model, state, scale)
        measured.begin()
        (model(ids, labels).objective * factor).backward()
        scale /= 2 if factor > 1 else 1
        found.append(measured.record(1))
    return found


def test_gradients_are_without_the_loss_scale(ranks: Pools) -> None:
    ((plain, scaled),) = ranks(1).run(_scaled)
    assert any(name.startswith("intermediate_grad_norms/") for name in plain)
    assert scaled == pytest.approx(plain)


def test_norms_in_fp16_are_without_the_loss_scale(ranks: Pools, tmp_path: Path) -> None:
    """Times the loss scale, the gradients' norm does not fit into fp16."""
    flags = ("--max_steps", 1, "--no-do_save", "--log_norms", "--log_activations", "--batch_size", 8)
    flags = (*flags, "--hidden_size", 64, "--intermediate_size", 96)
    runs = [
        ranks(1).run(train, Trainer, tmp_path / p, *flags, "--precision", p)[0].records[0] for p in ("fp16", "fp32")
    ]
    for name in ("grad_norms/wte.weight", "update_norm", "intermediate_grad_norms/blocks.0.input"):
        assert runs[0][name] == pytest.approx(runs[1][name], rel=0.05)


def test_kurtosis_from_moments() -> None:
    x = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 20
    moments = [float(x.pow(p).mean()) for p in (1, 2, 3, 4)]
    assert kurtosis(moments) == pytest.approx(float(((x - x.mean()) ** 4).mean() / x.var(correction=0) ** 2), rel=1e-6)
    assert math.isnan(kurtosis([3.0, 9.0, 27.0, 81.0]))
    assert math.isnan(kurtosis([0.0] * 4))


# Attention, by itself.


def kinds_of_masks() -> dict[str, tuple[Documents | None, int]]:
    packed = documents_of(torch.tensor([[*range(5), *range(9), *range(6)], [*range(20)]]))
    window = visible(None, 4, 2, 20, torch.float64, torch.device("cpu"))
    return {
        "causal": (None, 0),
        "window": (None, 4),
        "window as a mask": (window, 4),
        "documents": (packed, 0),
        "documents and window": (packed, 4),
        "documents as a mask": (packed.with_mask(2, 20, torch.float64), 0),
    }


@pytest.mark.parametrize("kind", kinds_of_masks())
@pytest.mark.parametrize("rows", [3, 7, 20, ROWS])
def test_attention_of_some_rows_is_that_of_all_scores(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are one-hot make the output of attention its weights."""
    monkeypatch.setattr("tinytron.metrics.attention._SCORES", 2 * 4 * 20 * 2)  # tiles of two rows
    documents, window = kinds_of_masks()[kind]
    random = torch.Generator().manual_seed(1)
    q, k = (3 * torch.randn(2, 20, heads, 20, generator=random, dtype=torch.float64) for heads in (4, 2))
    v = torch.eye(20, dtype=torch.float64).expand(2, 2, 20, 20).transpose(1, 2)
    weights_BSNS = attend(q, k, v, backend="math", documents=documents, window=window)
    chosen = measured_rows(20, rows, q.device)
    weights = weights_BSNS[:, chosen]
    nats, count, largest = attention_statistics(q, k, documents, window, rows)
    assert count == 2 * 4 * min(rows, 20)
    assert float(nats) == pytest.approx(float(torch.special.entr(weights).sum()), rel=1e-9)
    scores = torch.einsum("bsnh,btnh->bsnt", q, k.repeat_interleave(2, 2)) / 20**0.5
    assert float(largest) == pytest.approx(float(scores[:, chosen][weights > 0].max()))


def test_rows_are_at_equal_distances_and_end_with_the_last() -> None:
    assert measured_rows(8, 4, torch.device("cpu")).tolist() == [1, 3, 5, 7]
    assert measured_rows(3, 4, torch.device("cpu")).tolist() == [0, 1, 2]
    assert measured_rows(10, 3, torch.device("cpu")).tolist() == [2, 5, 9]


# Positions.


def _positions() -> list[dict[str, float]]:
    """Losses equal to the position, of four reported steps. A job for the pool."""
    state = ParallelState.create(ParallelLayout(torch.distributed.get_world_size(), sep=2), torch.device("cpu"))
    measured, s = LossByPosition(state, 40), 20
    position = torch.arange(40.0)[state.group_rank("sep") * s :][:s].expand(3, s)
    labels = torch.zeros(3, s, dtype=torch.int64)
    labels[0] = -100
    losses = LossSums(torch.zeros(()), torch.zeros(()), per_token=torch.where(labels == -100, 0.0, position))
    found = [measured.record(0)]
    for _ in range(2):
        measured.add(Batch(labels, labels), losses)  # not begun
        measured.begin()
        measured.add(Batch(labels, labels), losses)
        found.append(measured.record(1))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_buckets_of_positions(ranks: Pools, world: int) -> None:
    for nothing, first, second in ranks(world).run(_positions):
        assert nothing == {}
        assert first == second
        assert first == {
            "loss_by_position/0-7": 3.5,
            "loss_by_position/8-15": 11.5,
            "loss_by_position/16-31": 23.5,
            "loss_by_position/32-63": 35.5,
        }


# Errors.


class NoLayers(Trainer):
    """A model with points but without our attention would be rare; this one has neither."""

    def _init_model(self, config: Any) -> None:
        self.raw_model = self.model = nn.Linear(2, 2)


@pytest.mark.parametrize(("flag", "cls", "text"), [
    ("--log_activations", NoLayers,
     "--log_activations: this Linear has no named points; use Tinytron's GPT, or build your modules on "
     "tinytron.hooks.HasPoints"),
    ("--log_attention", NoLayers,
     "--log_attention needs the attention layers of Tinytron's GPT, but this Linear has none; use --no-log_attention"),
    ("--log_loss_by_position", OwnTrainer,
     "--log_loss_by_position needs the loss of each token, but this model or _loss returns LossSums without per_token; "
     "set it, or use --no-log_loss_by_position"),
])  # fmt: skip
def test_models_that_lack_what_is_measured(
    ranks: Pools, tmp_path: Path, flag: str, cls: type[Trainer], text: str
) -> None:
    (found,) = ranks(1).run(user_error, cls, tmp_path, flag, "--max_steps", 1)
    assert found == f"ConfigError: {text}"
