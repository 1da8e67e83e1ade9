"""Every trainer of docs/posttraining.md in bf16 and compiled, compared with fp32 and eager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import losses
from tests.training import (
    test_contrastive,
    test_distillation,
    test_grpo,
    test_kl_divergence,
    test_lora,
    test_lora_phases,
)

Pools = Callable[[int], Ranks]


def dpo(folder: Path, name: str, *flags: object) -> dict[int, float]:
    return losses(test_contrastive.run(folder / name, *flags).log)


def kl(folder: Path, name: str, *flags: object) -> dict[int, float]:
    return losses(test_kl_divergence.run(folder / name, *flags).log)


def distill(folder: Path, name: str, *flags: object) -> dict[int, float]:
    return losses(test_distillation.run(folder / name, folder / "hf", *flags).log)


def grpo(folder: Path, name: str, *flags: object) -> dict[int, float]:
    return losses(test_grpo.run(folder, folder / name, *flags).log)


def lora(folder: Path, name: str, *flags: object) -> dict[int, float]:
    return test_lora.run(folder / "hf", folder / name, *test_lora.LORA, *flags)[1]


def phases(folder: Path, name: str, *flags: object) -> dict[int, float]:
    return losses(test_lora_phases.run(folder / name, *flags).log)


JOBS = (dpo, kl, distill, grpo, lora, phases)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a tokenizer, prompts and rewards."""
    return test_grpo.write_files(tmp_path, "llama")


@pytest.mark.parametrize("job", JOBS)
def test_bf16_begins_like_fp32(ranks: Pools, folder: Path, job: Any) -> None:
    """The first losses agree to bf16's precision; GRPO's answers may differ later on."""
    wide = ranks(1).run(job, folder, "wide", "--precision", "fp32")[0]
    narrow = ranks(1).run(job, folder, "narrow", "--precision", "bf16")[0]
    assert wide.keys() == narrow.keys()
    first = min(wide)
    assert narrow[first] == pytest.approx(wide[first], rel=0.03, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_compiled_is_like_eager(ranks: Pools, folder: Path, job: Any) -> None:
    eager = ranks(1).run(job, folder, "eager", "--precision", "fp32")[0]
    compiled = ranks(1).run(job, folder, "compiled", "--precision", "fp32", "--use_compile", timeout=600)[0]
    assert list(compiled.values()) == pytest.approx(list(eager.values()), rel=1e-4, abs=1e-5)
