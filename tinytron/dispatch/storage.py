"""JuiceFS volumes as the output folder: their metadata engine, its password, and the flags of ``juicefs mount``."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import unquote

from tinytron.dispatch.reading import mebibytes
from tinytron.dispatch.settings import Cluster


def without_password(url: str) -> tuple[str, str | None]:
    """A metadata engine such as ``redis://:secret@host:6379/0`` without its password, and the password if it has one.
    JuiceFS reads the password from ``META_PASSWORD``, so that no command line shows it."""
    scheme, found, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    user, at, host = place.rpartition("@")
    name, colon, password = user.partition(":")
    if not (found and at and colon and password):
        return url, None
    return f"{scheme}://{name}{'@' if name else ''}{host}{slash}{path}", unquote(password)


def mount_options(cluster: Cluster, quote: Callable[[str], str], quote_path: Callable[[str], str]) -> list[str]:
    """The flags of ``juicefs mount``, quoted. Its sizes are in MiB."""
    options = []
    if cluster.cache_size is not None:
        options += ["--cache-size", str(mebibytes(cluster.cache_size, "cache_size"))]
    if cluster.cache_dir is not None:
        options += ["--cache-dir", quote_path(cluster.cache_dir)]
    if cluster.all_squash is not None:
        options += ["--all-squash", quote(cluster.all_squash)]
    return options
