"""Turns streamed tokens into text: only complete characters, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
_CONTEXT = 4  # tokens before the first: some tokenizers drop the space before the first word they decode
_HALF = "\ufffd"  # decoders return this for a character whose bytes are incomplete


class TextStream:
    """The text of tokens that follow ``prompt``, piece by piece, up to the first of the strings ``stop``, which may begin
    and end inside tokens. ``text`` is everything returned so far; ``stopped`` says whether a stop string occurred."""

    def __init__(self, decode: Decode, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.text, self.stopped = "", False
        self._decode, self._stop = decode, stop
        context = _CONTEXT
        while context < len(prompt) and not decode(list(prompt[-context:])):  # special tokens only
            context *= 2
        self._tokens = list(prompt[-context:])
        if self._decode(self._tokens).endswith(_HALF):
            self._tokens = []
        self._shown = len(self._tokens)  # tokens whose text was returned or is held back
        self._start = 0  # decoding starts at this token
        self._held = ""  # may be the beginning of a stop string

    def add(self, token: int) -> str:
        """The text that has become certain; nothing after a stop string."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._shown])
        now = self._decode(self._tokens[self._start :])
        if now.endswith(_HALF) and len(self._tokens) - self._shown < 4:  # a character has at most four bytes
            return ""
        if now != before:  # otherwise the next token would be the first word, whose space some tokenizers drop
            self._start = self._shown
        self._shown = len(self._tokens)
        return self._give(self._held + now[len(before) :])

    def end(self) -> str:
        """The remaining text when no more tokens come."""
        before = self._decode(self._tokens[self._start : self._shown])
        rest = self._held + self._decode(self._tokens[self._start :])[len(before) :]
        self._shown = len(self._tokens)
        if self.stopped:
            return ""
        piece = self._give(rest)
        if not self.stopped:  # the text held back was not the beginning of a stop string after all
            piece, self.text, self._held = piece + self._held, self.text + self._held, ""
        return piece

    def _give(self, text: str) -> str:
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            piece = text[: min(found)]
        else:
            keep = max((_overlap(text, stop) for stop in self._stop), default=0)
            piece, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of ``text`` that begin ``stop``, which ``text`` does not contain as a whole."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
