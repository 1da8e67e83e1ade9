"""Flat tensors whose ranges are spread over the ranks, for torch.distributed.checkpoint (DCP).

DCP stores a tensor as chunks with global offsets and reads back any ranges of it, so a state saved by 4 ranks loads on
1 or 8. On its own DCP knows the chunks of DTensors only; the planners below describe plain flat ranges to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tinytron.distributed.sharding import Run


@dataclass(frozen=True, eq=False)
class FlatRanges:
    """This rank's part of one logical tensor of ``numel`` elements: ``elements`` (1-D, not copied) holds the elements of
    ``runs``, one run after the other."""

    numel: int
    runs: tuple[Run, ...]
    elements: torch.Tensor

    @classmethod
    def whole(cls, elements: torch.Tensor) -> FlatRanges:
        """The ranges of a rank that owns the whole tensor; ``elements`` is 1-D."""
        return cls(len(elements), (Run(0, len(elements)),), elements)

    def chunks(self) -> list[ChunkStorageMetadata]:
        """The owned ranges in DCP's form."""
        return [ChunkStorageMetadata(torch.Size([run.offset]), torch.Size([run.length])) for run in self.runs]


def _by_index(ranges: dict[str, FlatRanges]) -> dict[MetadataIndex, torch.Tensor]:
    """The elements of every range, by the index that DCP uses to ask for them."""
    parts: dict[MetadataIndex, torch.Tensor] = {}
    for name, owned in ranges.items():
        elements = owned.elements.split([run.length for run in owned.runs])
        parts |= {MetadataIndex(name, c.offsets): part for c, part in zip(owned.chunks(), elements, strict=True)}
    return parts


class FlatSavePlanner(DefaultSavePlanner):
    """Plans the writing of ``ranges``, by name; DCP writes a range that several ranks own only once."""

    def __init__(self, ranges: dict[str, FlatRanges]) -> None:
        super().__init__(flatten_state_dict=False)
        self.ranges, self._parts = ranges, _by_index(ranges)

    def create_local_plan(self) -> SavePlan:
        """One write per owned range."""
        items = []
        for name, owned in self.ranges.items():
            properties = TensorProperties.create_from_tensor(owned.elements)
            for chunk in owned.chunks():
                data = TensorWriteData(chunk, properties, torch.Size([owned.numel]))
                items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """The owned elements of the tensor and range that ``index`` names."""
        return self._parts[index]


class FlatLoadPlanner(DefaultLoadPlanner):
    """Plans the reading into ``ranges``, by name."""

    def __init__(self, ranges: dict[str, FlatRanges]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.ranges, self._parts = ranges, _by_index(ranges)

    def create_local_plan(self) -> LoadPlan:
        """One read per stored chunk that overlaps an owned range."""
        assert self.metadata is not None, "DCP sets it before planning"
        entries: dict[str, Any] = self.metadata.state_dict_metadata
        return LoadPlan(
            [
                item
                for name, owned in self.ranges.items()
                for item in create_read_items_for_chunk_list(name, entries[name], owned.chunks())
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The memory of the owned range that ``index`` names."""
        return self._parts[index]
