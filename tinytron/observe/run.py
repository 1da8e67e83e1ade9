"""One run as the page, the report and the table show it."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any, NamedTuple

from tinytron.errors import StorageError
from tinytron.observe.curves import Curve, Name, as_json, between, extremes, means
from tinytron.observe.events import (
    STOP,
    Event,
    Message,
    events_of_curves,
    events_of_files,
    events_of_log,
    events_of_messages,
    events_of_rewrites,
    last_resume,
)
from tinytron.observe.folder import CONFIG, LOG, MESSAGES, FileInfo, Folder
from tinytron.observe.log import LogReader
from tinytron.observe.records import SHOWN_TEXT

POINTS = 2000  # per curve
ALL_POINTS = 200_000  # per run, if it has many curves
LEAST_POINTS = 100
BARS = 80
PHASES = "phases"  # seconds by name, drawn as stacked bars
HEAT_COLUMNS = 240
STACK_BYTES = 2**20
MESSAGES_BYTES, MESSAGES_SHOWN = 2**18, 200  # the newest ones
MAX_TIME = 2**35  # seconds; a later date has a year of five digits
LIVE_SECONDS = 120.0  # a run whose log was written within this time is running
SLOW_REPORTS = 5  # reports that a run may be late before it counts as stopped
GROWING = ("train.batch_warmup_sizes", "train.seq_warmup_lens")
_CHECKPOINT = re.compile(r"(\d+)_meta\.pt")


class Checkpoint(NamedTuple):
    """A complete checkpoint: its step, size in bytes and when it was written."""

    step: int
    size: int
    written: float | None


class Run:
    """A run in ``folder``. ``refresh`` brings it up to date, and ``payload`` is everything to show, ready for JSON."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        self.log = LogReader(folder)
        self.problem = ""  # why the folder could not be read the last time
        self._lock = threading.Lock()
        self._files: dict[str, FileInfo] = {}
        self._config: dict[str, Any] = {}
        self._config_info: FileInfo | None = None
        self._stacks: list[str] = []
        self._messages: list[Message] = []
        self._shown: tuple[object, dict[str, Any]] | None = None

    def refresh(self, seconds: float = float("inf")) -> bool:
        """Look at the files, and read the log for about ``seconds``. True if all of it is read."""
        try:
            files = self.folder.files()
            if (info := files.get(CONFIG)) != self._config_info:
                self._config, self._config_info = self._read_config(), info
            stacks = [name for name in sorted(files) if re.fullmatch(r"stacks_rank\d+\.txt", name)]
            if stacks and any(files[name] != self._files.get(name) for name in stacks):
                self._stacks = [
                    self.folder.read(name, 0, STACK_BYTES).decode("utf-8", "replace") for name in stacks[:16]
                ]
            if (info := files.get(MESSAGES)) != self._files.get(MESSAGES):
                self._messages = [] if info is None else self._read_messages(info.size)
            self._files = files
            done = self.log.refresh(files[LOG].size, seconds) if LOG in files else True
            self.problem = ""
        except (OSError, StorageError) as error:
            self.problem, done = str(error), True
        return done

    def _read_config(self) -> dict[str, Any]:
        try:
            found = json.loads(self.folder.read(CONFIG))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _read_messages(self, size: int) -> list[Message]:
        """The newest messages. Damaged lines are passed over, and so is the one that the first byte cuts."""
        found = []
        for line in self.folder.read(MESSAGES, max(0, size - MESSAGES_BYTES), size).splitlines():
            try:
                entry = json.loads(line)
                found.append(Message(float(entry["time"]), int(entry["step"]), str(entry["text"])[:SHOWN_TEXT]))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                continue
        return [message for message in found if 0 <= message.time < MAX_TIME][-MESSAGES_SHOWN:]

    @property
    def version(self) -> str:
        """Differs if there is something new to show."""
        files = hash(tuple(sorted(self._files.items())))
        return f"{self.log.version}-{files & 0xFFFFFFFF:x}-{self.state}-{hash(self.problem) & 0xFFFF:x}"

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that have their metadata, oldest first."""
        sizes: dict[int, int] = {}
        for name, info in self._files.items():
            if match := re.match(r"(\d+)_(?:model\.pt$|meta\.pt$|opt/)", name):
                sizes[int(match[1])] = sizes.get(int(match[1]), 0) + info.size
        metas = [(int(m[1]), info) for name, info in self._files.items() if (m := _CHECKPOINT.fullmatch(name))]
        return [Checkpoint(step, sizes[step], info.written) for step, info in sorted(metas)]

    @property
    def config(self) -> dict[str, str]:
        """The options by ``section.name``, as text."""
        sections = self._config.get("config")
        found = {}
        for section, options in sections.items() if isinstance(sections, dict) else ():
            if isinstance(options, dict):
                found.update({f"{section}.{name}": _text(value) for name, value in options.items()})
            else:
                found[str(section)] = _text(options)
        return found

    @property
    def facts(self) -> dict[str, str]:
        """The other entries of config.json: versions, revision, command."""
        return {name: _text(value) for name, value in self._config.items() if name != "config"}

    def _number(self, name: str) -> int | None:
        try:
            number = int(self.config.get(name, ""))
        except ValueError:
            return None
        return number if number > 0 else None

    @property
    def max_steps(self) -> int | None:
        """The step at which the run ends, if its configuration says so."""
        known = self._config.get("max_steps")
        return known if isinstance(known, int) and known > 0 else self._number("train.max_steps")

    @property
    def _tokens_per_step(self) -> int | None:
        """``None`` if it changes during the run, too."""
        grows = any(self.config.get(name, "[]") != "[]" for name in GROWING)
        return None if grows else self._number("train.total_batch_size")

    @property
    def age(self) -> float | None:
        """Seconds since the log was written, if that is known."""
        info = self._files.get(LOG)
        return None if info is None or info.written is None else max(0.0, time.time() - info.written)

    @property
    def state(self) -> str:
        """``finished``, ``running``, ``stopped`` (before its last step), ``ended`` (its last step is unknown), ``open``
        (the time of the last line is unknown) or ``not begun``."""
        if self.max_steps is not None and self.log.last_step >= self.max_steps:
            return "finished"
        if self._stopped_by_signal:
            return "stopped"
        if self.age is None:
            return "open" if LOG in self._files else "not begun"
        if self.age < max(LIVE_SECONDS, SLOW_REPORTS * (self._seconds_per_report or 0)):
            return "running"
        return "ended" if self.max_steps is None else "stopped"

    @property
    def _stopped_by_signal(self) -> bool:
        return bool(self._messages) and STOP.match(self._messages[-1].text) is not None

    @property
    def _seconds_per_report(self) -> float | None:
        rate, tokens = self.last("tokens_per_second"), self._tokens_per_step
        every = self._number("logging.log_every")
        return tokens * every / rate if rate and tokens and every else None

    def last(self, key: str, stage: str = "train") -> float | None:
        """The newest value of a curve."""
        curve = self.log.curves.get(Name(stage, key))
        return None if curve is None or not len(curve.values) else float(curve.values[-1])

    def events(self) -> list[Event]:
        """What happened, by step."""
        curves = self.log.curves if self.log.complete else {}  # a gap between blocks would look like a spike
        found = events_of_curves(curves) + events_of_log(self.log.turns)
        found += events_of_files(self._files, self._stacks)
        if self._messages:
            found += events_of_messages(self._messages)
        else:  # a run of an earlier version
            found += events_of_rewrites(self.log.rewrites)
            found += last_resume(self._files, [(c.step, c.written) for c in self.checkpoints])
        if self.state == "stopped" and self.max_steps and not self._stopped_by_signal:
            found.append(
                Event(
                    self.log.last_step,
                    "stopped",
                    f"the log ends {self.max_steps - self.log.last_step} steps before --max_steps {self.max_steps}",
                )
            )
        if self.state == "finished":
            found.append(Event(self.log.last_step, "finished", f"the run reached --max_steps {self.max_steps}"))
        return sorted(found, key=lambda event: event.step)

    def summary(self) -> dict[str, Any]:
        """The few numbers that say how the run is doing; ``None`` for what is unknown or not finite."""
        step, rate, tokens = self.log.last_step, self.last("tokens_per_second"), self._tokens_per_step
        seq_len, lines = self._number("train.seq_len"), self.log.counts
        val = self.log.curves.get(Name("val", "loss"))
        best = None
        if val is not None and (finite := val.values[val.values < float("inf")]).size:
            best = float(finite.min())
        left = self.max_steps - step if self.max_steps else None
        found = {
            "state": self.state,
            "step": step,
            "max_steps": self.max_steps,
            "loss": self.last("loss"),
            "val_loss": self.last("loss", "val"),
            "best_val_loss": best,
            "tokens_per_second": rate,
            "mfu": self.last("mfu"),
            "tokens": step * tokens if tokens else None,
            "samples": step * tokens // seq_len if tokens and seq_len else None,
            "seconds_left": left * tokens / rate if left and tokens and rate and self.state == "running" else None,
            "age": self.age,
            "lines": lines[0],
            "damaged": lines[1] + self.log.unfinished * (self.state != "running"),
            "read": self.log.read_bytes / self.log.total_bytes if self.log.total_bytes else 1.0,
            "left_out": self.log.left_out,
            "problem": self.problem,
        }
        return {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in found.items()}

    def payload(self) -> dict[str, Any]:
        """Everything to show. Values that JSON lacks are ``None``."""
        with self._lock:
            version = self.version
            if self._shown is None or self._shown[0] != version:
                self._shown = (version, self._payload())
            shown = self._shown[1]
        return {**shown, "summary": self.summary()}

    def detail(self, first: float, last: float) -> dict[str, Any]:
        """The curves between two steps, with as many points as ``payload`` has of the whole run."""
        found = {name: between(curve, first, last) for name, curve in self.log.curves.items()}
        return {"curves": self._curves(found)}

    @staticmethod
    def _curves(curves: dict[Name, Curve]) -> list[dict[str, Any]]:
        points = max(LEAST_POINTS, min(POINTS, ALL_POINTS // max(1, len(curves))))
        return [_curve(name, curve, points) for name, curve in curves.items() if len(curve.steps)]

    def _payload(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": self.folder.name,
            "version": self.version,
            "curves": self._curves(self.log.curves),
            "loads": _loads(self.log.loads),
            "messages": [message._asdict() for message in self._messages],
            "texts": [text._asdict() for text in self.log.texts],
            "events": [event._asdict() for event in self.events()],
            "checkpoints": [checkpoint._asdict() for checkpoint in self.checkpoints],
            "config": self.config,
            "facts": self.facts,
        }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _curve(name: Name, curve: Curve, points: int) -> dict[str, Any]:
    chart, series = name.place
    entry: dict[str, Any] = {"stage": name.stage, "chart": chart, "series": series}
    if chart == PHASES:
        few = means(curve, BARS)
        return {**entry, "x": as_json(few.steps), "y": as_json(few.values)}
    few = extremes(curve, points // 2)
    entry |= {"x": as_json(few.steps), "y": as_json(few.values)}
    if len(few.steps) < len(curve.steps):  # for smoothing: extremes say little about the middle
        middle = means(curve, points // 2)
        entry |= {"mean_x": as_json(middle.steps), "mean_y": as_json(middle.values)}
    return entry


def _loads(loads: dict[str, list[tuple[int, list[float]]]]) -> list[dict[str, Any]]:
    """The experts' shares for heat maps: of each layer evenly spaced steps, and each expert's share relative to an even
    one."""
    found = []
    for layer, entries in loads.items():
        stride = -(-len(entries) // HEAT_COLUMNS)
        kept = entries[::-1][::stride][::-1]  # with the newest
        relative = [[round(share * len(shares), 3) for share in shares] for _, shares in kept]
        found.append({"layer": layer, "steps": [step for step, _ in kept], "shares": relative})
    return found
