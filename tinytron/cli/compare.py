"""``tinytron compare RUN [RUN ...]``: one table of the results of runs, and the best one."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence

from tinytron.cli.watch import open_runs
from tinytron.observe.compare import NUMBERS, as_lines, best, read_all, results
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.paths import expanded

_RUN_HELP = "run folder, or a folder with runs inside, such as a job's; on a disk or at s3:// or gs://"


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description="Print one table of the results of runs: the options in which they differ, their losses and speed, and "
        "the best run. The runs may still be training.",
    )
    parser.add_argument("runs", nargs="+", type=expanded, metavar="RUN", help=_RUN_HELP)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="the same as JSON, with unrounded numbers")
    form.add_argument("--csv", action="store_true", help="the same as comma-separated values, with unrounded numbers")
    return parser


def main(argv: Sequence[str], prog: str = "tinytron compare") -> None:
    """Print what ``argv`` asks for. Raises: TinytronError; OSError."""
    args = parse_strictly(_parser(prog), argv)
    rows = results(read_all(open_runs(args.runs, several=True)))
    if args.json:
        found = best(rows)
        print(
            json.dumps({"best": found[0] if found else None, "by": found[1] if found else None, "runs": rows}, indent=2)
        )
    elif args.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["run", *rows[0]["options"], "state", *NUMBERS])
        for row in rows:
            writer.writerow([row["run"], *row["options"].values(), row["state"], *(row[name] for name in NUMBERS)])
    else:
        print("\n".join(as_lines(rows)))
