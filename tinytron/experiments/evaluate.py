"""Jobs that evaluate a trained model by named evaluations, on all GPUs of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from tinytron.config import field
from tinytron.distributed.agreement import agree, agree_slowly
from tinytron.errors import ConfigError
from tinytron.evaluation.kinds import Evaluation
from tinytron.evaluation.named import find_evaluations
from tinytron.evaluation.report import RESULTS, run_all, shown, write_results
from tinytron.evaluation.subject import Subject
from tinytron.interop.open import local_checkpoint, open_model
from tinytron.job import BasicJob
from tinytron.jobs.checkpoints import find_checkpoint
from tinytron.registry import job
from tinytron.text.run_tokenizer import tokenizer_of_run
from tinytron.training import Config
from tinytron.training.backbone import check_family
from tinytron.training.config import TrainingConfig
from tinytron.training.world import join_world, place_in_world
from tinytron.utils.training import DTYPES


@dataclass
class EvaluateConfig:
    """The evaluations, and how they run."""

    evaluations: tuple[str, ...] = field(
        "eval/evaluations", help="names of evaluations (tinytron jobs --evaluations), or files of multiple-choice items"
    )
    length: int = field("eval/length", default=-1, help="number of items of each; -1: all")
    data_dir: str | None = field(
        "eval/data_dir", default=None, help="folder with local data, such as mnli.jsonl; default: the hub"
    )
    tokenizer: str | None = field(
        "eval/tokenizer", default=None, help="a tokenizer.json; default: the one of the model"
    )
    batch_tokens: int = field("eval/batch_tokens", default=8192, help="tokens per forward pass, including padding")
    dtype: str | None = field("eval/dtype", default=None, help="fp32, bf16, ...; default: as stored")


@dataclass
class RunConfig(EvaluateConfig):
    """The options of ``gpt/evaluate``."""

    checkpoint: str | None = field(
        "eval/checkpoint", default=None, help="run folder or weights file; or use --restore NAME/best"
    )


@dataclass
class BackboneConfig(EvaluateConfig):
    """The options of ``backbone/evaluate``."""

    implementation: str | None = field(
        "architecture/backbone/implementation", default=None, help="family of the weights: llama, qwen, gpt_neox, ..."
    )
    checkpoint: str | None = field(
        "architecture/backbone/weights", default=None, help="folder, or name on the hub, of a model of Hugging Face"
    )


class EvaluateJob(BasicJob):
    """Evaluates a model that every process has as a whole; the processes share the items."""

    CONFIG: ClassVar[type] = EvaluateConfig
    all_processes = True

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations that the options name. Raises: ConfigError or DataError."""
        folder = None if self.config.data_dir is None else Path(self.config.data_dir).expanduser()
        return find_evaluations(self.config.evaluations, self.config.length, folder)

    def checkpoint(self) -> str:
        """The model. Raises: CheckpointError for a job that is not there."""
        if self.spec.restore is not None:
            return str(find_checkpoint(self.spec.root, self.spec.restore).model)
        return str(self.config.checkpoint)

    def check(self) -> None:
        """Check the options. Raises: ConfigError."""
        config, path = self.config, "eval.checkpoint"
        if isinstance(config, BackboneConfig):
            path = "architecture.backbone.weights"
        if (config.checkpoint is None) == (self.spec.restore is None):
            verb = "both name a model; leave one out" if config.checkpoint else "name no model; give one of them"
            raise ConfigError(f"{path} and restore {verb}")
        if not self.evaluations:
            raise ConfigError("eval.evaluations=[] evaluates nothing; name one, such as [arithmetic]")
        if config.length < -1 or config.length == 0:
            raise ConfigError(f"eval.length={config.length} must be at least 1, or -1 for all items")
        if config.batch_tokens < 1:
            raise ConfigError(f"eval.batch_tokens={config.batch_tokens} must be at least 1; use 8192")
        if config.dtype is not None and config.dtype not in DTYPES:
            raise ConfigError(f"eval.dtype={config.dtype} must be one of {', '.join(DTYPES)}")

    def run(self) -> None:
        """Evaluate, and write results.json into the job's folder. Collective."""
        config = self.config
        state = join_world(Config(train=TrainingConfig(batch_size=0)))  # 0: there is no batch to divide
        world = state.groups["world"]
        agree_slowly(lambda: [one.count for one in self.evaluations], world)  # may download
        name = self.checkpoint()
        if isinstance(config, BackboneConfig):
            agree(lambda: check_family(config.implementation, name), world)
        source = agree_slowly(lambda: local_checkpoint(name), world)
        model, sections = agree_slowly(
            lambda: open_model(source, state.device, None if config.dtype is None else DTYPES[config.dtype]), world
        )
        given = None if config.tokenizer is None else Path(config.tokenizer).expanduser()
        tokenizer = agree(lambda: tokenizer_of_run(sections, given, source), world)
        subject = Subject.of_checkpoint(model, tokenizer, config.batch_tokens, state)

        def prepare() -> None:
            for one in self.evaluations:
                one.prepare(tokenizer, subject.longest)

        agree(prepare, world)
        results = run_all(self.evaluations, subject)
        if state.is_master:
            content = {"checkpoint": str(source), "torch": str(torch.__version__), "results": results}
            write_results(self.spec.folder / RESULTS, content)
            print(f"{shown(results)}\nwrote {self.spec.folder / RESULTS}", flush=True)

    @property
    def local(self) -> bool:
        """True in the first of all processes."""
        return place_in_world()[0] == 0


@job("gpt/evaluate")
class EvaluateGPT(EvaluateJob):
    """Evaluate a GPT of a run by named evaluations."""

    CONFIG = RunConfig


@job("backbone/evaluate")
class EvaluateBackbone(EvaluateJob):
    """Evaluate a model of Hugging Face by named evaluations."""

    CONFIG = BackboneConfig
