"""Metadata of configuration fields (help, bounds, choices), from which the command line is generated and values are
checked; and the parser of all command lines."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from tinytron.errors import ConfigError
from tinytron.utils.help_text import HelpAll, HelpFormatter, brief_help, placeholder, typed_program
from tinytron.utils.paths import expanded


@dataclass(frozen=True)
class Flag:
    """Metadata of one configuration field, next to its type: ``Annotated[int, Flag("help", "tokens", at_least=1)]``.

    ``identity``: the value is part of what the run *is*, and so of the config hash that names its folder; false for options
    that only affect how the run is executed (layout, paths, intervals, limits). The bounds apply to numbers that are not
    ``None``, and NaN violates all of them. ``works`` is a value for the error message to suggest, and ``rule`` states the
    bounds in other words. A number may be infinite only with ``infinite``. ``choices`` are the allowed values if the type
    is not a ``Literal``, usually a table's keys. A ``path`` may begin with ``~`` or a ``$VARIABLE``. ``bare`` is the choice
    that the flag without a value stands for. ``words`` are texts that stand for a number.
    """

    help: str
    unit: str = ""
    identity: bool = True
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    works: object = None
    rule: str = ""
    choices: tuple[str, ...] | None = None
    infinite: bool = False
    path: bool = False
    bare: str = ""
    words: tuple[tuple[str, int], ...] = ()

    @property
    def text(self) -> str:
        """The help text with its unit."""
        return f"{self.help} [{self.unit}]" if self.unit else self.help

    def allows(self, value: Any) -> bool:
        """True if ``value`` is within the bounds."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    @property
    def bounded(self) -> bool:
        """True if there is any bound; a section with an unbounded number has its own check."""
        return any(bound is not None for bound in (self.at_least, self.above, self.at_most, self.below))

    @property
    def bounds(self) -> str:
        """The bounds in words, in the form that follows "must be" in an error."""
        if self.rule:
            return self.rule
        if self.at_least is not None and self.at_most is not None:
            return f"in {self.at_least}..{self.at_most}"
        ends_at = self.at_most if self.below is None else self.below
        if ends_at is None:
            if self.above is not None:
                return "positive" if self.above == 0 else f"above {self.above}"
            return f"at least {self.at_least}"
        low = f"[{self.at_least}" if self.above is None else f"({self.above}"
        return f"in {low}, {ends_at}" + ("]" if self.at_most is not None else ")")


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
        """The allowed values of a ``Literal`` field, or the ``choices`` of its flag, else ``None``."""
        if self.flag.choices is not None:
            return self.flag.choices
        return typing.get_args(self.type) if typing.get_origin(self.type) is typing.Literal else None


def config_fields(cls: type) -> tuple[FieldInfo, ...]:
    """Every field of the dataclass ``cls`` in declaration order.

    Raises: TypeError if a field has no ``Flag`` (it would have no help text).
    """
    return _resolved_fields(cls)


@functools.cache  # resolving annotations takes 5 ms per class, and a run needs them about 70 times
def _resolved_fields(cls: Any) -> tuple[FieldInfo, ...]:
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
    return tuple(infos)


def check_bounds(section: Any) -> None:
    """Compare every field of the dataclass instance ``section`` with the bounds and choices of its flag. Raises:
    ConfigError for the first value that breaks them, with a value that works where the flag names one."""
    for info in config_fields(type(section)):
        value = getattr(section, info.name)
        flag = info.flag
        if value is None and info.optional:
            continue
        if info.choices is not None and value not in info.choices:
            raise ConfigError(f"--{info.name} {value} must be one of {', '.join(map(str, info.choices))}")
        finite = not isinstance(value, float) or math.isfinite(value)
        works = info.default if flag.works is None and not finite else flag.works
        advice = "" if works is None else f"; use {works}"
        if not flag.allows(value):
            raise ConfigError(f"--{info.name} {value} must be {flag.bounds}{advice}")
        if flag.bounded and not finite and not flag.infinite:
            raise ConfigError(f"--{info.name} {value} must be finite{advice}")


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the known name closest to ``name``, or an empty string if none is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else ""


class Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError instead of printing the usage and exiting. Flags cannot be abbreviated, not even
    those of subcommands.

    ``common`` names the arguments (by ``dest``) that ``--help`` shows; ``--help-all`` shows all. Without it, both show
    all. ``prog`` defaults to the script as it was typed.
    """

    def __init__(self, *, common: Sequence[str] = (), prog: str | None = None, **options: Any) -> None:
        usual: dict[str, Any] = {"allow_abbrev": False, "formatter_class": HelpFormatter}
        super().__init__(prog=typed_program() if prog is None else prog, **{**usual, **options})
        self._common = tuple(common)
        if self.add_help:
            brief, full = "show the most common flags and stop", "show all flags and stop"
            self._option_string_actions["--help"].help = brief if common else "show this and stop"
            self.add_argument("--help-all", action=HelpAll, help=full if common else argparse.SUPPRESS)
            self.add_argument("--help_all", action=HelpAll, help=argparse.SUPPRESS)

    def format_help(self) -> str:
        return brief_help(self, self._common) if self._common else super().format_help()

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def parse_strictly(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    usual: Mapping[str, str] = types.MappingProxyType({}),
) -> argparse.Namespace:
    """Parse ``argv`` (default: the command line). Raises: ConfigError for values of the wrong type and for unknown
    flags. It suggests our name for a flag of other programs that ``usual`` lists, or else the closest known flag."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0].replace("-", "_").replace("__", "--", 1)
        hint = f"; it is {usual[name]} here" if name in usual else nearest(unknown[0].split("=")[0], _options(parser))
        raise ConfigError(f"unknown argument {unknown[0]}{hint}; see --help")
    return args


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """The spellings of all flags, including those of subcommands."""
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += _options(command)
    return found


_SHOWN_CHOICES = 80  # characters of choices in front of a flag's help; more of them are in the help


def add_flag(group: argparse._ActionsContainer, info: FieldInfo) -> None:
    """Add the flag of one configuration field; booleans get ``--flag``, ``--no-flag`` and ``--flag true|false``."""
    name = info.name
    default = info.default
    text = info.flag.text.replace("%", "%%")
    if info.type is bool:
        group.add_argument(f"--{name}", action=_Switch, default=default, help=text)
        # `--no_flag` is also accepted for `--no-flag`, because all other flags have underscores.
        group.add_argument(f"--no_{name}", dest=name, action="store_false", default=default, help=argparse.SUPPRESS)
    elif info.choices is not None:
        alone: dict[str, Any] = {"nargs": "?", "const": info.flag.bare} if info.flag.bare else {}
        if sum(map(len, map(str, info.choices))) > _SHOWN_CHOICES:
            alone["metavar"], text = "NAME", f"{text}: {', '.join(map(str, info.choices))}"
        group.add_argument(f"--{name}", choices=info.choices, default=default, help=text, **alone)
    elif typing.get_origin(info.type) is tuple:
        inner = typing.get_args(info.type)
        count = "*" if inner[-1] is Ellipsis else len(inner)
        kind = expanded if info.flag.path else inner[0]
        shown = placeholder(kind) if inner[-1] is Ellipsis else (placeholder(kind),) * len(inner)
        group.add_argument(f"--{name}", nargs=count, type=kind, default=default, help=text, metavar=shown)
    else:
        shown = placeholder(expanded if info.flag.path else info.type)
        kind = _number_or_word(info.flag.words) if info.type is int else info.type
        if info.flag.path:
            kind = expanded
        group.add_argument(f"--{name}", type=kind, default=default, help=text, metavar=shown)


def _number_or_word(words: tuple[tuple[str, int], ...]) -> Callable[[str], int]:
    """``whole_number``, which also reads ``words``."""
    known = dict(words)
    return lambda text: known[text] if text in known else whole_number(text)


def whole_number(text: str) -> int:
    """Parse a whole number of at most 64 bits, such as ``134217728``, ``2**27``, ``134_217_728`` or ``1e6``. Raises:
    argparse.ArgumentTypeError."""
    base, power, exponent = text.partition("**")
    try:
        if power and not 0 <= int(exponent) <= 64:
            raise ValueError
        if re.fullmatch(r"[\d.]+[eE]\+?\d{1,2}", text):
            number = int(exact := Decimal(text))
            if number != exact:
                raise ValueError
        else:
            number = int(base) ** int(exponent) if power else int(text)
    except (ValueError, InvalidOperation):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number like 1000000, 1e6 or 2**20") from None
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} has more than 64 bits; use {-(2**63)} to {2**63 - 1}")
    return number


class _Switch(argparse.BooleanOptionalAction):
    """``--flag``, ``--no-flag``, and ``--flag true|false``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.nargs = "?"

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if values is None:
            super().__call__(parser, namespace, values, option_string)
            return
        given = {"true": True, "false": False}.get(str(values).lower())
        if given is None or str(option_string).startswith("--no-"):
            parser.error(
                f"argument {option_string} does not accept {values}; use --{self.dest} true or --{self.dest} false"
            )
        setattr(namespace, self.dest, given)
