"""docs/architecture.md and docs/ways.md are true: counts, files, rooms, and the syntax of the pictures."""

from __future__ import annotations

import re

import pytest

from tests.house.line_counts import PACKAGE, PAGE, ROOT, files_of, tables, updated

TEXT = PAGE.read_text()
WAYS = (ROOT / "docs" / "ways.md").read_text()
PICTURES = re.findall(r"```mermaid\n(.*?)```", WAYS, re.DOTALL)
NODE = re.compile(r'(\w+)(?:\["([^"`<>]+)"\])?')


def test_the_counts_are_those_of_the_code() -> None:
    assert updated(TEXT) == TEXT, "run: python -m tests.house.line_counts"


def test_the_core_names_no_file_twice_and_the_rooms_are_the_whole_library() -> None:
    core, rooms = tables(TEXT)
    assert len(set(core)) == len(core)
    assert sorted(rooms) == sorted(
        p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or not p.stem.startswith("__")
    )
    assert "training/trainer.py" in {str(path.relative_to(PACKAGE)) for path in core}


def test_names_of_files_are_read() -> None:
    assert files_of("training/{trainer,config}.py") == [PACKAGE / "training/trainer.py", PACKAGE / "training/config.py"]
    assert files_of("errors.py") == [PACKAGE / "errors.py"]
    with pytest.raises(AssertionError, match=r"names training/none.py"):
        files_of("training/{trainer,none}.py")


def test_counts_are_rounded_and_stay_while_they_are_about_right() -> None:
    lines = len((PACKAGE / "errors.py").read_text().splitlines())
    page = "| `errors.py` `errors.py` | {} | x |\n| all of these | {} | |\n"
    right = f"{round(2 * lines / 10) * 10}"
    assert updated(page.format(1, 2)) == page.format(right, right)
    assert updated(page.format(f"{2 * lines - 1}", "9,999")) == page.format(f"{2 * lines - 1}", right)


def test_files_that_the_pages_mention_are_there() -> None:
    mentioned = set(re.findall(r"`([\w./]+(?:\.py|/))`", TEXT + WAYS))
    assert len(mentioned) > 40
    assert not [name for name in mentioned if not ((PACKAGE / name).exists() or (ROOT / name).exists())]


@pytest.mark.parametrize(
    "picture", PICTURES, ids=[picture.split("\n")[1].split("[")[0].strip() for picture in PICTURES]
)
def test_pictures_are_plain_flowcharts(picture: str) -> None:
    """Quoted labels, arrows of two kinds, no reserved words: what every version of Mermaid draws."""
    first, *lines = picture.rstrip("\n").split("\n")
    assert first == "flowchart LR"
    labels: dict[str, str] = {}
    used = set()
    for line in lines:
        left, _, right = re.fullmatch(r" {4}(.+?) (-->|-\.->) (.+)", line).groups()  # type: ignore[union-attr]
        for side in (left, right):
            found = NODE.fullmatch(side)
            assert found is not None, side
            name, label = found.groups()
            assert name not in ("end", "default", "graph", "style", "class", "click", "x", "o"), name
            used.add(name)
            if label is not None:
                assert name not in labels, f"{name} has two labels"
                labels[name] = label
    assert used == set(labels)
