"""Command lines of other systems: a table of their flags, each with the option that it sets here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tinytron.config import MISSING
from tinytron.errors import ConfigError
from tinytron.jobs.aliases import Alias
from tinytron.jobs.options import JobOptions
from tinytron.jobs.training import TrainingJob, changed
from tinytron.utils.flags import FieldInfo, Flag, Parser, add_flag, parse_strictly
from tinytron.utils.help_text import shown_value


@dataclass(frozen=True)
class Setting:
    """A flag of another system: the option that it sets here (``None``: the front end translates it itself), its type and
    its default there (``MISSING``: it is required; ``None``: unset)."""

    alias: Alias | None
    type: Callable[[str], Any]
    default: Any
    help: str


Settings = Mapping[str, Setting]


def aliases_of(settings: Settings) -> Mapping[str, Alias]:
    """The ``ALIASES`` of a job whose options go by the names of ``settings``."""
    return MappingProxyType({name: s.alias for name, s in settings.items() if s.alias and name != s.alias.path})


def read_flags(settings: Settings, argv: Sequence[str], parser: Parser, works: str) -> dict[str, Any]:
    """The flags that ``argv`` gives, by name; ``parser`` gets all flags of ``settings``. ``works`` are the required flags
    with values that work. Raises: ConfigError for unknown flags, values of the wrong type, and required flags that are
    missing, naming all of them."""
    for name, setting in settings.items():
        text = setting.help
        if setting.default is MISSING:
            text += " (required)"
        elif setting.default is not None:
            text += f" (default: {shown_value(setting.default)})"
        add_flag(parser, FieldInfo(name, setting.type, True, None, Flag(text)))
    given = {name: value for name, value in vars(parse_strictly(parser, argv)).items() if value is not None}
    missing = [f"--{name}" for name, s in settings.items() if s.default is MISSING and name not in given]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(f"{', '.join(missing)} {verb} required; give {works}")
    return given


def with_defaults(settings: Settings, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, and the defaults of the flags that were not given."""
    return {name: s.default for name, s in settings.items() if s.default not in (MISSING, None)} | dict(given)


def options_of(job: type[TrainingJob], values: Mapping[str, Any], program: str) -> dict[str, Any]:
    """The values, by our flags, that differ from our defaults. ``values`` are named by ``job``'s aliases or by the paths of
    our options; ``program`` is the other system, for errors. Raises: ConfigError."""
    options = JobOptions(program, job)
    for name, value in values.items():
        options.set(name, value)
    return changed(job.options(), options.values())
