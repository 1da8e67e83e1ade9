"""Options that a trainer and its model declare, next to those of every run."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch.nn as nn

from tests.jobs.conftest import TINY
from tinytron.config import configuration, configure, field, nested
from tinytron.errors import CheckpointError, ConfigError
from tinytron.job import JobSpec
from tinytron.jobs.checkpoints import find_checkpoint
from tinytron.jobs.options import JobOptions
from tinytron.jobs.training import OWN, TrainingJob
from tinytron.training import Trainer


@dataclass
class Declared:
    length: int = field("train/seq_len")  # of every run: read here, too
    rate: float = field("optim/max_lr")
    names: list[list[int]] = field("training/names", default_factory=lambda: [[1], [2]])
    table: dict[str, int] = field("training/table", default_factory=dict)


class Block(nn.Module):
    inner: int = field("model/inner", default=8)


class Model(nn.Module):
    depth: int = field("model/depth", default=2)

    @classmethod
    def components(cls) -> list[type]:
        return [Block]


class Mine(Trainer):
    CONFIG = Declared
    MODEL = Model


JOB = TrainingJob.of(Mine)


def _job(*words: str) -> TrainingJob:
    options = JobOptions("mine", JOB)
    options.override([*TINY, *words])
    return JOB(JobSpec("mine", "m", "out", options.values()))


def test_a_declared_option_of_a_run_is_the_run_s() -> None:
    job = _job("training.table={b: 1, a: 2}", "model.inner=4")
    config = job.config_of_run()
    assert config.train.seq_len == 12
    with configuration(nested(job.spec.values)):
        assert configure(Declared).length == 12
    own = config.further[OWN]
    assert (own.training_names, own.training_table) == (((1,), (2,)), '{"a": 2, "b": 1}')
    assert (own.model_depth, own.model_inner) == (2, 4)
    assert not hasattr(own, "train_seq_len")
    assert hash(own) != hash(_job("model.inner=5").config_of_run().further[OWN])


@pytest.mark.parametrize("relative", ["", "/", "a//b", "../x", "a/.."])
def test_a_malformed_restore(relative: str) -> None:
    with pytest.raises(CheckpointError, match="must be NAME or NAME/CHECKPOINT, such as my-run/best"):
        find_checkpoint("out", relative)


def test_another_default_for_an_option_of_a_run_is_refused() -> None:
    @dataclass
    class Other:
        length: int = field("train/seq_len", default=5)

    class Theirs(Trainer):
        CONFIG = Other

    with pytest.raises(ConfigError, match=r"train\.seq_len has two defaults: .* in TrainingConfig and 5 in Other"):
        JobOptions("theirs", TrainingJob.of(Theirs))
