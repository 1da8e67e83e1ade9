"""Flat tensors of which each rank owns one range, for torch.distributed.checkpoint (DCP).

DCP stores a tensor as chunks with global offsets and reads any ranges of it back, so a state saved by 4 ranks loads on
1 or 8. The planners below tell it the chunks of plain flat ranges, which it knows only of DTensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass(frozen=True, eq=False)
class FlatRange:
    """One logical tensor of ``numel`` elements, of which this rank owns ``elements`` (1-D, not copied) from ``offset``
    on."""

    numel: int
    offset: int
    elements: torch.Tensor

    def chunk(self) -> ChunkStorageMetadata:
        """The owned range as DCP describes it."""
        return ChunkStorageMetadata(torch.Size([self.offset]), torch.Size([len(self.elements)]))


class FlatSavePlanner(DefaultSavePlanner):
    """Plans the writing of ``ranges`` by name; equal ranges of several ranks are written once."""

    def __init__(self, ranges: dict[str, FlatRange]) -> None:
        super().__init__(flatten_state_dict=False)
        self.ranges = ranges

    def create_local_plan(self) -> SavePlan:
        """One write per owned range."""
        items = []
        for name, owned in self.ranges.items():
            chunk = owned.chunk()
            properties = TensorProperties.create_from_tensor(owned.elements)
            data = TensorWriteData(chunk, properties, torch.Size([owned.numel]))
            items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """The owned elements of the tensor ``index`` names."""
        return self.ranges[index.fqn].elements


class FlatLoadPlanner(DefaultLoadPlanner):
    """Plans the reading into ``ranges`` by name."""

    def __init__(self, ranges: dict[str, FlatRange]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.ranges = ranges

    def create_local_plan(self) -> LoadPlan:
        """One read per stored chunk that overlaps an owned range."""
        assert self.metadata is not None, "set by DCP before planning"
        entries: dict[str, Any] = self.metadata.state_dict_metadata
        return LoadPlan(
            [
                item
                for name, owned in self.ranges.items()
                for item in create_read_items_for_chunk_list(name, entries[name], [owned.chunk()])
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The memory of the owned range that ``index`` names."""
        return self.ranges[index.fqn].elements
