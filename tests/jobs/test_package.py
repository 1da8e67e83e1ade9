"""A package outside the repository: a job, a model with options of its own, a dataset and an evaluation, by ``--load``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.corpus import make_texts
from tests.helpers.runs import losses, read_logs
from tinytron.cli.main import main
from tinytron.jobs.specs import read_stages
from tinytron.quick import quick
from tinytron.registry import load_module

pytest.importorskip("omegaconf")
PACKAGE = '''
import torch
import torch.nn as nn

from tinytron.config import field
from tinytron.model.models import LanguageModel
from tinytron.registry import dataset, evaluation, job
from tinytron.text.named import NamedDataset
from tinytron.training.base import BaseTrainer, BaseTrainerConfig


@dataset("their-texts")
class TheirTexts(NamedDataset):
    """Texts of theirs."""

    path = "{folder}"


class TheirModel(LanguageModel):
    their_scale: float = field("model/their_scale", default=0.5)

    def __init__(self, *, vocab_size, hidden_size, their_scale):
        super().__init__(vocab_size=vocab_size, hidden_size=hidden_size)
        self.layer, self.their_scale = nn.Linear(hidden_size, hidden_size), their_scale

    def body(self, x_BSD):
        return x_BSD + self.their_scale * torch.tanh(self.layer(x_BSD))


@job("their_model/train/pretrain")
class PretrainTheirs(BaseTrainer[BaseTrainerConfig, TheirModel]):
    """Pre-train their model."""

    MODEL = TheirModel


@evaluation("their-evaluation")
def their_evaluation(trainer):
    return {{"scale": trainer.raw_model.their_scale, "parameters": sum(p.numel() for p in trainer.raw_model.parameters())}}


@evaluation("their-mistake")
def their_mistake(trainer):
    return 0.5
'''


def test_all_four_are_found_by_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(60)))
    (tmp_path / "theirs.py").write_text(PACKAGE.format(folder=tmp_path / "texts.jsonl"))
    load = ("--load", "theirs.py")
    main(["jobs", *load])
    assert "their_model/train/pretrain         pre-train their model" in capsys.readouterr().out.lower()
    words = ("data.name=their-texts", "tokenizer.backend=train_bpe", "tokenizer.name=300", "system.num_proc=1")
    assert main(["configure", "data/tokenize_variable_dataset", "tok.yaml", *load, *words]) == 0
    (spec,) = read_stages("tok", ["tok.yaml"], "out", load=["theirs.py"])
    with quick(spec.job, "out", "tok", config="tok.yaml") as j:
        j()
    sizes: tuple[str, ...] = (
        "architecture.n_head=2",
        "model.vocab_size=300",
        "model.hidden_size=16",
        "model.their_scale=0.25",
        "train.seq_len=12",
    )
    sizes += ("train.batch_size=2", "train.total_batch_size=48", "train.max_steps=3", "train.precision=fp32")
    more = ("data.dataset_path=out/data/their-texts", "eval.evaluations=[their-evaluation]", "logging.log_every=1")
    assert main(["configure", "their_model/train/pretrain", "run.yaml", *load, *sizes, *more]) == 0
    with quick("their_model/train/pretrain", "out", "run", config="run.yaml") as j:
        j()
    (folder,) = Path("out/checkpoints/general/default/run").glob("run_*")
    log, records = read_logs(folder)
    assert sorted(losses(log)) == [1, 2, 3]
    (scores,) = (record for record in records if record["stage"] == "eval")
    parameters = 300 * 16 + 16 + 16 * 16 + 16
    assert scores == {"step": 3, "stage": "eval", "task": "their-evaluation", "scale": 0.25, "parameters": parameters}
    with quick("their_model/train/pretrain", "out", "wrong", config="run.yaml") as j:
        j.config.eval.evaluations = ["their-mistake"]
        with pytest.raises(Exception, match="the evaluation their-mistake returned a float; return scores by name"):
            j()
    load_module("theirs.py")  # again: the same objects
