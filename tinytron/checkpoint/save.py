"""Writing a checkpoint: weights and states first, metadata last. A background thread writes it unless ``wait`` is set."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.checkpoint.files import CheckpointFiles, Retention, checksum, complete_checkpoints
from tinytron.checkpoint.host_buffers import HostBuffers
from tinytron.checkpoint.load import read_meta
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.checkpoint.mirror import Mirror
from tinytron.checkpoint.snapshot import Snapshot, take_snapshot
from tinytron.distributed.agreement import agree
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.errors import CheckpointError, TinytronError
from tinytron.utils.training import sync_folder, write_atomically


def write_checkpoint(snapshot: Snapshot, group: dist.ProcessGroup, mirror: Mirror | None = None) -> None:
    """Write every rank's part of a snapshot and, once all parts are on disk, the metadata; then push everything to
    ``mirror``. Collective over ``group``.

    The checkpoint does not exist for a reader until ``*_meta.pt`` is in place. An older checkpoint of the same step loses
    its metadata before its parts are overwritten. Raises: TinytronError on every rank if the disk refuses on one.
    """
    from tinytron.checkpoint.optimizer_state import write_optimizer_state  # torch's DCP takes a second to import

    files = snapshot.files
    rank = dist.get_rank(group)
    staged = mirror is not None and mirror.first_on_node  # each node has its own folder
    agree(lambda: _clear(files) if rank == 0 or staged else None, group)
    sums = agree(lambda: _write_model(snapshot) if rank == 0 else {}, group)
    sums |= write_optimizer_state(snapshot.states, files.optimizer, group)
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, (sums, snapshot.rng), group=group)
    checksums = {name: value for sums, _ in of_ranks for name, value in sums.items()}
    meta = replace(snapshot.meta, files=checksums, rng=[rng for _, rng in of_ranks])
    agree(lambda: _commit(files, meta) if rank == 0 else None, group)
    if mirror is not None:
        _copy(files, mirror, group)


def _copy(files: CheckpointFiles, mirror: Mirror, group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    if rank == 0:
        mirror.remove_checkpoint(files.step)
    agree(lambda: None, group)  # barrier: no rank pushes before the old checkpoint is removed
    mirror.push_files(files.names_written_by(rank))
    agree(lambda: None, group)  # barrier: every rank has pushed its parts
    if rank == 0:
        mirror.push_commit(files.step)


def _clear(files: CheckpointFiles) -> None:
    files.folder.mkdir(parents=True, exist_ok=True)  # the user may have removed it during the run
    files.remove()


def _write_model(snapshot: Snapshot) -> dict[str, Any]:
    path = snapshot.files.model
    write_atomically(path, lambda file: torch.save(snapshot.weights, file))
    return {path.name: checksum(path)}


def _commit(files: CheckpointFiles, meta: CheckpointMeta) -> None:
    sync_folder(files.optimizer)
    sync_folder(files.folder)
    write_atomically(files.meta, lambda file: torch.save(meta.as_dict(), file))


def to_prune(folder: Path, retention: Retention) -> list[CheckpointFiles]:
    """The complete checkpoints of ``folder`` that ``retention`` does not keep, oldest first."""
    newest_first = complete_checkpoints(folder)
    found = {files.step: files for files in newest_first}
    known = costs(newest_first) if retention.keep_best else {}
    return [found[step] for step in retention.to_prune({step: known.get(step) for step in found})]


def prune(folder: Path, retention: Retention) -> list[CheckpointFiles]:
    """Delete the ``to_prune`` checkpoints of ``folder`` and return them. Raises: OSError if the system refuses."""
    gone = to_prune(folder, retention)
    for files in gone:
        files.remove()
    return gone


def costs(newest_first: Sequence[CheckpointFiles]) -> dict[int, float]:
    """By step, the number that is lowest for the best checkpoint (``CheckpointMeta.cost``), of the checkpoints that have it
    and are judged by the same metric as the newest one."""
    metric: str | None = None
    found = {}
    for files in newest_first:
        try:
            meta = read_meta(files.meta)
        except CheckpointError:  # a damaged checkpoint is never the best
            continue
        name = meta.best_metric.get("name", "")
        metric = name if metric is None else metric
        if name == metric and meta.cost is not None and not math.isnan(meta.cost):
            found[files.step] = meta.cost
    return found


class Consumer(Protocol):
    """A consumer of new checkpoints, such as an exporter, on the master. The saving thread calls ``committed`` once
    ``files`` are on disk and before any checkpoint is pruned; it returns text to add to the report and never raises."""

    def committed(self, files: CheckpointFiles) -> str: ...
    def report(self) -> list[str]: ...
    def close(self, say: Callable[[str], None], *, wait: bool) -> None: ...


@dataclass
class Save:
    """A save in progress; all fields but ``snapshot`` are set when it ends."""

    snapshot: Snapshot
    error: BaseException | None = None
    seconds: float = 0.0
    note: str = ""


class CheckpointSaver:
    """Saves a run's checkpoints into ``folder``, one at a time.

    ``save`` returns once everything is copied to host memory; a thread writes it while training continues. The thread's
    collectives use their own gloo group, so they cannot mix with the training's. If a save fails, only that checkpoint is
    lost, never the run: ``report`` returns the error.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: DistributedOptimizer,
        state: ParallelState,
        *,
        retention: Retention | None = None,
        mirror: Mirror | None = None,
        consumer: Consumer | None = None,
    ) -> None:
        self.folder, self.model, self.optimizer, self.state = folder, model, optimizer, state
        self.retention, self.mirror, self.consumer = retention or Retention(), mirror, consumer
        self._buffers = HostBuffers()
        self._group: dist.ProcessGroup | None = None
        self._save: Save | None = None
        self._thread: threading.Thread | None = None
        self.failed: str | None = None  # why the last finished save is not on disk; None if it is

    def save(self, step: int, meta: CheckpointMeta, *, wait: bool = False) -> list[str]:
        """Start saving ``step``, after waiting for an earlier save; with ``wait`` also wait for this one. Returns messages
        to print. ``meta`` has the fields that the run fills in. Collective."""
        messages = self.finish()
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        files = CheckpointFiles(self.folder, step)
        self._save = Save(take_snapshot(files, self.model, self.optimizer, meta, self.state, self._buffers))
        # A daemon thread: a dying process must not wait for a save, and an interrupted save leaves no checkpoint behind.
        self._thread = threading.Thread(target=self._write, args=(self._save,), name=f"save {step}", daemon=True)
        self._thread.start()
        return messages + self.finish() if wait else messages

    def _write(self, save: Save) -> None:
        start = time.perf_counter()
        try:
            assert self._group is not None, "save creates the group before it starts the thread"
            write_checkpoint(save.snapshot, self._group, self.mirror)
            if self.consumer is not None:
                save.note = self.consumer.committed(save.snapshot.files)
            self._prune(save, self._group)
        except BaseException as error:  # ``finish`` raises or reports it in the training thread
            save.error = error
        save.seconds = time.perf_counter() - start

    def _prune(self, save: Save, group: dist.ProcessGroup) -> None:
        """Delete old checkpoints. The master decides which; in a run with a mirror every node deletes its own copies, and
        the master the remote ones."""
        gone: list[int] = []
        if self.state.is_master:
            try:
                gone = [files.step for files in prune(self.folder, self.retention)]
            except OSError as error:
                save.note += f"; error: older checkpoints cannot be removed ({error})"
            save.note += "".join(f"; removed {step}" for step in gone)
        if self.mirror is None:
            return
        decided = [gone]
        dist.broadcast_object_list(decided, group=group, group_src=0)
        for step in decided[0]:
            if self.mirror.first_on_node:
                CheckpointFiles(self.folder, step).remove()
            if self.state.is_master:
                self.mirror.remove_checkpoint(step)

    def report(self) -> list[str]:
        """Messages about work that finished since the last call; does not wait. Raises: any error of the save other than
        a TinytronError or OSError."""
        ended = [] if self._thread is None or self._thread.is_alive() else self.finish()
        return ended + (self.consumer.report() if self.consumer is not None else [])

    def finish(self) -> list[str]:
        """Wait for the save in progress, then return its messages. Raises: as ``report``."""
        if self._thread is None or self._save is None:
            return []
        self._thread.join()
        save, self._save, self._thread = self._save, None, None
        step, path = save.snapshot.files.step, save.snapshot.files.model
        if save.error is None:
            self.failed = None
            return [f"step {step} | saved {path} in {save.seconds:.1f} s{save.note}"]
        if not isinstance(save.error, (TinytronError, OSError)):
            raise save.error
        self.failed = f"checkpoint {step} was NOT saved ({save.error})"
        return [f"error: {self.failed}; training continues, the next save tries again"]

    def close(self, say: Callable[[str], None], *, wait: bool = True) -> None:
        """Wait for the last save, and with ``wait`` for the consumer's remaining work. Raises: CheckpointError if the save
        failed, because then the end of the run is not on disk."""
        for message in self.finish():
            say(message)
        if self.consumer is not None:
            self.consumer.close(say, wait=wait)
        if self.failed is not None:
            raise CheckpointError(f"{self.failed}; free disk space and run the same command again")
