"""A module base class that compiles single methods in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn


class CompilesMethods(nn.Module):
    """A module whose methods can be compiled one by one. Copies and unpickled modules are not compiled, as with
    ``nn.Module.compile``."""

    compiled_methods: tuple[str, ...] = ()

    def compile_methods(self, *names: str, dynamic: bool | None = None) -> None:
        """Compile the methods ``names`` of this module; with ``dynamic``, for any sizes, starting with the first call."""
        for name in names:
            setattr(self, name, torch.compile(getattr(self, name), dynamic=dynamic))
        self.compiled_methods += names

    def __getstate__(self) -> dict[str, Any]:
        # A compiled method is bound to this module, so in a copy it would compute with this module's weights.
        state: dict[str, Any] = super().__getstate__()
        return {k: v for k, v in state.items() if k not in (*self.compiled_methods, "compiled_methods")}
