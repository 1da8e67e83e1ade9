"""Training in the test's own process, step by step, and what is left of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.gpu.device import TOY, relative_error
from tests.helpers.runs import TINY, config_of
from tinytron.data import Batch
from tinytron.training import Config, Trainer

# Two layers of the real shapes; in a rehearsal 6,000 parameters.
SMALL: tuple[object, ...] = tuple(
    shlex.split(
        "--exp_name small --use_mock_data --mock_data_num_samples 128 --total_batch_size 1024 --batch_size 4 --seq_len 128 "
        "--block_size 128 --vocab_size 512 --num_layer 2 --num_attention_heads 8 --num_key_value_heads 4 "
        "--hidden_size 256 --intermediate_size 512 --init_std 0.05 --max_lr 0.001 --warmup_steps 1"
    )
)
if TOY:
    SMALL = (*TINY, "--total_batch_size", 48, "--head_dim", 8)  # varlen asks for multiples of 8
EXPERTS = f"--use_moe --num_experts 8 --num_experts_per_tok 2 --moe_intermediate_size {8 if TOY else 128}"


class Stepped(Trainer):
    """A trainer driven from outside of ``train``, which keeps every step's loss and norm on the device."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._batches = self.data.steps(self.step)
        self._keep(self.reporter.window.add)

    def _keep(self, add: Callable[..., None]) -> None:
        def kept(step: int, lr: float, parts: dict[str, torch.Tensor], grad_norm: torch.Tensor, *more: Any) -> None:
            self.kept.append((parts["loss"], grad_norm))
            add(step, lr, parts, grad_norm, *more)

        self.reporter.window.add = kept  # type: ignore[method-assign]

    def next_batches(self) -> list[Batch]:
        """The micro-batches of the next step, on the device."""
        return next(self._batches)

    def run(self, steps: int) -> Stepped:
        """Train ``steps`` steps."""
        for _ in range(steps):
            self.one_step(self.next_batches())
        return self

    def one_step(self, microbatches: list[Batch]) -> None:
        """One training step, counted."""
        self.train_step(microbatches)
        self.step += 1

    def weights(self) -> dict[str, torch.Tensor]:
        """All parameters, as copies on the CPU."""
        self.optimizer.finish_gather()
        return {name: p.detach().cpu().clone() for name, p in self.raw_model.named_parameters()}

    def outcome(self) -> Outcome:
        """What is left of the steps so far."""
        losses, norms = ([float(x) for x in column] for column in zip(*self.kept, strict=True))
        return Outcome(losses, norms, self.weights())


@dataclass
class Outcome:
    """Losses and gradient norms (before clipping) by step, and the parameters in the end."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]

    def differences(self, exact: Outcome, losses: float, norms: float, weights: float) -> list[str]:
        """Where this differs from ``exact`` by more than the relative tolerances given."""
        pairs = [
            *(
                (f"loss of step {i}", a, b, losses)
                for i, (a, b) in enumerate(zip(self.losses, exact.losses, strict=True))
            ),
            *((f"norm of step {i}", a, b, norms) for i, (a, b) in enumerate(zip(self.norms, exact.norms, strict=True))),
            *((f"weight {name}", self.weights[name], exact.weights[name], weights) for name in exact.weights),
        ]
        errors = [(what, relative_error(a, b), tolerance) for what, a, b, tolerance in pairs]
        return [f"{what}: {error:.2e} > {tolerance:g}" for what, error, tolerance in errors if not error <= tolerance]


def stepped(log_dir: Path, *flags: object) -> Stepped:
    """A trainer of the SMALL model that saves nothing."""
    return Stepped(config_of(*SMALL, "--debug", "--log_dir", log_dir, *flags))


def trained(steps: int, log_dir: Path, *flags: object) -> Outcome:
    """What ``steps`` steps of the SMALL model give; the process group is gone afterwards."""
    try:
        return stepped(log_dir, "--max_steps", steps, *flags).run(steps).outcome()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
