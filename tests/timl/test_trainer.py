"""timl's trainer in Python: models, losses, optimizers and schedules of one's own take the steps that torch alone takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import transformers

from tests.helpers.ranks import Ranks
from tests.helpers.runs import losses, read_logs
from tinytron.cli.timl import build_config_of
from tinytron.data.formats import write_shard
from tinytron.errors import ConfigError, TinytronError
from tinytron.metrics.custom import NextTokenAccuracy
from tinytron.model import GPT, ModelConfig
from tinytron.timl import Trainer, TrainingArguments, batch_loader_tokens, get_num_tokens
from tinytron.utils.sequences import IGNORE_INDEX

Pools = Callable[[int], Ranks]
STEPS, BATCH, MICRO, LENGTH = 4, 8, 2, 12
SETTINGS: dict[str, Any] = {
    **{"block_size": LENGTH, "train_batch_size": BATCH, "per_device_train_batch_size": MICRO},
    **{"per_device_eval_batch_size": MICRO, "learning_rate": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.95},
    **{"adam_epsilon": 1e-8, "weight_decay": 0.1, "lr_scheduler_type": "constant", "save_every_steps": 2},
    **{"eval_every_steps": 4, "max_train_steps": STEPS, "bf16": False, "max_eval_tokens": 48},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train_0.bin", 40 * LENGTH), ("validation_0.bin", 10 * LENGTH)):
        write_shard(folder / name, np.random.default_rng(len(name)).integers(61, size=count).astype(np.uint16))
    return folder


def arguments(data: Path, out: Path, **settings: Any) -> TrainingArguments:
    """Settings of a tiny run."""
    patterns = {"train_file_pattern": f"{data}/train_*.bin", "eval_file_pattern": f"{data}/validation_*.bin"}
    return TrainingArguments(output_dir=str(out), **patterns, **{**SETTINGS, **settings})


class Toy(nn.Module):
    """A model with ``outputs.loss``, a mean; ``scale`` is an argument of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        logits = scale * self.head(self.table(input_ids))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), ignore_index=IGNORE_INDEX)
        return {"logits": logits, "loss": loss}


def own_loss(outputs: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    labels = inputs["labels"].flatten().long()
    return 2 * nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels, ignore_index=IGNORE_INDEX)


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 61}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropouts))


def halving(parameters: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.5)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def run(kind: str, data: Path, out: Path, **settings: Any) -> tuple[Path, dict[int, float], list[Any], dict[str, Any]]:
    """Folder, losses, records and weights of a run. A job for the pool."""
    model: Any = gpt2() if kind == "gpt2" else Toy()
    more: dict[str, Any] = {}
    if kind == "own loss":
        more = {"compute_loss_func": own_loss}
    elif kind == "own optimizer":
        more = {"optimizers": halving(model.parameters())}
    elif kind == "class":
        more = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9})}
    elif kind == "metrics":
        more = {"train_metric_cls": NextTokenAccuracy, "eval_metric_cls": [NextTokenAccuracy], "config": {"note": 3}}
    trainer = Trainer(model, arguments(data, out, **settings), batch_loader_tokens, batch_loader_tokens, **more)
    trainer.train()
    trainer.optimizer.finish_gather()
    weights = {name.removeprefix("hf."): p.detach().clone() for name, p in trainer.raw_model.named_parameters()}
    log, records = read_logs(trainer.log_dir) if trainer.master_process else ("", [])
    return trainer.log_dir, losses(log), records, weights


def twin(kind: str, data: Path, steps: int = STEPS) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same steps by torch alone: every global batch at once."""
    model: Any = gpt2() if kind == "gpt2" else Toy()
    named = dict(model.named_parameters())
    decays = [p for p in named.values() if p.ndim >= 2]
    others = [p for p in named.values() if p.ndim < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    schedule = None
    if kind == "own optimizer":
        optimizer, schedule = halving(model.parameters())
    elif kind == "class":
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    batches = batch_loader_tokens(f"{data}/train_*.bin", BATCH, LENGTH)
    found = []
    for _, batch in zip(range(steps), batches, strict=False):
        ids, labels = batch["input_ids"].long(), batch["labels"]
        logits = model(input_ids=ids).logits if kind == "gpt2" else model(ids, labels)["logits"]
        mean = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
        loss = 2 * mean if kind == "own loss" else mean
        found.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return found, named


@pytest.mark.parametrize("kind", ["toy", "gpt2", "own loss", "own optimizer", "class"])
@pytest.mark.sample(3)
def test_steps_are_those_of_torch_alone(ranks: Pools, data: Path, tmp_path: Path, kind: str) -> None:
    expected, weights = twin(kind, data)
    for world in (1, 2):
        _, found, _, own = ranks(world).run(run, kind, data, tmp_path / str(world))[0]
        assert list(found.values()) == pytest.approx(expected, rel=1e-5)
        for name, value in weights.items():
            if name.endswith("c_attn.bias"):  # the gradient of a key's bias is 0, and AdamW makes steps of its noise
                continue
            assert torch.allclose(own[name], value, rtol=1e-4, atol=1e-6), name


def _in_groups(data: Path, out: Path, *factors: Any) -> Trainer:
    """A trainer of two groups, with the rates 1.0 and 0.1, and a schedule if there are ``factors``."""
    model = Toy()
    groups: Any = [{"params": list(model.table.parameters()), "lr": 1.0}, {"params": list(model.head.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, list(factors)) if factors else None
    return Trainer(model, arguments(data, out), optimizers=(optimizer, schedule))


def _rates(trainer: Trainer, step: int) -> list[float]:
    first = trainer._lr_scheduler(step)
    return [first * group["lr_mult"] for group in trainer.optimizer.param_groups]


def test_every_group_keeps_its_rate(data: Path, tmp_path: Path) -> None:
    assert _rates(_in_groups(data, tmp_path / "a"), 2) == pytest.approx([1.0, 0.1])
    halved = _in_groups(data, tmp_path / "b", lambda step: 1.0, lambda step: 0.5**step)
    assert _rates(halved, 2) == pytest.approx([1.0, 0.025])
    zero = _in_groups(data, tmp_path / "c", lambda step: 0.0, lambda step: 1.0)
    with pytest.raises(ConfigError, match="gives the first group the rate 0, but not the others"):
        _rates(zero, 0)


@pytest.mark.parametrize("kind", ["toy", "own optimizer"])
def test_a_resumed_run_is_the_one_that_was_not_stopped(ranks: Pools, data: Path, tmp_path: Path, kind: str) -> None:
    _, whole, _, weights = ranks(2).run(run, kind, data, tmp_path / "whole")[0]
    ranks(2).run(_until, kind, data, tmp_path / "parts", 2)
    folder, parts, _, own = ranks(2).run(run, kind, data, tmp_path / "parts")[0]
    assert parts == whole
    assert all(torch.equal(own[name], value) for name, value in weights.items())
    assert folder.parent == tmp_path / "parts"


def _until(kind: str, data: Path, out: Path, steps: int) -> None:
    run(kind, data, out, max_train_steps=steps)


def test_models_of_transformers_are_exported_from_step_0_on(ranks: Pools, data: Path, tmp_path: Path) -> None:
    _, _, _, weights = ranks(1).run(run, "gpt2", data, tmp_path / "out")[0]
    first, last = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / f"step{n}") for n in (0, STEPS))
    start = dict(gpt2().named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, start[name]), name
    for name, parameter in last.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_metrics_and_limited_evaluation(ranks: Pools, data: Path, tmp_path: Path) -> None:
    folder, found, records, _ = ranks(2).run(run, "metrics", data, tmp_path)[0]
    assert len(found) == STEPS
    assert all("accuracy" in record for record in records)
    (val,) = (record for record in records if record["stage"] == "val")
    assert val["tokens"] == 48
    assert '\\"note\\": 3' in (folder / "config.json").read_text()


def test_forward_kwargs_reach_the_model(ranks: Pools, data: Path, tmp_path: Path) -> None:
    _, found, _, _ = ranks(1).run(_scaled, data, tmp_path)[0]
    assert list(found.values()) == pytest.approx([np.log(61)] * STEPS)


def _scaled(data: Path, out: Path) -> Any:
    return run("toy", data, out, forward_kwargs={"scale": 0.0})


def test_our_own_model_is_one_of_them(ranks: Pools, data: Path, tmp_path: Path) -> None:
    assert len(ranks(1).run(_train_gpt, data, tmp_path)[0]) == STEPS


def _train_gpt(data: Path, out: Path) -> dict[int, float]:
    sizes = {"num_layer": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 8}
    model = GPT(ModelConfig(block_size=LENGTH, vocab_size=61, intermediate_size=8, **sizes))
    trainer = Trainer(model, arguments(data, out))
    trainer.train()
    return losses(read_logs(trainer.log_dir)[0])


def test_settings_are_those_of_the_command(data: Path, tmp_path: Path) -> None:
    args = arguments(data, tmp_path)
    assert (args.max_grad_norm, args.warmup_steps, args.hub_model_id) == (0.0, 0, None)
    command = [f"--{name}={value}" for name, value in args.as_dict().items()]
    assert TrainingArguments.from_command_line(command).as_dict() == args.as_dict()
    ours = build_config_of(["--model_name", "gpt2", *command])
    assert (ours.optim.max_lr, ours.train.max_steps) == (args.learning_rate, args.max_train_steps)
    assert repr(args).startswith("TrainingArguments(output_dir='")
    assert get_num_tokens(args.train_file_pattern) == 40 * LENGTH


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"learning_rte": 1}, "TrainingArguments has no setting learning_rte; did you mean learning_rate?"),
        ({"learning_rate": None}, "TrainingArguments needs learning_rate; the flags --model_name gpt2"),
        ({"seed": "x"}, "seed=x must be a whole number"),
        ({"forward_kwargs": 3}, "forward_kwargs=3 must be a mapping"),
        ({"model_name": "gpt2"}, "TrainingArguments has no setting model_name"),
    ],
)
def test_wrong_settings(data: Path, tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        arguments(data, tmp_path, **settings)
    assert str(error.value).startswith(text)
    with pytest.raises(AttributeError, match="did you mean learning_rate"):
        _ = arguments(data, tmp_path).learning_rat


def test_two_optimizers_and_models_without_a_vocabulary(data: Path, tmp_path: Path) -> None:
    model = Toy()
    both: dict[str, Any] = {
        "optimizers": (torch.optim.SGD(model.parameters()), None),
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {}),
    }
    with pytest.raises(ConfigError, match="both give an optimizer; leave one out"):
        Trainer(model, arguments(data, tmp_path), **both)
    with pytest.raises(
        TinytronError, match=r"Linear has no vocabulary; give it a config\.vocab_size or an nn\.Embedding"
    ):
        Trainer(nn.Linear(2, 2), arguments(data, tmp_path))
