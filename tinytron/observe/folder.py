"""The files of a run folder, on a disk or at a URL, read without copying them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Protocol

from tinytron.errors import DataError
from tinytron.utils.remote import RemoteFolder, is_remote

LOG, CONFIG, MESSAGES = "log.jsonl", "config.json", "messages.jsonl"
RUN_FILES = (LOG, CONFIG)
SEARCH_DEPTH = 4  # levels below a folder that is not a run


class FileInfo(NamedTuple):
    """Size in bytes, and when a file was last written, in seconds since 1970 (``None`` where that is unknown)."""

    size: int
    written: float | None


class Folder(Protocol):
    """A folder of files. The methods raise OSError or StorageError if it cannot be read."""

    name: str
    pause: float  # seconds between two looks at the files

    def files(self) -> dict[str, FileInfo]:
        """The files of the folder by relative name, with those of its folders."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes of a file from ``start`` to ``end``."""


class LocalFolder:
    """A folder on a disk."""

    pause = 2.0

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, os.path.abspath(path)

    def files(self) -> dict[str, FileInfo]:
        found = {}
        for place, folders, names in os.walk(self.path):
            inner = os.path.relpath(place, self.path)
            if inner != ".":
                folders.clear()  # a run's folders have no folders
            for name in names:
                try:
                    status = os.stat(os.path.join(place, name))
                except FileNotFoundError:  # checkpoints come and go
                    continue
                found[name if inner == "." else f"{inner}/{name}"] = FileInfo(status.st_size, status.st_mtime)
        return found

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        with open(self.path / name, "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)


class UrlFolder:
    """A folder at a URL such as ``s3://bucket/run``."""

    pause = 15.0  # requests cost money, and runs copy their logs only when they save

    def __init__(self, url: str) -> None:
        self._remote = RemoteFolder(url)
        self.name = self._remote.url

    def files(self) -> dict[str, FileInfo]:
        return {name: FileInfo(size, None) for name, size in self._remote.list().items()}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        return self._remote.read(name, start, end)


def open_folder(text: str) -> Folder:
    """The run folder that a user named, or the folder of the log file that they named.

    Raises: DataError if it is not a run folder, naming one inside; ConfigError or StorageError for a URL.
    """
    text = text.removesuffix(f"/{LOG}") or "/"
    if is_remote(text):
        folder: Folder = UrlFolder(text)
        inside = sorted(folder.files())
        is_run, nearest = any(name in RUN_FILES for name in inside), _first_run(inside)
    else:
        path = Path(text.removeprefix("file://"))
        if path == Path(LOG):
            path = Path()
        if not path.is_dir():
            raise DataError(f"{text} is not a folder; use a run folder such as log/<run>")
        folder = LocalFolder(path)
        is_run, nearest = any((path / name).is_file() for name in RUN_FILES), ""
        if not is_run:
            nearest = _nearest_run(path)
    if is_run:
        return folder
    advice = f"use {text.rstrip('/')}/{nearest}" if nearest else "use a run folder such as log/<run>"
    raise DataError(f"{text} is not a run folder: it has neither {LOG} nor {CONFIG}; {advice}")


def runs_inside(text: str) -> list[str]:
    """The run folders directly inside a folder that a user named, such as a job's; empty if it is a run itself."""
    if is_remote(text):
        names = set(UrlFolder(text).files())
    else:
        path = Path(text.removeprefix("file://"))
        if not path.is_dir() or any((path / name).is_file() for name in RUN_FILES):
            return []
        names = {f"{inner.name}/{name}" for inner in _folders(path) for name in RUN_FILES if (inner / name).is_file()}
    if any(name in RUN_FILES for name in names):
        return []
    split = [name.split("/") for name in names]
    return [f"{text.rstrip('/')}/{name}" for name in sorted({w[0] for w in split if len(w) == 2 and w[1] in RUN_FILES})]


def _first_run(names: list[str]) -> str:
    return next((name.rpartition("/")[0] for name in names if name.endswith(f"/{LOG}")), "")


def _nearest_run(path: Path) -> str:
    """The relative name of the folder below ``path`` whose log was written last; empty if there is none."""
    found: list[tuple[float, str]] = []
    level = [path]
    for _ in range(SEARCH_DEPTH):
        level = [inner for folder in level for inner in _folders(folder)]
        for folder in level:
            log = folder / LOG
            if log.is_file():
                found.append((log.stat().st_mtime, str(folder.relative_to(path))))
        if found:
            return max(found)[1]
    return ""


def _folders(path: Path) -> list[Path]:
    try:
        return [inner for inner in path.iterdir() if inner.is_dir() and not inner.is_symlink()]
    except OSError:
        return []


def names_of(folders: list[str]) -> list[str]:
    """A short name for each of ``folders``: the last part of its path, or as many parts as distinguish it from the others.
    A folder that is named twice has the same name twice."""
    parts = [folder.rstrip("/").split("/") for folder in folders]

    def name(own: list[str]) -> str:
        others = [other for other in parts if other != own]
        length = 1
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        return "/".join(own[-length:])

    return [name(own) for own in parts]
