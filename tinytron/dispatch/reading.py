"""Reads the settings of hosts and clusters. Each mistake is one error, which names the key, the rule and a value that
works, and never repeats a secret."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from tinytron.config import converted
from tinytron.dispatch.checks import check_address, check_cluster, check_engine, check_host, check_label, check_variable
from tinytron.dispatch.settings import (
    FILE,
    HOST_TYPES,
    TOP,
    AnyHost,
    Cluster,
    Numbers,
    Partition,
    Secret,
    Secrets,
    Settings,
    Texts,
)
from tinytron.errors import ConfigError, first_line
from tinytron.utils.flags import FieldInfo, config_fields, nearest
from tinytron.utils.optional import require_package

T = TypeVar("T")
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_settings(file: str = FILE) -> Settings:
    """The settings in ``file``. Raises: ConfigError, which names the key, the rule, and a value that works."""
    yaml = require_package("yaml", "cli")
    try:
        content = yaml.load(Path(file).expanduser().read_text(encoding="utf-8"), _loader(yaml))
    except _TwiceError as error:
        raise ConfigError(f"{file}: {error}") from None
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


class _TwiceError(Exception):
    """A key stands twice in one mapping."""


def _loader(yaml: Any) -> Any:
    """A loader that leaves every value the text that the user wrote: to YAML, ``24:00:00`` is a number of base 60, ``010``
    is 8, and ``yes`` is true."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "a key is not text", key.start_mark)
                if key.value in seen:
                    raise _TwiceError(f"{key.value} stands twice (line {key.start_mark.line + 1}); remove one of them")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    kept = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
    Loader.yaml_implicit_resolvers = {
        first: [one for one in resolvers if one[0] in kept]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def settings_of(content: Any, file: str = FILE) -> Settings:
    """The settings in the parsed file ``content``. Raises: ConfigError."""
    top = _mapping(content, "the file", "clusters: {...} and hosts: {...}")
    for key in top:
        if key not in TOP:
            raise ConfigError(f"{key} is not a setting{nearest(str(key), TOP)}; use one of {', '.join(TOP)}")
    mount = None if top.get("mount") is None else check_engine(top["mount"], "mount")
    clusters = {}
    for name, one in _mapping(top.get("clusters"), "clusters", "lab: {root: /data/out, work: /data/work}").items():
        check_label(name, "clusters", "lab")
        given = _mapping(one, f"clusters.{name}", "{root: /data/out, work: /data/work}")
        clusters[str(name)] = read_section(Cluster, {"mount": mount, **given}, f"clusters.{name}")
        check_cluster(clusters[str(name)], f"clusters.{name}")
    hosts: dict[str, AnyHost] = {}
    for name, one in _mapping(top.get("hosts"), "hosts", "box: {type: plain, ssh: me@box, cluster: lab}").items():
        check_label(name, "hosts", "box")
        hosts[str(name)] = _host(one, f"hosts.{name}", clusters)
    priority = converted("priority", top.get("priority") or [], tuple[str, ...])
    for name in priority:
        if name not in hosts:
            raise ConfigError(f"priority: there is no host {name}{nearest(name, hosts)}; name hosts of this file")
    mapping = _texts(top.get("gres_mapping") or {}, "gres_mapping", "{h100: gpu:h100}")
    proxy = None if top.get("proxy") is None else check_address(_text(top["proxy"], "proxy", "me@gate"), "proxy")
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
    if not isinstance(kind, str) or kind not in HOST_TYPES:
        raise ConfigError(f"{where}.type {kind} must be one of {', '.join(HOST_TYPES)}{nearest(str(kind), HOST_TYPES)}")
    host = read_section(HOST_TYPES[kind], given, where)
    if host.cluster not in clusters:
        raise ConfigError(
            f"{where}.cluster {host.cluster} is not in clusters{nearest(host.cluster, clusters)}; use one of "
            f"{', '.join(clusters)}"
        )
    check_host(host, clusters[host.cluster], where)
    return host


def _mapping(value: Any, where: str, works: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping of settings; write {works}")
    return value


def _value(value: Any, where: str, info: FieldInfo) -> Any:
    kind, works = info.type, info.flag.works
    if kind is Secret:
        return _secret(value, where, str(works))
    if kind == Secrets:
        given = _mapping(value, where, str(works))
        for name in given:
            check_variable(str(name), where)
        return {str(name): _secret(one, f"{where}.{name}", "{env: MY_KEY}") for name, one in given.items()}
    if info.name == "mount":
        return check_engine(value, where)
    if kind is bool and isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if kind == Texts:
        return _texts(value, where, works)
    if kind == Numbers:
        for name in _mapping(value, where, str(works)):
            check_label(name, where, "h100")
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
        if not isinstance(one, (str, int, float)):  # the error does not repeat what may be a secret
            raise ConfigError(f"{where}.{name} must be text; use {works}")
        found[str(name)] = text = str(one)
        if "\0" in text:
            raise ConfigError(f"{where}.{name} must not have the character 0; use {works}")
        if where.endswith(".env"):
            check_variable(str(name), where, value=text)
    return found


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
