"""Error texts by what they must name: flag, value and a value that works. The words between may change."""

from __future__ import annotations

import re


def says(telling: str) -> str:
    """A regular expression for a whole error text, in which `` ... `` stands for any words, or none: ``"--a 3 ... --b 4 ...
    use 2"``. A text that may also begin or end with other words begins or ends with ``...``."""
    parts = [part.strip() for part in re.split(r"(?:^|(?<= ))\.\.\.(?= |$)", telling)]
    pattern = ""
    for number, part in enumerate(parts):
        # Where other words may go on, a part must not end or begin inside of a word: 3 is not 30.
        before = r".*(?<!\w)" if number and part[:1].isalnum() else ".*" if number else ""
        after = r"(?!\w)" if number < len(parts) - 1 and part[-1:].isalnum() else ""
        pattern += before + re.escape(part) + after
    return f"^{pattern}$"
