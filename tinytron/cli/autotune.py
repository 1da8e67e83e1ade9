"""``tinytron autotune``: short runs over a grid of --sep_size and --batch_size, and the fastest of them as a command."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tinytron.cli.run import processes
from tinytron.errors import ConfigError
from tinytron.utils.flags import Parser, parse_strictly, whole_number
from tinytron.utils.texts import table

OK, OOM, FAILED, TIMEOUT = "ok", "oom", "failed", "timeout"
# Exceptions of torch, CUDA and Python, and the message of a run that is refused because of the planner's estimate.
_OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory|\bMemoryError\b|this run needs about .* GiB, but")
_OURS = ("--sep_size", "--batch_size", "--max_steps", "--log_dir", "--log_every")
_GRACE_SECONDS = 10.0  # from the failure of one process to the end of those that may wait for it
_DESCRIPTION = """Measure short training runs on mock data, one for each pair of --sep_size and --batch_size, and print the
command of the fastest. The words after -- are flags of tinytron pretrain, which all runs have.

%(prog)s --batch_sizes 4 8 16 -- --preset gpt2
%(prog)s --sep_sizes 1 2 4 --batch_sizes 8 --nproc_per_node 8 -- --preset 1b --seq_len 8192
"""


@dataclass(frozen=True)
class Row:
    """The result of one run. ``reason`` says why a run was not measured."""

    sep_size: int
    batch_size: int
    status: str
    tokens_per_second: float | None = None
    mfu: float | None = None
    reason: str = ""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the grid and write the results. Returns the exit status: 1 if no run could be measured. Raises: ConfigError."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    args, flags = parse_strictly(_parser(prog), words[:split]), words[split + 1 :]
    args.nproc_per_node = args.nproc_per_node or processes()
    for word in flags:
        if (name := word.split("=")[0]) in _OURS:
            raise ConfigError(f"{name} is set for each run; leave it out after --, and see autotune --help")
    rows: list[Row] = []
    for sep_size in args.sep_sizes:
        for batch_size in args.batch_sizes:
            rows.append(_measure(args, flags, sep_size, batch_size))
            _write(Path(args.csv), rows)  # after every run: an interruption keeps the results
            speed = f"{rows[-1].tokens_per_second:,.0f} tok/s" if rows[-1].tokens_per_second else rows[-1].reason
            print(f"sep_size {sep_size}, batch_size {batch_size}: {rows[-1].status} {speed}", flush=True)
    print()
    print("\n".join(_table(rows)))
    print(f"\nwrote {args.csv}")
    measured = [row for row in rows if row.tokens_per_second is not None]
    if not measured:
        print("no run could be measured; the reasons are above")
        return 1
    best = max(measured, key=lambda row: row.tokens_per_second or 0.0)
    words = [*flags, "--sep_size", str(best.sep_size), "--batch_size", str(best.batch_size)]
    launcher = ["tinytron", "launch", "--nproc_per_node", str(args.nproc_per_node), *_target(args)]
    print(f"fastest: {shlex.join([*launcher, *words])}")
    return 0


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, usage="%(prog)s [--flag value ...] [-- PRETRAIN_FLAG ...]", description=_DESCRIPTION)
    parser.add_argument("--sep_sizes", nargs="+", type=_count, default=[1], metavar="N", help="values of --sep_size")
    parser.add_argument(
        "--batch_sizes", nargs="+", type=_count, default=[8], metavar="N", help="values of --batch_size"
    )
    parser.add_argument("--target_steps", type=_count, default=20, metavar="N", help="measured steps of a run")
    parser.add_argument("--warmup_steps", type=_count, default=5, metavar="N", help="steps before those, not measured")
    parser.add_argument("--timeout", type=_count, default=600, metavar="SECONDS", help="end a run that takes longer")
    parser.add_argument(
        "--nproc_per_node",
        type=_count,
        metavar="N",
        help="processes of a run; default: one per GPU, or NPROC (1) on a CPU",
    )
    parser.add_argument("--script", metavar="FILE", help="a training script instead of tinytron pretrain")
    parser.add_argument("--csv", default="autotune_results.csv", metavar="FILE", help="file for the results")
    return parser


def _count(text: str) -> int:
    if (number := whole_number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _target(args: argparse.Namespace) -> list[str]:
    """The words that name the program, for python or the launcher."""
    return [args.script] if args.script else ["-m", "tinytron", "pretrain"]


def _measure(args: argparse.Namespace, flags: Sequence[str], sep_size: int, batch_size: int) -> Row:
    """One run, in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="tinytron_autotune_") as folder:
        steps = args.warmup_steps + args.target_steps
        command = [
            *(sys.executable, *_target(args), *flags, "--use_mock_data", "--no-do_save"),
            *("--sep_size", str(sep_size), "--batch_size", str(batch_size), "--max_steps", str(steps)),
            # A report ends with the warm-up, and no later one covers a step of it.
            *("--log_dir", folder, "--log_every", str(args.warmup_steps)),
        ]
        output = Path(folder) / "output.txt"
        status = _run(command, args.nproc_per_node, output, args.timeout)
        text = output.read_text(encoding="utf-8", errors="replace")
        if status is None:
            return Row(sep_size, batch_size, TIMEOUT, reason=f"not done after {args.timeout} s")
        if status:
            killed = -status == signal.SIGKILL  # as the system does when memory runs out
            found = OOM if killed or _OUT_OF_MEMORY.search(text) else FAILED
            return Row(sep_size, batch_size, found, reason=_reason(text) or f"exit status {status}")
        records = [record for record in _records(Path(folder)) if record["step"] > args.warmup_steps]
        if len(records) < args.target_steps:
            return Row(sep_size, batch_size, FAILED, reason=f"its log has {len(records)} of {args.target_steps} steps")
        rate, mfu = (
            len(records) / sum(1 / record[name] for record in records) for name in ("tokens_per_second", "mfu")
        )
        return Row(sep_size, batch_size, OK, tokens_per_second=rate, mfu=mfu)


def _run(command: Sequence[str], count: int, output: Path, timeout: float) -> int | None:
    """Run ``command`` in ``count`` processes that train together. Returns the exit status of the first that fails (0: none
    did; ``None``: not done after ``timeout`` seconds). Processes that are left are killed, with those they started."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    environment = {"OMP_NUM_THREADS": str(max(1, cores // count)), **os.environ, **shared}
    environment["LOCAL_WORLD_SIZE"] = str(count)
    started: list[subprocess.Popen[bytes]] = []
    try:
        with open(output, "wb") as file:
            for rank in range(count):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                started.append(
                    subprocess.Popen(
                        command,
                        env={**environment, **own},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # a process group of its own, so that it can be killed whole
                    )
                )
        return _wait(started, time.monotonic() + timeout)
    finally:
        for process in started:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(started: Sequence[subprocess.Popen[bytes]], end: float) -> int | None:
    """Wait until all processes ended or one failed. Returns as ``_run``."""
    first: int | None = None
    while any(process.poll() is None for process in started):
        failed = [process.returncode for process in started if process.poll()]
        if failed and first is None:
            first, end = failed[0], min(end, time.monotonic() + _GRACE_SECONDS)
        if time.monotonic() > end:
            return first
        time.sleep(0.05)
    return first if first is not None else next((p.returncode for p in started if p.returncode), 0)


def _reason(output: str) -> str:
    """The line of a run's output that says why it failed: the first error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ") or re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors[0] if errors else lines[-1] if lines else "")[:300]


def _records(folder: Path) -> list[dict[str, float]]:
    """The training records in the log of the run in ``folder``."""
    lines = [line for path in folder.glob("*/log.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    records = map(json.loads, lines)
    return [record for record in records if record.get("stage") == "train"]


def _write(path: Path, rows: Sequence[Row]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, asdict(rows[0]).keys())
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [("sep_size", "batch_size", "tok/s", "MFU", "status", "reason")]
    for row in rows:
        speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        share = "-" if row.mfu is None else f"{row.mfu:.1%}"
        lines.append((str(row.sep_size), str(row.batch_size), speed, share, row.status, row.reason))
    return table(lines, right=range(4))
