"""Host memory for what a save copies from the device."""

from __future__ import annotations

import torch


class HostBuffers:
    """Host memory for copies, kept from save to save: new memory is slower to write than to copy (pinned for GPUs, whose
    copies it makes asynchronous). It costs as much as a checkpoint holds of this rank."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor`` that is valid until the next copy under the same key; on a GPU once it is synchronised."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)
