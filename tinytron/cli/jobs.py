"""``tinytron jobs``, ``configure``, ``checkpoints``: list jobs, write their options to a file, and list the checkpoints
that they saved."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tinytron.errors import ConfigError
from tinytron.registry import DATASETS, EVALUATIONS, JOBS, load_module
from tinytron.utils.flags import Parser, parse_strictly, whole_number
from tinytron.utils.texts import next_command


def add_load(parser: argparse.ArgumentParser) -> None:
    """Add the flag that loads modules with more jobs."""
    parser.add_argument(
        "--load",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module or .py file, which registers your own jobs",
    )


def parse_with_overrides(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse ``argv``; the words ``key=value`` between and after the flags become ``overrides``. Raises: ConfigError."""
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').strip()} [key=value ...]"
    _, unknown = parser.parse_known_args(argv)
    words = [word for word in unknown if "=" in word and not word.startswith("-")]
    args = parse_strictly(parser, [word for word in argv if word not in words])
    args.overrides = words
    return args


def main(argv: Sequence[str], prog: str = "tinytron jobs") -> None:
    """List the jobs, the datasets or the evaluations. Raises: ConfigError."""
    parser = Parser(prog=prog, description="List the jobs that tinytron configure and tinytron run accept.")
    parser.add_argument("--datasets", action="store_true", help="list the datasets that data.name accepts by name")
    parser.add_argument("--evaluations", action="store_true", help="list the evaluations that eval.evaluations accepts")
    add_load(parser)
    args = parse_strictly(parser, argv)
    for module in args.load:
        load_module(module)
    listed = EVALUATIONS if args.evaluations else DATASETS if args.datasets else JOBS
    if listed is not JOBS:
        _ = [listed[key] for key in listed]  # imports them: their descriptions are docstrings
    width = max(map(len, listed))
    for key in listed:
        print(f"{key:{width}}  {listed.help(key)}".rstrip())


def configure(argv: Sequence[str], prog: str = "tinytron configure") -> None:
    """Write the options of a job to a file. Raises: ConfigError."""
    parser = Parser(prog=prog, description="Write every option of a job to a YAML file that you can edit and run.")
    parser.add_argument("job", metavar="JOB", help="name of the job; tinytron jobs lists them")
    parser.add_argument("out", metavar="OUT.yaml", help="the file to write")
    parser.add_argument("-p", "--previous", metavar="FILE", help="start from the options of this file")
    parser.add_argument("--chip", help="accelerator to request, such as h100")
    parser.add_argument("-n", "--n_chips", type=whole_number, help="number of accelerators to request")
    parser.add_argument("--n_shards", type=whole_number, help="number of accelerators that share one model")
    add_load(parser)
    args = parse_with_overrides(parser, argv)
    for module in args.load:
        load_module(module)
    text, notes, missing = configured(args.job, args.overrides, args.previous, (args.chip, args.n_chips, args.n_shards))
    keep_edits(Path(args.out), text, args.job, args.previous)
    write_file(Path(args.out), text)
    for note in notes:
        print(note)
    print(f"wrote {args.out}")
    if missing:
        print(f"required before it can run: {', '.join(missing)}")
    print(next_command("run", "my-run", args.out, "./output", *(w for m in args.load for w in ("--load", m))))


def configured(
    key: str, overrides: Sequence[str], previous: str | None, hardware: tuple[str | None, int | None, int | None]
) -> tuple[str, list[str], list[str]]:
    """The YAML of the job ``key``, notes for the user, and the required options that are missing."""
    from tinytron.jobs.kinds import job_class  # takes a second to import for training jobs
    from tinytron.jobs.options import JobOptions, about_of, read_file

    options = JobOptions(key, job_class(key))
    notes = []
    if previous is not None:
        content, _ = read_file(previous)
        left_out = options.update_known(content, previous)
        if left_out:
            notes.append(f"left out, because {key} has no such option: {', '.join(left_out)}")
    options.override(overrides)
    about = about_of(key, *hardware)
    return options.as_yaml(about), notes, options.missing()


def keep_edits(path: Path, text: str, job: str, previous: str | None) -> None:
    """Raises: ConfigError if ``path`` exists with other content, perhaps edited, that this command would overwrite."""
    try:
        if previous is not None and path.samefile(Path(previous).expanduser()):
            return
        same = path.read_bytes() == text.encode()
    except OSError:  # the file does not exist, or writing it will fail with a better message
        return
    if not same:
        raise ConfigError(
            f"{path} already exists with other options; name another file, or change this one with "
            f"tinytron configure {job} {path} -p {path} key=value"
        )


def write_file(path: Path, text: str) -> None:
    """Write ``text``. Raises: ConfigError if the file cannot be written."""
    from tinytron.utils.training import write_atomically  # imports torch, which would delay `tinytron jobs`

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); use a file such as run.yaml") from error


def checkpoints(argv: Sequence[str], prog: str = "tinytron checkpoints") -> None:
    """List the checkpoints of a job. Raises: ConfigError; CheckpointError."""
    parser = Parser(prog=prog, description="List the checkpoints that a job has saved.")
    parser.add_argument("name", metavar="NAME", help="name the job was run under")
    parser.add_argument("out", metavar="OUT", help="its output folder")
    add_place(parser)
    args = parse_strictly(parser, argv)
    from tinytron.job import JobSpec
    from tinytron.jobs.checkpoints import best_of, named_checkpoint, newest_run
    from tinytron.jobs.places import check_place

    check_place(args.name, args.project, args.group)
    folder = JobSpec("", args.name, args.out, {}, args.project, args.group).folder
    named_checkpoint(folder, "latest")
    run = newest_run(folder)
    best = best_of(run)
    for number, files in enumerate(run):
        names = [name for name, applies in (("latest", number == 0), ("best", files == best)) if applies]
        if (folder / "done.json").exists() and number == 0:
            names.append("final")
        print(f"{files.step:>8}  {files.model}" + (f"  ({', '.join(names)})" if names else ""))


def add_place(parser: argparse.ArgumentParser) -> None:
    """Add the flags that locate a job in the output folder."""
    parser.add_argument("-p", "--project", default="general", help="folder in OUT/checkpoints")
    parser.add_argument("-g", "--group", default="default", help="folder inside the project's folder")
