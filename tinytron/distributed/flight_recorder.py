"""torch's flight recorder: the last collectives of this process, to find the rank that called another one, or none."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

# Environment variables that have torch record the last 2,000 collectives, if they are set before the process group is
# made. The second one is that of torch before 2.9.
VARIABLES = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"}


def write_collectives(path: Path) -> str:
    """Write the recorded collectives to ``path``, as JSON; returns a clause about it. Waits for no rank and no
    device."""
    try:
        # Private, but torch has no public function for it (torch 2.13).
        from torch._C._distributed_c10d import _dump_fr_trace_json as dump  # type: ignore[attr-defined]

        content = dump(includeCollectives=True, onlyActive=False) if dist.is_initialized() else b"{}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    except Exception as error:  # a diagnosis must not end the run
        return f"; collectives could not be written ({error})"
    return f"; collectives: {path}"
