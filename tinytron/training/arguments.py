"""The command line, generated from the dataclasses in config.py."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Sequence
from typing import Any

from tinytron.errors import ConfigError
from tinytron.training.config import SECTIONS, Config
from tinytron.utils.flags import FieldInfo, Parser, config_fields, nearest


def build_parser(description: str = "Pre-train a GPT.") -> argparse.ArgumentParser:
    """One flag per configuration field, grouped by section; booleans as ``--flag`` and ``--no-flag``."""
    parser = Parser(
        usage="%(prog)s [--flag value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(section, (cls.__doc__ or "").split(" Raises:")[0])
        for info in config_fields(cls):
            _add_flag(group, info)
    return parser


def _add_flag(group: argparse._ArgumentGroup, info: FieldInfo) -> None:
    name, default, text = info.name, info.default, info.flag.text.replace("%", "%%")
    if info.type is bool:
        both = argparse.BooleanOptionalAction
        group.add_argument(f"--{name}", action=both, default=default, help=text)
        # `--no_flag` is an accepted spelling of `--no-flag`, like all other flags with underscores.
        group.add_argument(f"--no_{name}", dest=name, action="store_false", default=default, help=argparse.SUPPRESS)
    elif info.choices is not None:
        group.add_argument(f"--{name}", choices=info.choices, default=default, help=text)
    elif typing.get_origin(info.type) is tuple:
        inner = typing.get_args(info.type)
        group.add_argument(f"--{name}", nargs=len(inner), type=inner[0], default=default, help=text)
    else:
        group.add_argument(f"--{name}", type=info.type, default=default, help=text, metavar=info.type.__name__.upper())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse ``argv`` (default: the command line). Raises: ConfigError for unknown flags, naming the nearest known one,
    and for values of the wrong type."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ConfigError(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], known)}; see --help")
    return args


def build_config(args: argparse.Namespace) -> Config:
    """The frozen configuration. Raises: ConfigError for values that break a rule."""
    sections: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        values = {info.name: getattr(args, info.name) for info in config_fields(cls)}
        sections[section] = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    return Config(**sections)


def show_config(config: Config) -> str:
    """The resolved configuration as JSON, with the hash that names the run's folder."""
    return json.dumps({"config_hash": config.config_hash(), **config.as_dict()}, indent=2)
