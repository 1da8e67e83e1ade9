"""How command-line tools (``python -m tinytron.<package>``) run and end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tinytron.errors import TinytronError


def run_tool(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Call ``args.tool(args)``, which the subcommand in ``arguments`` (default: the command line) sets. Returns the exit
    status: what the tool returns (nothing: 0), or 2 after an error, which is one line."""
    try:
        args = parser.parse_args(arguments)
        status: int | None = args.tool(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TinytronError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status or 0
