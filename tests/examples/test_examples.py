"""Every example runs as its page prints it, and its seam really acts: compared with what it must do, worked out by hand."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT, TINY, config_of, losses, read_logs, run_well
from tinytron.inference import SamplingOptions, complete
from tinytron.model import GPT, ModelConfig
from tinytron.training import Trainer

Pools = Callable[[int], Ranks]
EXAMPLES = ("own_data", "own_optimizer", "own_loss", "own_model", "own_logger")
MAX_LINES = 40  # blank ones not counted: longer means that the seam is awkward


def load(name: str) -> ModuleType:
    """The example as a module; every process of a pool loads it for itself."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed() -> dict[str, list[str]]:
    """The commands of examples/README.md by ``--exp_name``, with the variable filled in."""
    page = (ROOT / "examples" / "README.md").read_text()
    block = page.split("```bash\n")[1].split("```")[0]
    (tiny,) = [word for word in shlex.split(block, comments=True) if word.startswith("TINY=")]
    lines = [line for line in block.splitlines() if "examples/own_" in line]
    commands = [shlex.split(line.replace("$TINY", tiny.removeprefix("TINY=")), comments=True) for line in lines]
    return {words[words.index("--exp_name") + 1]: words for words in commands}


def test_the_page_names_every_example_and_they_are_short() -> None:
    files = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
    assert files == sorted([*EXAMPLES, "look_inside"])
    assert set(printed()) == {*EXAMPLES, "own_loss_2"}
    for name in files:
        lines = [line for line in (ROOT / "examples" / f"{name}.py").read_text().splitlines() if line.strip()]
        assert 15 <= len(lines) <= MAX_LINES, f"{name} has {len(lines)} lines"


def run_printed(name: str, log_dir: Path) -> tuple[dict[int, float], list[dict[str, Any]], Path]:
    """Losses by step, records and folder of a command of the page, started as a user would."""
    words = printed()[name]
    script = next(number for number, word in enumerate(words) if word.startswith("examples/"))
    processes = int(words[3]) if words[:2] == ["tinytron", "launch"] else 0
    flags = (*words[script + 1 :], "--log_dir", log_dir, "--log_every", 5)
    run_well(*flags, cwd=ROOT, script=ROOT / words[script], processes=processes)
    (folder,) = log_dir.glob(f"{name}_*")
    log, records = read_logs(folder)
    return losses(log), records, folder


def test_own_data_is_what_is_trained_on_and_looked_into(tmp_path: Path) -> None:
    found, records, folder = run_printed("own_data", tmp_path)
    # Bytes of English: far better than ln 256 = 5.5 after few steps, and mock data would stay there.
    assert found[20] < 4.0 < 5.0 < found[1]
    rows = (len((ROOT / "README.md").read_bytes()) - 1) // 32
    assert records[-1]["stage"] == "val"
    assert records[-1]["tokens"] == 32 * (rows - round(0.99 * rows))  # whatever the length of the page
    page = (ROOT / "examples" / "README.md").read_text()
    assert "python examples/look_inside.py log/own_data_*" in page
    done = run_well(folder, cwd=ROOT, script=ROOT / "examples" / "look_inside.py")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["logit lens", "patched", "steered"]


def test_look_inside_shows_what_a_pass_by_hand_shows() -> None:
    """The lens at the last block is the output; a patch of the last token there gives the other prompt's; a direction of
    zero steers nowhere."""
    example = load("look_inside")
    config = ModelConfig(block_size=64, vocab_size=61, num_layer=2, hidden_size=16, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=24, init_std=0.3)  # fmt: skip
    model, last = GPT(config).eval(), "blocks.1.post_mlp"
    ids, other = torch.arange(12).view(1, 12), torch.arange(20, 32).view(1, 12)
    with torch.no_grad():
        lens, logits = example.logit_lens(model, ids), model(ids)
        assert len(lens) == 2
        assert torch.equal(lens[1], logits)
        assert not torch.allclose(lens[0], logits)
        patched = example.patched(model, ids, other, last)
        assert torch.equal(patched[:, :-1], logits[:, :-1])
        torch.testing.assert_close(patched[:, -1], model(other)[:, -1])
        options = SamplingOptions(max_new_tokens=20, temperature=0)
        plain = complete(model, ids.tolist(), options).samples[0].tokens
        assert example.steered(model, ids, torch.zeros(16), last) == plain
        assert example.steered(model, ids, 100 * torch.ones(16).cumsum(0), last) != plain


def trainer_of(name: str, log_dir: Path, *flags: object) -> Trainer:
    """The example's trainer, in this process, which must be one of a pool."""
    trainer: Trainer = load(name).MyTrainer(config_of(*flags, "--log_dir", log_dir, "--debug"))
    return trainer


def _one_step_of_lion(log_dir: Path) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Weights before and after the first step, and its learning rate. A job for the pool."""
    trainer = trainer_of("own_optimizer", log_dir, *TINY, "--max_steps", 1, "--weight_decay", 0.5)
    before, after = ({}, {})
    for weights in (before, after):
        weights |= {name: weight.detach().clone().numpy() for name, weight in trainer.raw_model.named_parameters()}
        trainer.train()
    return before, after, trainer._lr_scheduler(0)


@pytest.mark.parametrize("world", [1, 2])
def test_own_optimizer_moves_weights_as_lion_does(ranks: Pools, tmp_path: Path, world: int) -> None:
    """Its momentum begins with zero: the first step decays matrices, and then moves every weight by the learning rate."""
    results = ranks(world).run(_one_step_of_lion, tmp_path)
    before, after, lr = results[0]
    for name, weight in before.items():
        decayed = weight * (1 - 0.5 * lr) if weight.ndim == 2 else weight
        moved = abs(after[name] - decayed)
        idle = (moved < 0.01 * lr).mean()
        assert idle < (0.4 if name == "wte.weight" else 0.01), name  # not every token occurs in 96
        assert moved[moved > 0.01 * lr] == pytest.approx(lr, rel=1e-3), name
    for _, others, _ in results:
        assert all((others[name] == weight).all() for name, weight in after.items())


def _first_loss_by_hand(log_dir: Path, *flags: str) -> float:
    """The mean over the first step's sequences of their mean loss, by the model's plain losses of tokens. A job."""
    trainer = trainer_of("own_loss", log_dir, *flags)
    assert trainer.train_sampler is not None
    assert trainer.train_dataset is not None
    means = []
    for number in trainer.train_sampler.samples_of_step(0):
        sample = trainer.train_dataset[number]
        ids, labels = sample["input_ids"], sample["labels"]
        assert int((labels != -100).sum()) == int(sample["num_targets"])
        per_token = trainer.raw_model(ids[None], labels[None]).per_token
        means.append(float(per_token.sum()) / int(sample["num_targets"]))
    assert len(set(means)) == len(means) == 16
    return sum(means) / len(means)


@pytest.mark.slow
def test_own_loss_is_the_mean_over_sequences_on_every_layout(ranks: Pools, tmp_path: Path) -> None:
    one, _, _ = run_printed("own_loss", tmp_path / "one")
    two, _, _ = run_printed("own_loss_2", tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-5)
    (expected,) = ranks(1).run(_first_loss_by_hand, tmp_path, *printed()["own_loss"][2:])
    assert one[1] == pytest.approx(expected, rel=1e-5)


def test_own_model_is_what_is_trained(tmp_path: Path) -> None:
    _, _, folder = run_printed("own_model", tmp_path)
    weights = torch.load(folder / "00020_model.pt", weights_only=True)
    assert {name.split(".")[0] for name in weights} == {"embedding", "head", "gru", "updates"}
    assert int(weights["updates"]) == 20


def test_own_logger_writes_its_columns_and_its_flag_is_saved(tmp_path: Path) -> None:
    _, records, folder = run_printed("own_logger", tmp_path)
    rows = [line.split(",") for line in (folder / "table.csv").read_text().splitlines()]
    assert [int(row[0]) for row in rows] == list(range(1, 21))
    for row, record in zip(rows, records, strict=True):
        assert [float(x) for x in row[1:]] == [record["loss"], record["grad_norm"], record["tokens_per_second"]]
    saved = json.loads((folder / "config.json").read_text())["config"]["csv"]
    assert saved == {"csv_columns": ["loss", "grad_norm", "tokens_per_second"]}
