"""The model that an evaluation asks: log-probabilities, likeliest tokens and continuations, with the work shared by all
ranks and the results on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.data import Batch
from tinytron.distributed.agreement import agree
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import CheckpointError, ConfigError
from tinytron.evaluation.choices import Row, log_probs, score_rows, scored_logits
from tinytron.inference import Piece, SamplingOptions, complete
from tinytron.inference.engine import excluded_tokens, not_finite
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
from tinytron.model.protocols import require_gpt
from tinytron.text.run_tokenizer import RunTokenizer

Progress = Callable[[int], object]


def room_for_prompt(longest: int, new_tokens: int) -> int:
    """The number of tokens of a prompt to which ``new_tokens`` are added: what a model of ``longest`` tokens has left, but
    at least half."""
    return max(longest + 1 - new_tokens, (longest + 1) // 2)


@dataclass(frozen=True)
class Subject:
    """The ``model`` under evaluation. It accepts ``longest`` tokens, and ``tokens_per_batch`` are processed at a time.

    With a ``state`` every method is collective over the world: data-parallel ranks share the batches, and all ranks share
    the prompts. ``loss`` is that of a model other than the GPT. ``finite`` makes results that are NaN or infinite an error;
    otherwise scores are NaN. ``advance`` gets the number of rows done.
    """

    model: nn.Module
    tokenizer: RunTokenizer
    longest: int
    tokens_per_batch: int
    device: torch.device
    state: ParallelState | None = None
    loss: Callable[[Batch], LossSums] | None = None
    finite: bool = False
    advance: Progress = lambda rows: None

    @classmethod
    def of_checkpoint(
        cls, model: GPT, tokenizer: RunTokenizer, tokens_per_batch: int, state: ParallelState | None = None
    ) -> Subject:
        """A trained model, whole on every rank."""
        device = model.lm_head.weight.device
        return cls(model, tokenizer, model.config.block_size, tokens_per_batch, device, state, finite=True)

    def log_probs(self, rows: Sequence[Row]) -> list[float]:
        """The log-probability of every row's ``ids[start:]``, in nats. Raises: CheckpointError or ConfigError if one is not
        finite, with ``finite``."""

        def loss(batch: Batch) -> LossSums:
            self.advance(len(batch.labels))
            if isinstance(self.model, GPT) or self.loss is None:
                sums: LossSums = self.model(batch.input_ids, batch.labels)
                return sums
            return self.loss(batch)

        found = log_probs(self.model, loss, rows, **self._sharing())
        if self.finite and not all(map(math.isfinite, found)):
            raise not_finite("scores", self._dtype)
        return found

    def likeliest(self, rows: Sequence[Row], among: Sequence[int] | None = None) -> list[int] | None:
        """The likeliest token after every row's ``ids[:start]``, or the likeliest of the tokens ``among``; of rows that end
        after one more token, whichever. ``None`` if a logit is not finite. Raises: ConfigError for a model that is not the
        GPT; CheckpointError for logits that are not finite, with ``finite``."""
        model = require_gpt(self.model, "next tokens are those of", "use another evaluation")
        banned_V = excluded_tokens(model, self.tokenizer.tokenizer.vocab_size, self.tokenizer.tokenizer.unused)
        kept = None if among is None else torch.tensor(among, device=self.device)

        def score(batch: Batch) -> torch.Tensor:
            self.advance(len(batch.labels))
            found_B1 = torch.zeros(len(batch.labels), 1, dtype=torch.float64, device=self.device)
            for number, (logits_tV, _) in enumerate(scored_logits(model, batch)):
                if not len(logits_tV):  # the position is on another sequence-parallel rank
                    continue
                logits_V = logits_tV[0] if banned_V is None else logits_tV[0].masked_fill(banned_V, -math.inf)
                best = logits_V.argmax() if kept is None else kept[logits_V[kept].argmax()]
                found_B1[number] = torch.where(logits_V[best].isfinite(), best.double(), torch.nan)
            return found_B1

        found = score_rows(model, score, rows, **self._sharing()).squeeze(1).tolist()
        if not all(map(math.isfinite, found)):
            if self.finite:
                raise not_finite("logits", self._dtype)
            return None
        return list(map(int, found))

    def continuations(self, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> list[str] | None:
        """The text after every prompt. ``None`` if a logit is not finite. Raises: as ``likeliest``."""
        model = require_gpt(self.model, "texts are generated by", "use another evaluation")
        tokenizer = self.tokenizer.tokenizer
        size, rank = (self.state.layout.world_size, self.state.rank) if self.state else (1, 0)
        own = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))[rank::size]  # similar lengths together

        def advance(piece: Piece) -> None:
            self.advance(piece.finish is not None)

        def generate() -> dict[int, str]:
            done = complete(
                model,
                [prompts[number] for number in own],
                options,
                decode=tokenizer.decode,
                vocab_size=tokenizer.vocab_size,
                without=tokenizer.unused,
                batch_size=max(1, self.tokens_per_batch // self.longest),
                on_piece=advance,
            )
            return {number: sample.text for number, sample in zip(own, done.samples, strict=True)}

        try:
            texts = generate() if self.state is None else self._gathered(generate)
        except (CheckpointError, ConfigError):
            if self.finite:
                raise
            return None
        return [texts[number] for number in range(len(prompts))]

    def _gathered(self, generate: Callable[[], dict[int, str]]) -> dict[int, str]:
        assert self.state is not None, "there is nothing to gather"
        world = self.state.groups["world"]
        of_ranks: list[dict[int, str]] = [{}] * self.state.layout.world_size
        dist.all_gather_object(of_ranks, agree(generate, world), group=world)
        return {number: text for of_rank in of_ranks for number, text in of_rank.items()}

    def _sharing(self) -> dict[str, Any]:
        return {
            "longest": self.longest,
            "tokens_per_batch": self.tokens_per_batch,
            "device": self.device,
            "state": self.state,
        }

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype
