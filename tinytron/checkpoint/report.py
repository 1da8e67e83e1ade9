"""Reports on a run folder and on a checkpoint, as data and as tables."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tinytron.checkpoint.files import CheckpointFiles, bytes_of, leftovers
from tinytron.checkpoint.load import read_file, read_meta
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.checkpoint.optimizer_state import state_of, stored_states
from tinytron.errors import CheckpointError
from tinytron.utils.texts import table


@dataclass(frozen=True)
class Summary:
    """One line about a checkpoint. Bytes are measured on disk; ``None`` means that the metadata is unreadable or older
    than the field."""

    step: int
    status: str  # "complete", or a description of the damage
    tokens: int | None
    val_loss: float | None
    bytes_weights: int
    bytes_states: int
    bytes_total: int
    parameters: int | None
    bytes_per_parameter: float | None
    saved: str | None  # local time
    world_size: int | None


def summarize(files: CheckpointFiles) -> Summary:
    """The summary of a checkpoint, as far as a damaged one can be read."""
    missing = [path.name for path in files.parts if not path.exists()]
    status = "complete" if files.complete else "incomplete"
    meta = CheckpointMeta()
    if missing:
        status += f": {', '.join(missing)} missing"
    try:
        meta = read_meta(files.meta)
    except CheckpointError as error:
        status = status if files.meta.name in missing else f"unreadable: {error}"
    parameters = sum(math.prod(shape) for shape in meta.parameters.values()) or None
    total = bytes_of(files.parts)
    return Summary(
        step=files.step,
        status=status,
        tokens=meta.data_position.get("tokens"),
        val_loss=meta.val_loss,
        bytes_weights=bytes_of([files.model]),
        bytes_states=bytes_of([files.optimizer]),
        bytes_total=total,
        parameters=parameters,
        bytes_per_parameter=total / parameters if parameters else None,
        saved=time.strftime("%Y-%m-%d %H:%M", time.localtime(files.meta.stat().st_mtime))
        if files.meta.exists()
        else None,
        world_size=meta.run.get("world_size"),
    )


def folder_report(folder: Path, found: Sequence[CheckpointFiles]) -> dict[str, Any]:
    """Summaries of the checkpoints ``found`` in ``folder``, and the leftovers of interrupted saves."""
    left = [{"name": path.name, "bytes": bytes_of([path])} for path in leftovers(folder)]
    return {"folder": str(folder), "checkpoints": [asdict(summarize(files)) for files in found], "leftovers": left}


def checkpoint_report(files: CheckpointFiles) -> dict[str, Any]:
    """Everything about one checkpoint. Raises: CheckpointError if a part is missing or cannot be read."""
    meta = read_meta(files.meta)
    run, config = meta.run, meta.run.get("config", {})
    parallel = config.get("parallel", {})
    return {
        "folder": str(files.folder),
        **asdict(summarize(files)),
        "format": meta.format,
        "git": run.get("git"),
        "versions": run.get("versions", {}),
        "command": run.get("command", []),
        "best_metric": meta.best_metric,
        "data": meta.data,
        "optimizer": config.get("optim", {}).get("optimizer"),
        "precision": config.get("train", {}).get("precision"),
        "layout": {key: parallel.get(key) for key in ("sep_size", "ep_size", "use_distributed_optimizer")},
        "tensors": _tensors(files),
    }


def states_by_parameter(files: CheckpointFiles) -> dict[str, dict[str, Any]]:
    """Storage metadata of every state, as parameter -> key -> entry. Raises: CheckpointError if the folder of states is
    damaged."""
    found: dict[str, dict[str, Any]] = {}
    for key, entry in stored_states(files.optimizer).items():
        parameter, state = key.rsplit("/", 1)
        found.setdefault(parameter, {})[state] = entry
    return found


def _tensors(files: CheckpointFiles) -> list[dict[str, Any]]:
    states = states_by_parameter(files)
    tensors = []
    places: dict[int, str] = {}
    for name, weight in read_file(files.model, mmap=True).items():
        shape = tuple(weight.shape)
        first = places.setdefault(weight.data_ptr(), name)
        entries = {
            state_of(key, shape)[0]: _dtype(entry.properties.dtype) for key, entry in states.get(name, {}).items()
        }
        tensors.append(
            {
                "name": name,
                "shape": list(shape),
                "dtype": _dtype(weight.dtype),
                "tied_to": None if first == name else first,
                "states": entries,
            }
        )
    return tensors


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Text output.


def show_folder(report: dict[str, Any]) -> str:
    """``folder_report`` as text: one line per checkpoint and per leftover."""
    title = ("step", "tokens", "val loss", "weights", "states", "total", "B/param", "saved", "ranks", "status")
    rows = [
        (
            str(c["step"]),
            _number(c["tokens"], ","),
            _number(c["val_loss"], ".4f"),
            _size(c["bytes_weights"]),
            _size(c["bytes_states"]),
            _size(c["bytes_total"]),
            _number(c["bytes_per_parameter"], ".1f"),
            c["saved"] or "-",
            _number(c["world_size"], "d"),
            c["status"],
        )
        for c in report["checkpoints"]
    ]
    lines = [report["folder"], *table([title, *rows], right=range(9))]
    if report["leftovers"]:
        lines += ["", "left by interrupted saves, or part of a save in progress:"]
        lines += table([(left["name"], _size(left["bytes"])) for left in report["leftovers"]], right=[1])
    return "\n".join(lines)


def show_checkpoint(report: dict[str, Any]) -> str:
    """``checkpoint_report`` as text. Tensors whose names differ only in one number share a line."""
    layout, versions = report["layout"], report["versions"]
    best = [("best metric", f"{b['name']} {_number(b['value'], '.4f')}")] if (b := report["best_metric"]) else []
    zero = "sharded" if layout["use_distributed_optimizer"] else "not sharded"
    facts = [
        ("status", report["status"]),
        ("saved", f"{report['saved']}, format {report['format']}"),
        ("tokens", _number(report["tokens"], ",")),
        ("val loss", _number(report["val_loss"], ".4f")),
        *best,
        (
            "size",
            f"{_size(report['bytes_weights'])} weights + {_size(report['bytes_states'])} states, "
            f"{_size(report['bytes_total'])} total, {_number(report['bytes_per_parameter'], '.1f')} bytes per parameter",
        ),
        ("layout", f"{report['world_size']} ranks, sep {layout['sep_size']}, ep {layout['ep_size']}, states {zero}"),
        ("training", f"{report['optimizer']} in {report['precision']}, data {report['data']}"),
        ("code", f"{report['git']}; {', '.join(f'{name} {version}' for name, version in versions.items())}"),
        ("command", " ".join(report["command"])),
    ]
    lines = [f"checkpoint {report['step']} of {report['folder']}", *table(facts), ""]
    count = _number(report["parameters"], ",")
    return "\n".join(
        [*lines, *_tensor_table(report["tensors"]), f"{len(report['tensors'])} tensors, {count} parameters"]
    )


def _tensor_table(tensors: Sequence[dict[str, Any]]) -> list[str]:
    counts: dict[tuple[str, ...], int] = {}
    for tensor in tensors:
        kinds = ", ".join(dict.fromkeys(tensor["states"].values()))
        states = f"{' '.join(tensor['states'])} ({kinds})" if kinds else "-"
        if tensor["tied_to"]:
            states = f"tied to {tensor['tied_to']}"
        name = re.sub(r"\.\d+\.", ".*.", tensor["name"], count=1)
        row = (name, "x".join(str(size) for size in tensor["shape"]), tensor["dtype"], states)
        counts[row] = counts.get(row, 0) + 1
    rows = [(row[0], str(count), *row[1:]) for row, count in counts.items()]
    return table([("tensor", "count", "shape", "dtype", "states"), *rows], right=[1, 2])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
