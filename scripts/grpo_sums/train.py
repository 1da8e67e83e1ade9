"""Reinforcement learning with a reward that can be checked: a small model learns to add, by GRPO.

    python scripts/grpo_sums/train.py       one process, two minutes on a CPU

It writes sums such as ``7+5=12``, half of them wrong, trains a model of characters on them, and then rewards right answers
(docs/posttraining.md). ``reward`` is the function that a job would name: ``grpo.reward=scripts/grpo_sums/train.py:reward``.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from tinytron.cli import entry
from tinytron.config import configuration
from tinytron.text.options import TokenizeOptions
from tinytron.text.tokenize import tokenize_dataset
from tinytron.training import Trainer, build_config, parse_args
from tinytron.training.grpo import GRPOTrainer

FOLDER = Path("data/sums")
MODEL = (
    *("--num_layer", 2, "--hidden_size", 64, "--num_attention_heads", 4, "--num_key_value_heads", 4),
    *("--intermediate_size", 128, "--seq_len", 32, "--block_size", 32, "--precision", "fp32", "--vocab_size", 16),
)
COMMON = ("--log_dir", "log/sums", "--lr_schedule", "constant", "--log_every", 20)


def reward(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[int]) -> list[float]:
    """1 for the right number and nothing else, otherwise 0."""
    return [float(text.strip() == str(right)) for text, right in zip(completions, answer, strict=True)]


def write_data(folder: Path) -> None:
    """Texts to imitate, and prompts with their answers."""
    draw = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    texts, prompts = [], {"train": [], "val": []}  # type: ignore[var-annotated]
    for _ in range(20_000):
        a, b = draw.randrange(10), draw.randrange(10)
        wrong = draw.random() < 0.5
        texts.append({"text": f"{a}+{b}={draw.randrange(19) if wrong else a + b}"})
    for split, count in (("train", 2000), ("val", 100)):
        for _ in range(count):
            a, b = draw.randrange(10), draw.randrange(10)
            prompts[split].append({"prompt": f"{a}+{b}=", "answer": a + b})
    for name, rows in (("texts", texts), ("train", prompts["train"]), ("val", prompts["val"])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Imitate, then reinforce. Extra arguments are flags for both runs."""
    more = sys.argv[1:]
    write_data(FOLDER)
    shards = FOLDER / "shards"
    tokenize_dataset(
        TokenizeOptions(dataset_path=str(FOLDER / "texts.jsonl"), train_chars=True, output_dir=str(shards))
    )
    flags = ("--dataset_path", shards, "--total_batch_size", 64 * 32, "--batch_size", 64, "--max_lr", 2e-3, *MODEL)
    words = [*flags, *COMMON, "--exp_name", "imitate", "--max_steps", 500, *more]
    imitating = Trainer(build_config(parse_args([str(word) for word in words])))
    imitating.train()

    options = {"max_new_tokens": 4, "reward": f"{__file__}:reward", "rollout_batch_size": 512}
    flags = ("--init_from", imitating.log_dir, "--dataset_path", FOLDER / "train.jsonl", "--do_val")
    flags = (*flags, "--val_dataset_path", FOLDER / "val.jsonl", "--val_every_steps", 25)
    flags = (*flags, "--total_batch_size", 16 * 32, "--batch_size", 16, "--max_lr", 5e-4, *MODEL)
    words = [*flags, *COMMON, "--exp_name", "reinforce", "--max_steps", 100, "--max_epochs", 10, *more]
    del imitating  # it holds the lock of its folder
    with configuration({"grpo": options, "optimization": {"grpo": {"group_size": 8}, "ppo": {"beta": 0.01}}}):
        trainer = GRPOTrainer(build_config(parse_args([str(word) for word in words])))
    before = trainer.eval()
    trainer.train()
    print(f"right answers: {-before:.0%} after imitation, {-trainer.one_step_results['val_loss']:.0%} after GRPO")


if __name__ == "__main__":
    entry.run(main)
