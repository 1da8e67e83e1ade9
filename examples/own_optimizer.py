"""Your own optimizer: ``_init_optimizer`` wraps any element-wise ``torch.optim.Optimizer``, here Lion (arXiv:2302.06675).

The wrapper shards its state over all ranks; the schedule sets ``lr``, and the groups say which parameters decay.
"""

from typing import Any

import torch

from tinytron.cli import entry, pretrain
from tinytron.distributed import DistributedOptimizer
from tinytron.training import Config, Trainer
from tinytron.training.build import optimizer_groups


class Lion(torch.optim.Optimizer):
    """Moves every weight by the learning rate, up or down as the mean of momentum and gradient says."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, beta1: float = 0.9, beta2: float = 0.99) -> None:
        super().__init__(groups, {"lr": lr, "beta1": beta1, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                direction = momentum.lerp(weight.grad, 1 - group["beta1"]).sign()
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
                momentum.lerp_(weight.grad, 1 - group["beta2"])


class MyTrainer(Trainer):
    """Trains with Lion; the flags of learning rate and weight decay hold as for AdamW."""

    def _init_optimizer(self, config: Config) -> None:
        lion = Lion(optimizer_groups(config.optim, self.raw_model), lr=config.optim.max_lr)
        self.optimizer = DistributedOptimizer(optimizer=lion, process_group=self.dp_group)


if __name__ == "__main__":
    entry.run(lambda: pretrain.main(trainer=MyTrainer))
