"""Configurations as trees: classes declare their options as ``field("section/name", default=...)``, ``build`` collects
them, and ``configure`` makes an instance from the values that are active.

    @dataclass
    class MyConfig:
        my_loss_weight: float = field("training/my_loss_weight", default=0.1)

    with configuration(build(MyConfig)) as tree:
        tree.training.my_loss_weight = 0.2
        configure(MyConfig)  # MyConfig(my_loss_weight=0.2); works anywhere, also inside a model

A module of a model declares options in the same way, as class attributes that its ``__init__`` takes as arguments. Its
class method ``components()`` returns the classes of its parts, whose options become part of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import MISSING
from typing import Any, TypeVar

from tinytron.errors import ConfigError
from tinytron.utils.flags import Flag, nearest, whole_number
from tinytron.utils.optional import require_package

T = TypeVar("T")
_PATH = "tinytron.path"
_active: ContextVar[Any] = ContextVar("configuration")


def field(
    path: str,
    *,
    default: Any = MISSING,
    default_factory: Callable[[], Any] | None = None,
    help: str = "",
) -> Any:
    """An option at ``path``, such as ``"training/my_loss_weight"``; without a default it is required (``???`` in files).
    ``help`` becomes its comment in files. Raises: TypeError for a path without a section, and for a default that instances
    would share or that a file cannot hold."""
    if not all(part.isidentifier() for part in path.split("/")) or "/" not in path:
        raise TypeError(f"field({path!r}) needs a section and a name, such as training/my_loss_weight")
    if isinstance(default, (list, dict, set)):
        raise TypeError(f"field({path!r}) needs default_factory=lambda: {default!r}; instances would share one default")
    if default is not MISSING and default_factory is None:
        try:
            json.dumps(default)
        except TypeError:
            raise TypeError(f"field({path!r}) has the default {default!r}; use a number, text, tuple or None") from None
    metadata = {_PATH: path.replace("/", "."), "help": help}
    if default_factory is not None:
        return dataclasses.field(default_factory=default_factory, metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)  # in any order


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: ``path`` (``"training.my_loss_weight"``), the attribute ``name`` of ``owner``, its type, default
    (``MISSING``: required) and what its ``flag`` says about it."""

    path: str
    name: str
    owner: str
    type: Any
    default: Any
    flag: Flag

    @property
    def required(self) -> bool:
        """True if the option has no default."""
        return self.default is MISSING


def options_of(cls: type) -> list[Option]:
    """The options that ``cls`` declares by ``field``, inherited ones included, and those of its ``components()``."""
    found = _own_options(cls)
    components = getattr(cls, "components", None)
    for component in components() if callable(components) else ():
        found += options_of(component)
    return found


def _own_options(cls: type) -> list[Option]:
    hints = typing.get_type_hints(cls, include_extras=False)
    found = []
    for name, declared in _declared(cls).items():
        default = declared.default if declared.default_factory is MISSING else declared.default_factory()
        flag = Flag(declared.metadata["help"])
        found.append(Option(declared.metadata[_PATH], name, cls.__name__, hints.get(name, Any), default, flag))
    return found


def _declared(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """Fields with a path by attribute: those of a dataclass, or class attributes."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for base in reversed(cls.__mro__):
        for name, value in base.__dict__.get("__dataclass_fields__", base.__dict__).items():
            if isinstance(value, dataclasses.Field) and _PATH in value.metadata:
                found[name] = value
    return found


def merged(options: list[Option]) -> dict[str, Option]:
    """``options`` by path. One that is required takes the default that another declares for its path. Raises: ConfigError
    if two give one path different defaults."""
    found: dict[str, Option] = {}
    for option in options:
        known = found.setdefault(option.path, option)
        if known.required:
            found[option.path] = option
        elif not option.required and known.default is not option.default and known.default != option.default:
            raise ConfigError(
                f"{option.path} has two defaults: {known.default!r} in {known.owner} and {option.default!r} in "
                f"{option.owner}; give them the same one"
            )
    return found


def build(*classes: type) -> Any:
    """The options of ``classes`` as an OmegaConf tree with their defaults; required ones are ``???``. It takes no further
    keys. Raises: ConfigError for two defaults of one option."""
    conf = require_package("omegaconf", "cli").OmegaConf
    options = merged([option for cls in classes for option in options_of(cls)])
    tree = conf.create(nested({path: "???" if o.required else plain(o.default) for path, o in options.items()}))
    conf.set_struct(tree, True)
    return tree


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        here = tree
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = value
    return tree


def plain(value: Any) -> Any:
    """``value`` as YAML and JSON store it."""
    return list(value) if isinstance(value, tuple) else value


@contextlib.contextmanager
def configuration(tree: Any) -> Iterator[Any]:
    """Make ``tree`` (an OmegaConf tree or nested mapping) the configuration that ``configure`` reads in this context."""
    token = _active.set(tree)
    try:
        yield tree
    finally:
        _active.reset(token)


def is_configured() -> bool:
    """True inside ``configuration``."""
    return _active.get(None) is not None


def configure(cls: Callable[..., T], **more: Any) -> T:
    """An instance of ``cls`` with the active configuration's values for its fields, and ``more`` arguments. Raises:
    ConfigError outside of ``configuration``, for an option that is missing there, and for a value of the wrong type."""
    tree = _active.get(None)
    if tree is None:
        raise ConfigError(
            f"configure({cls.__name__}) needs a configuration; call it inside `with configuration(tree):`"
        )
    assert isinstance(cls, type), "classes declare fields"
    values = {option.name: _value_in(tree, option) for option in _own_options(cls) if option.name not in more}
    return cls(**values, **more)


def _value_in(tree: Any, option: Option) -> Any:
    here = tree
    for part in option.path.split("."):
        if here is None or part not in here or here[part] == "???":  # OmegaConf's trees do not contain what is missing
            if option.required:
                raise ConfigError(f"{option.path} is required by {option.owner}; give {option.path}=...")
            return option.default
        here = here[part]
    return converted(option.path, here, option.type)


def converted(path: str, value: Any, kind: Any) -> Any:
    """``value`` as the type ``kind``. Raises: ConfigError if it cannot be one."""
    if (found := _as(value, kind)) is not MISSING:
        return found
    raise ConfigError(f"{path}={'null' if value is None else value} must be {_name(kind)}")


def _name(kind: Any) -> str:
    if _is_union(kind):
        return " or ".join(map(_name, typing.get_args(kind)))
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (tuple, list):
        items = typing.get_args(kind)
        if len(set(items) - {Ellipsis}) == 1:
            count = "each " if items[-1] is Ellipsis or len(items) == 1 else f"{len(items)} items, each "
            return f"a list ({count}{_name(items[0])})"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    names |= {list: "a list", dict: "a mapping"}
    return names.get(kind, str(kind))


def _as(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, or MISSING."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if _is_union(kind):
        members = typing.get_args(kind)
        if type(value) in members:  # text for `int | str` stays text
            return value
        return next((found for member in members if (found := _as(value, member)) is not MISSING), MISSING)
    if kind is type(None):
        return None if value is None else MISSING
    if origin is typing.Literal:
        return value if value in typing.get_args(kind) else MISSING
    if kind is bool:
        return value if isinstance(value, bool) else MISSING
    if kind is int:
        if isinstance(value, str):
            return _parsed(whole_number, value)
        whole = isinstance(value, float) and math.isfinite(value) and value.is_integer()
        return int(value) if whole or (isinstance(value, int) and not isinstance(value, bool)) else MISSING
    if kind is float:
        if isinstance(value, str):
            return _parsed(float, value)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else MISSING
    if kind is str:
        return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else MISSING
    if origin in (tuple, list) or kind in (tuple, list):
        return _sequence(value, origin or kind, typing.get_args(kind))
    if origin is dict or kind is dict:
        return value if isinstance(value, Mapping) else MISSING
    return value


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _sequence(value: Any, kind: type, items: tuple[Any, ...]) -> Any:
    """``value`` as a tuple or list of ``items`` (``()``: of anything), or MISSING."""
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
        return MISSING
    values = list(value)
    if not items:
        return kind(values)
    if kind is list or items[-1] is Ellipsis:
        items = items[:1] * len(values)
    if len(items) != len(values):
        return MISSING
    found = [_as(one, item) for one, item in zip(values, items, strict=True)]
    return MISSING if any(one is MISSING for one in found) else kind(found)


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    """The number in ``text``, or MISSING. YAML reads 1e-3 and 2**20 as text."""
    try:
        return parse(text)
    except (ValueError, argparse.ArgumentTypeError):
        return MISSING


class UnknownOptionError(ConfigError):
    """No option has that name."""


def unknown(path: str, known: Mapping[str, Any], where: str = "") -> UnknownOptionError:
    """The error for an unknown option. It proposes the nearest path, or an option of that name elsewhere. ``where`` is put
    in front."""
    by_name = {name.rpartition(".")[2]: name for name in known}
    hint = nearest(path, known)
    if not hint and (name := path.rpartition(".")[2]) in by_name:
        hint = f"; did you mean {by_name[name]}?"
    return UnknownOptionError(f"{where}there is no option {path}{hint}")
