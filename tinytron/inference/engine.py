"""Text generation: prompts of any lengths in one batch, a key-value cache, reproducible samples.

prompts -> prefill: one pass over all of them -> one row per sample -> decode: one pass per further token -> pieces of text

The model accepts at most ``block_size`` tokens. A text that outgrows this continues from its newest half, whose keys are
computed again; if the window moved token by token, every step would have to recompute them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from tinytron.errors import CheckpointError, ConfigError, TinytronError
from tinytron.inference.kv_cache import KVCache
from tinytron.inference.sampler import SamplingOptions, next_tokens
from tinytron.inference.text import Decode, TextStream
from tinytron.model import GPT

Finish = Literal["stop", "length"]


@dataclass
class Sample:
    """One continuation of ``prompts[prompt]``: ``tokens`` (without a stop token; a stop string's tokens up to its end) and
    ``text`` (up to the stop string). ``finish``: ``stop``, or ``length`` after ``max_new_tokens``; ``stop_token`` is the
    stop token that ended it, if one did. ``cuts`` counts how often the text outgrew ``block_size``, so that the model no
    longer saw its beginning."""

    prompt: int
    number: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    stop_token: int | None = None
    cuts: int = 0


class Piece(NamedTuple):
    """One more token of ``samples[sample]``, or its end, and the text that is now certain (may be empty)."""

    sample: int
    token: int | None
    text: str
    finish: Finish | None


@dataclass
class Generation:
    """The samples, by prompt and then by number, and how long they took. ``prefill_tokens`` are those of the prompts and
    of texts that were cut; ``decode_tokens`` are those that needed their own pass."""

    samples: list[Sample]
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second, over all rows."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class _Row:
    """A sample in progress: the tokens that the model sees, its random numbers and its text."""

    def __init__(
        self, index: int, sample: Sample, prompt: Sequence[int], options: SamplingOptions, text: TextStream | None
    ) -> None:
        self.index, self.sample, self.limit, self.text = index, sample, options.max_new_tokens, text
        self.seen = list(prompt)
        self.uniform = _uniform(prompt, sample.number, options.seed, self.limit)

    def cut(self, longest: int) -> None:
        """Keep only the newest half of ``longest`` tokens if there are more than that."""
        if len(self.seen) > longest:
            self.seen = self.seen[-max(1, longest // 2) :]
            self.sample.cuts += 1

    def add(self, token: int, stop_tokens: Sequence[int]) -> Piece:
        """Append a token; the last piece carries the reason for the end."""
        if token in stop_tokens:
            self.sample.stop_token = token
            return self._end("stop", None, "")
        self.sample.tokens.append(token)
        self.seen.append(token)
        piece = self.text.add(token) if self.text else ""
        if self.text is not None and self.text.stopped:
            return self._end("stop", token, piece)
        if len(self.sample.tokens) == self.limit:
            return self._end("length", token, piece)
        return Piece(self.index, token, piece, None)

    def _end(self, finish: Finish, token: int | None, piece: str) -> Piece:
        if self.text is not None:
            piece += self.text.end()
            finish = "stop" if self.text.stopped else finish
            self.sample.text = self.text.text
        self.sample.finish = finish
        return Piece(self.index, token, piece, finish)


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    *,
    decode: Decode | None = None,
    vocab_size: int | None = None,
    without: Sequence[int] = (),
    batch_size: int = 32,
) -> Generator[Piece, None, Generation]:
    """Continue every prompt (token ids) ``num_samples`` times, ``batch_size`` rows at a time, and yield every piece as it
    comes; the generator's return value is the ``Generation``.

    ``decode`` turns token ids into text; without it texts are empty, and stop strings cannot be found. Only the first
    ``vocab_size`` tokens of the vocabulary are sampled, and none of ``without``. A sample depends on the weights, the
    prompt, its number and ``options``, but not on the other prompts (up to the rounding of the logits). Raises: ConfigError
    for prompts that are empty, longer than ``block_size`` or outside the vocabulary, for stop strings without ``decode``,
    and for a model that is spread over several processes.
    """
    _check(model, prompts, options, decode)
    owners = [(p, n) for p in range(len(prompts)) for n in range(options.num_samples)]
    result = Generation([Sample(p, n) for p, n in owners])
    for first in range(0, len(owners), max(1, batch_size)):
        rows = []
        for index in range(first, min(first + max(1, batch_size), len(owners))):
            sample = result.samples[index]
            prompt = prompts[sample.prompt]
            text = TextStream(decode, prompt, options.stop) if decode else None
            rows.append(_Row(index, sample, prompt, options, text))
        excluded = _excluded(model, vocab_size, without)
        while rows:
            rows = yield from _continue(model, rows, options, result, excluded)
    return result


def complete(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    *,
    decode: Decode | None = None,
    vocab_size: int | None = None,
    without: Sequence[int] = (),
    batch_size: int = 32,
    on_piece: Callable[[Piece], None] | None = None,
) -> Generation:
    """Run ``stream`` to its end; ``on_piece`` is called with every piece."""
    pieces = stream(
        model, prompts, options, decode=decode, vocab_size=vocab_size, without=without, batch_size=batch_size
    )
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            result: Generation = end.value
            return result
        if on_piece is not None:
            on_piece(piece)


def _check(model: GPT, prompts: Sequence[Sequence[int]], options: SamplingOptions, decode: Decode | None) -> None:
    if model.state is not None and (model.state.layout.sep > 1 or model.state.layout.ep > 1):
        raise ConfigError(
            "this model is spread over several processes; save a checkpoint and generate from it with load_model"
        )
    if options.stop and decode is None:
        raise ConfigError(f"--stop {options.stop[0]!r} needs a tokenizer; give one, or use stop_tokens")
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    for prompt in prompts:
        if not prompt:
            raise ConfigError("a prompt needs at least one token; use the end-of-text token to start from nothing")
        if len(prompt) > block_size:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens exceeds --block_size {block_size} of the model; "
                f"use at most {block_size} tokens"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise ConfigError(
                f"a prompt has token id {wrong}, outside 0..{vocab_size - 1} of the model; check the tokenizer"
            )


def _continue(
    model: GPT, rows: list[_Row], options: SamplingOptions, result: Generation, excluded: torch.Tensor | None
) -> Generator[Piece, None, list[_Row]]:
    """Prefill what ``rows`` have seen (equal prompts once), and decode all rows together until the last one ends or one has
    more tokens than the model accepts; returns the rows that have not ended."""
    start = time.perf_counter()
    used = sorted({tuple(row.seen) for row in rows})
    longest = max(map(len, used))
    left = max(row.limit - len(row.sample.tokens) for row in rows)
    limit = min(left, model.config.block_size - longest + 1)
    weight = model.lm_head.weight
    cache = KVCache(model.config, [longest - len(p) for p in used], longest + limit - 1, weight.dtype, weight.device)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in used], device=weight.device)
    logits = _logits(model, cache, ids, excluded)
    cache.keep(places := [used.index(tuple(row.seen)) for row in rows])
    logits = logits[places]
    draws = [row.uniform[len(row.sample.tokens) :][:limit] for row in rows]
    uniform = torch.stack([F.pad(drawn, (0, limit - len(drawn))) for drawn in draws]).to(weight.device)
    prefilled = False
    for step in range(limit):
        chosen = next_tokens(logits, options, uniform[:, step])
        usable = torch.isfinite(logits.amax(-1))
        tokens = torch.where(usable, chosen, -1).tolist()  # the host waits for the device here
        if min(tokens) < 0:
            raise not_finite("logits", weight.dtype)
        now = time.perf_counter()
        if prefilled:
            result.decode_seconds, result.decode_tokens = (
                result.decode_seconds + now - start,
                result.decode_tokens + len(rows),
            )
        else:
            result.prefill_seconds, prefilled = result.prefill_seconds + now - start, True
            result.prefill_tokens += sum(map(len, used))
        pieces = [row.add(token, options.stop_tokens) for row, token in zip(rows, tokens, strict=True)]
        yield from pieces
        start = time.perf_counter()  # exclude the consumer's time from the measured rate
        alive = [place for place, piece in enumerate(pieces) if piece.finish is None]
        rows = [rows[place] for place in alive]
        if not rows or step == limit - 1:
            break
        if len(alive) < len(pieces):
            chosen, uniform = chosen[alive], uniform[alive]
            cache.keep(alive)
        logits = _logits(model, cache, chosen.unsqueeze(1), excluded)
    for row in rows:
        row.cut(model.config.block_size)
    return rows


def not_finite(what: str, dtype: torch.dtype) -> TinytronError:
    """The error for a model whose ``what`` (logits, losses, ...) are NaN or infinite, with weights of ``dtype``."""
    if dtype == torch.float16:
        return ConfigError(f"the model's {what} are NaN or infinite in fp16, whose maximum is 65504; use --dtype fp32")
    return CheckpointError(
        f"the model's {what} are NaN or infinite, because its weights are, or diverged; use an earlier checkpoint"
    )


@torch.no_grad()
def _logits(model: GPT, cache: KVCache, ids_Bs: torch.Tensor, excluded_V: torch.Tensor | None) -> torch.Tensor:
    """The next token's logits ``[B, V]`` after ``ids_Bs``, which follow what is in the cache; the logits of ``excluded_V``
    are -inf."""
    with _evaluating(model):
        hidden_BsD, _ = model.hidden_states(ids_Bs, cache.extend(ids_Bs.shape[1]), cache=cache.layers)
        model.wait_for_params(model.lm_head)
        logits_BV: torch.Tensor = model.lm_head(hidden_BsD[:, -1])
    if excluded_V is not None:
        logits_BV.masked_fill_(excluded_V, float("-inf"))
    return logits_BV


def _excluded(model: GPT, vocab_size: int | None, without: Sequence[int]) -> torch.Tensor | None:
    """Mask of the model's tokens that are never sampled, ``[V]``: those that the tokenizer does not have."""
    weight = model.lm_head.weight
    first = len(weight) if vocab_size is None else vocab_size
    if first >= len(weight) and not without:
        return None
    excluded_V = torch.arange(len(weight)) >= first
    excluded_V[list(without)] = True
    return excluded_V.to(weight.device)


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _uniform(prompt: Sequence[int], number: int, seed: int, count: int) -> torch.Tensor:
    """``count`` uniform numbers in [0, 1), float64, determined by this prompt, sample number and seed: the same on every
    device and in every batch; a longer row begins with the shorter one."""
    text = f"{seed}:{number}:{','.join(map(str, prompt))}"
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(count, generator=generator, dtype=torch.float64)
