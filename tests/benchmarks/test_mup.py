"""benchmarks/mup.py: with muP activations after a few steps do not depend on the width, without it they grow."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import ROOT


@pytest.fixture
def mup(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("mup")


def test_activations_are_of_one_size_at_every_width(mup: Any) -> None:
    sizes = {base: [mup.coordinates(width, base) for width in mup.WIDTHS] for base in (0, mup.BASE_WIDTH)}
    for name in ("attention", "residual stream", "logits"):
        last = [of_width[name][-1] for of_width in sizes[mup.BASE_WIDTH]]
        assert max(last) < 2 * min(last), f"{name} with muP: {last}"
    for name in ("residual stream", "logits"):
        last = [of_width[name][-1] for of_width in sizes[0]]
        assert last == sorted(last)
        assert last[-1] > 3 * last[0], f"{name} without muP: {last}"


def test_the_picture_is_drawn(mup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(mup, "WIDTHS", (64, 128))
    mup.draw(tmp_path / "made" / "mup.png")
    assert (tmp_path / "made" / "mup.png").stat().st_size > 10_000
