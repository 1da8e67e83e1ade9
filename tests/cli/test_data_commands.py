"""From a jsonl file to a training step in two commands, as docs/data.md has them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, TINY, follow, read_logs
from tinytron.cli.tokenize import training_flags
from tinytron.data.manifest import Manifest, ShardFacts, TokenizerFacts
from tinytron.distributed.layout import ParallelLayout
from tinytron.model import GPT
from tinytron.training.arguments import build_config, parse_args
from tinytron.training.derive import derive

TOKENIZER = TokenizerFacts("train_bpe", "300", "", 300, 0, "<end>", "prepend")


@pytest.mark.parametrize(
    ("train", "val", "validates"),
    [
        ([40], [], False), ([3000], [9], False), ([100] * 99, [100], True), ([10**6], [10**4], True),
        ([2**27] * 3, [10**6], True), ([2**27] * 80, [10**6], True),
    ],
)  # fmt: skip
def test_the_printed_command_fits_any_data(train: list[int], val: list[int], validates: bool) -> None:
    shards = [ShardFacts(f"train_{n:06}.bin", count, 1, "") for n, count in enumerate(train)]
    shards += [ShardFacts(f"val_{n:06}.bin", count, 1, "") for n, count in enumerate(val)]
    manifest = Manifest("uint16", "timl", TOKENIZER, {}, {}, "", {}, {}, 0, True, shards)
    words = shlex.split(training_flags(Path("my data"), manifest))
    assert words[:2] == ["--dataset_path", "my data"]
    config = build_config(parse_args(words))
    samples = sum((count - 1) // config.train.seq_len for count in train)
    info = derive(config, ParallelLayout(world_size=1), samples)
    assert info.warmup_steps == config.optim.warmup_steps < info.max_steps
    assert config.train.do_val == validates
    tokens = config.train.total_batch_size * info.max_steps
    parameters = sum(p.numel() for p in GPT(config.model, device="meta", seed=None).parameters())
    assert sum(train) < 3e6 or 10 < tokens / parameters < 100


def command(*words: object) -> str:
    """What a command prints. Fails with it unless the command succeeds."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_commands_from_text_to_training(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {n}: " + "to be or not to be, " * (n % 7 + 1)}) for n in range(200)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    tokenize = (
        "scripts/tokenize_dataset.py",
        "--dataset_path",
        tmp_path / "texts.jsonl",
        "--output_dir",
        tmp_path / "out",
    )
    tokenize = (*tokenize, "--train_bpe", 300, "--val_fraction", 0.1, "--num_proc", 2)
    advice = re.search(r"train with: python (pretrain_debug\.py --dataset_path .* --do_val)$", command(*tokenize), re.M)
    assert advice is not None
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = command(*tokenize)
    assert again == f"{tmp_path / 'out'} already has the shards: nothing to do\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    # As printed, but for two steps, in the precision that every CPU multiplies fast.
    trained = command(
        *shlex.split(advice[1]), "--precision", "fp32", "--max_steps", 2, "--log_dir", tmp_path / "advice"
    )
    assert "step 2/2 | loss" in trained
    assert "step 2 | val loss" in trained
    assert follow(trained).startswith("the")
    again = command(*shlex.split(advice[1]), "--precision", "fp32", "--max_steps", 2, "--log_dir", tmp_path / "advice")
    assert "already trained: 2 of 2 steps are done" in again
    assert follow(again) == follow(trained)
    (run,) = (tmp_path / "advice").iterdir()
    exported = command("-m", "tinytron", "export", "--checkpoint", run, "--out", tmp_path / "export")
    assert follow(exported) == follow(trained)  # the same weights, the same text
    flags = [flag for flag in TINY if flag != "--use_mock_data"]
    flags += ["--vocab_size", 300, "--dataset_path", tmp_path / "out", "--log_dir", tmp_path / "log", "--max_steps", 2]
    command("pretrain_debug.py", *flags, "--do_val", "--packing", "best_fit", "--document_mask")
    (run,) = (tmp_path / "log").iterdir()
    log, records = read_logs(run)
    assert [line.split()[:2] for line in log.splitlines()] == [["1", "train"], ["2", "train"], ["2", "val"]]
    assert 4 < records[-1]["loss"] < 7  # ln 300 is 5.7
    assert command("-m", "tinytron", "data", "verify", tmp_path / "out").startswith("ok: ")
