"""The loss of a step from whatever a model returns: Tinytron's sums, a mean, or the result of a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tinytron.data import Batch
from tinytron.errors import ConfigError
from tinytron.model.modules.loss import LossSums

# ``compute_loss_func(outputs, inputs)``: the mean loss of a micro-batch from the model's outputs and its inputs by name.
LossFunction = Callable[[Any, Mapping[str, Any]], torch.Tensor]


def loss_sums(outputs: Any, batch: Batch, compute: LossFunction | None = None) -> LossSums:
    """The loss sums of ``batch``: those that the model returned as ``outputs``; or from a mean over its targets, which is
    the result of ``compute``, or else ``outputs.loss``. Raises: ConfigError if there is no loss."""
    if compute is not None:
        return sums_of_mean(compute(outputs, batch.as_inputs()), batch, "compute_loss_func")
    if isinstance(outputs, LossSums):
        return outputs
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise ConfigError(
            f"the model returned a {type(outputs).__name__} without a loss; return LossSums or an object with .loss, which "
            "is a mean, or set the trainer's compute_loss_func"
        )
    return sums_of_mean(loss, batch, "outputs.loss")


def sums_of_mean(mean: Any, batch: Batch, source: str, aux: Mapping[str, torch.Tensor] | None = None) -> LossSums:
    """The sums whose division by the global number of targets is right if ``mean`` is the mean over this batch's targets,
    weighted if they have weights. ``aux`` are further means to log. ``source`` names the mean in errors.

    A batch without targets has no mean: whatever it is there, such as NaN, counts as 0. Raises: ConfigError unless ``mean``
    is a scalar tensor.
    """
    mean = checked_mean(mean, source)
    weight = batch.target_weight().to(mean.dtype)
    total = torch.where(weight > 0, mean, 0.0) * weight
    return LossSums(total, total.detach(), *means_to_log(aux or {}, batch))


def checked_mean(mean: Any, source: str) -> torch.Tensor:
    """``mean``, in fp32 or fp64, as a scalar. Raises: ConfigError unless it is one number."""
    if not torch.is_tensor(mean) or mean.numel() != 1:
        shown = f"a tensor of shape {list(mean.shape)}" if torch.is_tensor(mean) else f"a {type(mean).__name__}"
        raise ConfigError(f"{source} is {shown}; return one number, the mean loss of the micro-batch, as a tensor")
    return mean.reshape(()).to(torch.promote_types(mean.dtype, torch.float32))


def means_to_log(
    aux: Mapping[str, torch.Tensor], batch: Batch
) -> tuple[dict[str, torch.Tensor], None, dict[str, torch.Tensor]]:
    """The fields ``aux``, ``per_token`` and ``counts`` of ``LossSums`` for means over the targets of ``batch``."""
    weight = batch.target_weight().float()
    sums = {name: torch.where(weight > 0, value.detach().float().mean(), 0.0) * weight for name, value in aux.items()}
    return sums, None, dict.fromkeys(sums, weight)
