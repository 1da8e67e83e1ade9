"""``tinytron run`` and ``tinytron restore``: run a configured job, stage by stage, on all GPUs of this machine, or of
several that each run this command.

The command is safe to repeat: finished work is reported as finished, interrupted work continues.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tinytron.cli import entry
from tinytron.cli.child import run_child
from tinytron.cli.jobs import add_load, add_place, parse_with_overrides
from tinytron.cli.nodes import Nodes, nodes_of
from tinytron.config import configuration, nested
from tinytron.errors import CheckpointError, ConfigError
from tinytron.job import BasicJob, JobSpec
from tinytron.jobs.kinds import job_class
from tinytron.jobs.options import JobOptions
from tinytron.jobs.places import check_place
from tinytron.jobs.specs import read_stages
from tinytron.jobs.sweep import grid
from tinytron.observe.folder import LOG
from tinytron.registry import load_module
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.lock import lock_folder
from tinytron.utils.signals import INTERRUPTED
from tinytron.utils.training import write_atomically

SPEC = "job.json"  # in the job's folder: the job and its options, for the worker processes and for `restore`
_STAGE = "--run-stage"  # followed by a spec file: this command starts itself this way
_WORKER = "--run-process"
_LOOK_SECONDS = 1.0  # between two looks for the first node's marker
_MARKER_SECONDS = 60.0  # for the marker of a stage that all nodes ran to show on the others, whose file system may lag


def main(argv: Sequence[str], prog: str = "tinytron run") -> int:
    """Run the job of a file, and the stages after it. Returns its exit status. Raises: TinytronError."""
    if argv and argv[0] in (_STAGE, _WORKER):
        file = Path(argv[1])
        spec = JobSpec.from_json(file.read_text(encoding="utf-8"))
        for module in spec.load:
            load_module(module)
        return start(spec, file) if argv[0] == _STAGE else execute(spec)
    parser = Parser(
        prog=prog, description=(__doc__ or "").replace("``tinytron run`` and ``tinytron restore``: run", "Run")
    )
    parser.add_argument("name", metavar="NAME", help="name of this work and of its folder")
    parser.add_argument("file", metavar="FILE", help="options of the job, as written by tinytron configure")
    parser.add_argument("out", metavar="OUT", help="output folder")
    parser.add_argument("-j", "--job", help="the job, if the file does not name it")
    add_place(parser)
    parser.add_argument(
        "-s",
        "--stage",
        action="append",
        default=[],
        metavar="FILE",
        help="run the job of this file next; repeat the flag for more stages",
    )
    parser.add_argument(
        "--restore",
        metavar="NAME[/CHECKPOINT]",
        help="start from the weights of another job in OUT, such as other/best",
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="KEY=VALUE,...",
        help="run every combination of these values, one after another, and compare them; last on the command line",
    )
    add_load(parser)
    args = parse_with_overrides(parser, argv)
    load = [str(Path(module).resolve()) if module.endswith(".py") else module for module in args.load]
    for module in load:
        load_module(module)
    works = [
        read_stages(
            f"{args.name}-{variant.suffix}" if variant.suffix else args.name,
            [args.file, *args.stage],
            args.out,
            [*args.overrides, *variant.words],
            job=args.job,
            project=args.project,
            group=args.group,
            load=load,
            restore=args.restore,
        )
        for variant in grid(args.sweep)
    ]
    return run_sweep(works) if args.sweep else run_stages(works[0])


def restore(argv: Sequence[str], prog: str = "tinytron restore") -> int:
    """Continue a job from one of its checkpoints, with its own options. Returns its exit status. Raises: TinytronError."""
    parser = Parser(
        prog=prog, description="Continue a job from one of its checkpoints, with the options it was run with."
    )
    parser.add_argument("name", metavar="NAME", help="name the job was run under")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="latest, best, final, or a step")
    parser.add_argument("out", metavar="OUT", help="its output folder")
    add_place(parser)
    args = parse_strictly(parser, argv)
    check_place(args.name, args.project, args.group)
    spec = read_spec(JobSpec("", args.name, args.out, {}, args.project, args.group))
    with lock_folder(spec.folder, "stop it first"):
        _job(spec).go_back_to(args.checkpoint)
    return run_stages([spec])


def read_spec(place: JobSpec) -> JobSpec:
    """The spec of the job that was run at ``place``, with defaults for options added since. The folder may have been
    moved. Raises: CheckpointError if the spec is missing or damaged; ConfigError for an unknown job."""
    file = place.folder / SPEC
    try:
        spec = JobSpec.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{place.folder} contains no job that was run; give the name that was the first argument of tinytron run"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged; repeat the tinytron run command, which writes it again") from error
    for module in spec.load:
        load_module(module)
    options = JobOptions(spec.job, job_class(spec.job))
    options.update(nested(spec.values), str(file))
    return replace(place, job=spec.job, values=options.values(), load=spec.load, restore=spec.restore)


def run_stages(specs: Sequence[JobSpec]) -> int:
    """Run the stages one after another. Returns the status of the first stage that fails or is stopped, else 0. Raises:
    ConfigError if another process is running one of them; TinytronError."""
    nodes = nodes_of()
    for number, spec in enumerate(specs):
        if _job(spec).done:
            print(f"{spec.name} is finished: {spec.folder}", flush=True)
            continue
        with _written(spec, nodes) as file:
            if len(specs) == 1:
                return start(spec, file)
            print(f"stage {number} of {len(specs) - 1}: {spec.name} ({spec.job})", flush=True)
            status, stopped = _in_a_process(spec, file)
        if status or stopped or not _is_done(spec, 0 if nodes.first else _MARKER_SECONDS):
            return status
    return 0


def run_sweep(works: Sequence[Sequence[JobSpec]]) -> int:
    """Run the works one after another, each with its stages, and print a table of their last stages. One that fails does
    not keep the next from running. Returns the status of the first that failed or was stopped, else 0. Raises:
    TinytronError."""
    nodes = nodes_of()
    statuses = []
    for number, specs in enumerate(works, 1):
        print(f"run {number} of {len(works)}: {specs[-1].name}", flush=True)
        for spec in specs:
            if _job(spec).done:
                continue
            with _written(spec, nodes) as file:
                status, stopped = _in_a_process(spec, file)
            if stopped:
                return status
            if status:
                statuses.append(status)
                break
    folders = [str(log.parent) for specs in works for log in sorted(specs[-1].folder.glob(f"*/{LOG}"))]
    if folders:
        from tinytron.cli.watch import open_runs  # with the server of pages
        from tinytron.observe.compare import as_lines, read_all, results

        print("\n".join(as_lines(results(read_all(open_runs(folders))))))
    return statuses[0] if statuses else 0


def start(spec: JobSpec, file: Path) -> int:
    """Run the job, whose description is in ``file``, in as many processes as it needs: in this one, or in several that are
    started here. Raises: TinytronError; SystemExit with the status of a process that failed, or if the job was asked to
    stop."""
    nodes = nodes_of()
    alone = not job_class(spec.job).all_processes
    if alone and not nodes.first:
        print(f"waiting for the first node, which runs {spec.name} alone", flush=True)
        _is_done(spec, float("inf"))
        return 0
    count = 1 if alone else processes()
    if alone or (count == 1 and nodes.count == 1):
        return execute(spec)
    from tinytron.cli import launch  # imports all of torchrun

    launch.main([*nodes.rendezvous, "--nproc_per_node", str(count), "-m", "tinytron.cli.run", _WORKER, str(file)])
    # One of the nodes may have been asked to stop, which the others must not take for the end.
    return entry.TO_BE_CONTINUED if nodes.first and nodes.count > 1 and not _job(spec).done else 0


def execute(spec: JobSpec) -> int:
    """Run the job in this process; returns 0. Raises: TinytronError; SystemExit if it was asked to stop."""
    with configuration(nested(spec.values)):
        _job(spec)()
    return 0


def processes() -> int:
    """Number of training processes on this machine: one per GPU, or ``NPROC`` (1) if there is no GPU or ``NUM_GPUS`` is 0.
    Raises: ConfigError."""
    import torch

    for name in ("NUM_GPUS", "NPROC"):
        text = os.environ.get(name, "1")
        if not text.isdecimal():
            raise ConfigError(f"environment variable {name}={text!r} must be a whole number; use {name}=1")
    gpus = int(os.environ.get("NUM_GPUS", str(torch.cuda.device_count())))
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return max(1, gpus or int(os.environ.get("NPROC", "1")))


@contextlib.contextmanager
def _written(spec: JobSpec, nodes: Nodes) -> Iterator[Path]:
    """A file with the spec, for the processes that run it: on the first node in the job's folder, which is locked, because
    two commands would overwrite each other's ``job.json``; on the others a copy of their own. Raises: ConfigError."""
    if not nodes.first:
        with tempfile.TemporaryDirectory(prefix="tinytron-") as folder:
            copy = Path(folder) / SPEC
            copy.write_text(spec.to_json(), encoding="utf-8")
            yield copy
        return
    with _writing(spec.folder):
        spec.folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(spec.folder, "wait until it ends, or give this work another name"):
        write_spec(spec)
        yield spec.folder / SPEC


def write_spec(spec: JobSpec) -> None:
    """Write the spec to a file in the job's folder. Raises: ConfigError if it cannot be written."""
    text = spec.to_json().encode()
    with _writing(spec.folder):
        write_atomically(spec.folder / SPEC, lambda file: file.write(text))


def _is_done(spec: JobSpec, seconds: float) -> bool:
    """True if the job is finished, or is within ``seconds``."""
    end = time.monotonic() + seconds
    while not _job(spec).done:
        if time.monotonic() >= end:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); use an output folder you can write to, such as ./output"
        ) from error


def _job(spec: JobSpec) -> BasicJob:
    return job_class(spec.job)(spec)


def _in_a_process(spec: JobSpec, file: Path) -> tuple[int, bool]:
    """Run a stage in its own process, which frees its memory when it ends. Stop signals are forwarded to it. Returns its
    exit status, and whether it was asked to stop (it may still have finished)."""
    status, received = run_child([sys.executable, "-m", "tinytron", "run", _STAGE, str(file)])
    if status < 0:
        _say_killed(spec.name, signal.Signals(-status), expected=-status in received)
        return 128 - status, True
    if status == 0 and signal.SIGINT in received:
        return INTERRUPTED, True
    return status, bool(received)


def _say_killed(name: str, by: signal.Signals, *, expected: bool) -> None:
    if expected:  # the stage had not begun to train
        text = f"{name} was stopped by {by.name}"
    else:
        text = f"error: {name} was killed by {by.name}" + (" (out of memory?)" if by == signal.SIGKILL else "")
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
