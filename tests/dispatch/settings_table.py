"""The tables of settings in docs/clusters.md: ``python -m tests.dispatch.settings_table`` rewrites them from the code."""

from __future__ import annotations

from dataclasses import MISSING

from tests.helpers.runs import ROOT
from tinytron.dispatch.settings import HOST_TYPES, TOP, Cluster, Partition
from tinytron.utils.flags import config_fields

PAGE = ROOT / "docs" / "clusters.md"
BEGIN, END = "## Settings\n", "\n## Limits\n"


def _rows(cls: type) -> list[str]:
    rows = []
    for info in config_fields(cls):
        needed = "**required:** " if info.default is MISSING else ""
        default = f" (default: `{info.default}`)" if info.default not in (MISSING, None, False) else ""
        works = str(info.flag.works).lower() if isinstance(info.flag.works, bool) else info.flag.works
        rows.append(f"| `{info.name}` | {needed}{info.flag.help}{default} | `{works}` |")
    return rows


def section() -> str:
    """The section of the page."""
    lines = [
        BEGIN,
        "`~/.tinytron.yaml`, or the file that `--dispatch` names. Unknown keys are errors that name the nearest one.",
        "",
    ]
    lines += ["| key | meaning |", "|---|---|", *(f"| `{key}` | {text} |" for key, text in TOP.items())]
    for title, cls in (
        ("clusters", Cluster),
        *((f"hosts of the type {kind}", cls) for kind, cls in HOST_TYPES.items() if kind != "volcano"),
        ("partitions", Partition),
    ):
        lines += ["", f"### Settings of {title}", "", "| key | meaning | such as |", "|---|---|---|", *_rows(cls)]
    lines += ["", "The type `volcano` has the settings of `kubernetes`."]
    return "\n".join(lines) + "\n"


def updated(page: str) -> str:
    """``page`` with the section as it should be."""
    before, _, rest = page.partition(BEGIN)
    return before + section() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
