"""The tokens of a dialogue that a model continues, rendered and encoded as in training up to the next answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinytron.data.manifest import read_manifest
from tinytron.errors import ConfigError
from tinytron.text.chat import ASSISTANT, Template, template_of
from tinytron.text.encoders import pieces_of
from tinytron.text.rows import Messages
from tinytron.text.run_tokenizer import RunTokenizer, tokenizers_of_data

_PLACEHOLDER = "x"


@dataclass(frozen=True)
class Dialogue:
    """Turns messages into prompts for a model that was trained on dialogues rendered by ``template``."""

    tokenizer: RunTokenizer
    template: Template

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The ids of ``messages`` up to where the assistant's next answer begins. Raises: DataError for messages that the
        template refuses."""
        segments = self.template([*messages, {"role": ASSISTANT, "content": _PLACEHOLDER}])
        answer = max(i for i, segment in enumerate(segments) if segment.learned and not segment.marks)
        text, found = self.tokenizer.tokenizer, self.tokenizer
        ids: list[int] = []
        for piece in pieces_of(segments[:answer], text.specials):
            ids += [piece.number] if piece.number is not None else [int(n) for n in text.encode([piece.text])[0]]
        first = found.begin
        if first is None and found.prepend:
            first = found.end
        return ids if first is None or ids[:1] == [first] else [first, *ids]

    @property
    def end(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The tokens that end an answer, and texts that do where the mark is not one token."""
        segments = self.template(
            [{"role": "user", "content": _PLACEHOLDER}, {"role": ASSISTANT, "content": _PLACEHOLDER}]
        )
        answer = max(i for i, segment in enumerate(segments) if segment.learned and not segment.marks)
        marks = "".join(segment.text for segment in segments[answer + 1 :] if segment.learned)
        number = self.tokenizer.tokenizer.specials.get(marks)
        if number is not None or not marks.strip():
            ends = self.tokenizer.stop_tokens
            return (ends if number is None or number in ends else (*ends, number)), ()
        return self.tokenizer.stop_tokens, (re.sub(r"\s+$", "", marks),)


def dialogue_of_run(config: Mapping[str, Mapping[str, Any]], tokenizer: RunTokenizer, wanted: str | None) -> Dialogue:
    """The ``Dialogue`` of a model with the saved ``config``: with the template ``wanted`` (``chatml``, ``tokenizer``), or
    else the one that its data was made with, or else the tokenizer's own, or else ChatML. Raises: ConfigError."""
    text = tokenizer.tokenizer
    if wanted is None:
        path = config.get("data", {}).get("dataset_path")
        wanted = _of_data(path if isinstance(path, str) else None)
    if wanted is None:
        wanted = "tokenizer" if text.chat_template else "chatml"
    return Dialogue(tokenizer, template_of(wanted, text.chat_template, text.specials, text.named, text.name))


def _of_data(path: str | None) -> str | None:
    try:
        manifests = [read_manifest(folder) for folder in tokenizers_of_data(path).folders]
    except (ConfigError, OSError):  # the data may have moved since
        return None
    names = (manifest.options.get("chat_template") for manifest in manifests if manifest is not None)
    return next((name for name in names if isinstance(name, str)), None)
