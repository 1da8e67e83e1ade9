"""Rules that values of the settings keep. Each error names the key, the rule and a value that works, and no secret."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from tinytron.dispatch.credentials import secrets_of, without_password
from tinytron.dispatch.settings import AnyHost, Cluster, Kubernetes, Plain, Slurm, Tpu
from tinytron.errors import ConfigError
from tinytron.manifests.job import SECRET_NAME

# Options of sbatch that status, logs, cancel and requeueing rely on, or that have settings of their own.
_OURS = frozenset([
    "job-name", "output", "error", "open-mode", "nodes", "ntasks", "ntasks-per-node", "gres", "cpus-per-task",
    "mem", "time", "partition", "constraint", "account", "qos", "exclude", "signal", "array", "requeue",
    "no-requeue", "wrap", "parsable", "chdir", "export",
])  # fmt: skip


def check_cluster(cluster: Cluster, where: str) -> None:
    """Raises: ConfigError for folders that are not absolute, and for sizes and users that are not written as such."""
    folders = (
        "root", "work", "share", "log", "status", "data", "checkpoints", "results", "cache_dir", "uv_dir", "python",
    )  # fmt: skip
    paths = {name: getattr(cluster, name) for name in folders}
    paths |= {variable: secret.file for variable, secret in secrets_of(cluster).items()}
    for name, path in paths.items():
        if path is not None and not path.startswith(("/", "~/")):
            raise ConfigError(f"{where}.{name} {path} must be an absolute path or begin with ~/, as /data/{name}")
    if cluster.all_squash is not None and re.fullmatch(r"\d+:\d+", cluster.all_squash, re.ASCII) is None:
        raise ConfigError(f"{where}.all_squash {cluster.all_squash} must be UID:GID, as 1000:1000")
    if cluster.cache_size is not None:
        mebibytes(cluster.cache_size, f"{where}.cache_size")


def check_host(host: AnyHost, cluster: Cluster, where: str) -> None:
    """Raises: ConfigError for values that the host's own program would refuse, or misread."""
    if isinstance(host, (Plain, Slurm)) and host.ssh is not None:
        check_address(host.ssh, f"{where}.ssh")
    if isinstance(host, Slurm):
        _check_slurm(host, cluster, where)
    if isinstance(host, Tpu) and host.spot and host.preemptible:
        raise ConfigError(f"{where}: spot and preemptible exclude each other; write spot: true only")
    if isinstance(host, Kubernetes):
        _check_kubernetes(host, cluster, where)


def _check_slurm(host: Slurm, cluster: Cluster, where: str) -> None:
    """sbatch expands no ``~`` in its options, and patterns with a backslash not at all."""
    if re.fullmatch(r"\d+([KMGT]B?)?", host.mem, re.ASCII | re.IGNORECASE) is None:
        raise ConfigError(f"{where}.mem {host.mem} must be a whole number with K, M, G or T; use 64G")
    if host.time is not None:
        seconds = _seconds(host.time, f"{where}.time")
        if seconds is not None and seconds <= host.signal_seconds:
            raise ConfigError(
                f"{where}.time {host.time} leaves no time to train before the signal {host.signal_seconds} s before it; "
                "use a longer time, or a smaller signal_seconds"
            )
    for name in host.annotations or {}:
        if name.replace("_", "-") in _OURS:
            raise ConfigError(
                f"{where}.annotations.{name}: tinytron sets this option of sbatch itself; use another setting, or leave "
                "it out"
            )
    log = cluster.folder("log")
    if log.startswith("~") or "\\" in log:
        raise ConfigError(
            f"clusters.{host.cluster}: the log folder {log} must be an absolute path without a backslash for the SLURM "
            f"host at {where}; write log: /home/me/logs"
        )


def _check_kubernetes(host: Kubernetes, cluster: Cluster, where: str) -> None:
    """Pods keep only what is on the claim."""
    if host.pvc_name is None:
        raise ConfigError(
            f"{where}.pvc_name is required: the claim that has the cluster's folders; write pvc_name: data"
        )
    mounted = PurePosixPath(host.pvc_mount_path)
    for name in ("root", "work", "share", "log", "status"):
        path = getattr(cluster, name) if name in ("root", "work") else cluster.folder(name)
        if not PurePosixPath(path).is_relative_to(mounted):
            raise ConfigError(
                f"clusters.{host.cluster}: {name} {path} is not below {mounted}, where the pods of {where} have their "
                f"claim; use {mounted / name}"
            )
    if cluster.mount is not None:
        raise ConfigError(
            f"clusters.{host.cluster}.mount: pods of {where} cannot mount JuiceFS; make its volume the claim "
            f"{host.pvc_name}"
        )


def mebibytes(text: str, where: str) -> int:
    """A size such as ``100G`` in MiB. Raises: ConfigError."""
    number, unit = text[:-1], text[-1:].upper()
    if text.isdecimal():
        number, unit = text, "M"
    if not number.isdecimal() or int(number) == 0 or unit not in ("M", "G", "T"):
        raise ConfigError(f"{where} {text} must be a number with M, G or T; use 100G")
    return int(number) * {"M": 1, "G": 1024, "T": 1024 * 1024}[unit]


def check_variable(name: str, where: str, *, value: str = "1") -> None:
    """Raises: ConfigError if no environment variable can have that name, and for a ``value`` that may be a secret, by its
    name: values are written into scripts."""
    if not (name.isascii() and name.isidentifier()):
        raise ConfigError(f"{where}: {name!r} must be letters, digits and _; use a name such as NCCL_DEBUG")
    if SECRET_NAME.search(name) and not value.isdecimal() and value.lower() not in ("true", "false", "yes", "no"):
        raise ConfigError(
            f"{where}: {name} looks like a secret, and values here are written into scripts; name it in the cluster's "
            f"settings, as secrets: {{{name}: {{env: {name}}}}}"
        )


def check_label(name: Any, where: str, works: str) -> None:
    """Raises: ConfigError if ``name`` cannot be the name of a host, a cluster or a chip."""
    if not isinstance(name, str) or re.fullmatch(r"[\w.+:/-]+", name) is None:
        raise ConfigError(f"{where}: the name {name!r} must be letters, digits and any of . _ + : / -; use {works}")


def check_engine(value: Any, where: str) -> str:
    """The metadata engine of a volume. The errors do not repeat it: it may have a password."""
    works = "redis://10.0.0.1:6379/0"
    if not isinstance(value, str) or not value or any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise ConfigError(f"{where} must be one line of text; use {works}")
    url, _ = without_password(value)
    local = url.startswith(("sqlite3://", "badger://"))  # a file
    usual = local or re.fullmatch(r"([\w+.-]+://)?([^:@/]+@)?[^@]*", url) is not None
    if not usual or re.search("password=|passwd=", url, re.IGNORECASE):
        raise ConfigError(
            f"{where} has an @ or a password where it is not understood; write the password as mount_password: "
            f"{{env: META_PASSWORD}}, and the rest as {works}"
        )
    return value


def _seconds(text: str, where: str) -> int | None:
    """A time limit as SLURM writes it, in seconds; ``None`` if there is none. Raises: ConfigError."""
    if text.upper() in ("INFINITE", "UNLIMITED", "0"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if found is None:
        raise ConfigError(f"{where} {text} must be minutes, H:MM:SS or D-HH:MM:SS; use 24:00:00")
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None:
        return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return ((first or 0) * 60 + (second or 0)) * 60 + third
    return (first or 0) * 60 + (second or 0)


def check_address(text: str, where: str) -> str:
    """``text``, a host as ssh takes it. Raises: ConfigError if it is none."""
    if not text or text.startswith("-") or any(c.isspace() or ord(c) < 32 for c in text):  # ssh would read an option
        raise ConfigError(
            f"{where} {text!r} must be a host as ssh takes it, without spaces and a leading -; use me@box"
        )
    return text
