"""What a configuration field says about itself beside its type and default: the command line is made from it; and the
parser of all command lines."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from tinytron.errors import ConfigError


@dataclass(frozen=True)
class Flag:
    """Metadata of one configuration field, put beside its type as ``Annotated[int, Flag("help", unit="tokens")]``.

    ``identity`` says whether the value is part of what the run *is* (and so of the config hash that names its
    folder) or only of how it is executed (layout, paths, intervals, limits).
    """

    help: str
    unit: str = ""
    identity: bool = True

    @property
    def text(self) -> str:
        """The help text with its unit."""
        return f"{self.help} [{self.unit}]" if self.unit else self.help


@dataclass(frozen=True)
class FieldInfo:
    """One configuration field, resolved: name, bare type (``int``, ``Literal[...]``), optionality, default, flag."""

    name: str
    type: Any
    optional: bool
    default: Any
    flag: Flag

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """The allowed values of a ``Literal`` field, else ``None``."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is typing.Literal else None


def config_fields(cls: type) -> list[FieldInfo]:
    """Every field of the dataclass ``cls`` in declaration order.

    Raises: TypeError if a field carries no ``Flag`` (then it would have no help text).
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    infos = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        flags = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Flag)]
        if not flags:
            raise TypeError(f"{cls.__name__}.{field.name} needs an Annotated[..., Flag(...)] type")
        bare = typing.get_args(hint)[0]
        # ``Literal[...] | None`` is a typing.Union until Python 3.14, ``int | None`` a types.UnionType.
        members = typing.get_args(bare) if typing.get_origin(bare) in (types.UnionType, typing.Union) else ()
        optional = type(None) in members
        if optional:
            (bare,) = (m for m in members if m is not type(None))
        infos.append(FieldInfo(field.name, bare, optional, field.default, flags[0]))
    return infos


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the known name most like ``name``, or an empty string when none is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else ""


class Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")
