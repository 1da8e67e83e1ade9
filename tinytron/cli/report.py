"""``tinytron report RUN [RUN ...]``: one HTML file about runs, or a picture for a paper."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tinytron.cli.watch import RUN_HELP, open_runs
from tinytron.errors import ConfigError
from tinytron.observe.figures import FORMATS, save_figures
from tinytron.observe.report import report
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.paths import expanded, user_path

PAGES = (".html", ".htm")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description="Write what the page of tinytron watch shows into one HTML file, which opens anywhere without a "
        "server, or draw the curves as a picture.",
    )
    parser.add_argument("runs", nargs="+", type=expanded, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "-o", "--out", type=user_path, metavar="FILE", help="default: report.html, or with --png report.png"
    )
    parser.add_argument(
        "--png",
        action="store_true",
        help=f"draw a picture instead, with matplotlib; FILE may end in {', '.join(FORMATS)}",
    )
    parser.add_argument(
        "--curves",
        nargs="+",
        metavar="NAME",
        help="charts of the picture; default: loss grad_norm",
    )
    return parser


def _out(args: argparse.Namespace) -> Path:
    """The file to write. Raises: ConfigError for an ending of another format, or a folder that does not exist."""
    endings = FORMATS if args.png else PAGES
    out: Path = args.out or Path(f"report{endings[0]}")
    if out.suffix.lower() not in endings:
        other = "; --png draws pictures" if not args.png and out.suffix.lower() in FORMATS else ""
        raise ConfigError(
            f"--out {out} must end in {' or '.join(endings)}{other}; use {out.stem or 'report'}{endings[0]}"
        )
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist; make it, or use {out.name}")
    return out


def main(argv: Sequence[str], prog: str = "tinytron report") -> None:
    """Write the report that ``argv`` asks for. Raises: TinytronError; OSError."""
    args = parse_strictly(_parser(prog), argv)
    if args.curves and not args.png:
        raise ConfigError("--curves chooses what --png draws, and the page has every curve; add --png, or drop it")
    out = _out(args)
    runs = open_runs(args.runs)
    for run in runs:
        run.refresh()
        if run.problem:
            raise ConfigError(f"{run.folder.name} cannot be read: {run.problem}")
    if args.png:
        save_figures(runs, out, args.curves or ())
    else:
        out.write_text(report(runs), encoding="utf-8")
    print(f"wrote {out}, {out.stat().st_size:,} bytes")
