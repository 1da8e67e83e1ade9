"""The help of every command: ``--help`` fits a screen, ``--help-all`` shows all flags, and each default is shown once."""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.runs import ROOT
from tinytron.cli import gpt2fun
from tinytron.cli.main import COMMANDS, main
from tinytron.utils import help_text
from tinytron.utils.flags import Parser

LINES, COLUMNS = 45, 100
NESTED = [
    ("data", "info"),
    ("data", "verify"),
    *(("checkpoint", t) for t in ("inspect", "verify", "consolidate", "prune")),
]
VERBS = [*((name,) for name in COMMANDS), *NESTED]


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> list[Parser]:
    """The parsers that print their help."""
    made: list[Parser] = []
    original = Parser.exit

    def exit_of(self: Parser, *args: Any) -> Any:
        made.append(self)
        original(self, *args)

    monkeypatch.setattr(Parser, "exit", exit_of)
    return made


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_fits_a_screen_and_names_help_all_if_it_hides_a_flag(
    verb: tuple[str, ...], capsys: pytest.CaptureFixture[str], parsers: list[Parser]
) -> None:
    shown = helped(capsys, *verb, "--help")
    lines = shown.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    flags_of = help_text.visible_flags(parsers[0])
    hidden = [a.dest for a in flags_of if not any(name in _names_of(shown) for name in a.option_strings)]
    last = f"--help-all shows all {len(flags_of)} flags."
    assert (lines[-1] == last) == bool(hidden)
    assert hidden or "--help-all" not in shown
    assert len(flags_of) - len(hidden) <= 15


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_all_lists_every_flag_with_its_default_once(
    verb: tuple[str, ...], capsys: pytest.CaptureFixture[str], parsers: list[Parser]
) -> None:
    shown = helped(capsys, *verb, "--help-all")
    assert max(map(len, shown.splitlines())) <= COLUMNS
    (parser,) = parsers
    formatter = parser._get_formatter()
    listed = {action.dest for action in parser._actions if action.help != argparse.SUPPRESS}
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:  # another spelling
            assert action.dest in listed or action.dest == "help_all"
            continue
        if action.option_strings:
            assert any(name in _names_of(shown) for name in action.option_strings)
        text = formatter._expand_help(action) if action.help else ""
        assert len(re.findall(r"\bdefault(?::|s to) ?", text, re.IGNORECASE)) <= 1, text
        if action.nargs != 0 and action.default not in (None, argparse.SUPPRESS, "", [], ()):
            assert "default" in text.lower(), text


def _names_of(shown: str) -> set[str]:
    """The flags that have an entry of their own in the help, both spellings of booleans."""
    entries = re.findall(r"^  (-\S.*?)(?:  |$)", shown, re.MULTILINE)
    names = {word for entry in entries for word in re.findall(r"(?<!\S)--?[\w\[\].-]+", entry)}
    return {spelling for name in names for spelling in (name.replace("[no-]", ""), name.replace("[no-]", "no-"))}


@pytest.mark.parametrize("verb", [name for name in COMMANDS if name not in ("data", "checkpoint")])
def test_help_of_a_long_command_begins_with_examples_that_run_under_its_name(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = helped(capsys, verb, "--help")
    if "common flags:" in shown:
        before = shown.split("common flags:")[0]
        assert re.findall(rf"^tinytron {verb} --", before, re.MULTILINE)


def test_a_default_is_shown_as_it_would_be_typed() -> None:
    assert help_text.shown_value(2**27) == "2**27"
    assert help_text.shown_value(524288) == "524288"
    assert (help_text.shown_value(True), help_text.shown_value((15, 20))) == ("on", "15 20")


def test_booleans_have_no_placeholder_and_say_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    shown = helped(capsys, "pretrain", "--help-all")
    assert re.search(r"--\[no-\]async_save +\S", shown)
    assert "--[no-]resume" in shown
    assert "ASYNC_SAVE" not in shown
    assert "(default: on)" in shown
    assert "(default: off)" in shown


def test_a_script_is_called_as_it_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/tokenize_dataset.py", "--help"])
    monkeypatch.chdir(ROOT)
    runpy.run_path("scripts/tokenize_dataset.py", run_name="__main__")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python scripts/tokenize_dataset.py --dataset_path PATH")
    assert "\npython scripts/tokenize_dataset.py --dataset_path corpus.jsonl" in shown


@pytest.mark.parametrize("flag", ["--help_all", "--help-all"])
def test_help_all_has_both_spellings(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--muon_momentum" in helped(capsys, "pretrain", flag)


def test_gpt2fun_and_the_download_fit_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpt2fun.build_config_of(["--help"], {})
    download = subprocess.run(
        [sys.executable, "scripts/download_fineweb.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for shown in (capsys.readouterr().out, download.stdout):
        lines = shown.splitlines()
        assert len(lines) <= LINES
        assert max(map(len, lines)) <= COLUMNS


def test_a_common_flag_exists() -> None:
    """A name that no flag has would end --help in a traceback."""
    parser = Parser(common=("size",))
    parser.add_argument("--size", type=int, default=3, help="how large")
    assert "--size INT  how large (default: 3)" in parser.format_help()
    with pytest.raises(KeyError, match="size"):
        Parser(common=("size",)).format_help()
