"""The command line, generated from the sections of the configuration."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tinytron.interop import model_options
from tinytron.training.config import Config, all_sections
from tinytron.training.run.exports import check_exportable
from tinytron.utils.flags import Parser, add_flag, config_fields, parse_strictly
from tinytron.utils.paths import tidy

NONE: Mapping[str, type] = MappingProxyType({})


def build_parser(sections: Mapping[str, type] = NONE, prog: str | None = None) -> argparse.ArgumentParser:
    """One flag per configuration field, grouped by section, of the built-in ``sections`` and further ones; booleans as
    ``--flag`` and ``--no-flag``. ``prog`` is the command's name (default: that of the script)."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--flag value ...]",
        description="Pre-train a GPT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for section, cls in all_sections(sections).items():
        group = parser.add_argument_group(section, (cls.__doc__ or "").split(" Raises:")[0])
        for info in config_fields(cls):
            add_flag(group, info)
    return parser


def parse_args(
    argv: Sequence[str] | None = None, sections: Mapping[str, type] = NONE, prog: str | None = None
) -> argparse.Namespace:
    """Parse ``argv`` (default: the command line), with the flags of further ``sections`` such as ``MyTrainer.sections``;
    ``given`` of the result are the flags that stand there. Raises: ConfigError for unknown flags, naming the nearest known
    one, and for values of the wrong type."""
    parser = build_parser(sections, prog)
    args = parse_strictly(parser, argv)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args.given = frozenset(vars(parse_strictly(parser, argv)))
    args.sections = sections
    return args


def build_config(args: argparse.Namespace) -> Config:
    """The frozen configuration. ``block_size`` is ``seq_len`` unless it is given: a model cannot use positions that it was
    not trained at. With ``--init_from`` the architecture is that of the weights, which flags of ``args.given`` must not
    contradict. Raises: ConfigError for values that break a rule."""
    values: dict[str, dict[str, Any]] = {}
    sections = all_sections(args.sections)
    for section, cls in sections.items():
        found = {info.name: getattr(args, info.name) for info in config_fields(cls)}
        values[section] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    if args.init_from is not None:
        values["ckpt"]["init_from"] = tidy(args.init_from)  # part of the run's identity, however it is spelled
    if args.init_from is None and "block_size" not in args.given:
        values["model"]["block_size"] = max(1, values["train"]["seq_len"])
    if args.init_from is not None:
        values["model"] = model_options(args.init_from, values["model"], args.given & values["model"].keys())
    config = Config.of({section: cls(**values[section]) for section, cls in sections.items()})
    check_exportable(config)
    return config


def show_config(config: Config) -> str:
    """The resolved configuration as JSON, with the hash that names the run's folder."""
    return json.dumps({"config_hash": config.config_hash(), **config.as_dict()}, indent=2)
