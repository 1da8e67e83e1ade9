"""Text that users wrote: byte order marks, line ends, and halves of surrogate pairs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tinytron.errors import ConfigError, DataError
from tinytron.utils.paths import expanded, files_below, one_spelling, user_path
from tinytron.utils.texts import numbered_lines, whole_characters

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("char", "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
def test_a_line_ends_at_its_line_feed_only(char: str) -> None:
    """At none of the other characters that ``str.splitlines`` cuts at."""
    text = json.dumps({"text": f"a{char}b"}, ensure_ascii=False)
    assert list(numbered_lines(f"{text}\n\n  \n{text}".encode())) == [(1, text), (4, text)]
    assert list(numbered_lines(f"x{char}y\r\nz\r\n".encode())) == [(1, f"x{char}y"), (2, "z")]


def test_a_byte_order_mark_is_no_text_at_the_start_of_a_line_and_text_within() -> None:
    assert list(numbered_lines(BOM + b"a\n" + BOM + b"b\nc" + BOM)) == [(1, "a"), (2, "b"), (3, "c\ufeff")]


def test_bytes_that_are_no_utf_8_are_refused() -> None:
    with pytest.raises(UnicodeDecodeError):
        list(numbered_lines(b"a\ncaf\xe9\n"))


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    assert whole_characters("x \ud83d y \U0001f642") == "x ? y \U0001f642"
    assert whole_characters(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf?"


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "corpus" / "sub" / ".hidden").mkdir(parents=True)
    for name in (
        "elsewhere/a.txt",
        "corpus/b.txt",
        "corpus/sub/c.txt",
        "corpus/sub/.d.txt",
        "corpus/sub/.hidden/e.txt",
    ):
        (tmp_path / name).write_text("x")
    corpus = tmp_path / "corpus"
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "again").symlink_to(tmp_path / "elsewhere")
    (corpus / "sub" / "up").symlink_to(corpus)
    (corpus / "broken").symlink_to(tmp_path / "nowhere")
    (corpus / "f.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    names = sorted(str(path.relative_to(corpus)) for path in files_below(corpus, hidden=False))
    assert names == ["again/a.txt", "b.txt", "f.txt", "sub/c.txt"]
    assert len(list(files_below(corpus))) == 6


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(place: Any) -> Any:
        if Path(place).name == "closed":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    assert list(files_below(tmp_path / "nowhere")) == []
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"closed cannot be read \(Permission denied\); make it readable"):
        list(files_below(tmp_path))


def test_a_path_begins_as_the_shell_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/scratch/runs")
    found = {text: expanded(text) for text in ("~/runs", "~", "$RUNS/a", "${RUNS}", "a~b$RUNS", "./$RUNS", "./~a")}
    assert list(found.values()) == [
        "/home/me/runs", "/home/me", "/scratch/runs/a", "/scratch/runs", "a~b$RUNS", "./$RUNS", "./~a"
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["$NONE/a", "${NONE}", "~nobody-here/a", "$ /a", "$", "$HOME/$NONE", "$NONE/$HOME"])
def test_a_path_names_no_user_or_variable_that_is_not_there(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NONE", raising=False)
    with pytest.raises(ConfigError, match=re.escape(f"write ./{text} if its name starts like that")):
        user_path(text)


def test_a_folder_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run := tmp_path / "here" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for text in ("run", "run/", "./run", "../here/run", str(run), "run/../run", "../link/run"):
        assert one_spelling(text) == str(run.resolve())
    monkeypatch.chdir(tmp_path)
    assert one_spelling("here/run") == str(run.resolve())
    assert one_spelling("openai-community/gpt2") == "openai-community/gpt2"
