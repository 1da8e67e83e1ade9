"""What step_time.py measured, as Markdown, JSON and a bar chart."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import platform
import shlex
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

LIBRARIES = ("torch", "transformers", "litgpt", "torchtitan")
COLOURS = {"plain torch": "#9aa0a6", "transformers": "#f4b400", "litgpt": "#7e57c2", "torchtitan": "#4285f4"}
OURS = "#d93025"


@dataclass
class Row:
    """One variant: seconds of a step in each round (``cpu``: of all threads' processor time), or why there are none."""

    name: str
    keeps: str
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    first_loss: float | None = None
    first_step: float | None = None  # seconds, compilation included
    peak_bytes: int | None = None
    failure: str | None = None


@dataclass
class Table:
    """All variants of one model in one precision. ``peak_flops`` is the rate of matrix products that MFU refers to."""

    model: str
    precision: str
    parameters: int
    batch: int
    seq_len: int
    flops_per_token: float
    peak_flops: float
    peak_source: str
    rows: list[Row]

    def rate(self, row: Row) -> float:
        """Tokens a second."""
        return self.batch * self.seq_len / statistics.median(row.seconds)

    def mfu(self, row: Row) -> float:
        """The part of the peak rate that the model's matrix products reach."""
        return self.rate(row) * self.flops_per_token / self.peak_flops

    def ratios(self, row: Row, kind: Literal["seconds", "cpu"] = "seconds") -> list[float]:
        """Speed relative to the first row that ran, round by round; ``cpu``: by processor seconds."""
        base = next(other for other in self.rows if other.seconds)
        return [b / own for b, own in zip(getattr(base, kind), getattr(row, kind), strict=True)]

    @property
    def title(self) -> str:
        """Model, precision and batch."""
        size = f"{self.parameters / 1e6:.1f}M parameters"
        return f"{self.model}, {self.precision}: {size}, {self.batch} x {self.seq_len} tokens a step"

    def lines(self) -> list[str]:
        """As Markdown."""
        peak = f"{self.peak_flops / 1e12:.3g} TFLOP/s ({self.peak_source})"
        lines = [
            f"## {self.title}",
            "",
            f"MFU refers to {peak} and {self.flops_per_token / 1e6:.1f} MFLOP a token.",
            "",
        ]
        lines.append(
            "| variant | weights, moments | tok/s | ratio | min-max | by CPU time | MFU | peak MiB | first step |"
        )
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for row in self.rows:
            name = f"**{row.name}**" if row.name.startswith("tinytron") else row.name
            if not row.seconds:
                lines.append(f"| {name} | {row.keeps} | {row.failure} | | | | | | |")
                continue
            ratios = self.ratios(row)
            cpu = f"{statistics.median(self.ratios(row, 'cpu')):.3f}" if row.cpu else "-"
            peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
            span = f"{statistics.median(ratios):.3f} | {min(ratios):.2f}-{max(ratios):.2f} | {cpu}"
            first = f"{row.first_step or 0:.1f} s"
            lines.append(
                f"| {name} | {row.keeps} | {self.rate(row):,.0f} | {span} | {self.mfu(row):.1%} | {peak} | {first} |"
            )
        return lines


def machine(device: torch.device) -> str:
    """Device, threads and versions, in a line."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{where}; Python {platform.python_version()}, {', '.join(f'{n} {v}' for n, v in _versions().items())}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def write(out: Path, tables: list[Table], device: torch.device, settings: dict[str, Any], command: list[str]) -> str:
    """``out`` with .md, .json and, if matplotlib is there, .png; returns what was written, or is missing, in a line."""
    out.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{out}.md", f"{out}.json"]
    title = f"# Training step side by side, {datetime.date.today().isoformat()}"
    head = [title, "", f"{machine(device)}.", f"`{shlex.join(command)}`", ""]
    Path(names[0]).write_text("\n".join([*head, *(line for table in tables for line in [*table.lines(), ""])]))
    content = {"machine": machine(device), "settings": settings, "tables": [asdict(table) for table in tables]}
    Path(names[1]).write_text(json.dumps(content, indent=2))
    try:
        draw(Path(f"{out}.png"), tables)
    except ImportError:
        return f"written: {', '.join(names)}; no chart without matplotlib: pip install matplotlib"
    return f"written: {', '.join([*names, f'{out}.png'])}"


def draw(path: Path, tables: list[Table]) -> None:
    """One panel of bars a table: the median ratio, and a line from the smallest to the largest. Raises: ImportError."""
    figure_module = importlib.import_module("matplotlib.figure")
    tables = [table for table in tables if any(row.seconds for row in table.rows)]
    heights = [0.9 + 0.28 * sum(bool(row.seconds) for row in table.rows) for table in tables]
    figure = figure_module.Figure(figsize=(8, sum(heights) or 1), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0] if tables else []
    for panel, table in zip(panels, tables, strict=True):
        rows = [row for row in table.rows if row.seconds][::-1]
        ratios = [table.ratios(row) for row in rows]
        middles = [statistics.median(values) for values in ratios]
        spans = [[m - min(v) for m, v in zip(middles, ratios, strict=True)]]
        spans.append([max(v) - m for m, v in zip(middles, ratios, strict=True)])
        colours = [COLOURS.get(row.name.split(",")[0], OURS) for row in rows]
        labels = [f"{row.name} ({table.rate(row):,.0f} tok/s)" for row in rows]
        panel.barh(labels, middles, xerr=spans, color=colours, error_kw={"elinewidth": 1})
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_title(table.title, fontsize=10)
        panel.tick_params(labelsize=8)
        panel.set_xlabel(f"speed relative to {rows[-1].name}", fontsize=8)
    figure.savefig(path, dpi=120)
