"""The options of a job, from files and ``key=value`` words, under Tinytron's or another system's names."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinytron.config import MISSING, Option, converted, merged, nested, plain, unknown
from tinytron.errors import ConfigError, first_line
from tinytron.job import BasicJob
from tinytron.jobs.aliases import SECTIONS, Alias
from tinytron.utils.optional import require_package

# Keys of a file that are not options: the job, the hardware it asks for, and another job's checkpoint to start from.
ABOUT = ("job", "request", "restore")


class JobOptions:
    """The options of the job class ``cls``, which is registered as ``key``: what was given so far, and the defaults."""

    def __init__(self, key: str, cls: type[BasicJob]) -> None:
        self.key = key
        self.known: dict[str, Option] = merged(cls.options())
        self._aliases: Mapping[str, Alias] = cls.ALIASES
        self._defaults = {path: o.default for path, o in self.known.items() if not o.required} | dict(cls.DEFAULTS)
        self._given: dict[str, Any] = {}  # by the name that was used: an option or an alias
        for path in cls.DEFAULTS:
            assert path in self.known, f"{path} is not an option of {key}"

    def update(self, content: Mapping[str, Any], where: str) -> None:
        """Apply the options of a nested mapping on top of those given so far. Raises: ConfigError, beginning with
        ``where``, for an unknown option, for a value of the wrong type, and for two names of one option that disagree."""
        found: dict[str, tuple[str, str, Any]] = {}
        for path, value in self._leaves(content, where=where):
            name = self._spelled(path, where)
            other = found.setdefault(self._target(name), (path, name, value))
            if other[0] != path and other[2] != value:
                raise ConfigError(f"{where}: {other[0]} and {path} are one option; give one of them")
        followers = {
            path for _, name, _ in found.values() if name not in self.known for path in self._aliases[name].also
        }
        for _, name, value in found.values():
            self._put(name, value, where)
            # `tinytron configure` writes every option. One that is at its default may still follow another option.
            if name not in followers and value == plain(self._defaults.get(name, MISSING)):
                self._given.pop(name, None)

    def update_known(self, content: Mapping[str, Any], where: str) -> list[str]:
        """Like ``update``, but skip options that the job does not have, and return their names."""
        left_out = []
        for path, value in self._leaves(content):
            try:
                name = self._spelled(path, where)
            except ConfigError:
                left_out.append(path)
                continue
            self._put(name, value, where)
        return left_out

    def override(self, words: Sequence[str]) -> None:
        """Apply ``key=value`` arguments. Raises: ConfigError as ``update`` does, and for an argument of another form."""
        conf = require_package("omegaconf", "cli").OmegaConf
        for word in words:
            name, equals, text = word.partition("=")
            if not equals or not name:
                raise ConfigError(f"{word} is not an option; write key=value, such as train.max_steps=100")
            try:
                content = conf.to_container(conf.from_dotlist([word]), resolve=True)
            except Exception as error:
                raise ConfigError(f"{word} cannot be read ({first_line(error)}); quote values as YAML does") from error
            for path, value in self._leaves(content, where=word):
                named = self._spelled(path, word)
                if path == name and isinstance(value, (bool, int, float)) and self._is_text(named):
                    value = text  # 2024_01 is a number to YAML, and "no" is false
                self._put(named, value, word)

    def set(self, path: str, value: Any) -> None:
        """Set one value. Raises: ConfigError as ``update`` does."""
        self._put(self._spelled(path, path), value, path)

    def get(self, path: str) -> Any:
        """The value of an option by any of its names. Raises: ConfigError for an unknown one, or if a required one is
        missing."""
        name = self._spelled(path, path)
        alias = self._aliases.get(name) if name not in self.known else None
        if alias is None:
            return self.values([name])[name]
        value = self.get(alias.path)
        return None if value is None else alias.back(value, self.get)

    def sections(self, path: str) -> bool:
        """True if ``path`` is a section, by its own name or another system's."""
        prefix = f"{path}."
        names = (*self.known, *self._aliases, *(f"{theirs}." for theirs in SECTIONS))
        return any(name.startswith(prefix) for name in names)

    def values(self, only: Sequence[str] | None = None) -> dict[str, Any]:
        """Every option by its own path (or those of ``only``). Raises: ConfigError if a required one was not given, or if
        a value under another system's name does not translate."""
        found: dict[str, Any] = {}

        def value_of(path: str) -> Any:
            if path not in found:
                found[path] = self._resolve(path, value_of)
            return found[path]

        return {path: value_of(path) for path in (self.known if only is None else only)}

    def missing(self) -> list[str]:
        """Required options that were not given."""
        targets = {self._target(name) for name in self._given}
        return [path for path in self.known if path not in self._defaults and path not in targets]

    def as_yaml(self, about: Mapping[str, Any]) -> str:
        """All options by section with their help; ``about`` comes first. Missing required options are ``???``."""
        absent = self.missing()
        values = self.values([path for path in self.known if path not in absent])
        lines = [f"{name}: {json.dumps(value)}" for name, value in about.items()]
        open_sections: list[str] = []
        for path, option in self._by_section():
            *sections, name = path.split(".")
            if sections != open_sections:
                shared = next((i for i, (a, b) in enumerate(zip(sections, open_sections, strict=False)) if a != b), 0)
                lines += [""] if not shared else []
                lines += ["  " * i + f"{section}:" for i, section in enumerate(sections) if i >= shared]
                open_sections = sections
            shown = "???" if path in absent else json.dumps(plain(values[path]))
            comment = f"  # {option.flag.text}" if option.flag.text else ""
            lines.append("  " * len(sections) + f"{name}: {shown}{comment}")
        return "\n".join(lines) + "\n"

    def _by_section(self) -> list[tuple[str, Option]]:
        order = list(dict.fromkeys(path.rpartition(".")[0] for path in self.known))
        return sorted(self.known.items(), key=lambda item: order.index(item[0].rpartition(".")[0]))

    def _leaves(self, content: Mapping[str, Any], prefix: str = "", where: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in content.items():
            path = f"{prefix}{key}"
            if path in self.known or path in self._aliases:
                yield path, value
            elif isinstance(value, Mapping):
                yield from self._leaves(value, f"{path}.", where)
            elif not self.sections(path):
                yield path, value
            elif value is not None and where:  # None: a section whose lines are all commented out
                raise ConfigError(f"{where}: {path} is a section of options, not a value; {self._example(path)}")

    def _example(self, section: str) -> str:
        prefixes = (f"{section}.", f"{SECTIONS.get(section, section)}.")
        first = next((path for path in self.known if path.startswith(prefixes)), None)
        return f"give {first}=..." if first else "give one of its options"

    def _is_text(self, name: str) -> bool:
        """True if the option ``name`` takes text, but not numbers."""
        kind = self._kind(name)
        return kind is str or set(typing.get_args(kind)) == {str, type(None)}

    def _kind(self, name: str) -> Any:
        """The type of the option or alias ``name``."""
        if name in self.known:
            return self.known[name].type
        alias = self._aliases[name]
        ours = self.known[alias.path].type
        if alias.type is None:
            return ours
        return alias.type | None if type(None) in typing.get_args(ours) else alias.type

    def _spelled(self, path: str, where: str) -> str:
        """The name of the option or alias at ``path``, by any name of its section. Raises: ConfigError if there is none."""
        section, _, rest = path.partition(".")
        ours = f"{SECTIONS[section]}.{rest}" if section in SECTIONS else path
        theirs = {name: f"{other}.{rest}" for other, name in SECTIONS.items()}.get(section, path)
        for name in (path, ours, theirs):
            if name in self._aliases and name not in self.known:
                return name
            if name in self.known:
                return name
        begin = "" if where == path else f"{where}: "
        raise unknown(path, {**self.known, **self._aliases}, begin)

    def _target(self, name: str) -> str:
        return name if name in self.known else self._aliases[name].path

    def _put(self, name: str, value: Any, where: str) -> None:
        if value == "???":
            return
        if name in self.known and isinstance(value, str):
            value = dict(self.known[name].flag.words).get(value, value)
        try:
            value = converted(name, value, self._kind(name))
        except ConfigError as error:
            raise ConfigError(str(error) if where.startswith(name) else f"{where}: {error}") from None
        target = self._target(name)
        for other in [other for other in self._given if self._target(other) == target]:
            del self._given[other]
        self._given[name] = value

    def _resolve(self, path: str, get: Any) -> Any:
        for name, value in self._given.items():
            if self._target(name) != path:
                continue
            if name == path:
                return value
            ours = None if value is None else self._aliases[name].to(value, get)
            return converted(name, ours, self.known[path].type)
        for name, value in self._given.items():
            if name in self._aliases and name not in self.known and path in self._aliases[name].also:
                return value
        if path not in self._defaults:
            raise ConfigError(f"{path} is required by {self.key}; give {path}=...")
        return self._defaults[path]


def about_of(key: str, chip: str | None, n_chips: int | None, n_shards: int | None) -> dict[str, Any]:
    """The entries of a file that are not options: its job, and the hardware that it asks for, if any."""
    if chip is None and n_chips is None and n_shards is None:
        return {"job": key}
    return {"job": key, "request": {"chip": chip, "min_chips": n_chips or 1, "n_shards": n_shards or 1}}


class View:
    """A section of a job's options as attributes, read and written under any of their names."""

    def __init__(self, options: JobOptions, prefix: str = "") -> None:
        self.__dict__.update(_options=options, _prefix=prefix)

    def __getattr__(self, name: str) -> Any:
        path = f"{self._prefix}{name}"
        if self._options.sections(path):
            return View(self._options, f"{path}.")
        try:
            return self._options.get(path)
        except ConfigError as error:
            raise AttributeError(str(error)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._options.set(f"{self._prefix}{name}", value)

    __getitem__ = __getattr__
    __setitem__ = __setattr__

    def __repr__(self) -> str:
        prefix = self._prefix
        values = {path: value for path, value in self._options.values().items() if path.startswith(prefix)}
        return json.dumps(nested({path.removeprefix(prefix): plain(value) for path, value in values.items()}), indent=2)


def read_file(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options in a YAML file, nested, and its other entries (``ABOUT``). Raises: ConfigError if it cannot be read."""
    omegaconf = require_package("omegaconf", "cli")
    conf = omegaconf.OmegaConf
    try:
        content = conf.to_container(conf.load(Path(path).expanduser()), resolve=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({first_line(error)}); make one with tinytron configure") from error
    except omegaconf.errors.OmegaConfBaseException as error:  # the other lines describe its internals
        raise ConfigError(f"{path} is not valid YAML ({first_line(error)})") from error
    except Exception as error:  # an error of the YAML parser, whose last line has the position
        raise ConfigError(f"{path} is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} has no options; make one with tinytron configure JOB {path}")
    about = {name: value for name in ABOUT if (value := content.pop(name, None)) is not None}
    for name in ("job", "restore"):
        if not isinstance(about.get(name, ""), str):
            raise ConfigError(f"{path}: {name}: {about[name]} must be text; write it in quotes")
    return content, about
