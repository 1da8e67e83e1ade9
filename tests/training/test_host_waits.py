"""A training step never waits for the device, except where experts must know how many rows come (tests/gpu/ has it for
real)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.host_waits import HostWaits
from tests.helpers.ranks import Ranks
from tests.helpers.runs import train
from tests.training.test_trainer_mixture import mixture
from tinytron.data import Batch
from tinytron.training import Trainer

Pools = Callable[[int], Ranks]


class Watched(Trainer):
    """Reports what the host waited for in each step."""

    def train_step(self, microbatches: list[Batch]) -> None:
        with HostWaits() as waits:
            super().train_step(microbatches)
        self.waits = [*getattr(self, "waits", []), dict(waits.count)]

    def report(self) -> list[dict[str, int]]:
        return self.waits


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": torch.Tensor.item,
    "float": float,
    "int": lambda x: int(x.long()),
    "bool": bool,
    "if": lambda x: 1 if x > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "array": lambda x: x.__array__(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": torch.nonzero,
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x.view(1)[x.view(1) > 0],
    "set by mask": lambda x: x.view(1).__setitem__(x.view(1) > 0, x.new_ones(1)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": torch.unique,
    "bincount": lambda x: x.long().view(1).bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long().view(1)),
    "tensor": lambda x: x + torch.tensor([1.0]),
}


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * grad.tolist()


@pytest.mark.parametrize("name", READS)
def test_what_makes_the_host_wait_is_counted(name: str) -> None:
    x = torch.ones(())
    with HostWaits() as waits:
        y = (x * 2).clamp(min=0).sum() + x.view(1)[torch.zeros_like(x.view(1).long())]
        torch.where(y > 0, y, 0.0).masked_fill_(y > 1, 0.0)
        assert not waits.count  # none of these
        READS[name](x)
    assert sum(waits.count.values()) == 1, waits.count


def test_a_backward_is_watched_too() -> None:
    x = torch.ones((), requires_grad=True)
    loss = _Backward.apply(x)
    with HostWaits() as waits:
        loss.backward()
    assert waits.count == {"tolist": 1}


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, ""),
        (1, "--precision bf16 --z_loss_coef 0.001 --recompute full"),
        (1, "--precision fp16 --recompute selective"),
        (1, "--ema_decay 0.9 --weight_decay_schedule lr --batch_warmup_sizes 48 --batch_warmup_ends 2 --max_steps 4"),
        (1, "--spike_sigma 8 --spike_window 6"),
        (1, "--optimizer muon --muon_normuon --muon_cautious"),
        (1, "--norm_type layer --mlp_type gelu --position_type learned --dropout 0.1"),
        (1, "--sliding_window 4 --attn_backend sdpa"),
        (2, "--spike_sigma 8 --grad_reduce_dtype bf16"),
        (2, "--sep_size 2 --no-use_distributed_optimizer"),
    ],
)
def test_no_step_of_a_dense_model_waits(ranks: Pools, tmp_path: Path, world: int, flags: str) -> None:
    for run in ranks(world).run(train, Watched, tmp_path, *flags.split()):
        first, *others = run.extra
        # Optimizers without states look whether the first gradient is finite (docs of DistributedOptimizer.step).
        assert first == {"_local_scalar_dense": 1}
        assert others == [{}, {}, {}]


@pytest.mark.parametrize(("world", "flags"), [(1, "--recompute full"), (2, "--sep_size 2"), (2, "--optimizer muon")])
def test_statistics_cost_no_wait(ranks: Pools, tmp_path: Path, world: int, flags: str) -> None:
    """Not even in steps that are measured, except that places of parameters are copied to the device once."""
    all_of_them = "--log_norms --log_activations --log_attention --log_loss_by_position --log_every 2"
    for run in ranks(world).run(train, Watched, tmp_path, *all_of_them.split(), *flags.split()):
        first, *others = run.extra
        assert first == {"_local_scalar_dense": 1, "lift_fresh": 1}
        assert others == [{}, {}, {}]


def test_documents_and_sources_of_a_mixture_cost_no_wait(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--dataset_path", mixture(tmp_path / "data"), "--document_mask", "--packing", "best_fit")
    run = ranks(1).run(train, Watched, tmp_path, *flags, "--no-use_mock_data", "--max_steps", 3)[0]
    assert run.extra[1:] == [{}, {}]
    assert set(run.records[-1]["sources"]) == {"web", "code"}


MOE = "--use_moe --num_experts 4 --num_experts_per_tok 2 --moe_intermediate_size 8"


@pytest.mark.parametrize(
    ("world", "flags", "per_step"),
    [  # 2 expert layers, and 4 micro-batches over the data-parallel ranks
        (1, "", 2 * 4),
        (1, "--first_k_dense 1 --precision bf16", 1 * 4),
        (1, "--recompute full", 2 * 4),
        (2, "--ep_size 2 --moe_bias_update_rate 0.01 --moe_aux_loss_scope batch", 2 * 2),
        (2, "--sep_size 2", 2 * 4),
        (1, "--moe_router_debug --optimizer muon", 2 * 4),
    ],
)
def test_experts_wait_once_per_exchange(ranks: Pools, tmp_path: Path, world: int, flags: str, per_step: int) -> None:
    for run in ranks(world).run(train, Watched, tmp_path, *MOE.split(), *flags.split()):
        assert run.extra[1:] == [{"tolist": per_step}] * 3
