"""Reads the settings of hosts and clusters. Each mistake is one error, which names the key, the rule and a value that
works, and never repeats a secret."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from tinytron.config import converted
from tinytron.dispatch.settings import (
    FILE,
    HOST_TYPES,
    TOP,
    AnyHost,
    Cluster,
    Kubernetes,
    Numbers,
    Partition,
    Plain,
    Secret,
    Settings,
    Slurm,
    Texts,
    Tpu,
)
from tinytron.errors import ConfigError, first_line
from tinytron.utils.flags import FieldInfo, config_fields, nearest
from tinytron.utils.optional import require_package

T = TypeVar("T")


def read_settings(file: str = FILE) -> Settings:
    """The settings in ``file``. Raises: ConfigError, which names the key, the rule, and a value that works."""
    yaml = require_package("yaml", "cli")
    try:
        content = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{file} does not exist; copy examples/dispatch.yaml to {FILE} and edit it, or name a file with --dispatch"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({first_line(error)}); make it a text file that you can read"
        ) from error
    except yaml.YAMLError as error:  # without its text, which repeats lines of the file, and these may have secrets
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"{file} is not valid YAML{line}; compare with examples/dispatch.yaml") from None
    try:
        return settings_of(content, file)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def settings_of(content: Any, file: str = FILE) -> Settings:
    """The settings in the parsed file ``content``. Raises: ConfigError."""
    top = _mapping(content, "the file", "clusters: {...} and hosts: {...}")
    for key in top:
        if key not in TOP:
            raise ConfigError(f"{key} is not a setting{nearest(str(key), TOP)}; use one of {', '.join(TOP)}")
    mount = None if top.get("mount") is None else _text(top["mount"], "mount", "redis://10.0.0.1:6379/0")
    clusters = {}
    for name, one in _mapping(top.get("clusters"), "clusters", "lab: {root: /data/out, work: /data/work}").items():
        given = _mapping(one, f"clusters.{name}", "{root: /data/out, work: /data/work}")
        clusters[str(name)] = read_section(Cluster, {"mount": mount, **given}, f"clusters.{name}")
        check_cluster(clusters[str(name)], f"clusters.{name}")
    hosts: dict[str, AnyHost] = {}
    for name, one in _mapping(top.get("hosts"), "hosts", "box: {type: plain, ssh: me@box, cluster: lab}").items():
        hosts[str(name)] = _host(one, f"hosts.{name}", clusters)
    priority = converted("priority", top.get("priority") or [], tuple[str, ...])
    for name in priority:
        if name not in hosts:
            raise ConfigError(f"priority: there is no host {name}{nearest(name, hosts)}; name hosts of this file")
    mapping = _texts(top.get("gres_mapping") or {}, "gres_mapping", "{h100: gpu:h100}")
    proxy = None if top.get("proxy") is None else _address(top["proxy"], "proxy")
    return Settings(file, clusters, hosts, tuple(dict.fromkeys(priority)), mapping, proxy)


def read_section(cls: type[T], content: Any, where: str) -> T:
    """An instance of ``cls`` with the values of ``content``, which is at ``where``. Raises: ConfigError."""
    infos = {info.name: info for info in config_fields(cls)}
    required = [f"{name}: {i.flag.works}" for name, i in infos.items() if i.default is MISSING]
    given = _mapping(content, where, "{" + ", ".join(required) + "}")
    for key in given:
        if key not in infos:
            raise ConfigError(
                f"{where}.{key} is not a setting{nearest(str(key), infos)}; use one of {', '.join(infos)}"
            )
    values = {}
    for name, info in infos.items():
        if given.get(name) is not None:
            values[name] = _value(given[name], f"{where}.{name}", info)
        elif info.default is MISSING:
            raise ConfigError(f"{where}.{name} is required: {info.flag.help}; write {name}: {info.flag.works}")
    return cls(**values)


def _host(content: Any, where: str, clusters: Mapping[str, Cluster]) -> AnyHost:
    given = dict(_mapping(content, where, "{type: plain, ssh: me@box, cluster: lab}"))
    kind = given.pop("type", None)
    if kind not in HOST_TYPES:
        raise ConfigError(f"{where}.type {kind} must be one of {', '.join(HOST_TYPES)}{nearest(str(kind), HOST_TYPES)}")
    host = read_section(HOST_TYPES[kind], given, where)
    if host.cluster not in clusters:
        raise ConfigError(
            f"{where}.cluster {host.cluster} is not in clusters{nearest(host.cluster, clusters)}; use one of "
            f"{', '.join(clusters)}"
        )
    if isinstance(host, (Plain, Slurm)) and host.ssh is not None:
        _address(host.ssh, f"{where}.ssh")
    if isinstance(host, Slurm):
        _check_slurm(host, clusters[host.cluster], where)
    if isinstance(host, Tpu) and host.spot and host.preemptible:
        raise ConfigError(f"{where}: spot and preemptible exclude each other; write spot: true only")
    if isinstance(host, Kubernetes):
        _check_kubernetes(host, clusters[host.cluster], where)
    return host


def check_cluster(cluster: Cluster, where: str) -> None:
    """Raises: ConfigError for folders that are not absolute, and for sizes and users that are not written as such."""
    for name in ("root", "work", "share", "log", "status", "data", "checkpoints", "results", "cache_dir", "uv_dir"):
        path = getattr(cluster, name)
        if path is not None and not path.startswith(("/", "~/")):
            raise ConfigError(f"{where}.{name} {path} must be an absolute path or begin with ~/, as /data/{name}")
    if cluster.all_squash is not None and not all(part.isdecimal() for part in cluster.all_squash.split(":")):
        raise ConfigError(f"{where}.all_squash {cluster.all_squash} must be UID:GID, as 1000:1000")
    if cluster.cache_size is not None:
        mebibytes(cluster.cache_size, f"{where}.cache_size")


def _check_slurm(host: Slurm, cluster: Cluster, where: str) -> None:
    """sbatch expands no ``~`` in its options, and patterns with a backslash not at all."""
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
    if not number.isdecimal() or unit not in ("M", "G", "T"):
        raise ConfigError(f"{where} {text} must be a number with M, G or T; use 100G")
    return int(number) * {"M": 1, "G": 1024, "T": 1024 * 1024}[unit]


def _mapping(value: Any, where: str, works: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping of settings; write {works}")
    return value


def _value(value: Any, where: str, info: FieldInfo) -> Any:
    kind, works = info.type, info.flag.works
    if kind is Secret:
        return _secret(value, where, str(works))
    if kind == Texts:
        return _texts(value, where, works)
    if kind == Numbers:
        counts = {str(k): _converted(v, f"{where}.{k}", int, 8) for k, v in _mapping(value, where, str(works)).items()}
        for name, count in counts.items():
            if count < 0:
                raise ConfigError(f"{where}.{name} {count} must be at least 0; use 8")
        return counts
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list; write {works}")
        if item is Partition:
            named = [{"name": one} if isinstance(one, str) else one for one in value]
            return tuple(read_section(Partition, one, f"{where}[{i}]") for i, one in enumerate(named))
        if item == Texts:
            return tuple(_texts(one, f"{where}[{i}]", works) for i, one in enumerate(value))
        return tuple(_text(one, f"{where}[{i}]", works) for i, one in enumerate(value))
    if kind is str:
        return _text(value, where, works)
    number = _converted(value, where, kind, works)
    if not info.flag.allows(number):
        raise ConfigError(f"{where} {number} must be {info.flag.bounds}; use {works}")
    return number


def _converted(value: Any, where: str, kind: Any, works: object) -> Any:
    try:
        return converted(where, value, kind)
    except ConfigError as error:
        raise ConfigError(f"{error}; use {works}") from None


def _text(value: Any, where: str, works: object) -> str:
    text: str = _converted(value, where, str, works)
    if not text or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ConfigError(f"{where} {text!r} must not be empty or have control characters; use {works}")
    return text


def _texts(value: Any, where: str, works: object) -> Texts:
    """A mapping of names to texts. A value may have line ends, but not the character 0, which ends a variable."""
    found = {}
    for name, one in _mapping(value, where, str(works)).items():
        if isinstance(one, bool):
            one = str(one).lower()
        found[str(name)] = text = _converted(one, f"{where}.{name}", str, works)
        if "\0" in text:
            raise ConfigError(f"{where}.{name} must not have the character 0; use {works}")
        if where.endswith(".env"):
            check_variable(str(name), where)
    return found


def check_variable(name: str, where: str) -> None:
    """Raises: ConfigError if no environment variable can have that name."""
    if not (name.isascii() and name.isidentifier()):
        raise ConfigError(f"{where}: {name!r} must be letters, digits and _; use a name such as NCCL_DEBUG")


def _secret(value: Any, where: str, works: str) -> Secret:
    """A reference to a secret. The error does not repeat the value, which may be the secret itself."""
    given = value if isinstance(value, Mapping) else {}
    names = [name for name in ("env", "file") if isinstance(given.get(name), str) and given[name]]
    if len(names) != 1 or len(given) != 1:
        raise ConfigError(f"{where} must say where the secret is, not be the secret; write {works} or {{file: ~/.key}}")
    if names == ["env"] and not (given["env"].isascii() and given["env"].isidentifier()):
        raise ConfigError(f"{where}.env must be the name of an environment variable; write {works}")
    if names == ["file"]:
        _text(given["file"], f"{where}.file", "~/.key")
    return Secret(**given)


def _address(value: Any, where: str) -> str:
    text = _text(value, where, "me@box")
    if text.startswith("-") or any(c.isspace() for c in text):  # ssh would read an option
        raise ConfigError(
            f"{where} {text!r} must be a host as ssh takes it, without spaces and a leading -; use me@box"
        )
    return text
