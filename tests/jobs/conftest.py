"""A module of jobs as a user writes one, and options of a training run that takes a second."""

from __future__ import annotations

from pathlib import Path

import pytest

MODULE = '''
from dataclasses import dataclass
from tinytron.config import configure, field
from tinytron.job import BasicJob
from tinytron.registry import job
from tinytron.training import Trainer


@dataclass
class MyConfig:
    my_loss_weight: float = field("training/my_loss_weight", default=0.1, help="weight of my loss")


@job("my_model/train/pretrain")
class Mine(Trainer):
    """Train my model."""

    CONFIG = MyConfig

    def _init_model(self, config):
        super()._init_model(config)
        self._say(f"weight {configure(MyConfig).my_loss_weight}")


@dataclass
class SayConfig:
    text: str = field("say/text")
    fail_once: str = field("say/fail_once", default="")


@job("say/text")
class Say(BasicJob):
    """Write a text."""

    CONFIG = SayConfig

    def run(self):
        file = self.spec.folder / "text"
        if self.config.fail_once and not file.exists():
            file.write_text("half")
            raise SystemExit(3)
        file.write_text(self.config.text)
        print("said", self.config.text, flush=True)
'''
TINY = (
    *(
        "train.precision=fp32",
        "train.max_steps=3",
        "train.seq_len=12",
        "train.batch_size=2",
        "train.total_batch_size=48",
    ),
    *("model.num_layer=1", "architecture.n_head=2", "model.hidden_size=16", "model.intermediate_size=24"),
    *("model.vocab_size=61", "model.init_std=0.1", "logging.log_every=1", "data.mock_data_num_samples=32"),
)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with jobs, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "module_with_jobs.py").write_text(MODULE)
    return "module_with_jobs.py"
