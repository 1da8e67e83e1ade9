"""theseus' commands and snippets, in words of our own and with sizes shrunk by their own keys; README.md here lists them.

The experiment is added where that system's page puts it: a file below ``experiments``, and one line in the package. For
that, the package is copied.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.corpus import make_texts, write_jsonl
from tests.helpers.runs import ROOT, losses, read_logs
from tests.interop import families
from tinytron.jobs.options import JobOptions
from tinytron.quick import quick
from tinytron.registry import JOBS

pytest.importorskip("omegaconf")

SHRUNK = (
    *("training.per_device_batch_size=2", "training.batch_size=4", "architecture.block_size=12", "training.tokens=144"),
    *(
        "architecture.n_layers=1",
        "architecture.n_embd=16",
        "architecture.n_head=2",
        "architecture.dtype.activation=float32",
    ),
    *(
        "logging.report_interval=1",
        "model.intermediate_size=24",
        "data.mock_data_num_samples=32",
        "model.vocab_size=61",
    ),
)
MODEL = '''
import torch
import torch.nn as nn

from tinytron.config import field
from tinytron.model.models.base import LanguageModel


class MyModel(LanguageModel):
    """One layer that looks back by a running sum."""

    my_scale: float = field("architecture/my_scale", default=0.5)

    def __init__(self, *, vocab_size: int, hidden_size: int, my_scale: float) -> None:
        super().__init__(vocab_size=vocab_size, hidden_size=hidden_size)
        self.my_scale, self.layer = my_scale, nn.Linear(hidden_size, hidden_size)

    def body(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return x_BSD + self.my_scale * torch.tanh(self.layer(x_BSD.cumsum(1)))
'''
EXPERIMENT = """
from dataclasses import dataclass

import numpy as np

from tinytron.config import configure, field
from tinytron.model.models import MyModel
from tinytron.registry import job
from tinytron.training.base import BaseTrainer, BaseTrainerConfig


@job("my_model/train/pretrain")
class PretrainMyModel(BaseTrainer[BaseTrainerConfig, MyModel]):
    MODEL = MyModel
    CONFIG = BaseTrainerConfig

    @classmethod
    def schedule(cls):
        return "wsd"


@dataclass
class MyTrainerConfig(BaseTrainerConfig):
    my_loss_weight: float = field("training/my_loss_weight", default=0.1)


@job("my_model/train/signal")
class TrainOnSignal(BaseTrainer[MyTrainerConfig, MyModel]):
    MODEL = MyModel
    CONFIG = MyTrainerConfig

    def __init__(self, spec):
        super().__init__(spec)
        self.my_weight = configure(MyTrainerConfig).my_loss_weight

    @classmethod
    def schedule(cls):
        return "wsd"

    def batch(self, slice="train"):
        batch = super().batch(slice)
        batch["my_signal"] = np.tanh(batch["x"] / 61)
        return batch

    @staticmethod
    def forward(state, params, batch, key=None, deterministic=False, intermediates=False):
        logits, loss = state.apply_fn(
            {"params": params}, batch["x"], batch["y"], padding_mask=batch["padding_mask"], deterministic=deterministic
        )
        aux_loss = (logits.mean(2) - batch["my_signal"]).square().mean()
        return logits, loss + configure(MyTrainerConfig).my_loss_weight * aux_loss, {}
"""


def tinytron(*words: object, cwd: Path, package: Path = ROOT) -> str:
    """The output of a command that succeeds; ``NPROC=2`` processes where a job uses all of the machine."""
    env = {**os.environ, "PYTHONPATH": str(package), "NPROC": "2", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [sys.executable, "-m", "tinytron", *map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr + finished.stdout
    return finished.stdout


def test_tokenize_and_train_by_commands(tmp_path: Path) -> None:
    """The quick start: list, configure, run; a request for hardware is written to the file."""
    (tmp_path / "fineweb").mkdir()
    write_jsonl(tmp_path / "fineweb" / "texts.jsonl", make_texts(60))
    assert {"data/tokenize_variable_dataset", "gpt/train/pretrain"} <= {
        line.split()[0] for line in tinytron("jobs", cwd=tmp_path).splitlines()
    }
    tokenize = ("data.name=fineweb", "data.max_samples=1000000", "tokenizer.backend=train_bpe", "tokenizer.name=300")
    tinytron(
        "configure", "data/tokenize_variable_dataset", "tokenize.yaml", *tokenize, "system.num_proc=1", cwd=tmp_path
    )
    assert "token shards: output/data/fineweb" in tinytron(
        "run", "tokenize-fineweb", "tokenize.yaml", "output", cwd=tmp_path
    )
    data = ("data.dataset_path=output/data/fineweb", "model.vocab_size=300")
    words = (*SHRUNK, *data, "model.hidden_size=32")  # the README's own spelling of a size
    tinytron("configure", "gpt/train/pretrain", "train.yaml", "--chip", "h100", "-n", 8, *words, cwd=tmp_path)
    assert '"min_chips": 8' in (tmp_path / "train.yaml").read_text()
    tinytron("run", "my-gpt-run", "train.yaml", "./output", cwd=tmp_path)
    (folder,) = (tmp_path / "output/checkpoints/general/default/my-gpt-run").glob("my-gpt-run_*")
    assert sorted(losses(read_logs(folder)[0])) == [1, 2, 3]
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["model"]["hidden_size"] == 32
    assert "is finished" in tinytron("run", "my-gpt-run", "train.yaml", "./output", cwd=tmp_path)


def test_quick(tmp_path: Path) -> None:
    """Configure in Python, run here, and save for later."""
    assert "gpt/train/pretrain" in JOBS
    with quick("gpt/train/pretrain", str(tmp_path / "output"), "my-run") as j:
        j.options.override(SHRUNK)
        j.config.training.per_device_batch_size = 4
        j.config.logging.checkpoint_interval = 4096
        j.save(str(tmp_path / "config.yaml"), chip="h100", n_chips=8)
        assert j.config.train.batch_size == 4
    text = (tmp_path / "config.yaml").read_text()
    assert '"chip": "h100"' in text
    assert "save_every_steps: 4096" in text


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with a model and an experiment of one's own, and one line each in two ``__init__``."""
    root = tmp_path_factory.mktemp("fork")
    shutil.copytree(ROOT / "tinytron", root / "tinytron", ignore=shutil.ignore_patterns("__pycache__"))
    for folder, name, text, line in (
        ("model/models", "my_model", MODEL, "from tinytron.model.models.my_model import MyModel"),
        ("experiments", "models/my_model", EXPERIMENT, "from .models.my_model import PretrainMyModel"),
    ):
        (root / "tinytron" / folder / f"{name}.py").write_text(text)
        with (root / "tinytron" / folder / "__init__.py").open("a") as file:
            file.write(f"\n{line}  # noqa: F401\n")
    return root


@pytest.mark.slow
def test_an_experiment_of_three_lines(package: Path, tmp_path: Path) -> None:
    """It is listed, configured with its model's options and its schedule, and runs."""
    assert "my_model/train/pretrain" in tinytron("jobs", cwd=tmp_path, package=package)
    words = ("configure", "my_model/train/pretrain", "run.yaml", *SHRUNK)
    tinytron(*words, cwd=tmp_path, package=package)
    text = (tmp_path / "run.yaml").read_text()
    assert "my_scale: 0.5" in text
    assert 'lr_schedule: "wsd"' in text
    tinytron("run", "my-run", "run.yaml", "./output", cwd=tmp_path, package=package)
    (folder,) = (tmp_path / "output/checkpoints/general/default/my-run").glob("my-run_*")
    assert sorted(losses(read_logs(folder)[0])) == [1, 2, 3]


@pytest.mark.slow
def test_options_batch_and_forward_of_ones_own(package: Path, tmp_path: Path) -> None:
    """The weight of the auxiliary loss is an option, and the extra key of the batch changes the loss."""
    tinytron("configure", "my_model/train/signal", "run.yaml", *SHRUNK, cwd=tmp_path, package=package)
    assert "my_loss_weight: 0.1" in (tmp_path / "run.yaml").read_text()
    found = []
    for name, weight in (("with", 0.1), ("without", 0)):
        words = ("run", name, "run.yaml", "./output", f"training.my_loss_weight={weight}")
        tinytron(*words, cwd=tmp_path, package=package)
        (folder,) = (tmp_path / f"output/checkpoints/general/default/{name}").glob(f"{name}_*")
        found.append(losses(read_logs(folder)[0]))
    assert found[0][1] > found[1][1] + 1e-3


def test_a_backbone(tmp_path: Path) -> None:
    """Fine-tuning names the family and the weights instead of an architecture."""
    families.save("llama tied biased", tmp_path / "weights")
    job = JOBS["llama/train/finetune"]
    assert job.DEFAULTS["architecture.backbone.implementation"] == "llama"
    backbone = (f"architecture.backbone.weights={tmp_path / 'weights'}", "architecture.block_size=12")
    words = [word for word in SHRUNK if not word.startswith(("architecture.n_", "model.", "architecture.block"))]
    with quick("llama/train/finetune", str(tmp_path / "out"), "tuned") as j:
        j.options.override([*words, *backbone])
        j()
    (folder,) = (tmp_path / "out/checkpoints/general/default/tuned").glob("tuned_*")
    assert sorted(losses(read_logs(folder)[0])) == [1, 2, 3]
    options = JobOptions("qwen/train/finetune", type(j.create()))
    assert options.get("architecture.backbone.weights") is None
