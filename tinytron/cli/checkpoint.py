"""``tinytron checkpoint inspect|verify|consolidate|prune PATH``: tools for checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tinytron.checkpoint import report, tools
from tinytron.checkpoint.files import CheckpointFiles, Retention, checkpoint_of, leftovers, newest_checkpoint
from tinytron.errors import CheckpointError, ConfigError
from tinytron.metrics.sinks.files import json_line
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.paths import user_path


def _parser(prog: str) -> argparse.ArgumentParser:
    """One subcommand per tool; ``args.tool`` runs it and returns the exit status."""
    parser = Parser(prog=prog, description="Look at checkpoints, check, export and delete them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    either = "run folder, or one file of a checkpoint, such as log/<run>/00100_model.pt"

    command = commands.add_parser("inspect", help="show what is in a run folder or a checkpoint")
    command.add_argument("path", type=user_path, metavar="PATH", help=either)
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.set_defaults(tool=_inspect)

    text = "check that checkpoints are complete and unchanged since they were written; exit status 1 if one is not"
    command = commands.add_parser("verify", help=text, description=text)
    command.add_argument(
        "path", type=user_path, metavar="PATH", help=f"{either}; for a folder, checks every checkpoint"
    )
    command.set_defaults(tool=_verify)

    text = "write fp32 weights and optimizer state into one file for torch.load"
    command = commands.add_parser("consolidate", help=text, description=text)
    command.add_argument("path", type=user_path, metavar="PATH", help=f"{either}; for a folder, its newest checkpoint")
    command.add_argument(
        "--out", type=user_path, metavar="FILE", help="default: <step>_consolidated.pt next to the checkpoint"
    )
    command.set_defaults(tool=_consolidate)

    text = "delete all checkpoints but the ones to keep, and files that interrupted saves left behind"
    command = commands.add_parser("prune", help=text, description=text)
    command.add_argument("path", type=user_path, metavar="PATH", help="run folder; no run may be using it")
    command.add_argument(
        "--keep_last",
        type=int,
        required=True,
        metavar="K",
        help="number of newest checkpoints to keep; 0: all, or just 1 if another --keep_ flag is given",
    )
    command.add_argument(
        "--keep_every", type=int, default=0, metavar="N", help="also keep every N-th step's checkpoint"
    )
    command.add_argument(
        "--keep_best", action="store_true", help="also keep the best one, by validation loss or --best_metric"
    )
    command.add_argument("--dry_run", action="store_true", help="print what would be deleted, and delete nothing")
    command.set_defaults(tool=_prune)
    return parser


def _inspect(args: argparse.Namespace) -> int:
    if checkpoint_of(args.path) is None:
        found = report.folder_report(args.path, tools.checkpoints_at(args.path))
        if not found["checkpoints"] and not found["leftovers"]:
            raise _nothing(args.path)
        text = report.show_folder(found)
    else:
        found = report.checkpoint_report(_only(args.path))
        text = report.show_checkpoint(found)
    print(json_line(found).rstrip() if args.json else text)
    return 0


def _verify(args: argparse.Namespace) -> int:
    found = tools.checkpoints_at(args.path)
    if not found:
        raise _nothing(args.path)
    status = 0
    for files in found:
        problems = tools.problems(files)
        print(f"checkpoint {files.step}: {'; '.join(problems) or 'ok'}", flush=True)  # the next check takes a while
        status = 1 if problems else status
    return status


def _consolidate(args: argparse.Namespace) -> int:
    files = newest_checkpoint(args.path) if checkpoint_of(args.path) is None else _only(args.path)
    if files is None:
        raise _nothing(args.path)
    out = tools.consolidate(files, args.out)
    print(f"wrote {out}, {out.stat().st_size:,} bytes")
    return 0


def _prune(args: argparse.Namespace) -> int:
    for name in ("keep_last", "keep_every"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name} {getattr(args, name)} must be at least 0")
    if not args.path.is_dir() or not (tools.checkpoints_at(args.path) or leftovers(args.path)):
        raise _nothing(args.path)
    retention = Retention(args.keep_last, args.keep_every, args.keep_best)
    gone = tools.prune_folder(args.path, retention, dry_run=args.dry_run)
    verb = "would remove" if args.dry_run else "removed"
    for step in gone.checkpoints:
        print(f"{verb} checkpoint {step}")
    for name in gone.leftovers:
        print(f"{verb} {name}, left by an interrupted save")
    print(f"{gone.bytes_freed:,} bytes {'would be ' if args.dry_run else ''}freed")
    return 0


def _only(path: Path) -> CheckpointFiles:
    (files,) = tools.checkpoints_at(path)
    return files


def _nothing(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} holds no checkpoint; use a run folder such as log/<run>")


def main(argv: Sequence[str], prog: str = "tinytron checkpoint") -> int | None:
    """Run the tool that ``argv`` names; returns 1 if ``verify`` found damage. Raises: TinytronError; OSError."""
    args = parse_strictly(_parser(prog), argv)
    status: int | None = args.tool(args)
    return status
