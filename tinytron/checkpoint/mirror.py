"""The remote copy of a run folder: fetched when the run starts, updated with every save."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist

from tinytron.checkpoint.files import CheckpointFiles, newest_checkpoint
from tinytron.distributed.agreement import agree_slowly
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import StorageError, TinytronError
from tinytron.metrics.sinks import SINKS
from tinytron.utils.remote import RemoteFolder

LOGS = (*(name for sink in SINKS.values() for name in sink.files), "config.json")  # files and folders
_ADVICE = "training continues with the local copy, and the next save tries again"


class Mirror:
    """Keeps ``url`` in sync with the local ``folder``. A remote checkpoint, too, exists once its ``*_meta.pt`` does.

    Each rank has its own mirror and pushes the files it wrote. ``push_*`` and ``remove_checkpoint`` block and may be called
    from any thread. They never raise if the storage fails: they print the error, remember what is missing, and retry it
    with the next call. Raises: ConfigError as ``RemoteFolder``.
    """

    def __init__(self, folder: Path, url: str, state: ParallelState, first_on_node: bool) -> None:
        self.folder, self.remote, self.state = folder, RemoteFolder(url), state
        self.first_on_node, self._lock = first_on_node, threading.RLock()
        self._parts: set[str] = set()  # files this rank wrote that are not at the remote yet
        self._commits: set[int] = set()  # steps whose metadata is not at the remote yet
        self._removals: set[int] = set()  # steps still to be deleted at the remote

    def set_aside(self) -> None:
        """Rename an existing remote folder (``.1``, ``.2``, ...) when a run starts over. Raises: StorageError."""
        if self.remote.list():
            names = (f"{self.remote.url}.{number}" for number in range(1, 10**6))
            self.remote.move(next(name for name in names if not RemoteFolder(name).list()))

    def restore(self) -> None:
        """Fetch the newest checkpoint and the logs if they are newer than the local ones. Afterwards all nodes have the
        same newest checkpoint. Collective.

        Raises: StorageError on every rank if the storage cannot be read.
        """
        several = self._nodes() > 1
        self._once_per_node(lambda: self._restore(several_nodes=several))

    def fetch(self, step: int) -> None:
        """On several nodes, each of which has only its own ranks' parts, fetch all of the checkpoint ``step``. Collective.
        Raises: StorageError on every rank if the storage cannot be read, or does not have it."""
        if self._nodes() > 1:
            self._once_per_node(lambda: self._pull(step, [f for f in self.remote.list() if _is_of(f, step)], ()))

    def _once_per_node(self, action: Callable[[], None]) -> None:
        agree_slowly(lambda: action() if self.first_on_node else None, self.state.groups["world"])

    def _nodes(self) -> int:
        firsts = [False] * self.state.layout.world_size
        dist.all_gather_object(firsts, self.first_on_node, group=self.state.groups["world"])
        return sum(firsts)

    def push_files(self, names: Iterable[str]) -> None:
        """Copy ``names`` (all files of a checkpoint except its metadata), and files that earlier calls failed to copy."""
        with self._lock:
            self._parts |= set(names)
            self._try(self._push_parts)

    def push_commit(self, step: int) -> None:
        """Copy the logs, then the metadata of ``step``. The master calls this once all ranks have pushed their parts. A
        checkpoint with a part missing at the remote gets its metadata only after that part has arrived."""
        with self._lock:
            self._commits.add(step)
            self._try(self._push_commits)

    def push_logs(self) -> None:
        """Copy the log files and config.json. Only the master calls this."""
        with self._lock:
            self._try(self._push_logs)

    def remove_checkpoint(self, step: int) -> None:
        """Delete the remote files of ``step``, metadata first. Only the master calls this."""
        with self._lock:
            self._parts = {name for name in self._parts if not _is_of(name, step)}
            self._commits.discard(step)
            self._removals.add(step)
            self._try(self._remove)

    # Each of the following methods may raise StorageError; the sets then still hold the work that remains.

    def _push_parts(self) -> None:
        self._remove()
        self.remote.push(self.folder, [name for name in sorted(self._parts) if (self.folder / name).is_file()])
        self._parts.clear()

    def _push_logs(self) -> None:
        kept = [self.folder / name for name in LOGS]
        paths = [path for one in kept for path in (one, *sorted(one.glob("*"))) if path.is_file()]
        self.remote.push(self.folder, [str(path.relative_to(self.folder)) for path in paths])

    def _push_commits(self) -> None:
        self._push_parts()
        self._push_logs()  # before the metadata, so that a restored run's log has every line up to its checkpoint
        present, missing = self.remote.list(), ""
        for files in [CheckpointFiles(self.folder, step) for step in sorted(self._commits)]:
            if files.complete:  # it may have been deleted in the meantime
                if lacking := [name for name in files.part_names() if name not in present]:
                    missing = f"cannot write {files.meta.name} ({lacking[0]} is not there yet)"
                    continue
                self.remote.push(self.folder, [files.meta.name])
            self._commits.discard(files.step)
        if missing:
            raise StorageError(f"{self.remote.url}: {missing}")

    def _remove(self) -> None:
        for step in sorted(self._removals):
            names = [name for name in self.remote.list() if _is_of(name, step)]
            self.remote.remove([name for name in names if name.endswith("_meta.pt")])
            self.remote.remove(names)
            self._removals.discard(step)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except TinytronError as error:
            print(f"error: {error}; {_ADVICE}", file=sys.stderr, flush=True)

    def _restore(self, several_nodes: bool) -> None:
        present = self.remote.list()
        steps = [int(match[1]) for name in present if (match := re.fullmatch(r"(\d+)_meta\.pt", name))]
        newest, own = max(steps, default=-1), newest_checkpoint(self.folder)
        if several_nodes:
            # Each node has only the parts of its own ranks, so a checkpoint that was never pushed cannot be loaded.
            while own is not None and own.step > newest:
                unpushed = own.meta.rename(own.meta.with_name(f"{own.meta.name}.unpushed"))
                print(f"checkpoint {own.step} never reached {self.remote.url}: kept as {unpushed}", file=sys.stderr)
                own = newest_checkpoint(self.folder)
        if newest >= 0 and (several_nodes or own is None or newest > own.step):
            self._pull(newest, [name for name in present if _is_of(name, newest)], present)
        elif own is not None and own.step > newest:
            self.push_files(own.part_names())
            self.push_commit(own.step)

    def _pull(self, step: int, names: list[str], present: Iterable[str]) -> None:
        """Fetch into a separate folder, so that an interrupted call can continue there; then move the files, metadata
        last."""
        files, arrived = CheckpointFiles(self.folder, step), self.folder / ".pull"
        print(f"fetching checkpoint {step} from {self.remote.url}", flush=True)
        logs = [name for name in present if name.split("/")[0] in LOGS]
        for name in logs:  # unlike a checkpoint's files they change, possibly without changing size
            (arrived / name).unlink(missing_ok=True)
        parts = [*(name for name in names if name != files.meta.name), *logs]
        self.remote.pull([*parts, files.meta.name], arrived)
        files.meta.unlink(missing_ok=True)
        shutil.rmtree(files.optimizer, ignore_errors=True)
        files.optimizer.mkdir(parents=True)
        for name in [*parts, files.meta.name]:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(arrived / name, self.folder / name)
        shutil.rmtree(arrived)


def _is_of(name: str, step: int) -> bool:
    return name.startswith((f"{step:05d}_model.", f"{step:05d}_opt/", f"{step:05d}_meta."))
