"""Runs evaluations one after another, and shows and writes their results: for the command and the jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinytron.evaluation.kinds import Evaluation, Result
from tinytron.evaluation.subject import Subject
from tinytron.utils.progress import Progress
from tinytron.utils.texts import table
from tinytron.utils.training import write_atomically

RESULTS = "results.json"


def run_one(evaluation: Evaluation, subject: Subject) -> Result:
    """The result of a prepared evaluation; its progress is shown by the first rank. Collective, as ``Subject``."""
    alone = subject.state is None or subject.state.layout.world_size == 1
    shown = subject.state is None or subject.state.is_master
    total = evaluation.work if alone else None
    with Progress(f"evaluating {evaluation.name}", total, "row", shown=shown) as progress:
        return evaluation.evaluate(replace(subject, advance=progress.update))


def run_all(evaluations: Sequence[Evaluation], subject: Subject) -> dict[str, dict[str, Any]]:
    """The numbers of every prepared evaluation by its name, with the ``seconds`` that it took. Collective."""
    found = {}
    for evaluation in evaluations:
        began = time.perf_counter()
        result = run_one(evaluation, subject)
        found[evaluation.name] = {**result.fields(), "seconds": round(time.perf_counter() - began, 3)}
    return found


def shown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the results of ``run_all``."""
    rows = [("evaluation", "score", "better", "items", "seconds")]
    for name, found in results.items():
        better = "higher" if found["higher_is_better"] else "lower"
        rows.append((name, f"{found['score']:.4f}", better, f"{found['count']:,}", f"{found['seconds']:.1f}"))
    return "\n".join(table(rows, right=(1, 3, 4)))


def write_results(file: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON. Raises: OSError."""
    write_atomically(file, lambda out: out.write(json.dumps(content, indent=2).encode() + b"\n"))
