"""Tools for token shards: ``python -m tinytron.data info|verify PATH``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tinytron.data import inspect
from tinytron.utils.flags import Parser
from tinytron.utils.tools import run_tool


def build_parser() -> argparse.ArgumentParser:
    """One subcommand per tool; ``args.tool`` runs it and returns the exit status."""
    parser = Parser(prog="python -m tinytron.data", description="Look at folders of token shards, and check them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("info", help="show what a folder of token shards holds")
    command.add_argument("path", type=Path, metavar="PATH", help="folder with *.bin files")
    command.set_defaults(tool=_info)
    text = "check that shards are what was written, and that their ids are in the vocabulary; exit status 1 if not"
    command = commands.add_parser("verify", help=text, description=text)
    command.add_argument("path", type=Path, metavar="PATH", help="folder with *.bin files and manifest.json")
    command.set_defaults(tool=_verify)
    return parser


def _info(args: argparse.Namespace) -> None:
    print("\n".join(inspect.describe(args.path)))


def _verify(args: argparse.Namespace) -> int:
    status = 0
    for problem in inspect.problems(args.path):
        print(problem, flush=True)  # the next one takes its time
        status = 1
    if status == 0:
        print(f"ok: {len(inspect.find_token_files(args.path))} shards")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool that ``arguments`` (default: the command line) name; returns the exit status: 0, 1 (``verify`` found
    damage), or 2 after an error, which is one line."""
    return run_tool(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
