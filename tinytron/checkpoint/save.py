"""Writing a checkpoint: weights and states first, metadata last; in the background unless told otherwise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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
    """Write every rank's part of a snapshot and, once all are on disk, the metadata; then copy all to where ``mirror``
    points. Collective over ``group``.

    Until ``*_meta.pt`` is in place the checkpoint does not exist for a reader; an older one of the same step stops
    existing before its parts are overwritten. Raises: TinytronError on every rank if the disk refuses on one.
    """
    from tinytron.checkpoint.optimizer_state import write_optimizer_state  # torch's DCP takes a second to import

    files, rank = snapshot.files, dist.get_rank(group)
    staged = mirror is not None and mirror.first_on_node  # each node has a folder of its own
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
    agree(lambda: None, group)  # nothing is pushed before
    mirror.push_files(files.names_written_by(rank))
    agree(lambda: None, group)  # all have pushed
    if rank == 0:
        mirror.push_commit(files.step)


def _clear(files: CheckpointFiles) -> None:
    files.folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it during the run
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
    found = {files.step: files for files in complete_checkpoints(folder)}
    losses = {step: _val_loss(files) if retention.keep_best else None for step, files in found.items()}
    return [found[step] for step in retention.to_prune(losses)]


def prune(folder: Path, retention: Retention) -> list[CheckpointFiles]:
    """Delete the ``to_prune`` checkpoints of ``folder``; returns them. Raises: OSError if the system refuses."""
    gone = to_prune(folder, retention)
    for files in gone:
        files.remove()
    return gone


def _val_loss(files: CheckpointFiles) -> float | None:
    try:
        return read_meta(files.meta).val_loss
    except CheckpointError:  # damaged: certainly not the best
        return None


class Consumer(Protocol):
    """What else is made of checkpoints, on the master: ``committed`` is called in the saving thread, when ``files`` are on
    disk and before any are pruned, and returns what to add to the report; it raises nothing."""

    def committed(self, files: CheckpointFiles) -> str: ...
    def report(self) -> list[str]: ...
    def close(self, say: Callable[[str], None], *, wait: bool) -> None: ...


@dataclass
class Save:
    """A save under way: the rest is set when it ends."""

    snapshot: Snapshot
    error: BaseException | None = None
    seconds: float = 0.0
    note: str = ""


class CheckpointSaver:
    """Saves a run's checkpoints into ``folder``, one at a time.

    ``save`` returns once everything is copied to host memory; a thread writes it while training goes on. The thread's
    collectives have a gloo group of their own, so they mix with nothing. A save that fails costs that checkpoint, never
    the run: ``report`` says so.
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
        self.failed: str | None = None  # why the last save that ended is not on disk

    def save(self, step: int, meta: CheckpointMeta, *, wait: bool = False) -> list[str]:
        """Start saving ``step`` (waiting for an earlier save first), or with ``wait`` save it; returns what there is to
        report. Collective. ``meta`` holds what the run knows."""
        messages = self.finish()
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        files = CheckpointFiles(self.folder, step)
        self._save = Save(take_snapshot(files, self.model, self.optimizer, meta, self.state, self._buffers))
        # A daemon: a process that dies does not wait for a save, and a save cut short is none.
        self._thread = threading.Thread(target=self._write, args=(self._save,), name=f"save {step}", daemon=True)
        self._thread.start()
        return messages + self.finish() if wait else messages

    def _write(self, save: Save) -> None:
        start = time.perf_counter()
        try:
            assert self._group is not None, "made by save"
            write_checkpoint(save.snapshot, self._group, self.mirror)
            if self.consumer is not None:
                save.note = self.consumer.committed(save.snapshot.files)
            self._prune(save, self._group)
        except BaseException as error:  # handed to the training thread
            save.error = error
        save.seconds = time.perf_counter() - start

    def _prune(self, save: Save, group: dist.ProcessGroup) -> None:
        """The master decides; of a staged run every node, and the remote copy, have their own files to delete."""
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
        """What ended since the last call, for printing; waits for nothing. Raises: whatever is no refusal of the disk."""
        ended = [] if self._thread is None or self._thread.is_alive() else self.finish()
        return ended + (self.consumer.report() if self.consumer is not None else [])

    def finish(self) -> list[str]:
        """Wait for the save under way, then as ``report``."""
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
        return [f"error: {self.failed}; training goes on, the next save tries again"]

    def close(self, say: Callable[[str], None], *, wait: bool = True) -> None:
        """Wait for the last save, and with ``wait`` for what the consumer still does. Raises: CheckpointError if the save
        failed: the end of the run is not on disk."""
        for message in self.finish():
            say(message)
        if self.consumer is not None:
            self.consumer.close(say, wait=wait)
        if self.failed is not None:
            raise CheckpointError(f"{self.failed}; free the disk and run the same command again")
