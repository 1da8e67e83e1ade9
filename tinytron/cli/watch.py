"""``tinytron watch RUN [RUN ...]``: follow runs on a page in the browser, or as a table in the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tinytron.errors import ConfigError
from tinytron.observe.folder import names_of, open_folder, runs_inside
from tinytron.observe.run import Run
from tinytron.observe.server import FIRST_PORT, WatchServer
from tinytron.observe.table import summary_table
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.paths import expanded

RUN_HELP = "run folder, such as log/<run>, on a disk or at s3:// or gs://; or a job's folder, with one run inside"
FIRST_SECONDS = 0.4  # spent on reading before the page opens
CLEAR = "\x1b[H\x1b[2J"


def open_runs(texts: Sequence[str], *, several: bool = False) -> list[Run]:
    """The runs that a user named, none of them read yet. A folder with one run inside, such as a job's, is that run; with
    ``several`` it is all the runs inside. Raises: DataError, ConfigError, StorageError; ConfigError for a run that is named
    twice."""
    found = [(text, runs_inside(text)) for text in texts]
    texts = [one for text, inside in found for one in (inside if len(inside) == 1 or (inside and several) else [text])]
    folders = [open_folder(text) for text in texts]
    for number, folder in enumerate(folders):
        if folder.name in [other.name for other in folders[:number]]:
            raise ConfigError(f"{texts[number]} is named twice; name each run once")
    names = names_of([folder.name for folder in folders])
    return [Run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description="Follow runs on a page in the browser, or as a table in the terminal. Ctrl-C ends it. Nothing is "
        "written, so any number of people may watch a run, also one that ended.",
    )
    parser.add_argument("runs", nargs="+", type=expanded, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at; by default only this machine can connect"
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help=f"0: any free port; default: the first free one from {FIRST_PORT}"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--tui", action="store_true", help="a table in the terminal instead of a page")
    where.add_argument("--once", action="store_true", help="print the table once, and stop")
    return parser


def _once(runs: Sequence[Run]) -> str:
    for run in runs:
        run.refresh()
    return "\n".join(summary_table(runs))


def _follow_in_terminal(runs: Sequence[Run]) -> None:
    """Print the table again whenever it changes; on a terminal in place of the last one."""
    before = ""
    while True:
        if (text := _once(runs)) != before:
            print(f"{CLEAR if sys.stdout.isatty() else ''}{text}", flush=True)
            before = text
        time.sleep(max(run.folder.pause for run in runs))


def _serve(runs: Sequence[Run], host: str, port: int | None) -> None:
    with WatchServer(runs, host, port) as server:
        what = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
        print(f"watching {what} at {server.url} (Ctrl-C ends it)", flush=True)
        if not server.is_private:
            print(f"--host {host}: everyone who can reach this machine can read these runs", flush=True)
        for run in runs:  # so that the first picture has curves of their whole length
            run.refresh(FIRST_SECONDS / len(runs))
        server.start_following()
        try:
            server.serve_forever()
        finally:
            server.stop_following()


def main(argv: Sequence[str], prog: str = "tinytron watch") -> None:
    """Watch the runs that ``argv`` names. Raises: TinytronError; KeyboardInterrupt."""
    args = parse_strictly(_parser(prog), argv)
    if args.port is not None and not 0 <= args.port < 2**16:
        raise ConfigError(f"--port {args.port} must be in 0..65535; use 0 for any free one")
    runs = open_runs(args.runs)
    if args.once:
        print(_once(runs))
    elif args.tui:
        _follow_in_terminal(runs)
    else:
        _serve(runs, args.host, args.port)
