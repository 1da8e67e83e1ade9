"""Checkpoint metadata: everything in a checkpoint except weights and optimizer states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """Content of ``<step>_meta.pt``, in plain types and tensors.

    The run fills in the first block and the snapshot the second. The writer fills in ``files`` and ``rng`` once every
    other file is on disk. A field that is missing from an older file keeps its default.
    """

    format: int | None = None  # None: Tinytron did not write this metadata
    run: dict[str, Any] = field(default_factory=dict)  # configuration, world size, command, versions
    identity: dict[str, Any] = field(default_factory=dict)  # values by "section.name"; see Config.identity
    data: str | None = None  # fingerprint of the data that was used before this step
    data_position: dict[str, int] = field(default_factory=dict)  # in steps, samples and tokens
    skips: list[list[int]] = field(default_factory=list)  # sequences passed over before steps (utils.batch_sizes.Skips)
    val_loss: float | None = None  # validation loss at this step, in nats per token
    best_metric: dict[str, Any] = field(
        default_factory=dict
    )  # name, value, higher_is_better; empty: the validation loss
    guard: dict[str, Any] = field(default_factory=dict)  # the spike detector's window; empty without a detector
    step: int | None = None  # completed optimizer steps

    optimizer: str | None = None  # class name
    counters: dict[str, Any] = field(default_factory=dict)  # the optimizer's counters
    parameters: dict[str, list[int]] = field(default_factory=dict)  # global shape of each trained parameter, by name

    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # size and SHA-256, by path in the folder
    rng: list[dict[str, Any]] = field(default_factory=list)  # generator states, by rank

    @property
    def cost(self) -> float | None:
        """The number that is lowest for the best checkpoint: its validation loss, or the value of ``--best_metric``,
        negative if higher is better; ``None`` if it is not known."""
        if not self.best_metric:
            return self.val_loss
        value = self.best_metric["value"]
        return -value if value is not None and self.best_metric["higher_is_better"] else value

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CheckpointMeta:
        """Rebuild the record from the output of ``as_dict``; unknown keys, from a later version, are dropped."""
        return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})

    def as_dict(self) -> dict[str, Any]:
        """The record as a dictionary, as it is stored."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
