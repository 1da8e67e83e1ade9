"""Steps, accumulation, warm-up and profile window from configuration, ranks and number of samples."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.errors import says
from tests.helpers.runs import config_of
from tinytron.distributed.layout import ParallelLayout
from tinytron.errors import ConfigError
from tinytron.training.build import describe_run_size
from tinytron.training.config import Config, OptimConfig, TrainingConfig
from tinytron.training.derive import Due, TrainingInfo, derive, with_fitting_batch

S = 16


def config(sequences: int = 32, batch_size: int = 2, warmup_steps: int = 0, **train: Any) -> Config:
    """A global batch of ``sequences``."""
    options = {"total_batch_size": sequences * S, "seq_len": S, "batch_size": batch_size} | train
    return Config(train=TrainingConfig(**options), optim=OptimConfig(warmup_steps=warmup_steps))


def derived(of: Config, ranks: int = 1, samples: int = 1000, sep: int = 1) -> TrainingInfo:
    return derive(of, ParallelLayout(ranks, sep), samples)


def refusal(of: Config, ranks: int = 1, samples: int = 1000) -> str:
    with pytest.raises(ConfigError, match=r"^.+$") as caught:
        derived(of, ranks, samples)
    return str(caught.value)


# Accumulation.


@pytest.mark.parametrize(("ranks", "sep", "accumulation"), [(1, 1, 16), (4, 1, 4), (16, 1, 1), (8, 2, 4), (8, 8, 16)])
def test_accumulation_fills_the_global_batch(ranks: int, sep: int, accumulation: int) -> None:
    info = derived(config(), ranks, sep=sep)
    assert info.dp_size == ranks // sep
    assert info.grad_accum_steps == accumulation
    assert info.grad_accum_steps * info.dp_size * 2 == info.global_batch_samples == 32


def test_an_indivisible_batch_names_micro_batches_that_work() -> None:
    text = "--total_batch_size 512 ... --batch_size x --seq_len ... = 3 x 16 x 4 = 192 ... --batch_size of [1, 2, 4, 8]"
    assert re.search(says(text), refusal(config(sequences=32, batch_size=3), ranks=4))


def test_without_such_a_micro_batch_it_names_a_global_batch_that_works() -> None:
    assert refusal(config(sequences=10, batch_size=3), ranks=4).endswith("3 x 16 x 4 = 192; use 192")
    assert refusal(config(sequences=30, batch_size=3), ranks=4).endswith("3 x 16 x 4 = 192; use 384")


@given(sequences=st.integers(1, 120), batch_size=st.integers(1, 40), ranks=st.integers(1, 12))
def test_every_proposed_value_works(sequences: int, batch_size: int, ranks: int) -> None:
    if sequences % (batch_size * ranks) == 0:
        assert derived(config(sequences, batch_size), ranks).grad_accum_steps == sequences // (batch_size * ranks)
        return
    text = refusal(config(sequences, batch_size), ranks)
    if proposed := re.search(r"use a --batch_size of \[(.*)\]$", text):
        fitting = [int(b) for b in proposed.group(1).split(", ")]
        assert fitting == [b for b in range(1, sequences + 1) if sequences % (b * ranks) == 0]
        for works in fitting:
            derived(config(sequences, works), ranks)
    else:
        total = int(text.rsplit("use ", 1)[1])
        derived(config(sequences, batch_size, total_batch_size=total), ranks)


@given(sequences=st.integers(1, 120), batch_size=st.integers(1, 40), ranks=st.integers(1, 12))
def test_the_largest_micro_batch_that_divides_is_found(sequences: int, batch_size: int, ranks: int) -> None:
    layout = ParallelLayout(ranks)
    given, plain = (config(sequences, batch_size, fit_batch=fit) for fit in (True, False))
    assert with_fitting_batch(plain, layout) == plain
    fitting = [b for b in range(1, batch_size + 1) if sequences % (b * ranks) == 0]
    if not fitting:
        assert with_fitting_batch(given, layout) == given
        return
    fitted = with_fitting_batch(given, layout)
    assert fitted == replace(given, train=replace(given.train, batch_size=fitting[-1]))
    assert derived(fitted, ranks).grad_accum_steps == sequences // (fitting[-1] * ranks)
    assert fitted.config_hash() == plain.config_hash()


# Steps.


@pytest.mark.parametrize(
    ("samples", "epochs", "steps"), [(1000, 1, 31), (1000, 2, 62), (1000, 4, 125), (32, 1, 1), (31, 2, 1), (1, 64, 2)]
)
def test_epochs_give_the_whole_batches_in_them(samples: int, epochs: int, steps: int) -> None:
    assert derived(config(max_epochs=epochs), samples=samples).max_steps == steps


@pytest.mark.parametrize("max_steps", [1, 7, 10**6])
def test_max_steps_hold_before_tokens_and_epochs(max_steps: int) -> None:
    for samples in (1, 1000):
        info = derived(config(max_steps=max_steps, max_epochs=3), samples=samples)
        assert info.max_steps == max_steps
        assert info.notes == (f"the length of the run is --max_steps {max_steps}, which holds before --max_epochs 3",)
        all_three = derived(config(max_steps=max_steps, max_train_tokens=5 * 512, max_epochs=3), samples=samples)
        assert all_three.max_steps == max_steps
        assert all_three.notes == (
            f"the length of the run is --max_steps {max_steps}, which holds before --max_train_tokens 2560 and "
            "--max_epochs 3",
        )


def test_tokens_hold_before_epochs() -> None:
    info = derived(config(max_train_tokens=4 * 512 + 1, max_epochs=3))
    assert info.max_steps == 5
    assert info.notes == ("the length of the run is --max_train_tokens 2049, which holds before --max_epochs 3",)
    assert derived(config(max_train_tokens=512)).notes == derived(config(max_steps=2)).notes == ()


@given(samples=st.integers(1, 40), epochs=st.integers(1, 5), sequences=st.integers(1, 100))
def test_too_little_data_names_the_epochs_that_work(samples: int, epochs: int, sequences: int) -> None:
    few = config(sequences, batch_size=1, max_epochs=epochs)
    if samples * epochs >= sequences:
        assert derived(few, samples=samples).max_steps >= 1
        return
    text = refusal(few, samples=samples)
    assert text.startswith(
        f"{epochs} epochs of {samples} samples do not fill one global batch of {sequences}; use --max_e"
    )
    proposed = re.search(r"--max_epochs (\d+), a smaller --total_batch_size, or --max_steps$", text)
    assert proposed is not None
    assert derived(config(sequences, batch_size=1, max_epochs=int(proposed.group(1))), samples=samples).max_steps == 1


# Warm-up.


@pytest.mark.parametrize(
    ("warmup", "max_steps", "resolved"),
    [(0, 5, 0), (4, 5, 4), (999, 1000, 999), (5, 5, 1), (1001, 10, 1), (900, 500, 50), (2000, 1000, 100), (7, 1, 1)],
)
def test_a_warm_up_longer_than_the_run_is_cut_to_a_tenth(warmup: int, max_steps: int, resolved: int) -> None:
    info = derived(config(warmup_steps=warmup, max_steps=max_steps))
    assert info.warmup_steps == resolved
    cut = f"warm-up cut from {warmup} to {resolved} steps: the run has only {max_steps}"
    assert info.notes == (() if warmup == resolved else (cut,))


def test_a_warm_up_of_one_step_is_never_cut() -> None:
    info = derived(config(warmup_steps=1, max_steps=1))
    assert (info.warmup_steps, info.notes) == (1, ())


@pytest.mark.parametrize(
    ("ratio", "max_steps", "resolved"), [(0.01, 1000, 10), (0.01, 50, 1), (0.25, 10, 3), (0.99, 5, 5), (0.0, 5000, 700)]
)
def test_a_warm_up_can_be_a_part_of_the_steps(ratio: float, max_steps: int, resolved: int) -> None:
    """Rounded up, like transformers' warmup_ratio; it wins over the number of steps."""
    part = config(warmup_steps=700, max_steps=max_steps)
    info = derived(replace(part, optim=replace(part.optim, warmup_ratio=ratio)))
    assert (info.warmup_steps, info.notes) == (resolved, ())


@pytest.mark.parametrize(
    ("warmup", "line"),
    [
        (1000, "20 steps (2 of them warm-up) of 512 tokens in sequences of 16, 16 micro-batches each"),
        (0, "20 steps of 512 tokens in sequences of 16, 16 micro-batches each"),
    ],
)
def test_a_run_says_how_long_it_warms_up(warmup: int, line: str) -> None:
    """A warm-up of 1,000 steps does not fit the run, whether it is the default or was given."""
    run = config(warmup_steps=warmup, max_steps=20)
    state: Any = SimpleNamespace(layout=ParallelLayout(1), device=torch.device("cpu"))
    assert describe_run_size(run, nn.Linear(2, 3), state, derived(run)).endswith(f" | {line}")


def test_the_documented_debug_command_runs() -> None:
    """1,280 mock samples of 4,096 tokens are ten steps, fewer than the default warm-up of 1,000."""
    info = derive(Config(), ParallelLayout(8), 1280)
    assert (info.max_steps, info.warmup_steps, info.grad_accum_steps) == (10, 1, 2)
    assert info.notes == ()  # no flag asked for those 1,000


# Profile window.


@pytest.mark.parametrize(
    ("max_steps", "window"), [(100, (15, 20)), (20, (15, 20)), (19, (14, 19)), (10, (5, 10)), (3, (1, 3)), (1, (1, 1))]
)
def test_the_profile_window_moves_into_the_run(max_steps: int, window: tuple[int, int]) -> None:
    info = derived(config(max_steps=max_steps, use_profiler=True))
    assert info.profile_window == window
    note = f"profiling steps {window[0]} to {window[1]}: the run has only {max_steps}"
    assert info.notes == (() if window == (15, 20) else (note,))


def test_without_the_profiler_its_window_is_nobodys_business() -> None:
    info = derived(config(max_steps=3))
    assert (info.profile_window, info.notes) == ((15, 20), ())


def due(*flags: object) -> dict[str, list[int]]:
    """The steps of a run of 7 after which each action is due."""
    config = config_of(*flags)
    found = Due(config, 7, answers=bool(config.train.eval_tasks))
    actions = {"validation": found.validation, "tasks": found.tasks, "save": found.save, "report": found.report}
    return {name: [step for step in range(1, 8) if action(step)] for name, action in actions.items()}


def test_recurring_actions_are_due_at_their_interval_and_at_the_end() -> None:
    flags = ("--do_val", "--val_every_steps", 2, "--save_every_steps", 3, "--log_every", 5)
    assert due(*flags) == {"validation": [2, 4, 6, 7], "tasks": [], "save": [3, 6, 7], "report": [1, 2, 3, 4, 5, 6, 7]}
    flags = ("--no-do_save", "--eval_tasks", "sky.jsonl", "--eval_every", 4, "--log_every", 100)
    assert due(*flags) == {"validation": [], "tasks": [4, 7], "save": [], "report": [1, 4, 7]}
    assert due("--do_val", "--val_every_steps", 0, "--save_every_steps", 0)["report"] == [1, 7]
    assert due("--debug", "--do_val", "--eval_tasks", "a.jsonl", "--log_every", 3) == {
        "validation": [], "tasks": [], "save": [], "report": [1, 3, 6, 7],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "rate"),
    [((), 1.0), (("--do_val",), 0.99), (("--do_val", "--debug"), 1.0), (("--do_val", "--split_rate", 0.5), 0.5)],
)
def test_derived_options_have_the_split_rate_they_imply(flags: tuple[object, ...], rate: float) -> None:
    train = config_of(*flags).train
    assert train.with_derived() == replace(train, split_rate=rate)


def test_building_a_config_validates_it() -> None:
    made = Config()
    made.validate_static()
    object.__setattr__(made, "train", replace(made.train, seq_len=8192))
    with pytest.raises(ConfigError, match=r"--seq_len 8192 exceeds --block_size 4096; use --block_size 8192"):
        made.validate_static()
