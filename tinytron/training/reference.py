"""A trainer whose loss has a second part: the divergence from another, frozen model over the whole vocabulary.

Both models' logits are in memory for one chunk of tokens only (kernels/kl_divergence.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn as nn

from tinytron.data import Batch
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError
from tinytron.interop.causal_lm import CausalLM
from tinytron.kernels.kl_divergence import linear_kl_divergence
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums, fused_linear_cross_entropy
from tinytron.model.protocols import require_gpt
from tinytron.training.base import BaseTrainer
from tinytron.training.build import build_model
from tinytron.training.config import Config
from tinytron.training.forward_pass import forward_pass
from tinytron.training.run.resume import fill_model
from tinytron.utils.sequences import IGNORE_INDEX

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT")


@dataclass(frozen=True)
class Divergence:
    """The loss is ``data`` times the cross entropy plus ``weight`` times KL(policy || reference), or KL(reference ||
    policy) if ``of_reference``, with logits divided by ``temperature``."""

    weight: float
    data: float = 1.0
    of_reference: bool = False
    temperature: float = 1.0


class ReferenceTrainer(BaseTrainer[ConfigT, ModelT]):
    """Trains the GPT. While ``reference`` is set, its divergence is part of the loss as ``divergence`` says, and is logged
    as ``kl``, in nats per target."""

    reference: nn.Module | None = None  # a GPT, or a CausalLM with a head that is a matrix
    divergence: Divergence

    def _init_optimizer(self, config: Config) -> None:
        require_gpt(self.raw_model, f"{type(self).__name__} trains", "use a family that the GPT has, such as llama")
        super()._init_optimizer(config)

    def _loss(self, batch: Batch) -> LossSums:
        if self.reference is None:
            return super()._loss(batch)
        model, how = self.raw_model, self.divergence
        assert isinstance(model, GPT), "_init_optimizer has checked it"
        with torch.no_grad():
            other_BsD, other_head = _hidden_states(self.reference, batch)
        passed = forward_pass(model, batch, self.state)
        x_BsD = passed.hidden_BsD
        labels_T = batch.labels.flatten()
        weights_T = None if batch.weights is None else batch.weights.flatten()
        counted_T = (labels_T != IGNORE_INDEX).to(torch.promote_types(x_BsD.dtype, torch.float32))
        head, x_TD = model.lm_head.weight, x_BsD.flatten(0, 1)
        if weights_T is not None:
            counted_T = counted_T * weights_T
        kl = linear_kl_divergence(
            x_TD,
            head,
            other_BsD.flatten(0, 1),
            other_head,
            counted_T,
            of_other=how.of_reference,
            temperature=how.temperature,
        )
        sums = fused_linear_cross_entropy(
            x_TD,
            head,
            labels_T,
            weights_T=weights_T,
            z_loss_coef=model.z_loss_coef,
            by=model.kernels.cross_entropy,
            count_hits=model.wants_hits,
        )
        assert sums.per_token is not None, "the fused loss returns every token's cross entropy"
        # A temperature divides the gradient by its square, which this undoes (arXiv:1503.02531, section 2).
        objective = how.data * sums.objective + how.weight * how.temperature**2 * kl
        sums = sums._replace(objective=objective, per_token=sums.per_token.view_as(batch.labels))
        sums = passed.with_routing_losses(model, sums)
        counts = {**sums.counts, "kl": counted_T.sum()}
        sums = sums._replace(aux={**sums.aux, "kl": kl.detach()}, counts=counts)
        self._custom["train" if model.training else "val"].update(sums, batch)
        return sums


def require_whole_rows(config: Config, what: str) -> None:
    """Raises: ConfigError if rows are to be cut (``--seq_warmup_lens``), or the losses of their tokens are to be logged,
    where each row is ``what``."""
    if config.logging.log_loss_by_position:
        raise ConfigError(
            f"--log_loss_by_position needs the loss of each token, but here it is that of {what}; drop it"
        )
    if lengths := config.train.seq_warmup_lens:
        raise ConfigError(
            f"--seq_warmup_lens {' '.join(map(str, lengths))} cuts sequences, but here each is {what}; drop it"
        )


def first_model(config: Config, model: nn.Module, state: ParallelState) -> nn.Module:
    """A model of the class of ``model``, a GPT, with the weights that the run began with, frozen and without dropout.
    Collective. Raises: as ``fill_model``."""
    made = build_model(config, state, type(model))  # type: ignore[arg-type]
    if (name := config.ckpt.init_from) is not None:
        fill_model(made, name, state)
    return made.eval().requires_grad_(False)


def _hidden_states(reference: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states that the head of ``reference`` is applied to, ``[B, s, D]``, and the head ``[V, D]``."""
    if isinstance(reference, GPT):
        hidden_BsD, _ = reference.hidden_states(
            batch.input_ids, batch.positions, batch.documents, padding_Bs=batch.padding
        )
        return hidden_BsD, reference.lm_head.weight
    assert isinstance(reference, CausalLM), "the trainers set no other model"
    if batch.positions is not None or batch.documents is not None:
        raise ConfigError("--document_mask needs Tinytron's GPT as the reference, too; use --no-document_mask")
    hidden: Any = reference.hf.get_decoder()(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden, reference.hf.get_output_embeddings().weight
