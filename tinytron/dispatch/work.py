"""A work to run, and the hardware it asks for: read from the command line, and sent to a host."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import PurePosixPath

from tinytron.errors import ConfigError
from tinytron.jobs.places import check_place

CONFIG = "config.yaml"
SCRIPT = "run.sh"
_LONGEST = 40  # characters of a name


@dataclass(frozen=True)
class Request:
    """The hardware that a job asks for: ``chips`` accelerators (0: a CPU job) of the kind ``chip`` (``None``: any)."""

    chips: int = 1
    chip: str | None = None
    mem: str | None = None
    cpu: int | None = None

    def per_node(self, most: int | None, host: str) -> int:
        """Chips of each node of a job on ``host``, whose nodes have ``most`` (``None``: unknown). Raises: ConfigError if
        the job cannot be divided among whole nodes."""
        if most is None or self.chips <= most:
            return self.chips
        if most == 0 or self.chips % most:
            raise ConfigError(
                f"-n {self.chips} on {host}: its nodes have {most} x {self.chip or 'chips'}, so more than one node needs a "
                f"multiple of that; use -n {max(1, self.chips // max(most, 1)) * most}"
            )
        return most

    def __str__(self) -> str:
        return f"{self.chips} x {self.chip or 'any chip'}" if self.chips else "a CPU job"


@dataclass(frozen=True)
class Work:
    """A named run: the contents of its option ``files``, one per stage, and further words of ``tinytron run``. ``load``
    has modules, and ``.py`` files by their paths in the code. A ``notebook`` has none of these; it runs Jupyter."""

    name: str
    files: tuple[bytes, ...]
    words: tuple[str, ...] = ()
    project: str = "general"
    group: str = "default"
    job: str | None = None
    restore: str | None = None
    load: tuple[str, ...] = ()
    notebook: bool = False

    def __post_init__(self) -> None:
        check_place(self.name, self.project, self.group)

    @property
    def place(self) -> PurePosixPath:
        """``project/group/name``."""
        return PurePosixPath(self.project, self.group, self.name)

    @property
    def title(self) -> str:
        """The name that schedulers show."""
        return f"{self.project}-{self.group}-{self.name}"

    def stage_files(self) -> dict[str, bytes]:
        """The option files by their names on the host."""
        return {CONFIG if n == 0 else f"stage{n}.yaml": content for n, content in enumerate(self.files)}

    def flags(self) -> list[str]:
        """The flags of ``tinytron run`` that are not paths on the host."""
        flags = ["-p", self.project, "-g", self.group]
        flags += ["-j", self.job] if self.job else []
        flags += [f"--restore={self.restore}"] if self.restore else []
        modules = [f"--load={module}" for module in self.load if not module.endswith(".py")]
        return [*flags, *modules, *self.words]

    def loaded_files(self) -> list[str]:
        """The ``.py`` files of ``load``."""
        return [file for file in self.load if file.endswith(".py")]


@dataclass(frozen=True)
class Prepared:
    """A work with its folder ``here`` on a host, its script, and the ``values`` of secrets by variable."""

    work: Work
    run_id: str
    here: str
    status: str
    script: str
    values: Mapping[str, str] = field(default_factory=dict, repr=False)

    def files(self) -> dict[str, bytes]:
        """The files of its folder, except the secrets."""
        return {SCRIPT: self.script.encode(), **self.work.stage_files()}


def name_of(work: Work, run_id: str) -> str:
    """A name for the submission that Kubernetes and Google Cloud take: as much of the work's as fits, and a hash that tells
    submissions apart."""
    unique = hashlib.sha256(f"{work.place}/{run_id}".encode()).hexdigest()[:8]
    plain = re.sub(r"[^a-z0-9]+", "-", work.name.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"run-{plain}"
    return f"{plain[: _LONGEST - 9].strip('-')}-{unique}"


def new_run_id() -> str:
    """A name for one submission, which sorts by time."""
    return datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
