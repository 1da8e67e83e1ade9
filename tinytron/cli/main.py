"""How command-line tools (``python -m tinytron.<package>``) run and end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from tinytron.errors import TinytronError


def run_tool(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """``status_of`` the call of ``args.tool(args)``, which the subcommand in ``arguments`` (default: the command line)
    sets."""

    def call() -> int | None:
        args = parser.parse_args(arguments)
        status: int | None = args.tool(args)
        return status

    return status_of(call)


def status_of(command: Callable[[], int | None]) -> int:
    """The exit status of ``command``: what it returns (nothing: 0), or 2 after an error, which is printed as one line."""
    try:
        status = command()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TinytronError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status or 0
