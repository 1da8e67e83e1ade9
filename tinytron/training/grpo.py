"""Reinforcement learning by GRPO (arXiv:2402.03300, section 4.1): several answers to each prompt, rewarded by a function of
the user, whose rewards are compared with each other.

Each step answers its prompts with the current weights, and then makes one or more updates. The loss of a token of answer i
is -min(r A, clip(r, 1 - eps, 1 + eps) A) + beta k3. Here r is the ratio of its probability to that at the start of the
step, A is the advantage of the answer, and k3 = exp(d) - d - 1 with d = log p_reference - log p is an unbiased estimate of
the divergence from the first model. Losses are averaged over the tokens of an answer, and then over answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.config import configure, field
from tinytron.data import Batch
from tinytron.data.batch import collate
from tinytron.data.prompts import NUMBER, Prompts, answer_row
from tinytron.distributed.agreement import agree
from tinytron.distributed.collectives import sum_over
from tinytron.errors import ConfigError, DataError
from tinytron.inference.sampler import SamplingOptions
from tinytron.model.lora import without_adapters
from tinytron.model.modules.loss import LossSums
from tinytron.model.protocols import require_gpt
from tinytron.training.backbone import BackbonedTrainer, BackbonedTrainerConfig
from tinytron.training.base import BaseTrainer, BaseTrainerConfig
from tinytron.training.config import Config
from tinytron.training.forward_pass import cross_entropy, forward_pass
from tinytron.training.memory import Frozen
from tinytron.training.reference import first_model, require_whole_rows
from tinytron.training.rollouts import Reward, Rollouts, Writer, advantages, interleaved, load_reward, roll_out
from tinytron.utils.phases import EVALUATION, FORWARD, phase
from tinytron.utils.sequences import IGNORE_INDEX

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT")
ADVANTAGE, OLD, REFERENCE = "advantage", "old_logp", "reference_logp"  # extra fields of a batch of answers


@dataclass
class GRPOTrainerConfig(BaseTrainerConfig):
    """The options of a run, and those of GRPO."""

    reward: str | None = field(
        "grpo/reward",
        default=None,
        help="function of the rewards, FILE.py:FUNCTION or MODULE:FUNCTION: (prompts, completions, **columns)",
    )
    group_size: int = field("optimization/grpo/group_size", default=4, help="answers sampled per prompt")
    iterations: int = field("optimization/grpo/iterations", default=1, help="updates with the answers of one step")
    beta: float = field(
        "optimization/ppo/beta", default=0.04, help="weight of the divergence from the first model; 0: none"
    )
    clip_eps: float = field(
        "optimization/ppo/clip_eps", default=0.2, help="clip range of the probability ratio (epsilon)"
    )
    scale_rewards: bool = field(
        "optimization/grpo/scale_rewards", default=True, help="divide advantages by the standard deviation in the group"
    )
    temperature: float = field(
        "optimization/ppo/sample_temperature", default=1.0, help="temperature of answers in training"
    )
    top_p: float = field("optimization/ppo/sample_top_p", default=1.0, help="top-p for answers in training; 1: off")
    max_new_tokens: int = field("grpo/max_new_tokens", default=64, help="longest answer, in tokens")
    rollout_batch_size: int = field("grpo/rollout_batch_size", default=64, help="answers written at once on each rank")
    tokenizer: str | None = field(
        "grpo/tokenizer", default=None, help="tokenizer.json; default: that of the first weights"
    )

    def __post_init__(self) -> None:
        for name, least, works in (("group_size", 2, 4), ("iterations", 1, 1), ("rollout_batch_size", 1, 64)):
            if getattr(self, name) < least:
                raise ConfigError(f"grpo.{name}={getattr(self, name)} must be at least {least}; use {works}")
        if not self.beta >= 0:
            raise ConfigError(f"optimization.ppo.beta={self.beta} must be at least 0; use 0.04")
        if not 0 < self.clip_eps < 1:
            raise ConfigError(f"optimization.ppo.clip_eps={self.clip_eps} must be above 0 and below 1; use 0.2")
        if not self.temperature > 0:
            raise ConfigError(
                f"optimization.ppo.sample_temperature={self.temperature} must be above 0, or all answers are alike; use 1.0"
            )
        self.sampling(0)

    def sampling(self, seed: int) -> SamplingOptions:
        """How answers are written in training. Raises: ConfigError for invalid values."""
        return SamplingOptions(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
            num_samples=self.group_size,
        )


@dataclass
class BackbonedGRPOTrainerConfig(GRPOTrainerConfig, BackbonedTrainerConfig):
    """The options of GRPO that starts from a model of Hugging Face."""


class GRPOTrainer(BaseTrainer[ConfigT, ModelT]):
    """Trains the GPT on the prompts of ``--dataset_path``, a file of JSON lines (data/prompts.py). ``--total_batch_size``
    counts prompts times ``--seq_len``, which must hold a prompt and its answer; ``--batch_size`` counts answers. Validation
    (``--val_dataset_path``) logs the mean reward of the likeliest answers; its loss is minus that reward. Options come from
    a job. Override ``reward`` to judge answers by a method.

    Raises: as ``BaseTrainer``; ConfigError for prompts that leave no room, or a reward that is not finite.
    """

    CONFIG: ClassVar[type] = GRPOTrainerConfig
    makes_batches = True  # instead of training on those of the data

    def __init__(self, spec: Config) -> None:
        self.options: GRPOTrainerConfig = configure(GRPOTrainerConfig)
        if spec.train.seq_len <= self.options.max_new_tokens:
            raise ConfigError(
                f"grpo.max_new_tokens={self.options.max_new_tokens} leaves no room for a prompt in --seq_len "
                f"{spec.train.seq_len}; use at most {spec.train.seq_len // 2}"
            )
        require_whole_rows(spec, "an answer")
        self._reward: Reward | None = None
        if type(self).reward is GRPOTrainer.reward:
            if self.options.reward is None:
                raise ConfigError(f"{type(self).__name__} needs rewards; give grpo.reward=rewards.py:reward")
            self._reward = load_reward(self.options.reward)
        super().__init__(spec)

    def reward(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> Sequence[float]:
        """A finite number for every one of ``completions``, which answer ``prompts`` (as they are in the file). ``columns``
        are the other keys of the file's lines, each a list. By default the function that ``grpo.reward`` names."""
        assert self._reward is not None, "set unless this method is overridden"
        return self._reward(prompts, completions, **columns)

    # Data.

    def _init_data(self, spec: Config) -> None:
        name = spec.ckpt.init_from
        if spec.data.dataset_path is None or name is None:
            missing = "prompts; give --dataset_path prompts.jsonl" if name is not None else "a model; give --init_from"
            raise ConfigError(f"{type(self).__name__} needs {missing}")
        paths = [spec.data.dataset_path, spec.data.val_dataset_path]
        given = self.options.tokenizer
        room = {"seq_len": spec.train.seq_len, "longest": spec.train.seq_len + 1 - self.options.max_new_tokens}

        def read() -> tuple[Writer, list[Prompts | None]]:
            writer = Writer.of_model(name, None if given is None else Path(given), spec.model.vocab_size)
            return writer, [None if path is None else Prompts(Path(path), writer.encode, **room) for path in paths]

        self.writer, (self.train_dataset, self.val_dataset) = agree(read, self.state.groups["world"])
        self.prompts: Prompts = self.train_dataset  # type: ignore[assignment]
        held_out: Any = self.val_dataset
        if held_out is not None and held_out.dialogues != self.prompts.dialogues:
            raise DataError(
                f"{held_out.file} and {self.prompts.file} have prompts of two kinds, texts and lists of messages; use one "
                "kind"
            )

    def _init_optimizer(self, config: Config) -> None:
        require_gpt(self.raw_model, f"{type(self).__name__} trains", "use a family that the GPT has, such as llama")
        super()._init_optimizer(config)

    def _frozen_models(self, config: Config) -> Frozen | None:
        others = super()._frozen_models(config)
        return others if others is None or not self._keeps_reference(config) else (*others, config.model)

    def _keeps_reference(self, config: Config) -> bool:
        return bool(self.options.beta) and not config.lora.lora_rank

    def _resume_from_checkpoint(self) -> None:
        """Load a checkpoint, and the first model as the reference. With LoRA that is the model without its adapters."""
        super()._resume_from_checkpoint()
        self.reference: nn.Module | None = None
        if self._keeps_reference(self.config):
            self.reference = first_model(self.config, self.raw_model, self.state)

    # A step.

    def train_step(self, microbatches: list[Batch]) -> None:
        """Answer the prompts of ``microbatches`` with the current weights, and update the weights ``iterations`` times."""
        numbers = [int(n) for batch in microbatches for n in batch.extras[NUMBER]]
        ids = [self.prompts.ids[n] for n in numbers]
        sampling = self._with_end(self.options.sampling(self.config.seed.seed + self.step))
        with phase(FORWARD):
            self.rollouts = self._roll_out(self.prompts, numbers, sampling)
            batches = self._batches(ids, self.rollouts, size=len(microbatches[0].labels))
        super().train_step(batches)
        # The weights have changed: from here on a signal does not drop the step, which would be answered and made again.
        drops, self.guards.acts_within_steps = self.guards.acts_within_steps, False
        try:
            for _ in range(1, self.options.iterations):
                self.reporter.window.drop_last()
                super().train_step(batches)
        finally:
            self.guards.acts_within_steps = drops

    def _roll_out(self, prompts: Prompts, numbers: list[int], sampling: SamplingOptions) -> Rollouts:
        """Answers to the ``prompts`` with these ``numbers``, which the ranks of ``sp_group`` have in common and share.
        Collective."""

        def answer() -> Rollouts:
            mine = numbers[self.sp_rank :: self.sp_world_size]
            rows, ids = [prompts.rows[n] for n in mine], [prompts.ids[n] for n in mine]
            return roll_out(self._gpt, self.writer, rows, ids, self.reward, sampling, self.options.rollout_batch_size)

        made = agree(answer, self.state.groups["world"])
        parts: list[Any] = [None] * self.sp_world_size
        dist.all_gather_object(parts, made, group=self.sp_group)
        return interleaved(parts)

    @property
    def _gpt(self) -> Any:
        return self.raw_model

    def _with_end(self, sampling: SamplingOptions) -> SamplingOptions:
        """``sampling`` with what ends an answer: in a dialogue the end of the turn, in a text that of the document."""
        if not self.prompts.dialogues:
            return replace(sampling, stop_tokens=self.writer.tokenizer.stop_tokens)
        stop_tokens, stop = self.writer.dialogue.end
        return replace(sampling, stop_tokens=stop_tokens, stop=stop)

    def _batches(self, ids: list[list[int]], made: Rollouts, size: int) -> list[Batch]:
        """Micro-batches of ``size`` answers on the device, with their advantages, and their log-probabilities under the
        reference and, for several updates, under the current weights."""
        seq_len = self.config.train.seq_len
        advantages_PG = advantages(made.rewards, scale=self.options.scale_rewards)
        judged = {"reward": made.rewards, "length": made.lengths, "ended": made.ended}
        samples = []
        for i, prompt in enumerate(ids):
            for g, answer in enumerate(made.answers[i]):
                sample = answer_row(prompt, answer, seq_len)
                numbers = {name: values[i, g].double() for name, values in judged.items()}
                samples.append({**sample, ADVANTAGE: advantages_PG[i, g], **numbers})
        batches = []
        for first in range(0, len(samples), size):
            batch = self.data.preparer.prepare(collate(samples[first : first + size])).to(self.device)
            extras = dict(batch.extras)
            if self.options.iterations > 1:
                extras[OLD] = self._log_probs(self.raw_model, batch)
            if self.options.beta:
                model = self.raw_model if self.reference is None else self.reference
                with without_adapters(model) if self.reference is None else contextlib.nullcontext():
                    extras[REFERENCE] = self._log_probs(model, batch)
            batches.append(batch._replace(extras=extras))
        return batches

    @torch.no_grad()
    def _log_probs(self, model: Any, batch: Batch) -> torch.Tensor:
        """The log-probability of every target of ``batch``, without dropout: ``[B, S]``, 0 where there is none."""
        was_training = model.training
        model.eval()
        x_BSD, _ = model.hidden_states(batch.input_ids, batch.positions, batch.documents, padding_Bs=batch.padding)
        model.wait_for_params(model.lm_head)
        sums = cross_entropy(model, x_BSD, batch)
        model.train(was_training)
        assert sums.per_token is not None, "the fused loss returns every token's cross entropy"
        return -sums.per_token.view_as(batch.labels)

    def _loss(self, batch: Batch) -> LossSums:
        """The loss as sums over answers. Its gradient is that of the tokens' cross entropies, each times the derivative of
        the loss by it, so the fused loss is used twice: for the log-probabilities, and then with these weights."""
        model: Any = self.raw_model
        passed = forward_pass(model, batch, self.state)
        x_BSD = passed.hidden_BsD
        with torch.no_grad():
            sums = cross_entropy(model, x_BSD.detach(), batch)
            assert sums.per_token is not None, "the fused loss returns every token's cross entropy"
            logp_BS = -sums.per_token.view_as(batch.labels)
            own = token_losses(
                logp_BS,
                batch.extras.get(OLD, logp_BS),
                batch.extras.get(REFERENCE),
                batch.extras[ADVANTAGE].to(logp_BS.dtype),
                self.options.beta,
                self.options.clip_eps,
            )
            real_BS = (batch.labels != IGNORE_INDEX).to(logp_BS.dtype)
            length_B1 = sum_over(real_BS.sum(1, keepdim=True), self.sp_group)
            share_BS = real_BS / length_B1.clamp(min=1)
            total = (own.loss * share_BS).sum()
            first = float(self.sp_rank == 0)  # the ranks of a group share their answers
            aux = {"kl": (own.divergence * share_BS).sum(), "clipped": (own.clipped * share_BS).sum()}
            for name, label in (("reward", "reward"), ("length", "completion_length"), ("ended", "completions_ended")):
                aux[label] = batch.extras[name].sum() * first
        objective = cross_entropy(model, x_BSD, batch, own.slope * share_BS).objective
        counts = dict.fromkeys(aux, self._normalizer(batch).to(total.dtype))
        found = LossSums(objective, total.to(objective.dtype), aux, counts=counts)
        self._custom["train" if model.training else "val"].update(found, batch)
        return passed.with_routing_losses(model, found)

    def _normalizer(self, batch: Batch) -> torch.Tensor:
        answers = len(batch.labels) * (self.sp_rank == 0)
        return torch.full((), answers, dtype=torch.int64, device=self.device)

    # Validation.

    def eval(self) -> float:
        """Answer the validation prompts, always by the likeliest token, log the mean reward, and return minus that.
        Collective."""
        held_out: Any = self.val_dataset
        mine = range(self.dp_rank, len(held_out), self.dp_world_size)
        parent = self.prompts if not isinstance(held_out, Prompts) else held_out
        numbers = [int(held_out[n][NUMBER]) for n in mine]
        greedy = self._with_end(SamplingOptions(max_new_tokens=self.options.max_new_tokens, temperature=0.0))

        with self.reporter.aside(EVALUATION), self.guards.paused():
            made = self._roll_out(parent, numbers, greedy)
            parts = (made.rewards.sum(), made.lengths.sum(), made.ended.sum(), len(numbers))
            first = float(self.sp_rank == 0)
            sums = torch.tensor([float(part) * first for part in parts], dtype=torch.float64, device=self.device)
            reward, length, ended, count = sum_over(sums, self.state.groups["world"]).tolist()
        loss = -reward / count
        self.evals.remember(self.step, loss)
        self.one_step_results["val_loss"] = loss
        means = {
            "tokens": int(length),
            "reward": -loss,
            "completion_length": length / count,
            "completions_ended": ended / count,
        }
        self.reporter.write(self.evals.noted([{"step": self.step, "stage": "val", "loss": loss, **means}]))
        return loss


class BackbonedGRPOTrainer(GRPOTrainer[ConfigT, ModelT], BackbonedTrainer[ConfigT, ModelT]):
    """``GRPOTrainer`` from the weights ``--init_from`` (``architecture.backbone.weights``)."""

    CONFIG = BackbonedGRPOTrainerConfig


@dataclass(frozen=True)
class TokenLosses:
    """For every token: its ``loss``, the derivative of the loss by the token's cross entropy (``slope``), its
    ``divergence`` from the reference, and whether its ratio was ``clipped``; all ``[B, S]``."""

    loss: torch.Tensor
    slope: torch.Tensor
    divergence: torch.Tensor
    clipped: torch.Tensor


def token_losses(
    logp_BS: torch.Tensor,
    old_BS: torch.Tensor,
    reference_BS: torch.Tensor | None,
    advantage_B: torch.Tensor,
    beta: float,
    clip_eps: float,
) -> TokenLosses:
    """GRPO's loss of every token (arXiv:2402.03300, equations 3 and 4)."""
    advantage_B1 = advantage_B[:, None]
    ratio_BS = (logp_BS - old_BS).exp()
    plain_BS, limited_BS = ratio_BS * advantage_B1, ratio_BS.clamp(1 - clip_eps, 1 + clip_eps) * advantage_B1
    clipped_BS = limited_BS < plain_BS  # constant there
    loss_BS = -torch.minimum(plain_BS, limited_BS)
    slope_BS = torch.where(clipped_BS, 0.0, plain_BS)  # the derivative of -r A by -log p
    divergence_BS = torch.zeros_like(logp_BS)
    if reference_BS is not None:
        difference_BS = reference_BS - logp_BS
        divergence_BS = difference_BS.exp() - difference_BS - 1
        loss_BS = loss_BS + beta * divergence_BS
        slope_BS = slope_BS + beta * (difference_BS.exp() - 1)  # the derivative by -log p, which is in d
    return TokenLosses(loss_BS, slope_BS, divergence_BS, clipped_BS.to(logp_BS.dtype))
