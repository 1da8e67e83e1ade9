"""Host memory that copies of a checkpoint go to."""

from __future__ import annotations

import torch


class HostBuffers:
    """Host memory kept from save to save: writing to fresh memory is slower than the copy itself. Pinned for GPUs, whose
    copies are asynchronous then. It holds as much as this rank's part of a checkpoint."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor`` that is valid until the next copy under the same key; on a GPU once it is synchronized."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)
