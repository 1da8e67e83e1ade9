"""The first ten minutes of a GPU: is this installation right, and how fast is it?

bash benchmarks/gpu.sh [--minutes 8] [--out FOLDER]     on a machine with a GPU; call it again to continue
bash benchmarks/gpu.sh --rehearse                       the same parts at toy sizes on a CPU, in about a minute
bash benchmarks/gpu.sh --table                          the table of what is there, without running anything

Every part is a process with a time limit. Its log, figures and verdict are in FOLDER as soon as they exist, so nothing is
lost when the call is interrupted: the next call starts with the first part that has no verdict. Exit status: 0 when
nothing is wrong, 1 when a check or a part failed, 2 for a wrong call, 130 or 143 after Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from gpu import parts as listed
from gpu.forked import preload
from gpu.parts import Part
from gpu.pool import Pool, Verdict, read_verdict, write_json
from gpu.table import report_lines, something_is_wrong
from tinytron.cli.entry import status_of
from tinytron.errors import ConfigError
from tinytron.utils.flags import Parser, nearest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = "environment"  # the part on which all others rest
MACHINE = "machine.json"
LOCK = ".lock"
TABLE = "table.md"
LOCK_TRIES = 40  # four a second


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(
        prog="bash benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time for this call; default: 8")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the results; default: log/gpu or log/rehearsal"
    )
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU: do all parts run?")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts alone")
    parser.add_argument("--again", nargs="+", metavar="PART", default=[], help="forget what these parts found")
    parser.add_argument("--list", action="store_true", help="print the parts with their expected seconds, and stop")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and stop")
    return parser


def chosen(names: Sequence[str] | None) -> list[Part]:
    """The parts called ``names``, in their order; default: all. Raises: ConfigError for an unknown one."""
    known = [part.name for part in listed.PARTS]
    for name in names or ():
        if name not in known:
            raise ConfigError(f"no part is called {name!r}{nearest(name, known)}; the parts are {', '.join(known)}")
    return [part for part in listed.PARTS if not names or part.name in names]


def machine(rehearsal: bool) -> dict[str, Any]:
    """What results of one folder must have in common."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        shown = "none that nvidia-smi shows"
    gpu = "none (a rehearsal)" if rehearsal else "; ".join(shown.splitlines())
    return {"gpu": gpu, "torch": importlib.metadata.version("torch"), "rehearsal": rehearsal}


def open_folder(folder: Path, rehearsal: bool) -> IO[str]:
    """Make ``folder`` this call's own. Raises: ConfigError if another call works in it, it cannot be written, or its
    results are from another machine."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+")  # noqa: SIM115  # held until the process ends
    except OSError as error:
        raise ConfigError(
            f"--out {folder} cannot be written ({error.strerror}); use a folder you may write to"
        ) from error
    if not _locked(lock):
        raise ConfigError(f"--out {folder} is in use by another call; wait for it, or use another --out")
    here, path = machine(rehearsal), folder / MACHINE
    if path.exists():
        there = json.loads(path.read_text())
        differing = [f"{k}: {there.get(k)} there, {v} now" for k, v in here.items() if there.get(k) != v]
        if differing:
            raise ConfigError(
                f"--out {folder} holds results from elsewhere ({'; '.join(differing)}); use another --out, or remove it"
            )
    else:
        write_json(path, here)
    return lock


# The environment of every part, and in a rehearsal: Triton interprets.
VARIABLES = {
    "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic cuBLAS, as the launch scripts set it
}  # fmt: skip
REHEARSAL_VARIABLES = {
    "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    "TINYTRON_REHEARSE_GPU": "1", "NUM_GPUS": "0",
}  # fmt: skip


def _locked(lock: IO[str]) -> bool:
    """Whether the lock could be had. Parts of a call that was just killed may hold it for a moment longer."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.25)
    return False


@contextlib.contextmanager
def interruptible(pool: Pool) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the parts that run, and then this call."""

    def end(number: int, _: object) -> None:
        pool.stop()
        print("stopped; call again to continue", flush=True)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        pool.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def run_parts(parts: Sequence[Part], pool: Pool, folder: Path, rehearsing: bool) -> None:
    """Run what has no verdict yet: parts that measure time alone, the others beside each other (in a rehearsal: all)."""
    for part in parts:
        if pool.left() <= 0:
            print(f"the time is used up before {part.name}", flush=True)
            break
        if is_settled(folder, part):
            continue
        if not rehearsing and pool.left() < part.expected / 2:
            print(f"{part.name}: left for the next call, {pool.left():.0f} s are too short", flush=True)
            continue
        alone = part.name == ENVIRONMENT or (part.alone and not rehearsing)
        if alone:
            pool.drain()
        pool.start(part)
        if alone:
            pool.drain()
        if part.name == ENVIRONMENT and not is_settled(folder, part) and pool.left() > 0:
            raise ConfigError(
                f"the GPU cannot be used; {folder / part.name / 'log.txt'} ends with: {last_line(folder / part.name)}"
            )
    pool.drain()


def is_settled(folder: Path, part: Part) -> bool:
    """Whether an earlier call has the verdict of ``part``. One on the machine itself counts only if all went well."""
    verdict = read_verdict(folder, part.name)
    return verdict == Verdict.DONE if part.name == ENVIRONMENT else verdict not in (None, Verdict.LEFT_OUT)


def last_line(folder: Path) -> str:
    """What a part said last."""
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and print the table; the exit status."""
    args = build_parser().parse_args(argv)
    parts, again = chosen(args.only), [part.name for part in chosen(args.again) if args.again]
    if not args.minutes > 0:
        raise ConfigError(f"--minutes {args.minutes:g} must be above 0; use 8")
    if args.list:
        print("\n".join(f"{part.name:<18} {part.expected:>4} s  {part.proves}" for part in listed.PARTS))
        total = sum(part.expected for part in listed.PARTS)
        print(f"{'all':<18} {total:>4} s  one after the other; tests run beside each other")
        return 0
    default = ROOT / "log" / ("rehearsal" if args.rehearse else "gpu")
    folder = Path(os.environ.get("CALLED_FROM", "."), args.out or default).resolve()
    if args.table:
        if not (folder / MACHINE).exists():
            raise ConfigError(f"--out {folder} holds no results; run without --table first")
    else:
        with open_folder(folder, args.rehearse):
            for name in again:
                shutil.rmtree(folder / name, ignore_errors=True)
            end = time.monotonic() + 60 * args.minutes
            os.environ.update({**VARIABLES, **(REHEARSAL_VARIABLES if args.rehearse else {})})
            if args.rehearse:
                preload()
            pool = Pool(folder, ROOT, args.rehearse, end)
            with interruptible(pool):
                if ENVIRONMENT not in [part.name for part in parts]:
                    parts.insert(0, listed.PARTS[0])  # the ceilings that others refer to
                run_parts(parts, pool, folder, args.rehearse)
    lines = report_lines(folder)
    print("\n" + "\n".join(lines))
    if not args.table:
        (folder / TABLE).write_text("\n".join(lines) + "\n")
    return int(something_is_wrong(folder))


if __name__ == "__main__":
    sys.exit(status_of(main))
