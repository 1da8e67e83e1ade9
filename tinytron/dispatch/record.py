"""Submissions from this machine, one file per submission in ``~/.tinytron/submissions``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinytron.dispatch.settings import HOST_TYPES
from tinytron.errors import ConfigError, first_line
from tinytron.utils.flags import nearest

FOLDER = "~/.tinytron/submissions"


@dataclass(frozen=True)
class Submission:
    """A submission: the work, the host of the type ``kind``, where its files are there, and the ``id`` of its process or of
    the scheduler's job; empty as long as the host has not said that the job was started."""

    run_id: str
    name: str
    project: str
    group: str
    host: str
    kind: str
    ssh: str | None
    proxy: str | None
    id: str
    here: str
    root: str
    status: str
    log: str
    tree: str
    options: dict[str, str] = field(default_factory=dict)  # more about the host, by kind
    ended: str = ""  # its last state, once nothing can change it: the host is not asked again

    @property
    def place(self) -> str:
        """``project/group/name``."""
        return f"{self.project}/{self.group}/{self.name}"


def write(submission: Submission) -> Path:
    """Keep ``submission``. Returns its file. Raises: ConfigError if it cannot be written."""
    file = _file_of(submission)
    folder = file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(asdict(submission), indent=2), encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}), but it must remember {submission.name} on {submission.host}"
            f"{f' ({submission.id})' if submission.id else ''}; make the folder writable"
        ) from error
    return file


def remove(submission: Submission) -> None:
    """Forget a submission that did not start."""
    _file_of(submission).unlink(missing_ok=True)


def read_all() -> list[Submission]:
    """Every submission, the oldest first, without damaged files."""
    return _read()[0]


def damaged() -> list[str]:
    """A line for each file that is left out, with the reason."""
    return _read()[1]


def _file_of(submission: Submission) -> Path:
    return Path(FOLDER).expanduser() / f"{submission.run_id}-{submission.name}.json"


def _read() -> tuple[list[Submission], list[str]]:
    found, wrong = [], []
    for file in sorted(Path(FOLDER).expanduser().glob("*.json")):
        try:
            found.append(_submission(json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            wrong.append(f"left out {file}: {first_line(error)}; repair or remove it")
    return found, wrong


def _submission(content: Any) -> Submission:
    """Raises: ValueError or TypeError if ``content`` is not a submission that this version wrote."""
    if not isinstance(content, dict):
        raise TypeError("it is not a mapping")
    one = Submission(**content)
    for name, value in content.items():
        if name == "options":
            good = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
        else:
            good = isinstance(value, str) or (value is None and name in ("ssh", "proxy"))
        if not good:
            raise TypeError(f"its {name} is {value!r}")
    if one.kind not in HOST_TYPES:
        raise ValueError(f"its kind of host is {one.kind}, which this version does not know")
    if one.kind in ("kubernetes", "volcano") and "namespace" not in one.options:
        raise ValueError("its options have no namespace")
    return one


def newest(submissions: Iterable[Submission]) -> list[Submission]:
    """The newest submission of each work."""
    return list({one.place: one for one in submissions}.values())


def named(name: str) -> Submission:
    """The newest submission of the work ``name``, which may also be given as ``project/group/name``. Raises: ConfigError if
    there is none, or if two works have that name."""
    all_of_them = newest(read_all())
    found = [one for one in all_of_them if name in (one.name, one.place)]
    if len(found) > 1:
        raise ConfigError(f"{name} may be {' or '.join(one.place for one in found)}; give the whole name")
    if not found:
        names = [one.name for one in all_of_them]
        raise ConfigError(
            f"nothing was submitted as {name}{nearest(name, names)}; tinytron status lists what was"
            + "".join(f" ({line})" for line in damaged()[:1])
        )
    return found[0]
