"""The tables of flags and presets in docs/reference. ``python -m tinytron.cli.config_tables`` regenerates them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tinytron.training.config import all_sections
from tinytron.training.presets import preset_table
from tinytron.utils.flags import FieldInfo, config_fields

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PAGES = (REFERENCE / "flags.md", REFERENCE / "presets.md")
_MARKED = re.compile(r"(<!-- (configuration|preset) tables: begin -->\n).*?(<!-- \2 tables: end -->)", re.DOTALL)


def tables(sections: Mapping[str, type] = MappingProxyType({})) -> str:
    """One heading and Markdown table per section: the built-in sections, then the extra ``sections``. A star marks an
    option that is part of the run's identity."""
    parts = []
    for section, cls in all_sections(sections).items():
        title = (cls.__doc__ or "").split("\n")[0].split(" Raises:")[0].rstrip(".")
        parts.append(f"## {section}\n{title}.\n\n| flag | default | meaning |\n|---|---|---|\n")
        parts += [_row(info) for info in config_fields(cls)]
        parts.append("\n")
    return "".join(parts).rstrip("\n") + "\n"


def _row(info: FieldInfo) -> str:
    name = f"--[no-]{info.name}" if info.type is bool else f"--{info.name}"
    default = (" ".join(str(v) for v in info.default) or "()") if isinstance(info.default, tuple) else str(info.default)
    choices = f" ({', '.join(map(str, info.choices))})" if info.choices else ""
    star = "\\*" if info.flag.identity else ""
    return f"| `{name}`{star} | `{default}` | {info.flag.text}{choices} |\n"


def updated(page: str) -> str:
    """``page`` with the tables between its markers regenerated."""
    made = {"configuration": tables, "preset": preset_table}
    return _MARKED.sub(lambda match: match[1] + made[match[2]]() + match[3], page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
