"""--use_triton_kernels in whole runs, its kernels in the interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import train
from tests.helpers.triton_interpreter import interpreted
from tinytron.training import Trainer, build

MODULES = {
    "cross_entropy_": interpreted("cross_entropy_triton"),
    "weighted_sum": interpreted("expert_rows_triton"),
    "sum_choices": interpreted("expert_rows_triton"),
    "plus_square": interpreted("gram_triton"),
}
Pools = Callable[[int], Ranks]


def _counting(name: str, function: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
    def counted(*args: Any, **more: Any) -> Any:
        calls[name] += 1
        return function(*args, **more)

    return counted


def _trained(log_dir: Path, *flags: object) -> tuple[dict[str, int], list[float]]:
    """Which kernels were called, and the losses."""
    calls: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "check_device", lambda kernels, device, dtype: None)  # there is no CUDA device
        for name, module in MODULES.items():
            patch.setattr(module, name, _counting(name, getattr(module, name), calls))
        run = train(Trainer, log_dir, "--max_steps", 2, "--total_batch_size", 48, "--num_layer", 1, *flags)
    return dict(calls), [record["loss"] for record in run.records]


def test_the_flag_reaches_loss_experts_and_muon(ranks: Pools, tmp_path: Path) -> None:
    experts = (
        "--use_moe",
        "--num_experts",
        4,
        "--num_experts_per_tok",
        2,
        "--moe_intermediate_size",
        8,
        "--ep_size",
        2,
    )
    flags = (*experts, "--optimizer", "muon", "--muon_ns_steps", 1, "--recompute", "full")
    plain = ranks(2).run(_trained, tmp_path / "plain", *flags)
    found = ranks(2).run(_trained, tmp_path / "kernels", "--use_triton_kernels", *flags)
    assert [calls for calls, _ in plain] == [{}, {}]
    assert [set(calls) for calls, _ in found] == [set(MODULES)] * 2
    assert len(found[0][1]) == 2
    assert found[0][1] == pytest.approx(plain[0][1], rel=1e-5)
