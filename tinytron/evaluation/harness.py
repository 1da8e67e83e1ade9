"""Runs a trained model in EleutherAI's lm-evaluation-harness, which has hundreds of published tasks.

``lm_eval.simple_evaluate(model=harness_model("log/<run>"), tasks=["arc_easy"])``; needs ``pip install lm-eval``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tinytron.data import Batch
from tinytron.errors import ConfigError
from tinytron.evaluation.choices import Row, encode_pair, rows_of_text, score_rows, scored_logits, windows
from tinytron.evaluation.subject import room_for_prompt
from tinytron.inference import SamplingOptions, complete
from tinytron.inference.engine import not_finite
from tinytron.interop.open import local_checkpoint, open_model
from tinytron.model import GPT
from tinytron.text.run_tokenizer import RunTokenizer, tokenizer_of_run

# Task settings for the number of tokens to generate; the first is the harness's own.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Request(Protocol):
    """A request of the harness (``lm_eval.api.instance.Instance``)."""

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments: a context and a continuation, a text, or a context and generation options."""


def harness_model(
    checkpoint: Path | str,
    *,
    tokenizer: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    batch_tokens: int = 8192,
    max_new_tokens: int = 256,
) -> Any:
    """An ``lm_eval.api.model.LM`` for any model that ``open_model`` opens. ``batch_tokens`` are processed at a time;
    ``max_new_tokens`` are generated for tasks that do not set a number.

    Raises: ConfigError without the package or a tokenizer; and what ``open_model`` raises.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed: pip install lm-eval")
    base: type = importlib.import_module("lm_eval.api.model").LM
    source = local_checkpoint(checkpoint)
    model, config = open_model(source, device, dtype)
    found = tokenizer_of_run(config, tokenizer, source)
    answers = Answers(model, found, batch_tokens, max_new_tokens)
    methods = {
        "loglikelihood": lambda self, requests: answers.loglikelihood(requests),
        "loglikelihood_rolling": lambda self, requests: answers.loglikelihood_rolling(requests),
        "generate_until": lambda self, requests: answers.generate_until(requests),
    }
    return type("TinytronLM", (base,), methods)()


class Answers:
    """Answers the harness's three kinds of requests with ``model``."""

    def __init__(
        self, model: GPT, tokenizer: RunTokenizer, batch_tokens: int = 8192, max_new_tokens: int = 256
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self.max_new_tokens = batch_tokens, max_new_tokens
        self.longest = model.config.block_size

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """For each continuation after its context: the log-probability in nats, and whether greedy generation produces it.
        A context that is too long loses its beginning; a continuation that is too long is scored in parts."""
        parts: list[list[Row]] = []
        for number, request in enumerate(requests):
            context, continuation = request.args
            ids, start = encode_pair(context, continuation, self.tokenizer)
            parts.append(list(windows(number, ids, start, self.longest)))
        return self._sums(parts)

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """The log-probability of whole texts in nats, as ``rows_of_text`` cuts them."""
        parts = [
            list(rows_of_text(number, request.args[0], self.tokenizer, self.longest))
            for number, request in enumerate(requests)
        ]
        return [score for score, _ in self._sums(parts)]

    def _sums(self, parts: list[list[Row]]) -> list[tuple[float, bool]]:
        """For each request the sum of its rows' log-probabilities, and whether all their tokens are the likeliest."""
        rows = [row for own in parts for row in own]
        scores_R2 = score_rows(
            self.model,
            functools.partial(_score, self.model),
            rows,
            longest=self.longest,
            tokens_per_batch=self.batch_tokens,
            device=self.model.lm_head.weight.device,
            columns=2,
        )
        if not bool(scores_R2.isfinite().all()):
            raise not_finite("scores", self.model.lm_head.weight.dtype)
        sums, greedy = [0.0] * len(parts), [True] * len(parts)
        for row, (log_prob, misses) in zip(rows, scores_R2.tolist(), strict=True):
            sums[row.question] += log_prob
            greedy[row.question] &= misses == 0
        return list(zip(sums, greedy, strict=True))

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """A continuation of each context up to one of the strings ``until``; greedy unless ``do_sample`` is set. Equal
        requests (a task's ``repeats``) get different samples. A context that is too long loses its beginning, but keeps
        at least half of the model's window; the continuation gets the rest."""
        equal: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            equal.setdefault(json.dumps(request.args, sort_keys=True, default=str), []).append(number)
        texts = [""] * len(requests)
        for numbers in equal.values():
            context, given = requests[numbers[0]].args
            options = self._options(given, len(numbers))
            ids = self.tokenizer.prompt_ids(context)
            room = room_for_prompt(self.longest, options.max_new_tokens)
            tokenizer = self.tokenizer.tokenizer
            done = complete(
                self.model,
                [ids[-room:]],
                options,
                decode=tokenizer.decode,
                vocab_size=tokenizer.vocab_size,
                without=tokenizer.unused,
            )
            for place, number in enumerate(numbers):
                texts[number] = done.samples[min(place, len(done.samples) - 1)].text
        return texts

    def _options(self, given: Mapping[str, Any], repeats: int) -> SamplingOptions:
        """Sampling options for the settings of a task; null values and a ``top_k`` of -1 mean off."""
        known = {name: value for name, value in given.items() if value is not None}
        sampled = bool(known.get("do_sample", float(known.get("temperature", 0)) > 0))
        sampled = sampled and float(known.get("temperature", 1)) > 0
        length = next((int(known[name]) for name in _LENGTHS if name in known), self.max_new_tokens)
        until = known.get("until", [])
        return SamplingOptions(
            max_new_tokens=min(length, self.longest),
            temperature=float(known.get("temperature", 1.0)) if sampled else 0.0,
            top_k=max(0, int(known.get("top_k", 0))) if sampled else 0,
            top_p=float(known.get("top_p", 1.0)) if sampled else 1.0,
            min_p=float(known.get("min_p", 0.0)) if sampled else 0.0,
            num_samples=repeats if sampled else 1,
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            stop_tokens=self.tokenizer.stop_tokens,
        )


def _score(model: GPT, batch: Batch) -> torch.Tensor:
    """For every row the log-probability of its labels in nats, and how many labels are not the likeliest token,
    ``[B, 2]``."""
    found = []
    for logits_tV, labels_t in scored_logits(model, batch):
        wide = torch.promote_types(logits_tV.dtype, torch.float32)
        log_prob_t1 = logits_tV.to(wide).log_softmax(-1).gather(1, labels_t.unsqueeze(1))
        misses_t = logits_tV.argmax(-1) != labels_t
        found.append(torch.stack([log_prob_t1.sum(dtype=torch.float64), misses_t.sum().double()]))
    return torch.stack(found)
