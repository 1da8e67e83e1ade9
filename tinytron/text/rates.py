"""The progress of a tokenization as the user sees it."""

from __future__ import annotations

from tinytron.text.chunk_encoder import Encoded
from tinytron.text.sources import TextSource
from tinytron.utils.progress import Progress, scaled


class Rates:
    """The progress of tokenizing, with documents and tokens per second of this call."""

    def __init__(self, source: TextSource, done: int) -> None:
        total, self._unit = source.size()
        self._first = done
        self.progress = Progress("tokenizing", total, self._unit, initial=done)
        self.documents = self.tokens = 0

    def update(self, done: int, made: Encoded) -> None:
        """Show that ``done`` of the source is finished, ``made`` having been added."""
        self.documents, self.tokens = self.documents + made.documents, self.tokens + made.tokens
        self.progress.update(done - self.progress.done, self._rates())

    def summary(self) -> str:
        """A line to print at the end."""
        read = scaled(self.progress.done - self._first, self._unit)
        return f"tokenized {read} in {self.progress.seconds:.1f} s: {self._rates()}"

    def _rates(self) -> str:
        seconds = max(1e-9, self.progress.seconds)
        # Not of one long text, which would be 0.
        documents = f"{self.documents / seconds:,.0f} documents/s, " if self.documents >= seconds else ""
        return f"{documents}{self.tokens / seconds:,.0f} tokens/s"

    def __enter__(self) -> Rates:
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.__exit__(*error)
