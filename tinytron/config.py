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

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import MISSING
from typing import Any, TypeVar

from tinytron.errors import ConfigError
from tinytron.utils.flags import Flag, nearest
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
    ``help`` becomes its comment in files."""
    if not all(part.isidentifier() for part in path.split("/")) or "/" not in path:
        raise TypeError(f"field({path!r}) needs a section and a name, such as training/my_loss_weight")
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
    """``options`` by path. Raises: ConfigError if two give one path different defaults."""
    found: dict[str, Option] = {}
    for option in options:
        known = found.setdefault(option.path, option)
        if known.default is not option.default and known.default != option.default:
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
    """``value`` as the type ``kind``. Raises: ConfigError if it is none."""
    members = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    for member in members:
        found = _as(value, member)
        if found is not MISSING:
            return found
    names = " or ".join("null" if m is type(None) else _name(m) for m in members)
    raise ConfigError(f"{path}={value} must be {names}")


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, str(kind))


def _as(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, or MISSING."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if kind is type(None):
        return None if value is None else MISSING
    if origin is typing.Literal:
        return value if value in typing.get_args(kind) else MISSING
    if kind is bool:
        return value if isinstance(value, bool) else MISSING
    if kind is int:
        whole = isinstance(value, float) and math.isfinite(value) and value.is_integer()
        return int(value) if whole or (isinstance(value, int) and not isinstance(value, bool)) else MISSING
    if kind is float:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else _number(value)
    if kind is str:
        return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else MISSING
    if origin in (tuple, list) or kind in (tuple, list):
        if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
            return MISSING
        return (origin or kind)(value)
    return value


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as text."""
    try:
        return float(value) if isinstance(value, str) else MISSING
    except ValueError:
        return MISSING


def unknown(path: str, known: Mapping[str, Any]) -> str:
    """The error text for an unknown option. It proposes the nearest path, or an option of that name elsewhere."""
    by_name = {name.rpartition(".")[2]: name for name in known}
    hint = nearest(path, known)
    if not hint and (name := path.rpartition(".")[2]) in by_name:
        hint = f"; did you mean {by_name[name]}?"
    return f"there is no option {path}{hint}"
