"""Bits per byte of validation and tasks during training: what the log says, the same on every number of ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluation.test_choices import make_items
from tests.helpers.corpus import EOT, Naive, make_texts, make_tokenizer, tokenize, tokens_of, write_jsonl
from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, train, user_error
from tinytron.checkpoint import load_model
from tinytron.cli.main import main
from tinytron.distributed import ParallelLayout
from tinytron.distributed.parallel_state import ParallelState
from tinytron.evaluation import validate
from tinytron.model.modules.loss import LossSums
from tinytron.training import Trainer

pytest.importorskip("tokenizers")
Pools = Callable[[int], Ranks]
FLAGS: tuple[object, ...] = (
    *("--no-use_mock_data", "--vocab_size", 400, "--max_steps", 4, "--log_every", 2, "--lr_schedule", "constant"),
    *("--seq_len", 32, "--block_size", 32, "--total_batch_size", 256),
)
EXPERTS = ("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``web`` and ``code``: token shards with tokenizer.json and a tenth for validation; two task files."""
    root = tmp_path_factory.mktemp("made")
    make_tokenizer(root / "tokenizer.json")
    for seed, name in enumerate(("web", "code")):
        texts = write_jsonl(root / f"{name}.jsonl", make_texts(120, seed=seed))
        tokenize(texts, root / "tokenizer.json", root / name, "--val_fraction", 0.2, "--num_tokens_per_file", 100000)
    for name, count in (("sky", 9), ("sea", 14)):
        lines = [{"context": i.context, "choices": i.choices, "answer": i.answer} for i in make_items(count)]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = [{"name": name, "path": name, "weight": 1} for name in ("web", "code")]
    (root / "mixture.json").write_text(json.dumps({"sources": sources}))
    return root


def run_of(ranks: Pools, world: int, data: Path, log_dir: Path, *flags: object) -> Run:
    run: Run = ranks(world).run(train, Trainer, log_dir, *FLAGS, "--dataset_path", data, *flags)[0]
    return run


def stages(run: Run, stage: str) -> list[dict[str, Any]]:
    return [record for record in run.records if record["stage"] == stage]


def _modes() -> list[bool]:
    """Whether a model is in training mode after validation, where it was before and where not."""
    state = ParallelState.create(ParallelLayout(1), torch.device("cpu"))
    model, modes = torch.nn.Linear(2, 2), []
    for mode in (True, False):
        model.train(mode)
        result = validate(model, lambda _: LossSums(torch.zeros(()), torch.zeros(())), [], state)
        assert math.isnan(result.loss)
        assert result.tokens == 0
        modes.append(model.training)
    return modes


def test_validation_leaves_the_mode_of_the_model(ranks: Pools) -> None:
    assert ranks(1).run(_modes) == [[True, False]]


# Bits per byte.


@pytest.mark.parametrize("world", [1, 2])
def test_bits_per_byte_are_those_of_the_text(ranks: Pools, world: int, made: Path, tmp_path: Path) -> None:
    run = run_of(ranks, world, made / "web", tmp_path, "--do_val")
    (val,) = stages(run, "val")
    naive = Naive(made / "tokenizer.json")
    tokens = tokens_of(made / "web", "val")
    targets = [naive.tokenizer.id_to_token(t) for t in tokens[1 : 1 + (len(tokens) - 1) // 32 * 32]]
    text_bytes = sum(len(token) for token in targets if token != EOT)  # a character for every byte
    assert val["tokens"] == len(targets)
    assert val["bits_per_byte"] == pytest.approx(val["loss"] * len(targets) / math.log(2) / text_bytes, rel=1e-6)
    assert val["perplexity"] == pytest.approx(math.exp(val["loss"]))


def test_every_source_has_its_own(ranks: Pools, made: Path, tmp_path: Path) -> None:
    run = run_of(ranks, 2, made / "mixture.json", tmp_path, "--do_val")
    (val,) = stages(run, "val")
    parts = val["sources"]
    assert set(parts) == {"web", "code"}
    bits = {name: part["loss"] * part["targets"] / math.log(2) for name, part in parts.items()}
    sizes = {name: bits[name] / part["bits_per_byte"] for name, part in parts.items()}
    assert val["bits_per_byte"] == pytest.approx(sum(bits.values()) / sum(sizes.values()), rel=1e-6)
    for part in [*parts.values(), *stages(run, "train")[-1]["sources"].values()]:
        assert part["perplexity"] == pytest.approx(math.exp(part["loss"]))


def test_without_a_tokenizer_there_are_none(ranks: Pools, tmp_path: Path) -> None:
    run: Run = ranks(1).run(train, Trainer, tmp_path, "--do_val", "--max_steps", 1)[0]
    (val,) = stages(run, "val")
    assert "bits_per_byte" not in val
    assert val["perplexity"] == pytest.approx(math.exp(val["loss"]))


def test_a_damaged_tokenizer_is_one_error(ranks: Pools, made: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for path in (made / "web").iterdir():
        if path.is_file() and path.suffix != ".lock":
            (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data" / "tokenizer.json").write_text("{}")
    log = tmp_path / "log"
    told = ranks(2).run(user_error, Trainer, log, *FLAGS, "--dataset_path", tmp_path / "data", "--do_val")
    assert all("tokenizer.json is not a tokenizer" in text for text in told)
    assert not log.exists(), "told before anything is written"


# Tasks.

LAYOUTS: list[tuple[int, tuple[object, ...]]] = [
    (2, ()),
    (2, ("--sep_size", 2)),
    (4, ("--sep_size", 2)),
    (4, ()),
]


def test_tasks_give_the_same_on_every_number_of_ranks(ranks: Pools, made: Path, tmp_path: Path) -> None:
    flags = ("--eval_tasks", made / "sky.jsonl", made / "sea.jsonl", "--eval_every", 2, "--batch_size", 1)
    flags = (*flags, *EXPERTS, "--precision", "fp64")
    alone = stages(run_of(ranks, 1, made / "web", tmp_path / "1", *flags), "eval")
    assert [(entry["step"], entry["task"], entry["items"]) for entry in alone] == [
        *((2, "sky", 9), (2, "sea", 14), (4, "sky", 9), (4, "sea", 14))
    ]
    for number, (world, layout) in enumerate(LAYOUTS):
        run = run_of(ranks, world, made / "web", tmp_path / f"layout{number}", *flags, *layout)
        assert stages(run, "eval") == alone
    assert len({entry["accuracy"] for entry in alone}) > 1


def test_they_are_those_of_the_command_on_the_checkpoint(
    ranks: Pools, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--eval_tasks", made / "sky.jsonl", "--precision", "fp64", "--do_save")
    run = run_of(ranks, 2, made / "web", tmp_path, *flags)
    (entry,) = stages(run, "eval")  # only after the last step
    assert entry["step"] == 4
    flags = ["--checkpoint", run.folder, "--tasks", made / "sky.jsonl", "--batch_tokens", 100]
    assert main(["evaluate", *map(str, flags)]) == 0
    written = json.loads((run.folder / "results.json").read_text())
    assert written["results"]["sky"] == {k: v for k, v in entry.items() if k not in ("step", "stage", "task")}
    assert written["checkpoint"] == str(run.folder / "00004_model.pt")
    assert f"sky: accuracy {entry['accuracy']:.4f}" in capsys.readouterr().out
    assert [line.split()[1] for line in run.log.splitlines()] == ["train"] * 4, "the text log has losses only"
    load_model(run.folder)


def test_training_is_not_changed_by_tasks(ranks: Pools, made: Path, tmp_path: Path) -> None:
    flags = (*EXPERTS, "--moe_bias_update_rate", 0.1, "--dropout", 0.1)
    tasks = ("--eval_tasks", made / "sky.jsonl", "--eval_every", 1)
    with_tasks = run_of(ranks, 2, made / "web", tmp_path / "a", *flags, *tasks)
    assert run_of(ranks, 2, made / "web", tmp_path / "b", *flags).log == with_tasks.log
    order = [(record["step"], record["stage"]) for record in with_tasks.records]
    assert order == [(step, stage) for step in (1, 2, 3, 4) for stage in ("train", "eval")]


def test_a_trial_run_answers_no_tasks(ranks: Pools, made: Path, tmp_path: Path) -> None:
    run = run_of(ranks, 1, made / "web", tmp_path, "--eval_tasks", made / "sky.jsonl", "--debug")
    assert stages(run, "eval") == []


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--eval_tasks", "nowhere.jsonl"), "DataError: the task file nowhere.jsonl cannot be read"),
        (
            ("--use_mock_data", "--eval_tasks", "SKY", "--eval_tokenizer", "TOKENIZER", "--vocab_size", 300),
            "tokens, but the model has --vocab_size 300; use the tokenizer that its data was made with",
        ),
        (
            ("--eval_tasks", "SKY", "--use_mock_data"),
            "ConfigError: no tokenizer: the run's data (mock data, or your own)",
        ),
        (("--eval_tasks", "SKY", "--eval_tokenizer", "nowhere.json"), "nowhere.json"),
    ],
)
def test_tasks_that_cannot_be_read_are_one_error(
    ranks: Pools, made: Path, tmp_path: Path, flags: tuple[object, ...], text: str
) -> None:
    places = {"SKY": made / "sky.jsonl", "TOKENIZER": made / "tokenizer.json"}
    given = [places.get(str(flag), flag) for flag in flags]
    log = tmp_path / "log"
    for told in ranks(2).run(user_error, Trainer, log, *FLAGS, "--dataset_path", made / "web", *given):
        assert text in told
    assert not log.exists(), "told before anything is written"


def test_a_given_tokenizer_is_used(ranks: Pools, made: Path, tmp_path: Path) -> None:
    flags = ("--use_mock_data", "--eval_tasks", made / "sky.jsonl", "--eval_tokenizer", made / "tokenizer.json")
    (entry,) = stages(run_of(ranks, 1, made / "web", tmp_path, *flags), "eval")
    assert entry["items"] == 9


# The command.


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--checkpoint", "nowhere", "--tasks", "SKY"), "nowhere is not a local folder"),
        (("--checkpoint", ".", "--tasks", "gone.jsonl"), "the task file gone.jsonl cannot be read"),
        (
            ("--checkpoint", ".", "--tasks", "SKY", "SKY"),
            "--tasks has two files called sky, and results go by file name",
        ),
        (("--checkpoint", ".", "--tasks", "SKY", "--batch_tokens", 0), "--batch_tokens 0 must be at least 1"),
    ],
)
def test_what_the_command_refuses(
    made: Path, words: tuple[object, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *(str(made / "sky.jsonl") if word == "SKY" else str(word) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line
