"""``BasicJob``: a piece of work with a name, options and a folder, which can be run again at any time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from tinytron.config import Option, configure, options_of
from tinytron.errors import CheckpointError
from tinytron.utils.training import write_atomically

MARKER = "done.json"  # in a job's folder once it is finished
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class JobSpec:
    """Everything that defines the work: the ``job``'s key, the ``name`` that the user gave it, the output folder ``root``,
    the ``values`` of all options by path (``"train.max_steps"``), the modules to ``load``, and the checkpoint of another
    job to start from (``restore``, relative to the checkpoints in ``root``)."""

    job: str
    name: str
    root: str
    values: Mapping[str, Any] = field(default_factory=dict)
    project: str = "general"
    group: str = "default"
    load: tuple[str, ...] = ()
    restore: str | None = None

    @property
    def folder(self) -> Path:
        """The job's folder, with all it needs to continue: ``<root>/checkpoints/<project>/<group>/<name>``."""
        return Path(self.root) / CHECKPOINTS / self.project / self.group / self.name

    @property
    def fingerprint(self) -> str:
        """A hash of what the work is. A job that is run again with other options is not finished."""
        text = json.dumps([self.job, dict(self.values), self.restore], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """JSON that ``from_json`` reads."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> JobSpec:
        """The spec that ``to_json`` wrote. Raises: ValueError for other text."""
        content = json.loads(text)
        try:
            spec = cls(**{**content, "load": tuple(content["load"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a job's description: {error}") from error
        if not isinstance(spec.job, str) or not isinstance(spec.values, Mapping):
            raise ValueError("not a job's description")
        return spec


class BasicJob:
    """A job: subclass it, name the dataclass of its options as ``CONFIG`` and write ``run``, and register it with ``@job``.

    Calling an instance runs it unless it is finished. ``run`` must be able to continue after an interruption at any point.
    A job with ``all_processes`` runs on all GPUs of the machine (or ``NPROC`` CPU processes); each process calls ``run``.
    """

    CONFIG: ClassVar[type | None] = None
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}  # by path; they replace the declared ones
    ALIASES: ClassVar[Mapping[str, Any]] = {}  # further names of options (tinytron.jobs.aliases)
    all_processes: ClassVar[bool] = False

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec

    @classmethod
    def options(cls) -> list[Option]:
        """Every option, in the order in which files list them."""
        return options_of(cls.CONFIG) if cls.CONFIG is not None else []

    @cached_property
    def config(self) -> Any:
        """The options: an instance of ``CONFIG``, made inside ``tinytron.config.configuration``."""
        return configure(self.CONFIG) if self.CONFIG is not None else None

    @property
    def done(self) -> bool:
        """True if the work was finished with these options."""
        try:
            content = json.loads((self.spec.folder / MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and content.get("fingerprint") == self.spec.fingerprint

    @property
    def local(self) -> bool:
        """True in the one process that writes shared files."""
        return True

    def check(self) -> None:
        """Called before anything runs. Raises: TinytronError if ``run`` could not work with these options."""
        _ = self.config

    def go_back_to(self, checkpoint: str) -> None:
        """Make ``run`` continue from ``checkpoint``: ``latest``, ``best``, ``final`` or a step. Raises: CheckpointError."""
        raise CheckpointError(f"the job {self.spec.job} has no checkpoints to go back to, such as {checkpoint}")

    def run(self) -> None:
        """Do the work, or the rest of it. Raises: TinytronError."""
        raise TypeError(f"{type(self).__name__} has no run method")

    def finish(self) -> None:
        """Record that the work is done; called after ``run``."""
        if self.local:
            text = json.dumps({"fingerprint": self.spec.fingerprint, "job": self.spec.job}, indent=2)
            write_atomically(self.spec.folder / MARKER, lambda file: file.write(text.encode()))

    def __call__(self) -> None:
        """Run, unless it is ``done``. Raises: TinytronError."""
        if self.done:
            print(f"{self.spec.name} is finished: {self.spec.folder}", flush=True)
            return
        self.spec.folder.mkdir(parents=True, exist_ok=True)
        self.run()
        self.finish()
