"""Folders behind URLs (s3://, gs://, ...): staged on the local disk, copied file by file through fsspec.

Everything else works on local paths: ``local_folder`` says where a folder is staged, ``RemoteFolder`` copies.
Credentials and endpoints come from where each file system looks for them (``AWS_*``, ``FSSPEC_*``), never from the URL.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tinytron.errors import ConfigError, StorageError, first_line
from tinytron.utils.training import sha256_of

T = TypeVar("T")

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol: what to install
PAUSES = (1.0, 3.0)  # seconds before each further attempt; s3fs and gcsfs make several of their own within one
TRANSFERS = 4  # files copied at a time

# Trying again does not help against these; the names are those of botocore and google.auth, which may be missing.
_PERMANENT = (FileNotFoundError, PermissionError, ImportError, ValueError, TypeError)
_PERMANENT_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL of another file system than the local one."""
    return "://" in path and not path.startswith("file://")


def staging_folder(url: str) -> Path:
    """Where the files of ``url`` lie locally: a folder of ``$TINYTRON_CACHE`` (default ``~/.cache/tinytron``), named after
    the URL, with a hash that keeps similar ones apart."""
    url = url.rstrip("/")
    cache = os.environ.get("TINYTRON_CACHE") or Path.home() / ".cache" / "tinytron"
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", url)[-60:]
    return Path(cache).absolute() / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def local_folder(path: str) -> Path:
    """The local folder to work in: ``path`` itself, without ``file://``, or where a URL is staged."""
    return staging_folder(path) if is_remote(path) else Path(path.removeprefix("file://"))


class RemoteFolder:
    """The files below ``url``. Methods block, may be called from any thread, and try again after transient errors.

    Raises: ConfigError for an unknown protocol, one whose package is not installed, or a password in the URL; later
    StorageError, in one line, for everything the storage refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol, _, place = self.url.partition("://")
        if ":" in place.partition("@")[0] and "@" in place.partition("/")[0]:
            raise ConfigError(
                f"the {protocol}:// URL holds a password, which logs and checkpoints would show; "
                "use environment variables such as AWS_SECRET_ACCESS_KEY"
            )
        import fsspec

        options = {"auto_mkdir": True} if protocol == "local" else {}  # the others make folders, or have none
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            advice = f"pip install tinytron[{extra}]" if extra else first_line(error)
            raise ConfigError(f"{self.url}: {protocol}:// needs a package that is not installed; {advice}") from error
        except ValueError as error:
            raise ConfigError(f"{self.url}: {first_line(error)}; use s3://, gs:// or a local folder") from error

    def list(self) -> dict[str, int]:
        """Sizes in bytes of all files below, by name relative to the folder; empty if there is none."""

        def find() -> dict[str, Any]:
            self._fs.invalidate_cache()
            return self._fs.find(self._root, detail=True)

        found = self._attempt("list", "it", find)
        return {name.removeprefix(self._root).lstrip("/"): int(info["size"]) for name, info in found.items()}

    def push(self, local_root: Path, names: Sequence[str]) -> None:
        """Copy the files ``names`` of ``local_root`` there, over what is there."""

        def put(name: str) -> None:
            self._fs.put_file(str(local_root / name), self._path(name))

        self._each("write", names, put)

    def pull(self, names: Sequence[str], local_root: Path, sha256: Mapping[str, str] | None = None) -> None:
        """Copy the files ``names`` below ``local_root``, each whole or not at all.

        One that lies there with the same size, and the same hash if ``sha256`` gives it, is not copied again.
        """
        hashes, sizes = sha256 or {}, self.list()
        for name in names:
            if name not in sizes:
                raise StorageError(f"{self.url}: cannot read {name} (it is not there)")

        def get(name: str) -> None:
            path = local_root / name
            if path.is_file() and not _difference(path, sizes[name], hashes.get(name)):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # other runs may fetch the same file
            try:
                self._fs.get_file(self._path(name), str(temporary))
                if difference := _difference(temporary, sizes[name], hashes.get(name)):
                    raise OSError(difference)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

        self._each("read", names, get)

    def remove(self, names: Sequence[str]) -> None:
        """Delete the files ``names``; those that are not there need not be."""

        def delete(name: str) -> None:
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

        self._each("delete", names, delete)

    def move(self, url: str) -> None:
        """Rename the folder: copy all files to ``url``, of the same file system, then delete them here."""
        names, target = sorted(self.list()), RemoteFolder(url)

        def copy(name: str) -> None:
            self._fs.cp_file(self._path(name), target._path(name))

        self._each("copy", names, copy)
        self.remove(names)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _each(self, operation: str, names: Sequence[str], action: Callable[[str], None]) -> None:
        """``action`` of every name, a few at a time. Raises: StorageError, the first; names not begun are left."""
        with ThreadPoolExecutor(TRANSFERS) as pool:
            jobs = [pool.submit(self._attempt, operation, name, lambda n=name: action(n)) for name in names]
            try:
                for job in jobs:
                    job.result()
            except StorageError:
                pool.shutdown(cancel_futures=True)
                raise

    def _attempt(self, operation: str, name: str, action: Callable[[], T]) -> T:
        """``action``, again after a pause if it fails for a reason that may pass."""
        for pause in (*PAUSES, None):
            try:
                return action()
            except Exception as error:  # every file system has errors of its own
                permanent = isinstance(error, _PERMANENT) or type(error).__name__ in _PERMANENT_NAMES
                if permanent or pause is None:
                    raise StorageError(f"{self.url}: cannot {operation} {name} ({first_line(error)})") from error
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


def _difference(path: Path, size: int, sha256: str | None) -> str:
    """How a file is not what it should be; empty if it is."""
    if (got := path.stat().st_size) != size:
        return f"{got} bytes came instead of {size}"
    if sha256 is None:
        return ""
    found = sha256_of(path)
    return "" if found == sha256 else f"its sha256 is {found} instead of {sha256}"
