"""``tinytron status``, ``logs``, ``cancel`` and ``pull``: what was submitted from this machine, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinytron.dispatch.hosts import ENDED, UNCONFIRMED, State, host_of
from tinytron.dispatch.record import Submission, damaged, named, newest, read_all
from tinytron.dispatch.submit import states_of
from tinytron.errors import HostError
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
    (state,) = [State(submission.ended)] if submission.ended else host.states([submission])
    where = f"{submission.place} on {submission.host}"
    if submission.ended or state.state in ENDED:
        print(f"{where} is {state}; there is nothing to stop")
        return
    host.cancel(submission)
    if state.active or state.state == UNCONFIRMED:
        print(f"asked {where} to stop")
    else:
        print(f"{where} does not run ({state.state}); its secrets are removed there")
    print(next_command("status", submission.name))


def pull(argv: Sequence[str], prog: str = "tinytron pull") -> None:
    """Copy the files of a run here. Raises: ConfigError; HostError."""
    parser = Parser(
        prog=prog, description="Copy a run's folder, without checkpoints, and its log here, as for tinytron watch."
    )
    parser.add_argument("name", metavar="NAME", help=_NAME)
    parser.add_argument("out", nargs="?", default="pulled", metavar="OUT", help="folder to copy to (default: pulled)")
    args = parse_strictly(parser, argv)
    submission = named(args.name)
    out = Path(args.out).expanduser()
    left = host_of(submission).pull(submission, out)
    if left:
        print(f"left out, because they are not files of the run: {', '.join(left[:5])}{' ...' if left[5:] else ''}")
    folder = out / "checkpoints" / submission.place
    print(f"copied to {folder}, without checkpoints")
    runs = sorted(path.parent for path in folder.glob(f"*/{LOG}"))
    if runs:
        print(watch_command(*runs))
