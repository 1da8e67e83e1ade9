"""GRPO: the steps of the formula written out in torch; rewards, validation, continued runs, mistakes."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, config_of, losses, read_logs, whole_weights
from tests.interop import families
from tinytron.config import configuration
from tinytron.data.prompts import Prompts
from tinytron.errors import DataError, TinytronError
from tinytron.inference.engine import complete
from tinytron.inference.sampler import SamplingOptions
from tinytron.interop import load_pretrained
from tinytron.model import GPT
from tinytron.training.grpo import GRPOTrainer, token_losses
from tinytron.training.rollouts import advantages

Pools = Callable[[int], Ranks]
STEPS, S, PROMPTS, GROUP, LR, BETA, EPS, NEW = 3, 20, 4, 3, 0.02, 0.1, 0.05, 6

RULES = """
def reward(prompts, completions, **columns):
    assert set(columns) == {"answer"}, columns
    found = []
    for prompt, text, answer in zip(prompts, completions, columns["answer"], strict=True):
        found.append(float(text.count(str(answer % 10))) - 0.1 * len(text))
    return found


def broken(prompts, completions, **columns):
    return 1 / 0


def short(prompts, completions, **columns):
    return [0.0]


def endless(prompts, completions, **columns):
    return [float("inf")] * len(prompts)
"""
CHARACTERS = "0123456789+= abcdefghijklmnopqrst"
FLAGS: tuple[object, ...] = (
    *(
        "--exp_name",
        "grpo",
        "--precision",
        "fp64",
        "--seq_len",
        S,
        "--batch_size",
        2,
        "--total_batch_size",
        PROMPTS * S,
    ),
    *("--max_steps", STEPS, "--max_lr", LR, "--lr_schedule", "constant", "--warmup_steps", 0, "--log_every", 1),
    *("--grad_clip_value", 0, "--max_epochs", STEPS),
)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """``write_files`` for a model without experts."""
    return write_files(tmp_path, "llama")


def write_files(tmp_path: Path, family: str) -> Path:
    """A model with a tokenizer of single characters, prompts, and rewards."""
    tokenizers = pytest.importorskip("tokenizers")
    families.save(family, tmp_path / "hf")
    words = {word: i for i, word in enumerate(["<end>", *CHARACTERS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    families.change_config(tmp_path / "hf", eos_token_id=0, bos_token_id=None)
    rows = [{"prompt": f"{a}+{b}=", "answer": a + b} for a, b in ((1, 2), (33, 4), (5, 5), (12, 90))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rules.py").write_text(RULES)
    return tmp_path


def run(files: Path, log_dir: Path, *flags: object, cls: Any = GRPOTrainer, **options: Any) -> Run:
    """Train. A job for the pool."""
    grpo = {"reward": f"{files / 'rules.py'}:reward", "max_new_tokens": NEW, **options.pop("grpo", {})}
    tree = {
        "grpo": grpo,
        "optimization": {
            "grpo": {"group_size": GROUP, **options},
            "ppo": {"beta": BETA, "clip_eps": EPS, "sample_temperature": 0.7},
        },
    }
    where = ("--log_dir", log_dir, "--init_from", files / "hf", "--dataset_path", files / "prompts.jsonl")
    with configuration(tree):
        trainer = cls(config_of(*FLAGS, *where, *flags))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer.train()
    frozen = () if trainer.reference is None else (trainer.config.model,)
    assert trainer._frozen_models(trainer.config) == frozen
    weights: dict[str, Any] = dict(whole_weights(trainer))
    weights["printed"] = printed.getvalue()
    log, records = read_logs(trainer.log_dir) if trainer.master_process else ("", [])
    return Run(trainer.log_dir, trainer.step, log, records, weights)


def iterated(files: Path, log_dir: Path, *flags: object) -> Run:
    """``run`` with two updates a step. A job for the pool."""
    return run(files, log_dir, *flags, iterations=2)


def error_of(files: Path, log_dir: Path, *flags: object, **options: Any) -> str:
    """The error of a run. A job for the pool."""
    try:
        run(files, log_dir, *flags, **options)
    except TinytronError as error:
        return str(error)
    return ""


def log_probs(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of the answer's tokens, from whole logits."""
    tokens = torch.tensor([[*prompt, *answer]])
    found = F.log_softmax(model(tokens[:, :-1]), -1).gather(2, tokens[:, 1:, None])[0, :, 0]
    return found[len(prompt) - 1 :]


def twin(files: Path, iterations: int, *flags: object) -> tuple[list[dict[str, float]], GPT]:
    """The same steps, answer by answer, by automatic differentiation."""
    config = config_of(*FLAGS, "--init_from", files / "hf", *flags)
    model = GPT(config.model, dtype=torch.float64, seed=None)
    load_pretrained(model, str(files / "hf"))
    first = copy.deepcopy(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    rows = [json.loads(line) for line in (files / "prompts.jsonl").read_text().splitlines()]
    ids = {word: i for i, word in enumerate(["<end>", *CHARACTERS])}
    prompts = [[ids[c] for c in row["prompt"]] for row in rows]
    space: dict[str, Any] = {}
    exec(RULES, space)
    found = []
    for step in range(STEPS):
        options = SamplingOptions(
            max_new_tokens=NEW, temperature=0.7, seed=config.seed.seed + step, num_samples=GROUP, stop_tokens=(0,)
        )
        unused = range(len(ids), families.VOCAB)
        made = complete(model, prompts, options, without=list(unused))
        answers = [[*s.tokens, 0] if s.finish == "stop" else s.tokens for s in made.samples]
        texts = ["".join(CHARACTERS[t - 1] for t in s.tokens) for s in made.samples]
        of_row = [rows[s.prompt] for s in made.samples]
        judged = space["reward"]([r["prompt"] for r in of_row], texts, answer=[r["answer"] for r in of_row])
        rewards = torch.tensor(judged, dtype=torch.float64)
        rewards = rewards.view(PROMPTS, GROUP)
        advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
        old: list[torch.Tensor] = []
        for update in range(iterations):
            total = torch.zeros((), dtype=torch.float64)
            for i, sample in enumerate(made.samples):
                logp = log_probs(model, prompts[sample.prompt], answers[i])
                if not update:
                    old.append(logp.detach())
                with torch.no_grad():
                    reference = log_probs(first, prompts[sample.prompt], answers[i])
                ratio = (logp - old[i]).exp()
                surrogate = torch.minimum(ratio * advantage[i], ratio.clamp(1 - EPS, 1 + EPS) * advantage[i])
                k3 = (reference - logp).exp() - (reference - logp) - 1
                total = total + (BETA * k3 - surrogate).mean()
            loss = total / len(made.samples)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        lengths = sum(map(len, answers)) / len(answers)
        found.append({"loss": float(loss.detach()), "reward": float(rewards.mean()), "completion_length": lengths})
    return found, model


@pytest.mark.parametrize(
    ("world", "job", "flags"),
    [
        (1, run, ()),
        (2, run, ("--no-use_distributed_optimizer",)),
        (2, iterated, ("--recompute", "full")),
        (2, iterated, ("--sep_size", 2)),
        (4, run, ("--sep_size", 2, "--batch_size", 1)),
    ],
)
def test_steps_are_those_of_the_formula(
    ranks: Pools, files: Path, world: int, job: Callable[..., Run], flags: tuple[object, ...]
) -> None:
    expected, model = twin(files, iterations=1 + (job is iterated))
    result = ranks(world).run(job, files, files / "log", *flags)[0]
    records = [record for record in result.records if record["stage"] == "train"]
    assert len(records) == STEPS
    for record, wanted in zip(records, expected, strict=True):
        for name, value in wanted.items():
            assert record[name] == pytest.approx(value, rel=1e-8, abs=1e-10), name
    assert records[-1]["kl"] > 0
    assert (records[-1]["clipped"] > 0) == (job is iterated)
    for name, value in model.named_parameters():
        torch.testing.assert_close(result.extra[name], value, rtol=1e-7, atol=1e-9)


def test_experts_on_two_ranks_answer_together(ranks: Pools, tmp_path: Path) -> None:
    files = write_files(tmp_path, "mixtral")
    off = ("--moe_aux_loss_coef", 0)
    expected, model = twin(files, 1, *off)
    result = ranks(2).run(run, files, files / "log", *off, "--ep_size", 2)[0]
    records = [record for record in result.records if record["stage"] == "train"]
    assert [record["loss"] for record in records] == pytest.approx(
        [one["loss"] for one in expected], rel=1e-8, abs=1e-10
    )
    assert [record["reward"] for record in records] == pytest.approx([one["reward"] for one in expected])
    for name, value in model.named_parameters():
        torch.testing.assert_close(result.extra[name], value, rtol=1e-7, atol=1e-9)


def test_continued_and_validated(ranks: Pools, files: Path) -> None:
    flags = ("--do_val", "--val_dataset_path", files / "prompts.jsonl", "--val_every_steps", 1)
    whole = ranks(2).run(run, files, files / "whole", *flags)[0]
    ranks(2).run(run, files, files / "parts", *flags, "--max_steps", 2)
    parts = ranks(2).run(run, files, files / "parts", *flags)[0]
    assert all(torch.equal(parts.extra[name], value) for name, value in whole.extra.items() if name != "printed")
    assert losses(parts.log) == losses(whole.log)
    values = [record for record in whole.records if record["stage"] == "val"]
    assert [record["step"] for record in values] == [1, 2, 3]
    assert all(record["loss"] == -record["reward"] for record in values)
    assert "error" not in whole.extra["printed"], "every sink takes the records"


LONGER = ("--max_steps", 5, "--max_epochs", 5)


class Dropped(GRPOTrainer):  # type: ignore[type-arg]
    """Gets a signal in the second update of its second step, when steps may be left between micro-batches."""

    def train_step(self, microbatches: Any) -> None:
        self.updates = 0
        super().train_step(microbatches)

    def _loss(self, batch: Any) -> Any:
        found = super()._loss(batch)
        self.updates += 1
        if self.step == 1 and self.updates == 8:  # two updates have 12 micro-batches
            os.kill(os.getpid(), signal.SIGTERM)
        return found


def stopped(files: Path, log_dir: Path) -> int:
    """The step that a stopped run saves. A job for the pool."""
    with pytest.raises(SystemExit):
        run(files, log_dir, *LONGER, cls=Dropped, iterations=2)
    return int(max(path.name for path in log_dir.glob("*/*_meta.pt"))[:5])


def test_a_step_with_several_updates_is_never_dropped_halfway(ranks: Pools, files: Path) -> None:
    """The step that the signal came in is finished, and the run then continues as if nothing had been."""
    (step,) = ranks(1).run(stopped, files, files / "stopped")
    assert 2 <= step < 5
    whole = ranks(1).run(iterated, files, files / "whole", *LONGER)[0]
    again = ranks(1).run(iterated, files, files / "stopped", *LONGER)[0]
    assert all(torch.equal(again.extra[name], value) for name, value in whole.extra.items() if name != "printed")


def test_adapters_need_no_second_model(ranks: Pools, files: Path) -> None:
    """With LoRA the reference is the model without its adapters: the divergence is 0 at first, and then not."""
    result = ranks(2).run(run, files, files / "log", "--lora_rank", 2, "--max_lr", 0.1)[0]
    kl = [record["kl"] for record in result.records if record["stage"] == "train"]
    assert kl[0] == pytest.approx(0, abs=1e-12)
    assert kl[-1] > 1e-6


def test_what_needs_batches_of_the_data_is_refused(ranks: Pools, files: Path) -> None:
    (lagging,) = ranks(1).run(error_of, files, files / "log", "--eval_tasks", "lagging")
    assert "lagging needs a trainer that trains on the batches of its data, but GRPOTrainer makes its own" in lagging
    (positions,) = ranks(1).run(error_of, files, files / "log", "--log_loss_by_position")
    assert "--log_loss_by_position needs the loss of each token, but here it is that of an answer; drop it" in positions


def test_texts_and_dialogues_do_not_mix(tmp_path: Path) -> None:
    lines = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="line 2 and line 1 have prompts of two kinds, a text and a list of messages"):
        Prompts(tmp_path / "mixed.jsonl", lambda prompt: [1], seq_len=8, longest=4)


def test_rewards_teach(files: Path) -> None:
    """The advantage is relative to the group, and a clipped token has no gradient."""
    rewards = torch.tensor([[1.0, 0.0, 0.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    found = advantages(rewards, scale=False)
    assert torch.allclose(found, torch.tensor([[2 / 3, -1 / 3, -1 / 3], [0.0, 0.0, 0.0]], dtype=torch.float64))
    logp = torch.log(torch.tensor([[0.5, 0.1, 0.5, 0.1]], dtype=torch.float64)).requires_grad_()
    old = torch.log(torch.tensor([[0.3, 0.3, 0.3, 0.3]], dtype=torch.float64))
    reference = torch.log(torch.tensor([[0.2, 0.2, 0.4, 0.1]], dtype=torch.float64))
    for advantage in (1.0, -1.0):
        own = token_losses(logp, old, reference, torch.tensor([advantage], dtype=torch.float64), 0.3, 0.2)
        (gradient,) = torch.autograd.grad(own.loss.sum(), logp)
        # torch shares the gradient of a minimum between equal values; there are none here.
        assert torch.allclose(own.slope, -gradient)
    assert own.clipped.tolist() == [[0.0, 1.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("flags", "options", "text"),
    [
        ((), {"grpo": {"max_new_tokens": 20}}, "grpo.max_new_tokens=20 leaves no room for a prompt in --seq_len 20"),
        ((), {"grpo": {"max_new_tokens": 17}}, "the prompt in line 2 has 5 tokens, and at most 4 leave room"),
        ((), {"group_size": 1}, "grpo.group_size=1 must be at least 2; use 4"),
        ((), {"grpo": {"reward": "nowhere"}}, "grpo.reward=nowhere must be FILE.py:FUNCTION"),
        ((), {"grpo": {"reward": "nowhere.py:f"}}, "grpo.reward=nowhere.py:f cannot be loaded"),
        ((), {"grpo": {"reward": None}}, "needs rewards; give grpo.reward=rewards.py:reward"),
        ((), {"grpo": {"reward": "RULES:broken"}}, "the reward function failed .ZeroDivisionError"),
        ((), {"grpo": {"reward": "RULES:short"}}, "returned 1 numbers for 12 answers; return one for each"),
        ((), {"grpo": {"reward": "RULES:endless"}}, "the reward function returned inf for the answer"),
        (("--dataset_path", "RULES"), {}, "line 2 has no prompt; write"),
        (("--dataset_path", "missing.jsonl"), {}, "missing.jsonl cannot be read"),
    ],
)
def test_mistakes(ranks: Pools, files: Path, flags: tuple[object, ...], options: dict[str, Any], text: str) -> None:
    rules = str(files / "rules.py")
    given = {
        key: {k: v.replace("RULES", rules) if isinstance(v, str) else v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in options.items()
    }
    words = [rules if flag == "RULES" else flag for flag in flags]
    message = error_of(files, files / "log", *words, **given)
    assert re.search(text, message), message
