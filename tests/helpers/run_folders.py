"""Run folders made by hand, for tests of what only reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>&amp;\u2028\x1b[31m\"'`<!--"


def records(steps: int, first: int = 1) -> list[dict[str, Any]]:
    """Training records as a run writes them, with a validation every ten steps."""
    found: list[dict[str, Any]] = []
    for step in range(first, first + steps):
        loss = 3 + 2 / step + 0.1 * math.sin(step)
        speed = {"tokens_per_second": 1000.0 + step, "mfu": 0.25, "skipped_steps": 0}
        found.append({"step": step, "loss": loss, "lr": 0.01 / step, "grad_norm": 1.5, "stage": "train", **speed})
        if step % 10 == 0:
            found.append(
                {"step": step, "stage": "val", "loss": loss + 0.1, "perplexity": math.exp(loss), "tokens": 640}
            )
    return found


def lines(entries: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def make_run(folder: Path, entries: Iterable[dict[str, Any]], max_steps: int = 100, **options: Any) -> Path:
    """A run folder with a log and a configuration; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text(lines(entries))
    train = {"max_steps": max_steps, "total_batch_size": 96, "seq_len": 12, **options}
    described = {"config": {"train": train, "logging": {"log_every": 1}}, "command": "tinytron pretrain"}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def experts(step: int, layers: int = 3) -> dict[str, Any]:
    """The load of four experts in each layer, as a record has it."""
    shares = [0.1, 0.2, 0.3, 0.4]
    entry = {"fractions": shares, "entropy": 0.9, "max_violation": 0.6, "dead": 0}
    return {"expert_load": [{"layer": layer, **entry} for layer in range(layers)], "step": step, "stage": "train"}
