"""The way of a batch onto a GPU; run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gpu.device import DEVICE, GPU_TEST, only_a_gpu_shows, sized
from tests.helpers.runs import TINY, config_of
from tinytron.data import write_shard
from tinytron.training import Trainer

pytestmark = GPU_TEST


def _shards(folder: Path) -> Path:
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(1, 61, 2001)
    tokens[::9] = 0
    write_shard(folder / "train_000000.bin", tokens)
    write_shard(folder / "train_000000.docs", np.arange(0, 2001, 9), np.uint32)
    return folder


def _trainer(folder: Path, *flags: object) -> Trainer:
    data = ("--no-use_mock_data", "--dataset_path", folder / "data", "--log_dir", folder / "log")
    return Trainer(config_of(*TINY, *data, "--max_steps", 3, "--debug", *flags))


def test_batches_are_pinned_before_they_are_sent(tmp_path: Path) -> None:
    _shards(tmp_path / "data")
    trainer = _trainer(tmp_path, "--document_mask")
    assert trainer.train_loader is not None
    batch = trainer.data.preparer.prepare(next(iter(trainer.train_loader)), trusted=True)
    sent = batch.to(trainer.device)
    assert sent.documents is not None
    assert {t.device.type for t in (sent.input_ids, sent.labels, sent.documents.cu_seqlens)} == {DEVICE.type}
    pinned = [tensor.is_pinned() for tensor in (batch.input_ids, batch.labels, batch.positions) if tensor is not None]
    only_a_gpu_shows("pinned memory")
    assert pinned == [True] * 3


@pytest.mark.parametrize("packing", sized(["best_fit", "concat"], ["best_fit"]))
def test_documents_train_alike_on_both_devices(tmp_path: Path, packing: str) -> None:
    _shards(tmp_path / "data")
    losses = []
    for backend in ("auto", "gloo"):  # gloo stays on the CPU
        exact = ("--disable_tf32", "--backend", backend)
        trainer = _trainer(tmp_path, "--document_mask", "--packing", packing, *exact)
        trainer.train()
        losses.append(trainer.one_step_results["loss"])
        torch.distributed.destroy_process_group()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
