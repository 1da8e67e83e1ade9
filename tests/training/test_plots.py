"""Figures of plot(intermediates): what it gets, where the figures go, and what an error costs."""

from __future__ import annotations

import contextlib
import gc
import io
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, read_logs, user_error
from tests.metrics.test_loggers import wandb_messages
from tinytron import hooks
from tinytron.checkpoint import load_model
from tinytron.metrics.sinks import Sink
from tinytron.training import Trainer
from tinytron.training.base import BaseTrainer, BaseTrainerConfig

pytest.importorskip("matplotlib")
Pools = Callable[[int], Ranks]
FLAGS = ("--do_val", "--val_every_steps", 2, "--max_steps", 4, "--precision", "fp64")


def heat_map(values: torch.Tensor) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 2))
    figure.add_subplot().imshow(values.numpy())
    return figure


class Shown(Sink):
    """Keeps the figures that it is given."""

    def __init__(self) -> None:
        self.figures: list[tuple[int, str, bytes]] = []

    def figure(self, step: int, name: str, image: bytes) -> None:
        self.figures.append((step, name, image[:4]))


class Plotting(Trainer):
    """Draws one activation, and keeps what it got."""

    plot_points = ("blocks.1.post_mlp",)

    def _init_reporter(self, config: Any) -> None:
        super()._init_reporter(config)
        self.shown, self.got = Shown(), list[Mapping[str, torch.Tensor]]()
        self.reporter.add(self.shown)

    def plot(self, intermediates: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        self.got.append(intermediates)
        return {"last block": heat_map(intermediates["blocks.1.post_mlp"][0])}


def run(log_dir: Path, *flags: object) -> tuple[Path, list[Any], list[Any], bool]:
    """Train: the folder, the figures shown, what ``plot`` got, and whether the trainer is freed. A job for the pool."""
    trainer = Plotting(config_of(*TINY, *FLAGS, "--log_dir", log_dir, *flags))
    trainer.train()
    found = trainer.log_dir, trainer.shown.figures, trainer.got
    alive = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        return *found, alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("world", "flags"), [(1, ("--recompute", "full")), (2, ("--sep_size", 2)), (2, ())])
def test_activations_of_the_first_validation_batch(
    ranks: Pools, tmp_path: Path, world: int, flags: tuple[object, ...]
) -> None:
    (folder, shown, got, freed), *others = ranks(world).run(run, tmp_path, *flags)
    assert freed
    assert [(step, name) for step, name, _ in shown] == [(2, "last block"), (4, "last block")]
    assert {image for _, _, image in shown} == {b"\x89PNG"}
    assert [found.keys() for found in got] == [{"blocks.1.post_mlp"}] * 2
    assert all(other[1:3] == ([], []) for other in others)  # only the master plots
    files = sorted(path.relative_to(folder / "plots") for path in (folder / "plots").rglob("*.png"))
    assert list(map(str, files)) == ["00002/last block.png", "00004/last block.png"]
    trainer = Plotting(config_of(*TINY, *FLAGS, "--debug", "--log_dir", tmp_path / "other"))
    model, _ = load_model(folder / "00004_model.pt")
    batch = next(trainer.data.preparer.once(trainer.data.val))
    with hooks.on(model, record=["blocks.1.post_mlp"]) as seen:
        model(batch.input_ids)
    rows = len(got[1]["blocks.1.post_mlp"])
    torch.testing.assert_close(got[1]["blocks.1.post_mlp"], seen["blocks.1.post_mlp"][:rows], rtol=1e-10, atol=1e-12)


def test_none_are_kept_if_not_wanted(ranks: Pools, tmp_path: Path) -> None:
    ((folder, shown, _, _),) = ranks(1).run(run, tmp_path, "--no-save_plots")
    assert len(shown) == 2
    assert not (folder / "plots").exists()


class Forwarding(BaseTrainer):  # type: ignore[type-arg]
    """The model's meta reaches its plot."""

    CONFIG = BaseTrainerConfig

    @staticmethod
    def forward(state, params, batch, key=None, deterministic=False, intermediates=False):  # type: ignore[no-untyped-def]
        logits, loss, meta = BaseTrainer.forward(state, params, batch, key, deterministic, intermediates)
        return logits, loss, {**meta, "scale": loss.detach() * 2, **({"logits of": logits} if intermediates else {})}

    def plot(self, intermediates: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        assert intermediates.keys() == {"logits of"}
        assert not intermediates["logits of"].requires_grad
        return {name: heat_map(value[0]) for name, value in intermediates.items()}


def _forwarding(log_dir: Path, *flags: object) -> tuple[Path, str]:
    trainer = Forwarding(config_of(*TINY, *FLAGS, "--log_dir", log_dir, *flags))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer.train()
    return trainer.log_dir, printed.getvalue()


def test_what_forward_returns_is_plotted(ranks: Pools, tmp_path: Path) -> None:
    ((folder, printed),) = ranks(1).run(_forwarding, tmp_path)
    assert sorted(path.name for path in (folder / "plots").rglob("*.png")) == ["logits of.png"] * 2
    assert "error" not in printed


class Failing(Forwarding):
    def plot(self, intermediates: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        raise ZeroDivisionError("no such thing\nas that")


class Wrong(Forwarding):
    def plot(self, intermediates: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {"text": "a figure"}


def _failing(cls: type[Trainer], log_dir: Path) -> tuple[str, int]:
    trainer = cls(config_of(*TINY, *FLAGS, "--log_dir", log_dir))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer.train()
    return printed.getvalue(), len(read_logs(trainer.log_dir)[1])


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (Failing, "ZeroDivisionError: no such thing"),
        (Wrong, "ConfigError: plot() returned a dict; return matplotlib figures by name"),
    ],
)
def test_an_error_costs_the_plots_and_not_the_run(ranks: Pools, tmp_path: Path, cls: Any, text: str) -> None:
    ((printed, records),) = ranks(1).run(_failing, cls, tmp_path)
    assert printed.count(f"error: plot() failed and is not called again ({text})") == 1
    assert records == 6


class NoSuchPoint(Plotting):
    plot_points = ("blocks.*.post_mpl",)


def test_a_point_that_does_not_exist_is_refused_before_training(ranks: Pools, tmp_path: Path) -> None:
    (error,) = ranks(1).run(user_error, NoSuchPoint, tmp_path, *FLAGS)
    assert error.startswith("ConfigError: NoSuchPoint.plot_points: blocks.*.post_mpl matches no point of this GPT")


def test_loggers_show_them(ranks: Pools, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
    loggers = ("--loggers", "jsonl", "tensorboard", "wandb", "--wandb_mode", "offline")
    ((folder, _, _, _),) = ranks(1).run(run, tmp_path, *loggers)
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert "plots/last block" in events.Tags()["tensors"]
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert any(b"plots/last block" in message for message in wandb_messages(file))
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/plots/*.png"))) == 2
