"""The secrets of jobs: by environment variable, and never part of a script or a command line."""

from __future__ import annotations

from urllib.parse import unquote

from tinytron.dispatch.settings import Cluster, Secret


def secrets_of(cluster: Cluster) -> dict[str, Secret]:
    """The secrets of the cluster's jobs by environment variable. A password inside ``mount`` is one of them, without a
    reference."""
    given = {
        "WANDB_API_KEY": cluster.wandb,
        "HF_TOKEN": cluster.hf_token,
        "META_PASSWORD": cluster.mount_password,  # read by juicefs
    }
    found = {name: secret for name, secret in given.items() if secret is not None} | (cluster.secrets or {})
    if cluster.mount is not None and without_password(cluster.mount)[1] is not None:
        found.setdefault("META_PASSWORD", Secret())
    return found


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
