"""The command line, generated from the dataclasses in config.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from tinytron.interop import model_options
from tinytron.training.config import SECTIONS, Config
from tinytron.utils.flags import Parser, add_flag, config_fields, parse_strictly


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
            add_flag(group, info)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse ``argv`` (default: the command line); ``given`` of the result are the flags that stand there. Raises:
    ConfigError for unknown flags, naming the nearest known one, and for values of the wrong type."""
    parser = build_parser()
    args = parse_strictly(parser, argv)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args.given = frozenset(vars(parse_strictly(parser, argv)))
    return args


def build_config(args: argparse.Namespace) -> Config:
    """The frozen configuration; with ``--init_from`` the architecture is that of the weights, which flags of ``args.given``
    must not contradict. Raises: ConfigError for values that break a rule."""
    values: dict[str, dict[str, Any]] = {}
    for section, cls in SECTIONS.items():
        found = {info.name: getattr(args, info.name) for info in config_fields(cls)}
        values[section] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    if args.init_from is not None:
        values["model"] = model_options(args.init_from, values["model"], args.given & values["model"].keys())
    return Config(**{section: cls(**values[section]) for section, cls in SECTIONS.items()})


def show_config(config: Config) -> str:
    """The resolved configuration as JSON, with the hash that names the run's folder."""
    return json.dumps({"config_hash": config.config_hash(), **config.as_dict()}, indent=2)
