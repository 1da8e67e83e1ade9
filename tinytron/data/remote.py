"""Token shards at a URL: they are fetched to the local disk before they are opened."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import PurePosixPath

from tinytron.data.manifest import MANIFEST, read_manifest
from tinytron.data.shards import split_of
from tinytron.errors import DataError
from tinytron.utils.remote import RemoteFolder, staging_folder

SIDECARS = (".docs", ".weights")  # the files that belong to a shard; derived files (.pack*) are rebuilt locally


def local_dataset_path(url: str) -> str:
    """The local folder, or the pattern of local files, where ``fetch_shards`` puts the shards of ``url``."""
    folder, pattern = _split(url)
    local = staging_folder(folder)
    return str(local / pattern) if pattern else str(local)


def fetch_shards(url: str, option: str = "--dataset_path") -> None:
    """Fetch the shards of a folder ``s3://bucket/folder``, or those that match a pattern
    ``s3://bucket/folder/train_*.bin``, with their sidecar files and the folder's json files.

    A local file of the same size is not fetched again, so an interrupted call continues where it stopped. A local shard
    that the remote folder no longer has is deleted. Fetched files are compared with the hashes in ``manifest.json``, if
    there is one. Raises: DataError if there is no shard, naming ``option``, which gave the URL; ConfigError and
    StorageError as ``RemoteFolder``.
    """
    folder, pattern = _split(url)
    local, remote = staging_folder(folder), RemoteFolder(folder)
    present = [name for name in remote.list() if "/" not in name]

    def is_wanted(name: str) -> bool:
        return fnmatch(name, pattern) if pattern else name.endswith(".bin") and split_of(name) in ("train", "val")

    shards = [name for name in present if is_wanted(name)]
    if not shards:
        raise DataError(f"{option} {url} matches no file; give a URL of a folder with train_*.bin and val_*.bin")
    for stale in local.glob("*"):
        if is_wanted(stale.name) and stale.name not in shards:
            stale.unlink()
    beside = {str(PurePosixPath(name).with_suffix(suffix)) for name in shards for suffix in SIDECARS}
    remote.pull([name for name in present if name.endswith(".json")], local)
    manifest = read_manifest(local) if MANIFEST in present else None
    # Check only newly fetched files: hashing every local file would make a restart too slow.
    known = manifest.shards if manifest else []
    hashes = {shard.name: shard.sha256 for shard in known if not (local / shard.name).exists()}
    remote.pull([*shards, *sorted(beside.intersection(present))], local, hashes)


def _split(url: str) -> tuple[str, str]:
    """The folder and the pattern in ``url``; the pattern is empty if ``url`` names a folder."""
    folder, _, last = url.rstrip("/").rpartition("/")
    is_pattern = last.endswith(".bin") or any(c in last for c in "*?[")
    return (folder, last) if is_pattern else (url.rstrip("/"), "")
