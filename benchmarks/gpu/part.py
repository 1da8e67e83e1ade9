"""What every part shares: its arguments, the sizes it runs at, and the result that it writes while it measures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from gpu import stand_in
from gpu.pool import LEFT_OUT_STATUS
from gpu.sizes import TOY, Sizes, choose_sizes
from tinytron.utils.training import write_atomically

RESULT = "result.json"


@dataclass
class Result:
    """The figures, checks and tables of one part, saved after each, so that a part that is cut short leaves what it has.

    ``figures``: numbers by name (``speed.dense128.mfu``), compared with targets.py. ``problems``: by the name of a check,
    what is wrong, or an empty text. ``tables``: Markdown for the report.
    """

    folder: Path
    figures: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    def figure(self, name: str, value: float) -> None:
        """Keep one number."""
        self.figures[name] = float(value)
        self.save()

    def check(self, name: str, problem: str = "") -> None:
        """Keep the outcome of a check: right, or what is wrong."""
        self.problems[name] = problem
        self.save()

    def note(self, text: str) -> None:
        """Keep a line for the report, and print it."""
        print(text, flush=True)
        self.notes.append(text)
        self.save()

    def table(self, lines: list[str]) -> None:
        """Keep a Markdown table, and print it."""
        print("\n".join(lines), flush=True)
        self.tables += [*lines, ""]
        self.save()

    def save(self) -> None:
        """Write all of it."""
        content = {name: value for name, value in asdict(self).items() if name != "folder"}
        text = json.dumps(content, indent=2)
        write_atomically(self.folder / RESULT, lambda file: file.write(text.encode()))


@dataclass(frozen=True)
class Context:
    """Where a part runs, how large, and where its result goes. ``others``: the folder with the results of all parts."""

    device: torch.device
    sizes: Sizes
    rehearsing: bool
    result: Result
    others: Path

    @property
    def out(self) -> Path:
        """The part's own folder."""
        return self.result.folder

    def leave_out(self, reason: str) -> NoReturn:
        """End this part: it cannot run here. The next call tries again."""
        self.result.note(reason)
        raise SystemExit(LEFT_OUT_STATUS)

    def figure_of(self, part: str, name: str) -> float | None:
        """A figure that an earlier part found, or ``None``."""
        path = self.others / part / RESULT
        value: float | None = json.loads(path.read_text())["figures"].get(name) if path.exists() else None
        return value


def run(
    body: Callable[[Context, argparse.Namespace], None], doc: str | None, *options: tuple[str, tuple[str, ...]]
) -> None:
    """The ``main`` of a part: ``options`` are flags of its own with their choices. With ``--rehearse`` the part runs at toy
    sizes on the CPU, with stand-ins for torch.cuda."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of this part's result")
    parser.add_argument("--others", type=Path, help="folder that holds the results of earlier parts by name")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    for name, choices in options:
        parser.add_argument(f"--{name}", choices=choices, required=True)
    args = parser.parse_args()
    if args.rehearse:
        stand_in.install()
        torch.compile = _uncompiled
        device, sizes = stand_in.CPU, TOY
    else:
        device = torch.device("cuda", 0)
        sizes = sizes_of_this_gpu()
    args.out.mkdir(parents=True, exist_ok=True)
    context = Context(device, sizes, args.rehearse, Result(args.out), args.others or args.out.parent)
    context.result.save()
    torch.set_float32_matmul_precision("high")  # TF32, as training has it without --disable_tf32
    body(context, args)


def _uncompiled(function: Any = None, **_: Any) -> Any:
    """In place of torch.compile in a rehearsal, where compilation would take most of the time."""
    return function if function is not None else _uncompiled


def sizes_of_this_gpu() -> Sizes:
    """What fits on the first GPU. Raises: SystemExit without one."""
    if not torch.cuda.is_available():
        raise SystemExit(f"error: torch {torch.__version__} sees no CUDA device; use --rehearse on a CPU")
    properties = torch.cuda.get_device_properties(0)
    return choose_sizes(properties.total_memory, (properties.major, properties.minor))
