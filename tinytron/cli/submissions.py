"""``tinytron status``, ``logs``, ``cancel`` and ``pull``: what was submitted from this machine, and what became of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tinytron.dispatch.hosts import ENDED, UNCONFIRMED, State, host_of
from tinytron.dispatch.record import Submission, damaged, named, newest, read_all
from tinytron.dispatch.submit import states_of
from tinytron.errors import ConfigError, HostError
from tinytron.observe.folder import LOG
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.texts import next_command, table, watch_command

_NAME = "name of the work, or PROJECT/GROUP/NAME"


def main(argv: Sequence[str], prog: str = "tinytron status") -> int:
    """Show the state of one submission or of all. Returns 1 if a host cannot be asked. Raises: ConfigError."""
    parser = Parser(prog=prog, description="Show the state of what was submitted from this machine.")
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"{_NAME}; default: all")
    parser.add_argument("--all", action="store_true", help="also earlier submissions of the same work")
    args = parse_strictly(parser, argv)
    if args.name is None:
        chosen = read_all() if args.all else newest(read_all())
    else:
        place = named(args.name).place
        chosen = [one for one in read_all() if one.place == place][0 if args.all else -1 :]
    for line in damaged():
        print(line)
    if not chosen:
        print(f"nothing was submitted from here yet; {next_command('submit', 'my-run', 'train.yaml')}")
        return 0
    states = states_of(chosen)
    rows: list[tuple[str, ...]] = [("name", "host", "id", "state", "heartbeat", "log")]
    rows += [_row(one, states[one.run_id]) for one in chosen]
    print("\n".join(table(rows)))
    errors = list(dict.fromkeys(str(state) for state in states.values() if isinstance(state, HostError)))
    print("".join(f"\nerror: {text}" for text in errors), end="\n" if errors else "")
    return 1 if errors else 0


def _row(one: Submission, state: State | HostError) -> tuple[str, ...]:
    if isinstance(state, HostError):
        return (one.place, one.host, one.id, "unknown", "", one.log)
    running = state.state in ("preparing", "waiting", "running")
    beat = f"{state.heartbeat} s ago" if running and state.heartbeat is not None else ""
    return (one.place, one.host, one.id, str(state), beat, one.log)


def logs(argv: Sequence[str], prog: str = "tinytron logs") -> int:
    """Print a log. Returns an exit status. Raises: ConfigError."""
    parser = Parser(prog=prog, description="Print the log of a submission.")
    parser.add_argument("name", metavar="NAME", help=_NAME)
    parser.add_argument("-f", "--follow", action="store_true", help="also print what is added, until Ctrl-C")
    args = parse_strictly(parser, argv)
    submission = named(args.name)
    return host_of(submission).log(submission, follow=args.follow)


def cancel(argv: Sequence[str], prog: str = "tinytron cancel") -> None:
    """Stop a submission. Raises: ConfigError; HostError."""
    parser = Parser(prog=prog, description="Stop a submission. A run that trains saves first.")
    parser.add_argument("name", metavar="NAME", help=_NAME)
    submission = named(parse_strictly(parser, argv).name)
    host = host_of(submission)
    where = f"{submission.place} on {submission.host}"
    try:
        (state,) = [State(submission.ended)] if submission.ended else host.states([submission])
    except HostError:  # it may be stopped all the same
        state = State(UNCONFIRMED)
    if submission.ended or state.state in ENDED:
        print(f"{where} is {state}; there is nothing to stop")
        return
    host.cancel(submission)
    if state.active or state.state == UNCONFIRMED:
        print(f"asked {where} to stop")
    else:
        print(f"{where} does not run ({state.state}); its secrets are removed there")
    print(next_command("status", submission.name))


def pull(argv: Sequence[str], prog: str = "tinytron pull") -> int:
    """Copy the files of runs here. Returns an exit status. Raises: ConfigError; HostError."""
    parser = Parser(
        prog=prog,
        description="Copy the folders of runs, without checkpoints, and their logs here, as for tinytron watch and compare."
        "\n\n%(prog)s my-run\n%(prog)s 'lr-*' --out results",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{_NAME}; or a pattern in quotes, such as 'lr-*'")
    parser.add_argument("--out", default="pulled", metavar="DIR", help="folder to copy to (default: pulled)")
    args = parse_strictly(parser, argv)
    chosen = {one.run_id: one for name in args.names for one in _matching(name)}
    out = Path(args.out).expanduser()
    runs, failed = [], False
    for submission in chosen.values():
        try:
            left = host_of(submission).pull(submission, out)
        except HostError as error:
            if len(chosen) == 1:
                raise
            print(f"{submission.place} was not copied: {error}", file=sys.stderr)  # a queued run has no folder yet
            failed = True
            continue
        folder = out / "checkpoints" / submission.place
        print(f"copied to {folder}, without checkpoints")
        if left:
            print(f"left out, because they are not files of the run: {', '.join(left[:5])}{' ...' if left[5:] else ''}")
        runs += sorted(path.parent for path in folder.glob(f"*/{LOG}"))
    if runs:
        print(watch_command(*runs))
    if len(runs) > 1:
        print(next_command("compare", *runs))
    return int(failed)


def _matching(name: str) -> list[Submission]:
    """The newest submissions of the works that ``name``, which may be a pattern, means. Raises: ConfigError if there are
    none."""
    if not any(character in name for character in "*?["):
        return [named(name)]
    known = newest(read_all())
    found = [one for one in known if fnmatchcase(one.name, name) or fnmatchcase(one.place, name)]
    if not found:
        raise ConfigError(
            f"nothing was submitted whose name matches {name}; tinytron status lists what was, and {name} needs quotes if "
            "files here match it"
        )
    return found
