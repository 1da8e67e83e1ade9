"""Dialogues as text: ChatML, and the chat template of a tokenizer.

ChatML writes every message as

    <|im_start|>ROLE
    CONTENT<|im_end|>

with a line end after ``ROLE`` and after ``<|im_end|>``. The two marks are tokens where the tokenizer has them as special
tokens, and plain text elsewhere. Contents are plain text in any case: a content that spells a mark does not end its turn.

A template makes segments of the messages. A segment is learned if it belongs to an answer of the assistant: the content,
and the mark that ends the turn. Text is encoded in one piece up to a special token or to the start or the end of an answer,
which is where a prompt ends at inference.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, Protocol

from tinytron.errors import ConfigError, DataError, first_line
from tinytron.text.rows import Messages
from tinytron.utils.optional import require_package

START, END = "<|im_start|>", "<|im_end|>"
ASSISTANT = "assistant"
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_SHOWN_CHARS = 60


class Segment(NamedTuple):
    """A piece of a rendered dialogue. ``marks``: special tokens that its text spells are tokens. ``learned``: it is part of
    an answer of the assistant."""

    text: str
    marks: bool
    learned: bool


class Template(Protocol):
    """Renders messages. Can be sent to another process."""

    def __call__(self, messages: Messages) -> list[Segment]:
        """The segments in order. Raises: DataError for messages that the template refuses."""

    def identity(self) -> dict[str, str]:
        """Plain JSON values that determine the result, for the record of a folder."""


@dataclass(frozen=True)
class ChatML:
    """See the head of this file."""

    def __call__(self, messages: Messages) -> list[Segment]:
        """See ``Template``."""
        found = []
        for message in messages:
            learned = message["role"] == ASSISTANT
            found += [
                Segment(START, True, False),
                Segment(f"{message['role']}\n", False, False),
                Segment(message["content"], False, learned),
                Segment(END, True, learned),
                Segment("\n", False, False),
            ]
        return found

    def identity(self) -> dict[str, str]:
        """See ``Template``."""
        return {"chat_template": "chatml"}


@dataclass(frozen=True)
class TokenizerTemplate:
    """The Jinja template ``source`` of a tokenizer whose special tokens are ``specials``; ``named`` has the ones with a
    role, such as ``bos_token``.

    The template renders placeholders instead of the contents, which shows where each content is. The result is compared
    with the rendering of the real messages, so a template that changes contents (other than white space around them) is an
    error and not a wrong mask.
    """

    source: str
    specials: tuple[str, ...]
    named: tuple[tuple[str, str], ...]

    def __call__(self, messages: Messages) -> list[Segment]:
        """See ``Template``."""
        shown = repr(messages[0]["content"][:_SHOWN_CHARS]) if messages else "nothing"
        marked = [{**message, "content": f"\ue0f0{n}\ue0f1"} for n, message in enumerate(messages)]
        try:
            whole, pieces = self._render(messages), re.split("\ue0f0(\\d+)\ue0f1", self._render(marked))
        except Exception as error:  # the template may refuse the order of the roles
            raise DataError(
                f"the tokenizer's chat template refuses the dialogue that begins with {shown} ({first_line(error)}); "
                "change its messages, or use --chat_template chatml"
            ) from error
        for strip in (False, True):
            segments = self._segments(pieces, messages, strip)
            if "".join(segment.text for segment in segments) == whole:
                return segments
        raise DataError(
            f"the tokenizer's chat template changes the contents of the dialogue that begins with {shown}, so the answers "
            "cannot be told from the rest; use --chat_template chatml"
        )

    def _segments(self, pieces: list[str], messages: Messages, strip: bool) -> list[Segment]:
        found, answered = [], False
        for number, piece in enumerate(pieces):
            if number % 2:
                message = messages[int(piece)]
                answered = message["role"] == ASSISTANT
                content = message["content"].strip() if strip else message["content"]
                found.append(Segment(content, False, answered))
                continue
            end = self._end_of_turn(piece) if answered else 0
            found += [Segment(piece[:end], True, True), Segment(piece[end:], True, False)]
        return [segment for segment in found if segment.text]

    def _end_of_turn(self, text: str) -> int:
        """Where the mark ends that ends a turn: after the first special token, else after the first line."""
        ends = [text.find(token) + len(token) for token in self.specials if token in text]
        return min(ends, default=(text.find("\n") + 1) or len(text))

    def _render(self, messages: Messages) -> str:
        text: str = self._compiled.render(
            messages=messages, add_generation_prompt=False, tools=None, **dict(self.named)
        )
        return text

    @cached_property
    def _compiled(self) -> Any:
        jinja = require_package("jinja2")
        sandbox = require_package("jinja2.sandbox")

        def refuse(message: str) -> NoReturn:
            raise jinja.TemplateError(message)

        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        # transformers' own tag, around answers; here a block that changes nothing
        return environment.from_string(_GENERATION.sub(_as_block, self.source))

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("source", "specials", "named")}  # compiled code is not picklable

    def identity(self) -> dict[str, str]:
        """See ``Template``."""
        return {"chat_template": "tokenizer", "chat_template_sha256": hashlib.sha256(self.source.encode()).hexdigest()}


def _as_block(found: re.Match[str]) -> str:
    return f"{{%{found[1]} {'endif' if found[2] else 'if true'} {found[3]}%}}"


def template_of(
    wanted: str, source: str | None, specials: Mapping[str, int], named: Mapping[str, str], where: str
) -> Template:
    """The template ``wanted``: ``chatml``, or ``tokenizer`` for the one of the tokenizer at ``where``, whose Jinja text is
    ``source``. Raises: ConfigError if it has none, or one that is not valid."""
    if wanted == "chatml":
        return ChatML()
    if not source:
        raise ConfigError(
            f"--chat_template tokenizer: {where} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); use --chat_template chatml"
        )
    found = TokenizerTemplate(source, tuple(specials), tuple(named.items()))
    try:
        _ = found._compiled
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"--chat_template tokenizer: the template of {where} is not valid ({first_line(error)}); use "
            "--chat_template chatml"
        ) from error
    return found


def with_system(messages: Messages, system_prompt: str | None) -> Messages:
    """``messages``, after ``system_prompt`` unless they begin with a system message."""
    if not system_prompt or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
