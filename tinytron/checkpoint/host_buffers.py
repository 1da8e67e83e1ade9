"""Host memory for the in-memory copy of a checkpoint."""

from __future__ import annotations

import torch


class HostBuffers:
    """Host buffers that are reused from save to save, because writing to fresh memory is slower than the copy itself.
    Buffers for GPU tensors are pinned, which makes the copies asynchronous. Together they are as large as this rank's part
    of a checkpoint."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copy ``tensor`` into the buffer of ``key``, valid until the next copy under that key. The copy of a GPU tensor is
        complete only after the device is synchronized."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)
