"""Prompts for a model to answer, from a file of JSON lines, each with ``prompt`` and whatever a reward needs.

{"prompt": "3 + 4 = ", "answer": 7}
{"prompt": [{"role": "user", "content": "3 + 4?"}], "answer": 7}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from tinytron.errors import DataError, first_line
from tinytron.utils.sequences import IGNORE_INDEX
from tinytron.utils.texts import numbered_lines

NUMBER = "number"  # the index of a prompt, among the extra fields of a sample


class Prompts(Dataset[dict[str, torch.Tensor]]):
    """The prompts of ``file``: ``rows`` as they are in the file, and ``ids`` of each, by ``encode``. A sample is
    ``seq_len`` tokens without a target, the prompt followed by padding, and its index ``number``.

    Raises: DataError if the file cannot be read, or for a line without a prompt, or one longer than ``longest`` tokens.
    """

    def __init__(self, file: Path, encode: Callable[[Any], list[int]], *, seq_len: int, longest: int) -> None:
        self.file, self.seq_len = file, seq_len
        try:
            content = file.read_bytes()
            lines = list(numbered_lines(content))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f'{file} cannot be read ({first_line(error)}); give a file of lines {{"prompt": "text"}}'
            ) from error
        self._hash = hashlib.sha256(content).hexdigest()[:16]
        self.rows = [_row(file, number, line) for number, line in lines]
        if not self.rows:
            raise DataError(f'{file} has no prompts; give lines {{"prompt": "text"}}')
        self.dialogues = not isinstance(self.rows[0]["prompt"], str)
        for (number, _), row in zip(lines, self.rows, strict=True):
            if isinstance(row["prompt"], str) == self.dialogues:
                raise DataError(
                    f"{file}: line {number} and line {lines[0][0]} have prompts of two kinds, a text and a list of "
                    "messages, which end in different ways; use one kind"
                )
        self.ids = [encode(row["prompt"]) for row in self.rows]
        for (number, _), ids in zip(lines, self.ids, strict=True):
            if len(ids) > longest:
                raise DataError(
                    f"{file}: the prompt in line {number} has {len(ids)} tokens, and at most {longest} leave room for an "
                    f"answer; use --seq_len {seq_len + len(ids) - longest}, or fewer new tokens"
                )

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Identifies the file's content."""
        return f"prompts:{self._hash}"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.zeros(self.seq_len, dtype=torch.int64)
        own = self.ids[index][: self.seq_len]
        ids[: len(own)] = torch.tensor(own)
        padding = torch.arange(self.seq_len) >= len(own)
        return {
            "input_ids": ids,
            "labels": torch.full_like(ids, IGNORE_INDEX),
            "padding": padding,
            NUMBER: torch.tensor(index),
        }


def _row(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    dialogue = isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt)
    if not isinstance(row, dict) or not (isinstance(prompt, str) or dialogue):
        raise DataError(
            f'{file}: line {number} has no prompt; write {{"prompt": "text"}}, or a list of messages with role and content'
        )
    return row


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def answer_row(prompt: Sequence[int], answer: Sequence[int], seq_len: int) -> dict[str, torch.Tensor]:
    """A sample with a prompt and its ``answer``, whose tokens are the targets; the rest is padding."""
    tokens = torch.tensor([*prompt, *answer])
    ids = torch.zeros(seq_len, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE_INDEX)
    length = len(tokens) - 1
    ids[:length] = tokens[:-1]
    labels[len(prompt) - 1 : length] = tokens[len(prompt) :]
    return {"input_ids": ids, "labels": labels, "padding": torch.arange(seq_len) >= length}
