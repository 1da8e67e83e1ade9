"""Text that users wrote, in files with or without a byte order mark or strings that are not all characters; and tables and
commands to print for them."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence

BOM = "\ufeff"
_BOM_BYTES = BOM.encode()


def whole_characters(text: str) -> str:
    """``text`` with ``?`` for each half of a surrogate pair, which JSON and a shell can give but which is no character:
    tokenizers refuse it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def without_bom(content: bytes) -> bytes:
    """``content`` without the byte order mark that some editors put before UTF-8."""
    return content.removeprefix(_BOM_BYTES)


def numbered_lines(content: bytes) -> Iterator[tuple[int, str]]:
    """The lines of UTF-8 ``content`` that hold more than white space, with their numbers from 1. They end at ``\\n`` or
    ``\\r\\n`` only: ``str.splitlines`` also cuts at U+2028, form feeds and others that a record may hold. A byte order
    mark at the start of a line, where joined files have one too, is left out. Raises: UnicodeDecodeError."""
    for number, line in enumerate(content.split(b"\n"), 1):
        text = without_bom(line).removesuffix(b"\r").decode("utf-8")
        if text and not text.isspace():
            yield number, text


def next_command(*words: object) -> str:
    """``next: tinytron ...``, a line to print last, with a command that works as it stands: where ``tinytron`` is not on
    the path, it names this Python instead."""
    program = ["tinytron"] if shutil.which("tinytron") else [sys.executable, "-m", "tinytron"]
    return f"next: {shlex.join([*program, *map(str, words)])}"


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
