"""P6: router gradients, auxiliary losses and the balancing bias, over layouts and under recomputation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.parity import EXPERTS, Case, differences, run_case, twin
from tests.helpers.ranks import Ranks
from tests.naive.gpt import Experts
from tinytron.model import GPT

Pools = Callable[[int], Ranks]
PLACES = [(1, 1, 1), (2, 2, 2), (2, 1, 2), (4, 2, 4), (4, 4, 1), (4, 1, 4)]
KINDS = {
    "sequence": dataclasses.replace(EXPERTS, score="sigmoid"),
    "batch": dataclasses.replace(EXPERTS, scope="batch", top_k=1, renormalized=False),
}


def _case(world: int, sep: int, ep: int, experts: Experts, **more: Any) -> Case:
    """In fp64, where no near tie of the router can flip."""
    return Case(world, 2, "uneven", True, sep, ep, experts=experts, shared_experts=1, precision="fp64", **more)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "sep", "ep"), PLACES)
@pytest.mark.sample(6)
def test_recomputation_changes_nothing(
    ranks: Pools, tmp_path: Path, world: int, sep: int, ep: int, kind: str, recompute: str
) -> None:
    """Gradients, losses, loads counted once, and the bias; against the twin, which knows no recomputation."""
    case = _case(world, sep, ep, KINDS[kind], recompute=recompute, overlap=kind == "batch")
    found = differences(case, ranks(world).run(run_case, case, tmp_path))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("world", "sep", "ep"), [(2, 2, 1), (4, 2, 2), (4, 1, 4)])
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.sample(2)
def test_recomputation_is_bit_identical(
    ranks: Pools, tmp_path: Path, world: int, sep: int, ep: int, recompute: str
) -> None:
    """In fp32, near ties or not: the choice is kept, not made again."""
    base = dataclasses.replace(_case(world, sep, ep, EXPERTS), precision="fp32")
    plain, other = (
        ranks(world).run(run_case, dataclasses.replace(base, recompute=how), tmp_path / how)
        for how in ("none", recompute)
    )
    for mine, theirs in zip(other, plain, strict=True):
        assert mine["norms"] == theirs["norms"]
        for a, b in zip(mine["weights"], theirs["weights"], strict=True):
            assert np.array_equal(a[3], b[3])


class _CountChoices(TorchDispatchMode):
    """How often something is chosen among scores."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.topk.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_the_choice_is_made_once(recompute: Any) -> None:
    """A choice made again in recomputation could differ in a tie on a GPU, and the ranks would wait for each other."""
    config = _case(1, 1, 1, EXPERTS).config(Path("unused")).model
    model = GPT(config, dtype=torch.float64, recompute=recompute)
    ids = torch.arange(24).view(2, 12)
    with _CountChoices() as counted:
        model(ids, ids).objective.backward()
    assert counted.count == config.num_layer


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"balance_coef": 0.0}, "router gradient"),
        ({"z_coef": 0.0}, "router gradient"),
        ({"scope": "batch"}, "router gradient"),
        ({"bias_rate": 0.0}, "load"),
    ],
    ids=["balance", "z", "scope", "bias"],
)
def test_every_term_matters_in_these_runs(change: dict[str, Any], what: str) -> None:
    """Or the comparisons above would hold without it."""
    one, other = (twin(_case(1, 1, 1, experts)) for experts in (EXPERTS, dataclasses.replace(EXPERTS, **change)))
    if what == "load":
        assert any((a != b).any() for a, b in zip(one.load, other.load, strict=True))
        return
    name = "blocks.0.mlp.router.weight"
    error = np.abs(one.grads[0][name] - other.grads[0][name]).max() / np.abs(one.grads[0][name]).max()
    assert error > 1e-3


def test_auxiliary_losses_are_logged_beside_the_token_loss(ranks: Pools, tmp_path: Path) -> None:
    case = _case(2, 2, 2, EXPERTS)
    for entry in ranks(2).run(run_case, case, tmp_path)[0]["log"]:
        assert entry["moe_balance"] > 2 * 0.9  # about one per token and layer, by the number of targets
        assert entry["moe_z"] > 0
        assert entry["loss"] < 4.5  # about ln 61: without the others
