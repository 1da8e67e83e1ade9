"""``tinytron submit`` and ``tinytron bootstrap``: run a job on another machine, now, or whenever its
script is started."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tinytron.cli.jobs import add_load, add_place, parse_with_overrides
from tinytron.dispatch.checks import check_cluster, check_engine, check_variable
from tinytron.dispatch.choose import Rule
from tinytron.dispatch.load import located
from tinytron.dispatch.reading import read_section, read_settings
from tinytron.dispatch.script import job_folder, job_script, packed
from tinytron.dispatch.settings import FILE, AnyHost, Cluster, Settings, Tpu
from tinytron.dispatch.ship import pack
from tinytron.dispatch.submit import Order, submit_all
from tinytron.dispatch.tpu import NOTE, machine_script
from tinytron.dispatch.work import Request, Work, name_of, new_run_id
from tinytron.errors import ConfigError
from tinytron.utils.flags import Parser, nearest, whole_number
from tinytron.utils.texts import next_command

_DESCRIPTION = """Run a job on a host of your settings (~/.tinytron.yaml): by SSH, or in the queue of SLURM or Kubernetes.

%(prog)s --chip h100 -n 8 my-run train.yaml
%(prog)s -n 8 --dry_run my-run train.yaml
"""
_COMMON = ("name", "file", "stage", "restore", "chip", "n_chips", "target", "dirty", "env", "dry_run", "dispatch")
# Flags of bootstrap that are settings of a cluster.
_FOLDERS = ("root", "work", "log", "mount", "cache_size", "cache_dir", "all_squash")


def main(argv: Sequence[str], prog: str = "tinytron submit") -> None:
    """Submit a job. Raises: TinytronError."""
    parser = Parser(prog=prog, description=_DESCRIPTION, common=_COMMON)
    _add_work(parser)
    add_hardware(parser, default="the file's")
    add_choice(parser)
    parser.add_argument("--dry_run", action="store_true", help="print every file and script instead")
    _also(parser, "--dry-run", "dry_run", action="store_true")
    parser.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="KEY=VALUE,...",
        help="submit every combination of these values, in SLURM as one job array; last on the command line",
    )
    args = parse_with_overrides(parser, argv)
    settings = read_settings(args.dispatch)
    works, asked = _works(args)
    order = Order(asked, rule_of(args), environment_of(args.env))
    shipment = pack(Path.cwd(), args.dirty, [args.file, *args.stage])
    works = [replace(work, load=located(work.load, shipment, os.environ.get("PYTHONPATH", ""))) for work in works]
    done = submit_all(works, settings, order, shipment, os.environ, name=args.name, dry_run=args.dry_run)
    for one in done:
        print(f"submitted {one.place} to {one.host} as {one.id}; log: {one.log}")
        print(next_command("logs", one.name, "-f"))


def bootstrap(argv: Sequence[str], prog: str = "tinytron bootstrap") -> None:
    """Write a self-contained script. Raises: TinytronError."""
    parser = Parser(
        prog=prog,
        description="Write one bash script that runs a job anywhere: it has the options and the code, makes the "
        "environment, and continues the run when it is started again.\n\n"
        "%(prog)s --root /data/out --work /tmp/work my-run train.yaml run.sh",
        common=("name", "file", "out", "stage", "n_chips", "target", "root", "work", "mount", "env", "dispatch"),
    )
    _add_work(parser, out=True)
    add_hardware(parser, default="the file's")
    parser.add_argument("--target", metavar="HOST", help="take folders and environment from this host of the settings")
    for name in _FOLDERS:
        parser.add_argument(
            f"--{name}", metavar="TEXT", help=f"the cluster's {name}, instead of the one in the settings"
        )
        if "_" in name:
            _also(parser, f"--{name.replace('_', '-')}", name)
    args = parse_with_overrides(parser, argv)
    work, asked = _work(args)
    given = {name: value for name in _FOLDERS if (value := getattr(args, name)) is not None}
    cluster, host = _cluster(args, given)
    env = {**(cluster.env or {}), **(host.env or {})} if host is not None else {}
    groups = getattr(host, "uv_groups", None) or ()
    shipment = pack(Path.cwd(), args.dirty, [args.file, *args.stage])
    work = replace(work, load=located(work.load, shipment, os.environ.get("PYTHONPATH", "")))
    for note in shipment.notes:
        print(note)
    files = {name: (content, 0o644) for name, content in work.stage_files().items()}
    payload = packed({**files, "code.tar.gz": (shipment.files.code, 0o644)})
    run_id = new_run_id()
    script = job_script(
        *(work, cluster, {**env, **environment_of(args.env)}, asked, run_id, shipment.files.tree),
        per_node=asked.chips if args.n_chips is not None else None,
        log=f"{args.log.rstrip('/')}/{work.project}_{work.group}_{work.name}_{run_id}.log" if args.log else "",
        uv_groups=groups,
        payload=payload,
    )
    out = Path(args.out)
    _write_script(out, script)
    print(f"wrote {out} ({len(script) / 1e6:.1f} MB); it unpacks to {job_folder(cluster, work, run_id)}")
    if isinstance(host, Tpu):
        machine = out.with_suffix(".tpu.sh")
        _write_script(machine, machine_script(host, cluster, name_of(work, run_id), out.name))
        print(f"wrote {machine}, which makes the TPU machine and starts {out.name} there; {NOTE}")


def _write_script(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); use a file such as run.sh") from error


def _add_work(parser: argparse.ArgumentParser, *, out: bool = False) -> None:
    """Add the flags that say what is run, and on what."""
    parser.add_argument("name", metavar="NAME", help="name of this work and of its folder")
    parser.add_argument("file", metavar="FILE", help="options of the job, as written by tinytron configure")
    if out:
        parser.add_argument("out", metavar="OUT.sh", help="the script to write")
    parser.add_argument("-j", "--job", help="the job, if the file does not name it")
    add_place(parser)
    parser.add_argument(
        "-s", "--stage", action="append", default=[], metavar="FILE", help="run the job of this file next"
    )
    parser.add_argument("--restore", metavar="NAME[/CHECKPOINT]", help="start from the weights of another job")
    add_load(parser)


def add_hardware(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the flags for chips, environment, settings and code."""
    parser.add_argument("--chip", help="kind of accelerator, such as h100; default: any, or what the file requests")
    parser.add_argument(
        "-n",
        "--n_chips",
        type=whole_number,
        metavar="N",
        help=f"number of accelerators; 0: a CPU job; default: {default}",
    )
    parser.add_argument("--env", action="append", default=[], metavar="K=V", help="environment variable of the job")
    parser.add_argument("--dispatch", default=FILE, metavar="FILE", help=f"the settings (default: {FILE})")
    code = parser.add_mutually_exclusive_group()
    code.add_argument("--dirty", action="store_true", default=None, help="send uncommitted changes, too")
    code.add_argument("--clean", dest="dirty", action="store_false", default=None, help="send the last commit only")


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a host, and those that only a scheduler reads."""
    parser.add_argument("--mem", metavar="SIZE", help="memory of each node (schedulers)")
    parser.add_argument("--cpu", type=whole_number, metavar="N", help="CPU cores of each node (schedulers)")
    parser.add_argument("--cluster", action="append", default=[], metavar="NAME", help="only hosts of this cluster")
    parser.add_argument(
        "--exclude_cluster", action="append", default=[], metavar="NAME", help="no hosts of this cluster"
    )
    _also(parser, "--exclude-cluster", "exclude_cluster", action="append")
    parser.add_argument("--target", metavar="NAME", help="this host, even if it is busy, or the hosts of this cluster")


def rule_of(args: argparse.Namespace) -> Rule:
    """The hosts that the flags of ``add_choice`` allow."""
    return Rule(tuple(args.cluster), tuple(args.exclude_cluster), args.target)


def _also(parser: argparse.ArgumentParser, flag: str, dest: str, action: str = "store") -> None:
    """Accept another spelling of a flag."""
    parser.add_argument(flag, dest=dest, action=action, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _works(args: argparse.Namespace) -> tuple[list[Work], Request]:
    """The work, or with ``--sweep`` one for each combination, and the hardware of each. Raises: ConfigError."""
    from tinytron.jobs.sweep import grid

    found = []
    for variant in grid(args.sweep):
        name = f"{args.name}-{variant.suffix}" if variant.suffix else args.name
        one = argparse.Namespace(**{**vars(args), "name": name, "overrides": [*args.overrides, *variant.words]})
        found.append(_work(one))
    return [work for work, _ in found], found[0][1]


def _work(args: argparse.Namespace) -> tuple[Work, Request]:
    """The work, and the hardware it asks for. Every file is checked before anything is sent. Raises: ConfigError."""
    from tinytron.jobs.options import read_file  # with the jobs: takes a second to import
    from tinytron.jobs.specs import read_stages
    from tinytron.registry import load_module

    files = [args.file, *args.stage]
    for module in args.load:
        load_module(module)
    named = {"job": args.job, "project": args.project, "group": args.group, "load": args.load}
    read_stages(args.name, files, "output", args.overrides, restore=args.restore, **named)
    contents = tuple(Path(file).expanduser().read_bytes() for file in files)
    work = Work(
        args.name, contents, tuple(args.overrides), args.project, args.group, args.job, args.restore, tuple(args.load)
    )
    asked = read_file(args.file)[1].get("request") or {}
    if not isinstance(asked, dict):
        raise ConfigError(f"{args.file}: request must be a mapping; write request: {{chip: h100, min_chips: 8}}")
    return work, request_of(args, asked.get("min_chips", 1), asked.get("chip"))


def request_of(args: argparse.Namespace, chips: Any, chip: str | None) -> Request:
    """The hardware that the flags ask for; by default ``chips`` of the kind ``chip``. Raises: ConfigError."""
    chips = chips if args.n_chips is None else args.n_chips
    if not isinstance(chips, int) or chips < 0:
        raise ConfigError(f"-n {chips} must be a whole number of at least 0; use -n 8, or -n 0 for a CPU job")
    if getattr(args, "cpu", None) is not None and args.cpu < 1:
        raise ConfigError(f"--cpu {args.cpu} must be at least 1; use --cpu 8")
    chip = chip if args.chip is None else args.chip
    return Request(chips, chip if chips else None, getattr(args, "mem", None), getattr(args, "cpu", None))


def environment_of(words: Sequence[str]) -> dict[str, str]:
    """The variables of ``--env K=V``. Raises: ConfigError."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--env {word} must be a name, = and a value, such as --env NCCL_DEBUG=INFO")
        check_variable(name, "--env", value=value)
        found[name] = value
    return found


def _cluster(args: argparse.Namespace, given: dict[str, str]) -> tuple[Cluster, AnyHost | None]:
    """The cluster of a bootstrap script, changed by ``given``, and the host ``--target``."""
    if args.target is None:
        if not {"root", "work"} <= given.keys():
            raise ConfigError("--root and --work are needed without --target; use --root /data/out --work /tmp/work")
        cluster = read_section(Cluster, given, "bootstrap")
        check_cluster(cluster, "bootstrap")
        return cluster, None
    settings: Settings = read_settings(args.dispatch)
    if args.target not in settings.hosts:
        raise ConfigError(
            f"--target {args.target} is not a host of {settings.file}{nearest(args.target, settings.hosts)}; use one of "
            f"{', '.join(settings.hosts)}"
        )
    if "mount" in given:
        check_engine(given["mount"], "--mount")
    cluster = replace(settings.cluster_of(args.target), **cast(Any, given))
    check_cluster(cluster, "bootstrap")
    return cluster, settings.hosts[args.target]
