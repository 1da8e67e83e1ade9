"""``tinytron run`` and ``tinytron restore``: run a configured job, stage by stage, on all GPUs of this machine.

Repeating the command is safe: finished work says so, interrupted work continues.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tinytron.cli import entry
from tinytron.cli.jobs import add_load, add_place, parse_with_overrides
from tinytron.config import configuration, nested
from tinytron.errors import CheckpointError, ConfigError
from tinytron.job import BasicJob, JobSpec
from tinytron.jobs.kinds import job_class
from tinytron.jobs.specs import read_stages
from tinytron.registry import load_module
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.training import write_atomically

SPEC = "job.json"  # in the job's folder: what it is, for the processes that run it and for `restore`
_STAGE = "--run-stage"  # with a spec file: how this command calls itself
_WORKER = "--run-process"


def main(argv: Sequence[str], prog: str = "tinytron run") -> int:
    """Run the job of a file, and the stages after it. Returns its exit status. Raises: TinytronError."""
    if argv and argv[0] in (_STAGE, _WORKER):
        spec = JobSpec.from_json(Path(argv[1]).read_text(encoding="utf-8"))
        return start(spec) if argv[0] == _STAGE else execute(spec)
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("name", metavar="NAME", help="name of this work; its folder is called that")
    parser.add_argument("file", metavar="FILE", help="options, as tinytron configure writes them")
    parser.add_argument("out", metavar="OUT", help="output folder")
    parser.add_argument("-j", "--job", help="the job, if the file does not name one")
    add_place(parser)
    parser.add_argument(
        "-s", "--stage", action="append", default=[], metavar="FILE", help="run this afterwards; several times"
    )
    parser.add_argument(
        "--restore", metavar="NAME[/CHECKPOINT]", help="begin with the weights of another job below OUT, say other/best"
    )
    add_load(parser)
    args = parse_with_overrides(parser, argv)
    for module in args.load:
        load_module(module)
    specs = read_stages(
        args.name,
        [args.file, *args.stage],
        args.out,
        args.overrides,
        job=args.job,
        project=args.project,
        group=args.group,
        load=args.load,
        restore=args.restore,
    )
    return run_stages(specs)


def restore(argv: Sequence[str], prog: str = "tinytron restore") -> int:
    """Continue a job from one of its checkpoints, as it was configured. Returns its exit status. Raises: TinytronError."""
    parser = Parser(
        prog=prog, description="Continue a job from one of its checkpoints, with the options it was run with."
    )
    parser.add_argument("name", metavar="NAME", help="name of the job, as it was run")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="latest, best, final, or a step")
    parser.add_argument("out", metavar="OUT", help="its output folder")
    add_place(parser)
    args = parse_strictly(parser, argv)
    folder = JobSpec("", args.name, args.out, {}, args.project, args.group).folder
    try:
        spec = JobSpec.from_json((folder / SPEC).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no job that was run; its name is the first argument of tinytron run"
        ) from error
    for module in spec.load:
        load_module(module)
    job = job_class(spec.job)(spec)
    job.go_back_to(args.checkpoint)
    return run_stages([spec])


def run_stages(specs: Sequence[JobSpec]) -> int:
    """Run the stages one after another. Returns the status of the first that fails, else 0."""
    for number, spec in enumerate(specs):
        if _job(spec).done:
            print(f"{spec.name} is finished: {spec.folder}", flush=True)
            continue
        write_spec(spec)
        if len(specs) == 1:
            return start(spec)
        print(f"stage {number} of {len(specs) - 1}: {spec.name} ({spec.job})", flush=True)
        if status := _in_a_process(spec):
            return status
        if not _job(spec).done:  # it was asked to stop
            return 0
    return 0


def start(spec: JobSpec) -> int:
    """Run the job on as many processes as it takes: this one, or more that are started here. Raises: TinytronError;
    SystemExit with the status of a process that failed, or if the job was asked to stop."""
    for module in spec.load:
        load_module(module)
    count = processes() if job_class(spec.job).all_processes else 1
    if count == 1:
        return execute(spec)
    from tinytron.cli import launch  # imports all of torchrun

    launch.main(
        ["--standalone", "--nproc_per_node", str(count), "-m", "tinytron.cli.run", _WORKER, str(spec.folder / SPEC)]
    )
    return 0


def execute(spec: JobSpec) -> int:
    """Run the job in this process; returns 0. Raises: TinytronError; SystemExit if it was asked to stop."""
    for module in spec.load:
        load_module(module)
    with configuration(nested(spec.values)):
        _job(spec)()
    return 0


def processes() -> int:
    """How many processes train on this machine: one for each GPU, or ``NPROC`` (1) where there is none or ``NUM_GPUS`` is
    0. Raises: ConfigError."""
    import torch

    for name in ("NUM_GPUS", "NPROC"):
        text = os.environ.get(name, "1")
        if not text.isdecimal():
            raise ConfigError(f"environment variable {name}={text!r} must be a whole number; use {name}=1")
    gpus = int(os.environ.get("NUM_GPUS", str(torch.cuda.device_count())))
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return max(1, gpus or int(os.environ.get("NPROC", "1")))


def write_spec(spec: JobSpec) -> None:
    """The spec as a file in the job's folder. Raises: ConfigError if it cannot be written."""
    text = spec.to_json().encode()
    try:
        spec.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(spec.folder / SPEC, lambda file: file.write(text))
    except OSError as error:
        raise ConfigError(
            f"{spec.folder} cannot be written ({error.strerror}); use an output folder you may write to, such as ./output"
        ) from error


def _job(spec: JobSpec) -> BasicJob:
    return job_class(spec.job)(spec)


def _in_a_process(spec: JobSpec) -> int:
    """Run a stage in its own process, which frees its memory when it ends. Stop signals are forwarded to it."""
    words = [sys.executable, "-m", "tinytron", "run", _STAGE, str(spec.folder / SPEC)]
    process = subprocess.Popen(words)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the stage received it too: it saves, and its exit status follows
            continue


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
