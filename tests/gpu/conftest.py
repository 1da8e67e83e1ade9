"""Fixtures of the gpu tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu.device import own_process_state, stand_ins


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has the GPU, or its stand-ins, and leaves the process as it was."""
    with stand_ins(monkeypatch), own_process_state():
        yield
