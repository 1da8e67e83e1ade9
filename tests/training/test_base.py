"""``BaseTrainer``: batch and forward passes of one's own give the same numbers on every layout; models, schedules,
optimizers and evaluators by name or by hand."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils.data import Dataset

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, losses, train, user_error
from tinytron.config import build, configuration, field
from tinytron.data import Batch, MockDataset
from tinytron.errors import ConfigError
from tinytron.metrics.custom import NextTokenAccuracy, create_loss_metric_cls
from tinytron.model import GPT
from tinytron.model.models import LanguageModel
from tinytron.training import Config, Trainer
from tinytron.training.base import BaseTrainer, BaseTrainerConfig
from tinytron.training.evaluator import Evaluator
from tinytron.training.objective import sums_of_mean

Pools = Callable[[int], Ranks]
SHORT = ("--max_steps", 3, "--debug", "--log_every", 1)
LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {
    "one": (1, ()),
    "dp 2": (2, ()),
    "sep 2": (2, ("--sep_size", 2)),
    "dp 2 x sep 2": (4, ("--sep_size", 2, "--no-use_distributed_optimizer")),
}
MOE = ("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8)


class Plain(BaseTrainer[BaseTrainerConfig, GPT]):
    """Nothing overridden: the fused loss of ``Trainer``."""


class WithLogits(BaseTrainer[BaseTrainerConfig, GPT]):
    """The default forward pass, called by an own one: the loss is computed from logits."""

    @staticmethod
    def forward(state: Any, params: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        logits, loss, meta = BaseTrainer.forward(state, params, batch, *rest, **named)
        assert logits.shape == (*batch["x"].shape, 61)
        return logits, loss, meta


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flags", [(), MOE], ids=["dense", "experts"])
@pytest.mark.sample(4)
def test_forward_gives_the_numbers_of_the_trainer(ranks: Pools, tmp_path: Path, layout: str, flags: Any) -> None:
    world, more = LAYOUTS[layout]
    runs = [
        ranks(world).run(train, cls, tmp_path / cls.__name__, *SHORT, *flags, *more)[0]
        for cls in (Trainer, Plain, WithLogits)
    ]
    assert [record["loss"] for record in runs[1].records] == [record["loss"] for record in runs[0].records]
    for theirs in runs[1:]:
        assert losses(theirs.log) == pytest.approx(losses(runs[0].log), rel=1e-6)
        norms = [[record["grad_norm"] for record in run.records] for run in (runs[0], theirs)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)


class Signal(BaseTrainer[BaseTrainerConfig, GPT]):
    """A key of its own for every token, and a loss that uses it; some labels are ignored as -1 or by the mask."""

    def batch(self, slice: str = "train") -> dict[str, Any]:
        batch = super().batch(slice)
        assert set(batch) == {"x", "y", "padding_mask"}
        assert all(isinstance(value, np.ndarray) for value in batch.values())
        batch["my_signal"] = (batch["x"] % 5).astype(np.float32)
        batch["y"] = np.where(batch["x"] % 7 == 0, -1, batch["y"])
        batch["padding_mask"] = batch["x"] % 11 != 0
        return batch

    @staticmethod
    def forward(
        state: Any, params: Any, batch: Any, key: Any = None, deterministic: bool = False, intermediates: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        assert deterministic is intermediates  # training, or validation
        logits, loss = state.apply_fn(
            {"params": params}, batch["x"], batch["y"], padding_mask=batch["padding_mask"], deterministic=deterministic
        )
        counted = batch["y"] != -100
        aux = ((logits.logsumexp(2) - batch["my_signal"]).square() * counted).sum() / counted.sum()
        return logits, loss + 0.1 * aux, {"my_aux": aux}


class SignalTwin(Trainer):
    """The same objective by hand, as sums."""

    def _loss(self, batch: Any) -> Any:
        from tinytron.model.modules.loss import LossSums

        ignored = (batch.input_ids % 7 == 0) | (batch.input_ids % 11 == 0)
        labels = batch.labels.masked_fill(ignored, -100)
        logits, sums = self.model(batch.input_ids, labels, with_logits=True)
        signal = (batch.input_ids % 5).float()
        aux = ((logits.logsumexp(2) - signal).square() * (labels != -100)).sum()
        total = sums.objective + 0.1 * aux
        counts = {"my_aux": (labels != -100).sum()}
        return LossSums(total, total.detach(), {"my_aux": aux.detach()}, counts=counts)

    def _normalizer(self, batch: Any) -> torch.Tensor:
        ignored = (batch.input_ids % 7 == 0) | (batch.input_ids % 11 == 0)
        return (~ignored & (batch.labels != -100)).sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_keys_reach_forward_on_every_layout(ranks: Pools, tmp_path: Path, layout: str) -> None:
    flags = ("--max_steps", 3, "--log_every", 1, "--do_val", "--no-do_save")
    twin = ranks(1).run(train, SignalTwin, tmp_path / "twin", *flags)[0]
    world, more = LAYOUTS[layout]
    own = ranks(world).run(train, Signal, tmp_path / "own", *flags, *more)[0]
    for stage in ("train", "val"):
        assert losses(own.log, stage) == pytest.approx(losses(twin.log, stage), rel=1e-5), stage
        found, expected = (
            [(r["my_aux"], r.get("grad_norm", 0.0)) for r in run.records if r["stage"] == stage] for run in (own, twin)
        )
        assert [n for pair in found for n in pair] == pytest.approx([n for pair in expected for n in pair], rel=1e-4)


class Gated(LanguageModel):
    """Mixes every token with a running mean of those before it."""

    depth: int = field("model/depth", default=2)

    def __init__(self, *, vocab_size: int, hidden_size: int, depth: int) -> None:
        super().__init__(vocab_size=vocab_size, hidden_size=hidden_size)
        self.layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(depth))

    def body(self, x_BSD: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            count = torch.arange(1, x_BSD.shape[1] + 1, device=x_BSD.device, dtype=x_BSD.dtype)[:, None]
            x_BSD = x_BSD + torch.tanh(layer(x_BSD.cumsum(1) / count))
        return x_BSD


@dataclass
class GatedConfig(BaseTrainerConfig):
    my_loss_weight: float = field("training/my_loss_weight", default=0.1)


class TrainGated(BaseTrainer[GatedConfig, Gated]):
    MODEL = Gated
    CONFIG = GatedConfig

    @classmethod
    def schedule(cls) -> str:
        return "wsd"

    def report(self) -> tuple[str, list[float], int]:
        rates = [self._lr_scheduler(step) for step in range(10)]
        return self.config.optim.lr_schedule, rates, len(self.raw_model.layers)


def train_configured(cls: type[Trainer], log_dir: Path, *flags: object, depth: int = 3) -> Any:
    """``train`` in the configuration that the model reads. A job for the pool."""
    tree = build(cls.MODEL, cls.CONFIG)  # type: ignore[attr-defined]
    tree.model.vocab_size, tree.model.hidden_size, tree.model.depth = 61, 16, depth
    with configuration(tree):
        return train(cls, log_dir, *flags)


def test_a_model_of_ones_own_trains_resumes_and_keeps_its_options(ranks: Pools, tmp_path: Path) -> None:
    flags = ("--lr_schedule", "wsd", "--log_every", 1)
    one = ranks(1).run(train_configured, TrainGated, tmp_path / "1", *flags)[0]
    two = ranks(2).run(train_configured, TrainGated, tmp_path / "2", *flags)[0]
    assert two.extra[2] == 3
    assert losses(two.log) == pytest.approx(losses(one.log), rel=1e-5)
    assert one.extra[0] == "wsd"
    again = ranks(2).run(train_configured, TrainGated, tmp_path / "2", *flags, "--max_steps", 6)[0]
    assert again.log.startswith(two.log)


def test_a_model_that_needs_whole_sequences_says_so(ranks: Pools, tmp_path: Path) -> None:
    errors = ranks(2).run(user_error, TrainGated, tmp_path, "--sep_size", 2)
    assert errors[0] == errors[1]
    assert "Gated needs whole sequences and has no experts, but --sep_size is 2; use --sep_size 1" in errors[0]


class Named(Plain):
    @classmethod
    def schedule(cls) -> Any:
        return "wsds"

    @classmethod
    def optimizer(cls) -> Any:
        return "muon"


class ByHand(Plain):
    @classmethod
    def schedule(cls) -> Any:
        return lambda step: 0.5 / (step + 1)

    @classmethod
    def optimizer(cls) -> Any:
        return lambda params: torch.optim.SGD(params, lr=1.0)


def test_schedules_and_optimizers_by_name_or_function(tmp_path: Path) -> None:
    named = Named(config_of(*TINY, *SHORT, "--log_dir", tmp_path))
    assert (named.config.optim.lr_schedule, named.config.optim.optimizer) == ("wsds", "muon")
    assert type(named.raw_optimizer).__name__ == "Muon"
    given = Named(config_of(*TINY, *SHORT, "--lr_schedule", "linear", "--log_dir", tmp_path))
    assert given.config.optim.lr_schedule == "linear"
    by_hand = ByHand(config_of(*TINY, *SHORT, "--log_dir", tmp_path))
    assert isinstance(by_hand.raw_optimizer, torch.optim.SGD)
    by_hand.train()
    assert by_hand._lr_scheduler(1) == 0.25


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    class Wrong(Plain):
        @classmethod
        def schedule(cls) -> Any:
            return "wds"

    class Other(Plain):
        @classmethod
        def optimizer(cls) -> Any:
            return "lion"

    with pytest.raises(ConfigError, match=r"schedule\(\) returned 'wds', which does not exist; did you mean wsd"):
        Wrong(config_of(*TINY, "--log_dir", tmp_path))
    with pytest.raises(ConfigError, match=r"optimizer\(\) returned 'lion', which .*use one of adamw, adam, muon"):
        Other(config_of(*TINY, "--log_dir", tmp_path))


class Scores(Evaluator):
    def evaluate(self) -> Mapping[str, Mapping[str, Any]]:
        weights = next(self.trainer.raw_model.parameters())
        return {"my_task": {"size": float(weights.shape[0]), "step": -1}}


class Hooked(Plain):
    """The names of other systems' steps, in the order in which they run."""

    def __init__(self, spec: Config) -> None:
        self.calls: list[str] = []
        super().__init__(spec)
        self.calls.append("own")

    def _init_topology(self, spec: Config) -> None:
        self.calls.append("topology")
        super()._init_topology(spec)

    def _init_data(self, spec: Config) -> None:
        self.calls.append("data")
        super()._init_data(spec)

    def _init_batch_config(self, topology: Any) -> None:
        assert topology.world_size == 1
        self.calls.append("batch")
        super()._init_batch_config(topology)

    def _init_model(self) -> None:  # type: ignore[override]
        self.calls.append("model")
        super()._init_model()

    def _init_state(self, params: Any) -> None:
        assert "wte.weight" in params
        self.calls.append("state")
        super()._init_state(params)

    def _init_wandb(self, spec: Config) -> None:
        self.calls.append("wandb")

    def _init_counters_and_eval(self) -> None:
        self.calls.append("counters")
        super()._init_counters_and_eval()

    def evaluator(self) -> Evaluator:
        return Scores.from_trainer(self)

    def report(self) -> list[str]:
        return self.calls


def test_every_step_of_the_initialization_can_be_overridden(ranks: Pools, tmp_path: Path) -> None:
    result = ranks(1).run(train, Hooked, tmp_path)[0]
    assert result.extra == ["topology", "data", "batch", "model", "state", "wandb", "counters", "own"]
    scores = [record for record in result.records if record["stage"] == "eval"]
    assert scores == [{"step": 4, "stage": "eval", "task": "my_task", "size": 61.0}]


class NoLoss(Plain):
    @staticmethod
    def forward(state: Any, params: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        return BaseTrainer.forward(state, params, batch)[0]


class NoMean(Plain):
    @staticmethod
    def forward(state: Any, params: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        logits, _, _ = BaseTrainer.forward(state, params, batch)
        return logits, logits, {}


class NoKeys(Plain):
    def batch(self, slice: str = "train") -> dict[str, Any]:
        return {"x": super().batch(slice)["x"]}


class Taken(Plain):
    def batch(self, slice: str = "train") -> dict[str, Any]:
        batch = super().batch(slice)
        return {**batch, "weights": batch["x"]}


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (NoLoss, "forward() returned a Tensor; return (logits, loss, meta)"),
        (NoMean, "the loss of forward() is a tensor of shape [2, 12, 61]; return one number"),
        (NoKeys, "batch() returned no y; return the dictionary of super().batch(), with more keys"),
        (Taken, "batch() returned the key weights, which means something else in a batch; rename it"),
    ],
)
def test_what_overrides_must_return(ranks: Pools, tmp_path: Path, cls: type[Trainer], text: str) -> None:
    for error in ranks(2).run(user_error, cls, tmp_path, *SHORT):
        assert error.startswith(f"ConfigError: {text}")


class Outputs(nn.Module):
    """A model with ``.loss`` in its outputs, as transformers' have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)
        self.with_loss = True

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.table(ids))
        mean = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"logits": logits} | ({"loss": mean} if self.with_loss else {})


class TrainsOutputs(Trainer):
    def _init_model(self, config: Config) -> None:
        self.raw_model = self.model = Outputs().to(self.device)


class OwnFunction(TrainsOutputs):
    def compute_loss_func(self, outputs: Any, inputs: Any) -> torch.Tensor:  # type: ignore[override]
        assert set(inputs) == {"input_ids", "labels"}
        return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), inputs["labels"].flatten())


class NoLossAtAll(TrainsOutputs):
    def _init_model(self, config: Config) -> None:
        super()._init_model(config)
        self.raw_model.with_loss = False


def test_a_mean_in_the_outputs_or_from_a_function(ranks: Pools, tmp_path: Path) -> None:
    one, two, function = (
        ranks(world).run(train, cls, tmp_path / f"{cls.__name__}{world}", *SHORT)[0]
        for cls, world in ((TrainsOutputs, 1), (TrainsOutputs, 2), (OwnFunction, 2))
    )
    for other in (two, function):
        assert losses(other.log) == pytest.approx(losses(one.log), rel=1e-5)
        norms = [[record["grad_norm"] for record in run.records] for run in (one, other)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for error in ranks(2).run(user_error, NoLossAtAll, tmp_path, *SHORT):
        assert error.startswith("ConfigError: the model returned a dict without a loss; return LossSums or an object")


class Everything(Signal):
    """Overrides what could keep a trainer alive."""

    train_metric_cls = (NextTokenAccuracy, create_loss_metric_cls("my_aux"))

    def evaluator(self) -> Evaluator:
        return Scores.from_trainer(self)


@pytest.mark.parametrize("cls", [Trainer, Everything])
def test_an_ended_run_is_freed_at_once(tmp_path: Path, cls: type[Trainer]) -> None:
    """It holds the lock of its folder, which the next run in this process needs: no cycle may keep it alive."""
    Trainer(config_of(*TINY, *SHORT, "--log_dir", tmp_path / "first"))  # torch keeps frames of its first model alive
    gc.collect()
    gc.disable()
    try:
        trainer = cls(config_of(*TINY, *SHORT, "--do_val", "--log_dir", tmp_path))
        trainer.train()
        if cls is Everything:
            assert 0 <= trainer.one_step_results.get("accuracy", 0.0) <= 1
        alive = weakref.ref(trainer)
        del trainer
        assert alive() is None
    finally:
        gc.enable()


class Documented(Plain):
    """``forward`` as the pages show it: without weights and positions."""

    @staticmethod
    def forward(
        state: Any, params: Any, batch: Any, key: Any = None, deterministic: bool = False, intermediates: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        logits, loss = state.apply_fn(
            {"params": params}, batch["x"], batch["y"], padding_mask=batch["padding_mask"], deterministic=deterministic
        )
        return logits, loss, {"one": torch.ones(())}


class Fancy(Dataset[dict[str, torch.Tensor]]):
    """Weights, documents, padding, and rows without targets."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random = np.random.default_rng(index)
        ids = torch.tensor(random.integers(61, size=13))
        labels, padding = ids[1:].clone(), torch.zeros(12, dtype=torch.bool)
        padding[9:] = index % 2 == 0
        labels[padding] = -100
        if index % 4 == 1:
            labels[:] = -100
        positions = torch.cat([torch.arange(5), torch.arange(7)])
        weights = torch.tensor(random.random(12), dtype=torch.float32)
        return {"input_ids": ids[:-1], "labels": labels, "padding": padding, "positions": positions, "weights": weights}


class _OnFancy(Trainer):
    def _init_dataset(self, config: Config) -> None:
        self.train_dataset, self.val_dataset = Fancy(), Fancy()


class PlainOnFancy(_OnFancy):
    """The twin."""


class DocumentedOnFancy(Documented):
    def _init_data(self, spec: Config) -> None:
        self.train_dataset, self.val_dataset = Fancy(), Fancy()


@pytest.mark.parametrize("flags", [(), ("--z_loss_coef", 0.1), MOE], ids=["dense", "z-loss", "experts"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_forward_pass_needs_not_know_of_weights_and_documents(
    ranks: Pools, tmp_path: Path, world: int, flags: Any
) -> None:
    more = ("--max_steps", 3, "--do_val", "--no-do_save", "--log_every", 1, "--precision", "fp64", *flags)
    twin, own = (
        ranks(world).run(train, cls, tmp_path / cls.__name__, *more)[0] for cls in (PlainOnFancy, DocumentedOnFancy)
    )
    for mine, theirs in zip(own.records, twin.records, strict=True):
        names = ("loss", "grad_norm") if mine["stage"] == "train" else ("loss",)
        assert {name: mine[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=1e-9)
        assert mine["one"] == pytest.approx(1.0)  # also with a last batch that is filled up


class GatedOnFancy(TrainGated):
    def _init_data(self, spec: Config) -> None:
        self.train_dataset = Fancy()


def _configured_error(cls: type[Trainer], log_dir: Path, *flags: object) -> str:
    try:
        train_configured(cls, log_dir, *flags)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_model_that_takes_no_positions_says_so(ranks: Pools, tmp_path: Path) -> None:
    for error in ranks(2).run(_configured_error, GatedOnFancy, tmp_path, *SHORT):
        assert error.startswith("the data have positions, but Gated.forward takes none; add the argument, or leave")


class Means(TrainsOutputs):
    """Mean losses, which are not numbers in a batch without targets."""

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = MockDataset(32, 12, 61, seed=0)
        self.val_dataset = MockDataset(6, 12, 61, seed=1)


def test_a_batch_that_only_fills_up_has_no_mean(ranks: Pools, tmp_path: Path) -> None:
    one, two = (ranks(w).run(train, Means, tmp_path / str(w), "--do_val", "--no-do_save")[0] for w in (1, 2))
    assert losses(two.log, "val") == pytest.approx(losses(one.log, "val"), rel=1e-5)


def test_sums_of_means_in_16_bits_do_not_overflow() -> None:
    labels = torch.zeros(64, 2048, dtype=torch.int64)
    sums = sums_of_mean(torch.tensor(4.0, dtype=torch.float16), Batch(labels, labels), "x")
    assert float(sums.token) == 4.0 * labels.numel()


def test_fitting_and_memory_know_the_gpt_of_every_trainer(tmp_path: Path) -> None:
    trainer = Named(config_of(*TINY, *SHORT, "--log_dir", tmp_path))
    assert trainer._frozen_models(trainer.config) == ()
