"""Remote folders (s3://, gs://, ...), which are staged on the local disk and copied file by file with fsspec.

Everything else works on local paths: ``local_folder`` gives the folder's staging place, and ``RemoteFolder`` copies.
Credentials and endpoints come from each file system's usual sources (``AWS_*``, ``FSSPEC_*``), never from the URL.
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
from tinytron.utils.progress import Progress

T = TypeVar("T")

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol -> extra to install
PAUSES = (1.0, 3.0)  # seconds before each further attempt; s3fs and gcsfs retry several times within one attempt
TRANSFERS = 4  # files copied at a time

# Errors that a retry does not fix. The names are from botocore and google.auth, which may not be installed.
_PERMANENT = (FileNotFoundError, PermissionError, ImportError, ValueError, TypeError)
_PERMANENT_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}


def is_remote(path: str) -> bool:
    """True if ``path`` is a URL that does not name the local file system."""
    return "://" in path and not path.startswith("file://")


def staging_folder(url: str) -> Path:
    """The local folder for the files of ``url``. It is in ``$TINYTRON_CACHE`` (default ``~/.cache/tinytron``) and named
    after the URL, with a hash that distinguishes similar URLs."""
    url = url.rstrip("/")
    cache = os.environ.get("TINYTRON_CACHE") or Path.home() / ".cache" / "tinytron"
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", url)[-60:]
    return Path(cache).absolute() / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def local_folder(path: str) -> Path:
    """The local folder to work in: ``path`` itself, without ``file://``, or the staging folder of a URL."""
    return staging_folder(path) if is_remote(path) else Path(path.removeprefix("file://"))


class RemoteFolder:
    """The files below ``url``. Methods block, may be called from any thread, and retry after transient errors.

    Raises: ConfigError for an unknown protocol, a protocol whose package is not installed, or a password in the URL. The
    methods raise a one-line StorageError for everything that the storage refuses.
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

        options = {"auto_mkdir": True} if protocol == "local" else {}  # others create folders, or have no folders
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            advice = f"pip install tinytron[{extra}]" if extra else first_line(error)
            raise ConfigError(f"{self.url}: {protocol}:// needs a package that is not installed; {advice}") from error
        except ValueError as error:
            raise ConfigError(f"{self.url}: {first_line(error)}; use s3://, gs:// or a local folder") from error

    def list(self) -> dict[str, int]:
        """Sizes in bytes of all files below the folder, by relative name; empty if there are none."""

        def find() -> dict[str, Any]:
            self._fs.invalidate_cache()
            return self._fs.find(self._root, detail=True)

        found = self._attempt("list", "it", find)
        return {name.removeprefix(self._root).lstrip("/"): int(info["size"]) for name, info in found.items()}

    def read(self, name: str, start: int, end: int | None) -> bytes:
        """The bytes of the file ``name`` from ``start`` to ``end``, or to its end."""
        return self._attempt("read", name, lambda: self._fs.cat_file(self._path(name), start=start, end=end))

    def push(self, local_root: Path, names: Sequence[str]) -> None:
        """Copy the files ``names`` from ``local_root`` to the remote folder, overwriting existing files."""

        def put(name: str) -> None:
            self._fs.put_file(str(local_root / name), self._path(name))

        self._each("write", names, put)

    def pull(self, names: Sequence[str], local_root: Path, sha256: Mapping[str, str] | None = None) -> None:
        """Copy the files ``names`` from the remote folder to ``local_root``; each appears complete or not at all.

        A local file with the same size, and the same hash if ``sha256`` has one, is not copied again.
        """
        hashes = sha256 or {}
        sizes = self.list()
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

        with Progress(f"fetching from {self.url}", len(names), "file") as progress:
            self._each("read", names, get, progress)

    def remove(self, names: Sequence[str]) -> None:
        """Delete the files ``names``; missing files are not an error."""

        def delete(name: str) -> None:
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

        self._each("delete", names, delete)

    def move(self, url: str) -> None:
        """Rename the folder: copy all files to ``url``, on the same file system, then delete the originals."""
        names = sorted(self.list())
        target = RemoteFolder(url)

        def copy(name: str) -> None:
            self._fs.cp_file(self._path(name), target._path(name))

        self._each("copy", names, copy)
        self.remove(names)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _each(
        self, operation: str, names: Sequence[str], action: Callable[[str], None], progress: Progress | None = None
    ) -> None:
        """Call ``action`` on every name, several at a time. Raises: the first StorageError; pending names are skipped."""
        with ThreadPoolExecutor(TRANSFERS) as pool:
            jobs = [pool.submit(self._attempt, operation, name, lambda n=name: action(n)) for name in names]
            try:
                for job in jobs:
                    job.result()
                    if progress is not None:
                        progress.update(1)
            except StorageError:
                pool.shutdown(cancel_futures=True)
                raise

    def _attempt(self, operation: str, name: str, action: Callable[[], T]) -> T:
        """Call ``action``; if it fails with an error that may be transient, retry after a pause."""
        for pause in (*PAUSES, None):
            try:
                return action()
            except Exception as error:  # every file system has its own error classes
                permanent = isinstance(error, _PERMANENT) or type(error).__name__ in _PERMANENT_NAMES
                if permanent or pause is None:
                    raise StorageError(f"{self.url}: cannot {operation} {name} ({first_line(error)})") from error
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


def _difference(path: Path, size: int, sha256: str | None) -> str:
    """The difference between a file and its expected size and hash in words; empty if there is none."""
    if (got := path.stat().st_size) != size:
        return f"{got} bytes arrived instead of {size}"
    if sha256 is None:
        return ""
    from tinytron.utils.training import sha256_of  # imports torch, which commands that only look at runs do not need

    found = sha256_of(path)
    return "" if found == sha256 else f"its sha256 is {found} instead of {sha256}"
