"""``tinytron data info|verify PATH``: show what token shards contain, and check them for damage."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tinytron.data import inspect
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.paths import user_path
from tinytron.utils.texts import counted


def _parser(prog: str) -> argparse.ArgumentParser:
    """One subcommand per tool; ``args.tool`` runs it and returns the exit status."""
    parser = Parser(prog=prog, description="Show and check folders of token shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("info", help="show what a folder of token shards contains")
    command.add_argument("path", type=user_path, metavar="PATH", help="folder with *.bin files")
    command.set_defaults(tool=_info)
    text = "check that shards are unchanged and their ids are in the vocabulary; exit status 1 if not"
    command = commands.add_parser("verify", help=text, description=text)
    command.add_argument("path", type=user_path, metavar="PATH", help="folder with *.bin files and manifest.json")
    command.set_defaults(tool=_verify)
    return parser


def _info(args: argparse.Namespace) -> None:
    print("\n".join(inspect.describe(args.path)))


def _verify(args: argparse.Namespace) -> int:
    status = 0
    for problem in inspect.problems(args.path):
        print(problem, flush=True)  # finding the next one takes a while
        status = 1
    if status == 0:
        print(f"ok: {counted(len(inspect.find_token_files(args.path)), 'shard')}")
    return status


def main(argv: Sequence[str], prog: str = "tinytron data") -> int | None:
    """Run the tool that ``argv`` names; returns 1 if ``verify`` found damage. Raises: TinytronError; OSError."""
    args = parse_strictly(_parser(prog), argv)
    status: int | None = args.tool(args)
    return status
