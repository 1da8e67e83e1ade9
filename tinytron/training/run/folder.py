"""The folder of a run: its path and lock, its remote copy, and the description of the run in it."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
import torch.nn as nn

import tinytron
from tinytron.checkpoint.files import bytes_of, complete_checkpoints, leftovers, remove_leftovers
from tinytron.checkpoint.load import read_json
from tinytron.checkpoint.mirror import Mirror
from tinytron.distributed.agreement import agree, agree_slowly
from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import CheckpointError, ConfigError
from tinytron.interop.tokenizer import TokenizerFiles, run_tokens
from tinytron.metrics.routing import ROUTES, keep_traces_until
from tinytron.metrics.sinks import SINKS, MessageLog
from tinytron.model import GPT
from tinytron.text.run_tokenizer import TOKENS
from tinytron.training.config import BALANCED, Config
from tinytron.training.run.resume import checkpoints_to_resume
from tinytron.training.world import first_on_node
from tinytron.utils.lock import lock_folder
from tinytron.utils.remote import is_remote, local_folder
from tinytron.utils.texts import next_command, next_generation
from tinytron.utils.training import write_atomically

T = TypeVar("T")
# Messages are those of every start of the run.
LOGS = tuple(name for sink in SINKS.values() if sink is not MessageLog for name in sink.files)
_REMEDY = "wait for it or stop it, or use another --exp_name"  # when the run folder is in use


class RunFolder:
    """The folder of this run, locked against other runs until the master's process ends. Construction is collective.

    ``path`` is the folder, ``mirror`` its remote copy if the log folder is a URL, ``description`` what ``config.json`` and
    every checkpoint record about the run, and ``notes`` are lines to print. Raises: ConfigError or StorageError on every
    rank if the folder cannot be written, is in use, or is not the same for all ranks.
    """

    def __init__(self, config: Config, state: ParallelState) -> None:
        self._config, self._state = config, state
        self.path = prepare_run_folder(config, state)
        self._lock = lock_run_folder(self.path, state)
        self.mirror = open_mirror(config, state)
        self.description = describe_run(config, state.layout)
        tokens = agree_slowly(lambda: tokens_of(config, self.path), state.groups["world"])
        self.description["config"][TOKENS] = tokens.as_section()
        self._tokenizer, unreadable = _contents(tokens.kept)
        self._has_tokenizer = tokens.is_complete and not unreadable
        copied = "" if self.mirror is None else f", copied to {self.mirror.remote.url}"
        self.notes = [f"run folder: {self.path}{copied}", *remove_leftovers_of_saves(config, self.path, state)]
        if why := tokens.left_behind or unreadable:
            self.notes.append(f"the run keeps no copy of the tokenizer: {why}")
        if tokens.left_out:
            self.notes.append(tokens.left_out)
        if 4 * len(tokens.unused) > config.model.vocab_size:
            size, unused = config.model.vocab_size, len(tokens.unused)
            self.notes.append(
                f"--vocab_size is {size}, but the tokenizer has {size - unused} tokens: {unused} rows are never used; "
                f"--vocab_size {-(-(size - unused) // 64) * 64} would be enough (for a new run)"
            )
        if state.is_master and (note := another_of_this_name(config, self.path)) is not None:
            self.notes.append(note)

    def begin(self, step: int, max_steps: int) -> list[str]:
        """Write ``config.json`` and the run's tokenizer, once it is certain that the run continues in this folder after
        ``step``; with the ``max_steps`` that follow from the data. Drop router traces of later steps, which will be traced
        again. At step 0, move the log of an earlier run aside (not with ``--debug``). Returns lines to print. Collective.

        Raises: ConfigError or, for the remote copy, StorageError on every rank: a run whose log folder cannot be written
        does not start.
        """
        text = json.dumps({**self.description, "max_steps": max_steps}, indent=2).encode()
        file = self.path / "config.json"

        def write() -> list[str]:
            aside = [] if step or self._config.train.debug else set_logs_aside(self.path)
            write_atomically(file, lambda out: out.write(text))
            for name, content in self._tokenizer.items():
                _write(self.path / name, content)
            if self.mirror is not None:
                moved = [name for name in aside if (self.path / name).is_file()]
                self.mirror.remote.push(self.path, [file.name, *self._tokenizer, *moved])
            keep_traces_until(self.path, step)
            return [f"no checkpoint to continue from: kept the earlier log as {aside[0]}"] if aside else []

        action = (lambda: writable(self._config, write)) if self._state.is_master else list
        return agree(action, self._state.groups["world"])

    def next_command(self, model: nn.Module) -> str:
        """A line with a command to try on ``model``, once it is trained and saved here."""
        if self._has_tokenizer and isinstance(model, GPT):
            return next_generation(self.path)
        return next_command("checkpoint", "inspect", self.path)

    def push_logs(self) -> None:
        """Bring the log files of the remote copy up to date, if there is a remote copy."""
        if self.mirror is not None and self._state.is_master:
            self.mirror.push_logs()


def another_of_this_name(config: Config, folder: Path) -> str | None:
    """A line about the newest run of this ``--exp_name`` that has checkpoints, if ``folder`` has none: a flag that was
    changed, or mistyped, starts another run."""
    if config.train.debug or complete_checkpoints(folder):
        return None
    name = re.compile(re.escape(config.logging.exp_name) + "_[0-9a-f]{8}")
    siblings = [
        path
        for path in folder.parent.glob("*/config.json")
        if path.parent != folder and name.fullmatch(path.parent.name)
    ]
    for file in sorted(siblings, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            description = read_json(file)
            balanced = description.get("balanced_sequences", config.balanced_sequences)  # older files do not have it
            saved = {**description["config"], BALANCED: balanced}
            checkpoints = complete_checkpoints(file.parent)
            differing = [
                name for name, value in config.identity().items() if _saved(saved, name, value) != _plain(value)
            ]
        except (CheckpointError, KeyError, TypeError, AttributeError):
            continue  # not a run of a compatible version
        if checkpoints and differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            return (
                f"this is a new run: {file.parent.name} has {checkpoints[0].step} steps, and differs in "
                f"{', '.join(differing[:3])}{more}"
            )
    return None


def _saved(sections: dict[str, Any], name: str, default: Any) -> Any:
    if name == BALANCED:
        return sections[name]
    section, _, option = name.partition(".")
    return sections[section].get(option, _plain(default))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def set_logs_aside(folder: Path) -> list[str]:
    """Rename non-empty log files of ``folder``, and router traces, to ``log.txt.1`` and so on; returns the new names."""
    logs = [folder / name for name in LOGS]
    there = [
        path for path in (*logs, *sorted(folder.glob(ROUTES.format("*")))) if path.exists() and path.stat().st_size
    ]
    number = next(n for n in range(1, 10**6) if not any(_numbered(path, n).exists() for path in (*logs, *there)))
    for path in there:
        path.rename(_numbered(path, number))
    return [_numbered(path, number).name for path in there]


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def tokens_of(config: Config, folder: Path) -> TokenizerFiles:
    """The tokenizer and token facts that the run in ``folder`` keeps."""
    try:
        continued = [str(files.model) for files in checkpoints_to_resume(config, folder)[:1]]
    except CheckpointError:  # reported when the checkpoint is loaded
        continued = []
    begun = [config.ckpt.init_from] if config.ckpt.init_from is not None else []
    return run_tokens(config.model.vocab_size, config.as_dict()["data"], [*continued, *begun])


def _contents(files: Sequence[Path]) -> tuple[dict[str, bytes], str]:
    """The contents of ``files`` by name, or nothing and the reason if one cannot be read."""
    try:
        return {path.name: path.read_bytes() for path in files}, ""
    except OSError as error:
        return {}, f"{error.filename} cannot be read ({error.strerror})"


def _write(file: Path, content: bytes) -> None:
    write_atomically(file, lambda out: out.write(content))


def run_folder(config: Config) -> Path:
    """``<log_dir>/<exp_name>_<config_hash>``; if the log folder is remote, the local staging folder."""
    return local_folder(config.logging.log_dir) / _run_name(config)


def _run_name(config: Config) -> str:
    return f"{config.logging.exp_name}_{config.config_hash()}"


def open_mirror(config: Config, state: ParallelState) -> Mirror | None:
    """The remote copy of the run's folder, if the log folder is remote; files that the local folder lacks are downloaded.
    Collective, after the folder is prepared.

    With ``--no-resume`` an existing remote run is moved aside. Raises: ConfigError or StorageError on every rank if the
    storage cannot be used.
    """
    log_dir = config.logging.log_dir
    if not is_remote(log_dir):
        return None
    url, world = f"{log_dir.rstrip('/')}/{_run_name(config)}", state.groups["world"]
    mirror = agree(lambda: Mirror(run_folder(config), url, state, first_on_node()), world)
    if not config.ckpt.resume:
        agree_slowly(lambda: mirror.set_aside() if state.is_master else None, world)
    elif not config.train.debug:
        mirror.restore()
    return mirror


def prepare_run_folder(config: Config, state: ParallelState) -> Path:
    """Create the run's folder. Collective.

    With ``--no-resume`` a folder that contains a run is moved aside (``.1``, ``.2``, ...), never overwritten. A remote one
    is staged on each node. Raises: ConfigError on every rank if the folder cannot be written, or is not the same for all.
    """
    folder, world = run_folder(config), state.groups["world"]
    seal, staged = folder / ".shared", is_remote(config.logging.log_dir)

    def create() -> None:
        # Only the master has a log; the other nodes of a staged run have parts of checkpoints.
        if not config.ckpt.resume and (folder if staged else folder / "log.txt").exists():
            lock_folder(folder, _REMEDY).close()  # fails if a running process uses the folder
            number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
            folder.rename(folder.with_name(f"{folder.name}.{number}"))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(seal, lambda file: file.write(b""))

    def see() -> None:
        if not seal.exists():
            raise ConfigError(
                f"--log_dir {config.logging.log_dir} is not the same folder on all nodes: process {state.rank} cannot see "
                f"what process 0 wrote to {folder}; use a folder that all nodes share"
            )

    creates = first_on_node() if staged else state.is_master
    agree(lambda: writable(config, create) if creates else None, world)
    agree(see, world)
    agree(lambda: seal.unlink() if creates else None, world)
    return folder


def lock_run_folder(folder: Path, state: ParallelState) -> IO[str] | None:
    """Keep other runs out of ``folder`` until the result is closed or the master's process ends for any reason.
    Collective.

    Raises: ConfigError on every rank if a running process uses the folder, naming its host and process id.
    """
    return agree(lambda: lock_folder(folder, _REMEDY) if state.is_master else None, state.groups["world"])


def remove_leftovers_of_saves(config: Config, folder: Path, state: ParallelState) -> list[str]:
    """Delete half-saved files of earlier, killed processes in ``folder``, whose lock is held; returns lines to print.
    Collective. Raises: ConfigError on every rank if deleting fails."""

    def remove() -> list[str]:
        size = bytes_of(leftovers(folder))
        names = [path.name for path in remove_leftovers(folder)]
        return [f"removed what interrupted saves left behind: {', '.join(names)} ({size:,} bytes)"] if names else []

    return agree(lambda: writable(config, remove) if state.is_master else [], state.groups["world"])


def writable(config: Config, action: Callable[[], T]) -> T:
    """The result of ``action``, which writes below the log folder. Raises: ConfigError if writing fails."""
    try:
        return action()
    except OSError as error:
        raise ConfigError(
            f"--log_dir {config.logging.log_dir} cannot be written ({error.strerror}: {error.filename}); "
            "use a folder you can write to, such as --log_dir ./log/"
        ) from error


def describe_run(config: Config, layout: ParallelLayout) -> dict[str, Any]:
    """Configuration, layout, code revision and versions."""
    return {
        "config": config.as_dict(),
        "config_hash": config.config_hash(),
        "balanced_sequences": config.balanced_sequences,
        "world_size": layout.world_size,
        "command": sys.argv,
        "git": git_revision(),
        "versions": {
            "tinytron": tinytron.__version__,
            "torch": str(torch.__version__),  # a str subclass that weights_only loading refuses
            "numpy": np.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
    }


def git_revision() -> str | None:
    """Commit of the code, with ``-dirty`` if files differ from it; ``None`` outside a git checkout."""
    command = ["git", "-C", str(Path(tinytron.__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
