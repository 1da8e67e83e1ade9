"""Weights & Biases."""

from __future__ import annotations

import io
import json
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinytron.errors import ConfigError, first_line
from tinytron.metrics.sinks.base import Record, RunInfo, Sink, SinkFailedError
from tinytron.metrics.sinks.files import JsonLog
from tinytron.metrics.sinks.flat import flat_record
from tinytron.utils.optional import require_package
from tinytron.utils.training import write_atomically

FILE = (
    "wandb.json"  # the run's id, the last step that certainly was logged of each kind of record, and if it ended well
)
STEP = "step"  # the axis of all charts; W&B's own step counts records
CERTAIN_SECONDS = 20.0  # W&B writes and sends every 15 seconds, and loses the rest when the process is killed
_PROJECT = "tinytron"


class WandB(Sink):
    """A run of Weights & Biases, continued under its id when our run is. A record stays there once it is logged, so the
    steps that a resumed run repeats are not logged a second time. Those of a run that went back are, because their values
    differ. After a kill, what W&B may have lost is logged again, from log.jsonl. ``now`` returns the time in seconds.

    Raises, in ``open``: ConfigError if the package is missing, W&B cannot be reached or refuses the run, for example
    without a key; if the run is a resumed one, SinkFailedError instead of the latter two.
    """

    files = (FILE,)  # W&B keeps its own files in a folder wandb/

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._uncertain: deque[tuple[float, str, int]] = deque()
        self._finished = False

    def open(self, run: RunInfo) -> None:
        wandb = require_package("wandb", "wandb")
        options = run.config["logging"]
        self._file, self._log = run.folder / FILE, run.folder / JsonLog.name
        self._about = run
        known = _read(self._file) if run.first_step or self._finished else None
        self._state = known or {"id": secrets.token_hex(4), "logged": {}, "ended": True}
        self._before, self._ended = dict(self._state["logged"]), self._state["ended"]
        description = run.folder / "config.json"
        config = json.loads(description.read_bytes()) if description.exists() else {"config": run.config}
        try:
            self._run: Any = wandb.init(
                project=options["wandb_project"] or _PROJECT,
                name=options["wandb_run_name"] or run.folder.name,
                group=options["wandb_group"],
                mode=options["wandb_mode"],
                id=self._state["id"],
                resume="allow",
                dir=str(run.folder),
                config=config.pop("config") | {"run": config},
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # its errors have no common class
            why = f"Weights & Biases cannot be reached, or refuses the run ({first_line(error)})"
            if run.first_step:  # a run that may have been preempted must not wait for it
                raise SinkFailedError(f"the logger wandb stops: {why}") from error
            raise ConfigError(f"--loggers wandb: {why}; run wandb login, or use --wandb_mode offline") from error
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        self._save(ended=False)

    def resume(self, step: int) -> None:
        """After a kill, log again what may be lost of the steps up to ``step``."""
        if not self._ended and self._log.exists():
            with open(self._log, "rb") as lines:
                for line in lines:
                    self.write([json.loads(line)])

    def go_back(self, step: int) -> None:
        """Log the later steps again, with what they are now."""
        self._note_certain(math.inf)
        self._state["logged"] = {kind: min(last, step) for kind, last in self._state["logged"].items()}
        self._before = dict(self._state["logged"])
        self._save(ended=False)

    def write(self, records: Sequence[Record]) -> None:
        """Log the records. After ``close`` the run is continued for them."""
        known = self._state["logged"] if self._finished else self._before
        new = [(kind, record) for record in records if record["step"] > known.get(kind := _kind(record), -1)]
        if self._finished:
            if new:
                self.open(self._about)
                self._finished = False
                self.write(records)
                self.close()
            return
        now = self._now()
        for kind, record in new:
            self._run.log({STEP: record["step"], **flat_record(record)})
            self._uncertain.append((now, kind, record["step"]))
        if self._note_certain(now - CERTAIN_SECONDS):
            self._save(ended=False)

    def figure(self, step: int, name: str, image: bytes) -> None:
        wandb, pillow = require_package("wandb", "wandb"), require_package("PIL.Image", "wandb")
        self._run.log({STEP: step, f"plots/{name}": wandb.Image(pillow.open(io.BytesIO(image)))})

    def close(self) -> None:
        """End the run there, once everything is sent."""
        if self._finished:
            return
        self._run.finish()
        self._finished = True
        self._note_certain(math.inf)
        self._save(ended=True)

    def _note_certain(self, until: float) -> bool:
        before = len(self._uncertain)
        while self._uncertain and self._uncertain[0][0] <= until:
            _, kind, step = self._uncertain.popleft()
            self._state["logged"][kind] = step
        return len(self._uncertain) < before

    def _save(self, ended: bool) -> None:
        self._state["ended"] = ended
        write_atomically(self._file, lambda out: out.write(json.dumps(self._state).encode()))


def _kind(record: Record) -> str:
    return "/".join(str(record[name]) for name in ("stage", "task") if name in record)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
        logged = {name: int(step) for name, step in found["logged"].items()}
        return {"id": str(found["id"]), "logged": logged, "ended": bool(found["ended"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
