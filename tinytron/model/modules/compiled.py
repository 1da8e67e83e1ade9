"""Methods of a module compiled in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn


class CompilesMethods(nn.Module):
    """A module of which single methods can be compiled. A copy of it is not compiled, and neither is what is unpickled: as
    with ``nn.Module.compile``."""

    compiled_methods: tuple[str, ...] = ()

    def compile_methods(self, *names: str, dynamic: bool | None = None) -> None:
        """Compile the methods ``names`` of this module; ``dynamic``: for any sizes from the first call on."""
        for name in names:
            setattr(self, name, torch.compile(getattr(self, name), dynamic=dynamic))
        self.compiled_methods += names

    def __getstate__(self) -> dict[str, Any]:
        # A compiled method is bound to this module: in a copy it would compute with this one's weights.
        state: dict[str, Any] = super().__getstate__()
        return {k: v for k, v in state.items() if k not in (*self.compiled_methods, "compiled_methods")}
