"""Token shards behind a URL: fetched to the local disk before they are opened."""

from __future__ import annotations

from fnmatch import fnmatch

from tinytron.errors import DataError
from tinytron.utils.remote import RemoteFolder, staging_folder

SHARDS = ("train_*.bin", "val_*.bin")


def local_dataset_path(url: str) -> str:
    """Where ``fetch_shards`` leaves the shards of ``url``: a local folder, or a pattern of local files."""
    folder, pattern = _split(url)
    local = staging_folder(folder)
    return str(local / pattern) if pattern else str(local)


def fetch_shards(url: str) -> None:
    """Bring the shards of a folder ``s3://bucket/folder``, or those that a pattern ``s3://bucket/folder/train_*.bin``
    matches, and the json files beside them here. What is here already in the same size is not fetched again, so an
    interrupted call goes on where it was; a local shard that is no longer there goes.

    Raises: DataError if there is no shard; ConfigError and StorageError as ``RemoteFolder``.
    """
    folder, pattern = _split(url)
    local, remote = staging_folder(folder), RemoteFolder(folder)
    wanted = (pattern,) if pattern else SHARDS
    present = [name for name in remote.list() if "/" not in name]
    shards = [name for name in present if any(fnmatch(name, w) for w in wanted)]
    if not shards:
        raise DataError(f"--dataset_path {url} matches no file; give a URL of a folder with train_*.bin and val_*.bin")
    for w in wanted:
        for stale in local.glob(w):
            if stale.name not in shards:
                stale.unlink()
    remote.pull([*shards, *(name for name in present if name.endswith(".json"))], local)


def _split(url: str) -> tuple[str, str]:
    """Folder and pattern; the pattern is empty if ``url`` names a folder."""
    folder, _, last = url.rstrip("/").rpartition("/")
    is_pattern = last.endswith(".bin") or any(c in last for c in "*?[")
    return (folder, last) if is_pattern else (url.rstrip("/"), "")
