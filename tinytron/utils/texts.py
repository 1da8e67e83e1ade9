"""Text from users, which may have a byte order mark or invalid characters; tables and commands to print for users."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence

BOM = "\ufeff"
_BOM_BYTES = BOM.encode()


def whole_characters(text: str) -> str:
    """``text`` with ``?`` for each half of a surrogate pair. Such halves can come from JSON or a shell, but they are not
    characters, and tokenizers reject them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def without_bom(content: bytes) -> bytes:
    """``content`` without the byte order mark that some editors put before UTF-8."""
    return content.removeprefix(_BOM_BYTES)


def numbered_lines(content: bytes) -> Iterator[tuple[int, str]]:
    """The lines of UTF-8 ``content`` that are not only white space, with their numbers, counted from 1. Lines end only at
    ``\\n`` or ``\\r\\n``; ``str.splitlines`` would also split at U+2028, form feeds and other characters that a record may
    contain. A byte order mark at the start of a line is dropped; concatenated files have them there, too. Raises:
    UnicodeDecodeError."""
    for number, line in enumerate(content.split(b"\n"), 1):
        text = without_bom(line).removesuffix(b"\r").decode("utf-8")
        if text and not text.isspace():
            yield number, text


def counted(count: int, noun: str, plural: str = "") -> str:
    """``1 shard``, ``1,024 shards``; ``plural`` of nouns that do not end in ``s`` then."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def program_words() -> list[str]:
    """The words that start Tinytron here: ``tinytron``, or if that is not on the path, this Python and its module."""
    return ["tinytron"] if shutil.which("tinytron") else [sys.executable, "-m", "tinytron"]


def next_command(*words: object) -> str:
    """``next: tinytron ...``, a line to print last, with a command that can be run as it is (see ``program_words``)."""
    return f"next: {shlex.join([*program_words(), *map(str, words)])}"


def next_generation(checkpoint: object, *words: object) -> str:
    """``next_command`` for a text from the model at ``checkpoint``, with further flags in ``words``."""
    return next_command("generate", "--checkpoint", checkpoint, "--prompt", "the", *words)


def watch_command(*folders: object) -> str:
    """``look: tinytron watch ...``, a line with the command that shows the runs in ``folders``."""
    return f"look: {shlex.join([*program_words(), 'watch', *map(str, folders)])}"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """The lines of a table. A column is as wide as its longest entry; those in ``right`` are aligned at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if i in right else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
