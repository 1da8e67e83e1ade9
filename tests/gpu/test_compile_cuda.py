"""Compiled models on a GPU equal eager ones, in losses and in gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.device import DEVICE, GPU_TEST, matmul_precision, no_host_waits, relative_error, sized
from tests.gpu.test_attention_cuda import LENGTHS
from tests.gpu.test_model_cuda import CONFIGS, B, S
from tests.gpu.trained import stepped, trained
from tinytron.kernels.choice import Kernels
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
from tinytron.utils.sequences import Documents

pytestmark = GPU_TEST


CASES = [  # configuration, precision, tolerance, recomputation, attention
    ("dense", torch.float32, 1e-4, "none", "sdpa"),
    ("dense", torch.bfloat16, 3e-2, "selective", "varlen"),
    ("experts", torch.bfloat16, 3e-2, "selective", "sdpa"),
    ("dense", torch.float32, 1e-4, "selective", "sdpa"),
    ("dense", torch.float32, 1e-4, "full", "sdpa"),
    ("options", torch.bfloat16, 3e-2, "none", "sdpa"),
    ("experts", torch.bfloat16, 3e-2, "full", "sdpa"),
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Graphs of other tests would count towards torch's limit of graphs per function."""
    torch._dynamo.reset()


def _step(model: GPT, seed: int, documents: Documents | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    tokens = torch.randint(model.config.vocab_size, (B, S + 1), generator=torch.Generator().manual_seed(seed)).to(
        DEVICE
    )
    sums = model(tokens[:, :-1], tokens[:, 1:], documents=documents)
    assert isinstance(sums, LossSums)
    grads = torch.autograd.grad(sums.objective, list(model.parameters()))
    return sums.objective.detach(), list(grads)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance", "recompute", "backend"),
    CASES[: sized(len(CASES), 2)],
)
def test_losses_and_gradients(name: str, dtype: torch.dtype, tolerance: float, recompute: Any, backend: Any) -> None:
    """Two batches, the second through the graphs of the first. In bf16 the compiler rounds less often."""
    config = replace(CONFIGS[name], num_layer=1)
    options: dict[str, Any] = {"dtype": dtype, "device": DEVICE, "kernels": Kernels(attention=backend)}
    eager, compiled = GPT(config, **options), GPT(config, recompute=recompute, **options)
    compiled.compile_blocks()
    documents = None
    if backend == "varlen":
        ends = torch.tensor([0, *(n * S * B // sum(LENGTHS) for n in LENGTHS)], dtype=torch.int32).cumsum(0)
        documents = Documents(ends.to(DEVICE, torch.int32), int(ends.diff().max()))
    with matmul_precision("highest"):
        for seed in (0, 1):
            (loss, grads), (exact, expected) = (_step(model, seed, documents) for model in (compiled, eager))
            assert relative_error(loss, exact) < min(tolerance, 2e-3)
            for (key, _), mine, theirs in zip(eager.named_parameters(), grads, expected, strict=True):
                assert relative_error(mine, theirs) < tolerance, key


def test_a_compiled_training_step_equals_and_waits_for_nothing(tmp_path: Path) -> None:
    flags = ("--precision", "bf16", "--recompute", "selective", "--max_steps", 3)
    eager = trained(3, tmp_path / "eager", *flags)
    trainer = stepped(tmp_path / "compiled", *flags, "--use_compile").run(2)
    batches = trainer.next_batches()
    torch.cuda.synchronize()
    with no_host_waits():
        trainer.one_step(batches)
    assert not (found := trainer.outcome().differences(eager, 2e-3, 3e-2, 5e-2)), "\n".join(found)
