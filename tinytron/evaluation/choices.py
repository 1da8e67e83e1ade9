"""Multiple choice: which of several continuations of a context is the likeliest.

A task file has one line per item: ``{"context": "The sky is", "choices": [" blue", " made of cheese"], "answer": 0}``.
Context and choice are tokenized together, as the model saw text in training; white space at the end of the context then
belongs to the choice, because tokenizers put it there. The tokens after the context's tokens are scored. If a token would
span the border, the two are tokenized separately, so that exactly the choice is scored.

items -> rows (one per item and choice) -> batches that do not depend on the number of ranks -> sums of log-probabilities
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from tinytron.data import Batch
from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.sequence_parallel.ulysses import cut_sequence
from tinytron.errors import ConfigError, DataError
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
from tinytron.text.run_tokenizer import RunTokenizer
from tinytron.utils.sequences import IGNORE_INDEX
from tinytron.utils.texts import numbered_lines, whole_characters

ROUNDING = 16  # row lengths are multiples of this: few distinct shapes, and equal parts for sequence-parallel ranks
FORM = '{"context": "text", "choices": ["text", "text"], "answer": 0}'
SCORES = {"accuracy": "sum", "accuracy_per_token": "per token", "accuracy_per_byte": "per byte"}


@dataclass(frozen=True)
class Item:
    """A question: ``choices[answer]`` is the right continuation of ``context``."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Row:
    """Choice ``choice`` of item number ``question``: ``ids[start:]`` are scored, ``ids[:start]`` are their context;
    ``text_bytes`` is the choice's length."""

    question: int
    choice: int
    ids: tuple[int, ...]
    start: int
    text_bytes: int


def read_items(path: Path) -> list[Item]:
    """The items of a task file. Raises: DataError naming the first line that does not have the right form."""
    try:
        lines = list(numbered_lines(path.read_bytes()))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the task file {path} cannot be read ({error}); give lines of the form {FORM}") from error
    items = [_item(line, f"{path}: line {number}") for number, line in lines]
    if not items:
        raise DataError(f"the task file {path} is empty; give lines of the form {FORM}")
    return items


def _item(line: str, where: str) -> Item:
    try:
        row = json.loads(line)
        context, choices, answer = row["context"], row["choices"], row["answer"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where} is not of the form {FORM} ({type(error).__name__}: {error})") from error
    texts = isinstance(context, str) and isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not texts or len(choices) < 2:
        raise DataError(f"{where} needs a text as context and at least two non-empty texts as choices, as in {FORM}")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer {answer!r} must be the number of a choice, 0 to {len(choices) - 1}")
    return Item(whole_characters(context), tuple(map(whole_characters, choices)), answer)


def encode_pair(context: str, continuation: str, tokenizer: RunTokenizer) -> tuple[list[int], int]:
    """Token ids of both together, and the index at which the continuation begins, at least 1. An empty context becomes the
    token that texts begin with. Raises: ConfigError if the tokenizer has no such token."""
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    before = tokenizer.prompt_ids(kept)
    lead = 1 if before[0] in (tokenizer.begin, tokenizer.end) else 0
    whole = before[:lead] + tokenizer.ids(kept + continuation)
    if whole[: len(before)] != before or len(whole) == len(before):  # a token spans the border
        whole = before + tokenizer.ids(continuation)
    return whole, len(before)


def encode_items(items: Sequence[Item], tokenizer: RunTokenizer, longest: int) -> list[Row]:
    """One row per choice. A context that is too long loses its beginning: the model accepts ``longest`` tokens. Raises:
    DataError for a choice that is too long or has no tokens."""
    rows = []
    for number, item in enumerate(items):
        for choice, text in enumerate(item.choices):
            ids, start = encode_pair(item.context, text, tokenizer)
            if not 1 <= len(ids) - start <= longest:
                raise DataError(
                    f"item {number + 1}: choice {choice} has {len(ids) - start} tokens, which must be 1 to {longest}; "
                    "shorten it, or use a model with a longer context"
                )
            cut = max(0, len(ids) - longest - 1)
            rows.append(Row(number, choice, tuple(ids[cut:]), start - cut, len(text.encode())))
    return rows


def windows(number: int, ids: Sequence[int], start: int, longest: int) -> Iterator[Row]:
    """``ids[start:]`` of text ``number`` in rows that the model can process, with each token scored once. All rows are full
    if the text is long enough."""
    while start < len(ids):
        end = min(len(ids), start + longest)
        first = max(0, end - longest - 1)
        yield Row(number, 0, tuple(ids[first:end]), start - first, 0)
        start = end


def rows_of_text(number: int, text: str, tokenizer: RunTokenizer, longest: int) -> Iterator[Row]:
    """The rows of a whole text, after the token that texts begin with, or else the end-of-text token. Without either, all
    tokens but the first are scored."""
    first = tokenizer.end if tokenizer.begin is None else tokenizer.begin
    ids = tokenizer.ids(text)
    return windows(number, ids if first is None else [first, *ids], 1, longest)


def plan_batches(rows: Sequence[Row], tokens: int, longest: int) -> list[list[int]]:
    """Row numbers grouped into batches of similar length, at most ``tokens`` each including padding; longest rows first."""
    batches: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda n: (-len(rows[n].ids), n)):
        if not batches or (len(batches[-1]) + 1) * padded_length(rows[batches[-1][0]], longest) > tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


def padded_length(row: Row, longest: int) -> int:
    """The number of columns of a batch whose longest row is ``row``."""
    return min(longest, -(-(len(row.ids) - 1) // ROUNDING) * ROUNDING)


def batch_of(rows: Sequence[Row], columns: int) -> Batch:
    """Rows padded on the right; only the continuations have labels."""
    ids_BS, labels_BS = (
        torch.zeros(len(rows), columns, dtype=torch.int64),
        torch.full((len(rows), columns), IGNORE_INDEX),
    )
    for number, row in enumerate(rows):
        ids = torch.tensor(row.ids)
        ids_BS[number, : len(ids) - 1] = ids[:-1]
        labels_BS[number, row.start - 1 : len(ids) - 1] = ids[row.start :]
    return Batch(ids_BS, labels_BS)


def log_probs(
    model: nn.Module,
    loss: Callable[[Batch], LossSums],
    rows: Sequence[Row],
    *,
    longest: int,
    tokens_per_batch: int,
    device: torch.device,
    state: ParallelState | None = None,
) -> list[float]:
    """The log-probability of every row's continuation, in nats; batches and ranks as in ``score_rows``.

    Raises: ConfigError on every rank if ``loss`` does not return the loss of every token.
    """

    def score(batch: Batch) -> torch.Tensor:
        nats = loss(batch).per_token
        if nats is None:
            raise ConfigError("tasks need the loss of every token, but this model has none; set LossSums.per_token")
        return -nats.view_as(batch.labels).sum(1, dtype=torch.float64, keepdim=True)

    sums_R1 = score_rows(
        model, score, rows, longest=longest, tokens_per_batch=tokens_per_batch, device=device, state=state
    )
    values: list[float] = sums_R1.squeeze(1).tolist()
    return values


@torch.no_grad()
def score_rows(
    model: nn.Module,
    score: Callable[[Batch], torch.Tensor],
    rows: Sequence[Row],
    *,
    longest: int,
    tokens_per_batch: int,
    device: torch.device,
    state: ParallelState | None = None,
    columns: int = 1,
) -> torch.Tensor:
    """The result of ``score`` for every row, fp64 ``[rows, columns]``, with ``model`` in evaluation mode. ``score`` gets
    batches on ``device`` and returns sums over each row's labels, fp64 ``[B, columns]``.

    The batches are the same on every layout. With ``state``, data-parallel ranks share the batches, sequence-parallel ranks
    see their part of each row, and all ranks get all results. Collective over the world.
    """
    share, part = (state.layout.dp, state.group_rank("dp")) if state else (1, 0)
    was_training = model.training
    model.eval()
    sums_RC = torch.zeros(len(rows), columns, dtype=torch.float64, device=device)
    batches = plan_batches(rows, tokens_per_batch, longest)
    try:
        for first in range(0, len(batches), share):
            own = first + part < len(batches)
            numbers = batches[first + part] if own else batches[0]  # every rank joins the model's collectives
            batch = batch_of([rows[n] for n in numbers], padded_length(rows[numbers[0]], longest))
            if state is not None:
                rank, size = state.group_rank("sep"), state.layout.sep
                batch = Batch(cut_sequence(batch.input_ids, rank, size), cut_sequence(batch.labels, rank, size))
            scores_BC = score(batch.to(device))
            if own:
                sums_RC[numbers] += scores_BC
    finally:
        model.train(was_training)
    if state is not None:
        sum_over(sums_RC, state.groups["world"])
    return sums_RC


def scored_logits(model: GPT, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For every row of ``batch`` the logits ``[t, V]`` at its labels, and the labels ``[t]``. Logits of other positions are
    not computed."""
    hidden_BsD, _ = model.hidden_states(batch.input_ids)
    model.wait_for_params(model.lm_head)
    for hidden_sD, labels_s in zip(hidden_BsD, batch.labels, strict=True):
        scored_s = labels_s != IGNORE_INDEX
        yield model.lm_head(hidden_sD[scored_s]), labels_s[scored_s]


def summarize(items: Sequence[Item], rows: Sequence[Row], scores: Sequence[float]) -> dict[str, Any]:
    """Accuracies with their standard errors: by the choices' log-probabilities as they are, per token and per byte. The
    first of equal ones wins. All are NaN if any log-probability is NaN, because then no choice is the likeliest."""
    result: dict[str, Any] = {"items": len(items)}
    for name in SCORES:
        best: dict[int, tuple[float, int]] = {}
        for row, score in zip(rows, scores, strict=True):
            units = {"accuracy": 1, "accuracy_per_token": len(row.ids) - row.start, "accuracy_per_byte": row.text_bytes}
            value = score / units[name]
            if row.question not in best or value > best[row.question][0]:
                best[row.question] = value, row.choice
        # Compare texts, not numbers: some benchmarks list the right choice twice.
        right = sum(item.choices[best[n][1]] == item.choices[item.answer] for n, item in enumerate(items)) / len(items)
        accuracy = math.nan if any(map(math.isnan, scores)) else right
        result[name] = accuracy
        result[f"{name}_stderr"] = math.sqrt(accuracy * (1 - accuracy) / max(1, len(items) - 1))
    return result
