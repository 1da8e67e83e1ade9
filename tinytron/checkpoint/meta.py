"""The record of a checkpoint: everything in it that is neither weights nor optimizer states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """Content of ``<step>_meta.pt``, in plain types and tensors.

    The run fills in the first block, the snapshot the second, and the writer ``files`` and ``rng`` when every other file is
    on disk. A field that a file of an older version lacks has its default.
    """

    format: int | None = None  # None: no metadata of ours
    run: dict[str, Any] = field(default_factory=dict)  # configuration, world size, command, versions
    identity: dict[str, Any] = field(default_factory=dict)  # values by "section.name"; see Config.identity
    data: str | None = None  # identity of the data before this step
    data_position: dict[str, int] = field(default_factory=dict)  # in steps, samples and tokens
    val_loss: float | None = None  # of this very step, in nats per token
    guard: dict[str, Any] = field(default_factory=dict)  # the spike detector's window; empty without one
    step: int | None = None  # completed optimizer steps

    optimizer: str | None = None  # its class
    counters: dict[str, Any] = field(default_factory=dict)  # of the optimizer
    parameters: dict[str, list[int]] = field(default_factory=dict)  # global shapes of the trained ones, by name

    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # size and SHA-256, by path in the folder
    rng: list[dict[str, Any]] = field(default_factory=list)  # generator states, by rank

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CheckpointMeta:
        """The record that ``as_dict`` gave; keys of a later version are left out."""
        return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})

    def as_dict(self) -> dict[str, Any]:
        """The record as it is stored."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
