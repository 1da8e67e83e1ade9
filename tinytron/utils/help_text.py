"""The help of all command lines: ``--help`` fits a screen, ``--help-all`` shows every flag."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

MAX_COLUMNS = 100
_EXAMPLE = ("python ", "tinytron ", "torchrun ")  # a paragraph that begins so is a list of commands
_PLACEHOLDERS = {"str": "TEXT", "whole_number": "INT", "user_path": "PATH", "expanded": "PATH", "byte_count": "SIZE"}


class HelpFormatter(argparse.HelpFormatter):
    """At most ``MAX_COLUMNS`` wide. Reflows paragraphs of prose and keeps the lines of commands. A flag's default is shown
    once, a boolean as ``--[no-]flag``, and a value by its type."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 28, **options})
        self._width = min(self._width, MAX_COLUMNS)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text.strip())
        return "\n\n".join(
            textwrap.indent(paragraph, indent)
            if paragraph.startswith((self._prog, *_EXAMPLE))
            else textwrap.fill(_plain(paragraph), width, initial_indent=indent, subsequent_indent=indent)
            for paragraph in paragraphs
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(_plain(text), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return None if action.help is None else action.help + default_of(action).replace("%", "%%")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0].removeprefix('--')}"
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if _underscored(name) not in {*action.option_strings} - {name}]
        value = "" if action.nargs == 0 else self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(names)} {value}".rstrip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return placeholder(action.type)


def placeholder(kind: Any) -> str:
    """The word for a value that ``kind`` parses."""
    name = getattr(kind, "__name__", "str")
    return _PLACEHOLDERS.get(name, name.upper())


def default_of(action: argparse.Action) -> str:
    """`` (default: ...)`` for the help of ``action``, unless there is none or the text says it itself. A flag that takes no
    value is off without it."""
    switches = isinstance(action, argparse.BooleanOptionalAction)
    if action.default in (None, argparse.SUPPRESS, "", [], ()) or "default" in str(action.help).lower():
        return ""
    return "" if action.nargs == 0 and not switches else f" (default: {shown_value(action.default)})"


def shown_value(value: Any) -> str:
    """``value`` as a user would write it; a large power of two as ``2**27``."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, int) and value > 10**6 and value.bit_count() == 1:
        return f"2**{value.bit_length() - 1}"
    return str(value)


def typed_program() -> str:
    """The program as it was typed: ``tinytron``, or ``python script.py``."""
    program = sys.argv[0]
    return f"python {program}" if program.endswith(".py") else program


def brief_help(parser: argparse.ArgumentParser, common: Sequence[str]) -> str:
    """The help of ``parser`` with only the arguments that ``common`` names, in that order."""
    by_name = {action.dest: action for action in parser._actions if action.help != argparse.SUPPRESS}
    formatter = parser._get_formatter()
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    formatter.add_text(parser.description)
    formatter.start_section("common flags")
    formatter.add_arguments(by_name[name] for name in common)
    formatter.end_section()
    formatter.add_text(f"--help-all shows all {len(visible_flags(parser))} flags.")
    return formatter.format_help()


def visible_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The flags of ``parser`` that its help may show, without those that show it."""
    helps = ("help", "help_all")
    return [
        action
        for action in parser._actions
        if action.option_strings and action.help != argparse.SUPPRESS and action.dest not in helps
    ]


class HelpAll(argparse.Action):
    """``--help-all``: print the help with every flag, and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(argparse.ArgumentParser.format_help(parser), end="")
        parser.exit()


def _plain(text: str) -> str:
    """``text`` on one line, without a docstring's backticks."""
    return " ".join(text.replace("``", "").split())


def _underscored(name: str) -> str:
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name
