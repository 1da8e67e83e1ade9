"""Find the tokens that two runs sent to different experts.

python scripts/compare_routes.py RUN_FOLDER OTHER_RUN_FOLDER

Both runs must use --moe_route_trace. Their layouts may differ; then give each run its own --log_dir, because the layout is
not part of a run folder's name. Tokens are matched by step, layer, row of the global batch and position; tokens that only
one run traced (because of another micro-batch size or interval) are left out. For each layer, the script prints the number
of flips (tokens whose set of experts differs) and the largest margin of a flipped token in either run. Exit status: 0
without flips, 1 with flips, 2 if the runs cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tinytron.cli import entry
from tinytron.errors import DataError
from tinytron.metrics.routing import ROUTES


class Place(NamedTuple):
    """The decision that a line of the trace describes."""

    step: int
    layer: int
    row: int
    position: int


class Decision(NamedTuple):
    """A routing decision for one token."""

    token: int
    experts: frozenset[int]
    margin: float


def read_routes(folder: Path) -> dict[Place, Decision]:
    """The traces of all ranks. Raises: DataError if there are none, or if a line is damaged or occurs twice."""
    paths = sorted(folder.glob(ROUTES.format("*")))
    if not paths:
        raise DataError(f"{folder} has no {ROUTES.format('*')}; give the folder of a run made with --moe_route_trace")
    routes: dict[Place, Decision] = {}
    for path in paths:
        with open(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    fields = json.loads(line)
                    place = Place(*(fields[name] for name in Place._fields))
                    decision = Decision(fields["token"], frozenset(fields["experts"]), float(fields["margin"]))
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}, line {number} is incomplete; resume the run to repair it") from error
                if place in routes:
                    raise DataError(f"{path}, line {number}: {place} occurs twice; use the folder of a single run")
                routes[place] = decision
    return routes


def compare(one: dict[Place, Decision], other: dict[Place, Decision]) -> tuple[list[str], int]:
    """The lines of a report, and the number of flips. Raises: DataError if the runs have no decision in common, or
    different tokens at the same place."""
    common = sorted(one.keys() & other.keys())
    if not common:
        raise DataError(
            "the traces have no step, layer, row and position in common; compare runs that report the same steps"
        )
    for place in common:
        if one[place].token != other[place].token:
            raise DataError(
                f"{place} is token {one[place].token} in one run and {other[place].token} in the other; "
                "compare runs on the same data and seed"
            )
    flips = [place for place in common if one[place].experts != other[place].experts]
    lines = [f"{len(common)} decisions compared; in one run only: {len(one.keys() ^ other.keys())}"]
    for layer in sorted({place.layer for place in common}):
        compared, flipped = ([p for p in places if p.layer == layer] for places in (common, flips))
        text = f"layer {layer}: {len(flipped)} of {len(compared)} tokens flipped"
        if flipped:
            largest = max(max(one[p].margin, other[p].margin) for p in flipped)
            text += f", largest margin {largest:.3e}, first in step {flipped[0].step}"
        lines.append(text)
    return lines, len(flips)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the runs in two folders, print the report, and set the exit status."""
    parser = argparse.ArgumentParser(description="compare the experts that two runs chose for the same tokens")
    parser.add_argument("folders", nargs=2, type=Path, metavar="RUN_FOLDER")
    one, other = (read_routes(folder) for folder in parser.parse_args(arguments).folders)
    lines, flips = compare(one, other)
    print("\n".join(lines))
    if flips:
        sys.exit(1)


if __name__ == "__main__":
    entry.run(main)
