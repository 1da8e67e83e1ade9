"""A run as a user starts it: the launch script trains, validates, saves, resumes and exports the quickstart's model. Its
losses are compared with those that a CPU reached on the same data (recorded_run.json).

``python -m gpu.recorded_run`` writes that record anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from gpu.corpus import write_corpus
from gpu.part import Context, Result, run
from gpu.sizes import Sizes
from tinytron.data import find_shards
from tinytron.data.formats import open_shard

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("recorded_run.json")
VOCAB = 4096
# Nats between losses of the same step in bf16 on a GPU and in fp32 on a CPU. Two runs on a CPU, fp32 and bf16, are up to
# 0.03 apart.
TOLERANCE = 0.1
EXPORT_TOLERANCE = 0.02  # nats between our validation loss and that of the exported model, in fp32


def flags_of(sizes: Sizes, data: Path, log_dir: Path, precision: str) -> list[str]:
    """The quickstart's model for CPUs, for a few steps; a toy in a rehearsal."""
    steps, toy = sizes.train_steps, sizes.name == "toy"
    model = (2, 64, 2, 1, 128, 32) if toy else (6, 256, 4, 2, 704, 256)
    names = ("num_layer", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "seq_len")
    flags: list[object] = [word for name, value in zip(names, model, strict=True) for word in (f"--{name}", value)]
    seq_len = model[-1]
    rows = 4 if toy else 32
    flags += ["--block_size", seq_len, "--batch_size", rows, "--total_batch_size", rows * seq_len]
    flags += [
        "--vocab_size",
        256 if toy else VOCAB,
        "--optimizer",
        "muon",
        "--init_std",
        0.02,
        "--precision",
        precision,
    ]
    flags += ["--embedding_lr_mult", 0.5, "--scalar_lr_mult", 0.5, "--max_lr", 1e-2, "--min_lr", 1e-4]
    flags += ["--warmup_steps", max(1, steps // 20), "--max_steps", steps, "--dataset_path", data, "--log_dir", log_dir]
    flags += ["--do_val", "--val_every_steps", steps // 2, "--save_every_steps", steps // 2, "--keep_last", 3]
    return [str(flag) for flag in (*flags, "--exp_name", "real_run", "--log_every", 10)]


def launch(flags: Sequence[str], compiled: bool) -> None:
    """Train through the launch script. Raises: subprocess.CalledProcessError."""
    settings = {"NPROC": "1", "DEBUG": "0", "DETER_MODE": "1", "USE_COMPILE": str(int(compiled))}
    settings.setdefault("NUM_GPUS", os.environ.get("NUM_GPUS", "1"))
    script = ["bash", "scripts/debug_gpt_0.25b/pretrain.sh", *flags]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(script, cwd=ROOT, env={**os.environ, **settings, "PATH": path}, check=True)


def read_losses(folder: Path) -> dict[str, dict[int, float]]:
    """``{"train": {step: loss}, "val": {step: loss}}`` from log.txt."""
    losses: dict[str, dict[int, float]] = {"train": {}, "val": {}}
    for line in (folder / "log.txt").read_text().splitlines():
        step, stage, loss = line.split()
        losses[stage][int(step)] = float(loss)
    return losses


def prepare(sizes: Sizes, folder: Path) -> Path:
    """The data of a run of these sizes."""
    toy = sizes.name == "toy"
    return write_corpus(folder, 4_000 if toy else 1_000_000, 500 if toy else 40_000, 256 if toy else VOCAB)


def check_losses(result: Result, losses: dict[str, dict[int, float]], steps: int, vocab_size: int, fall: float) -> None:
    """The whole curve is there, begins at ln V, and falls by more than ``fall`` nats."""
    train = losses["train"]
    missing = sorted(set(range(1, steps + 1)) - train.keys())
    result.check("every step is logged", f"no losses of steps {missing[:5]}" if missing else "")
    first, last = train.get(1, math.nan), train.get(steps, math.nan)
    expected = math.log(vocab_size)
    result.check("the first loss is ln V", "" if abs(first - expected) < 0.2 else f"{first:.3f}, not {expected:.3f}")
    learned = last < first - fall
    result.check("the model learns", "" if learned else f"the loss goes from {first:.3f} to {last:.3f}")


def compare_with_record(result: Result, losses: dict[str, dict[int, float]], path: Path = RECORD) -> None:
    """Every recorded loss is within ``TOLERANCE``."""
    name = "the losses are those recorded on a CPU"
    if not path.exists():
        result.check(name, f"{path.name} is missing: python -m gpu.recorded_run records it")
        return
    recorded = json.loads(path.read_text())
    distances = [
        abs(losses[stage].get(int(step), math.nan) - loss)
        for stage in ("train", "val")
        for step, loss in recorded[stage].items()
    ]
    worst = math.nan if any(map(math.isnan, distances)) else max(distances)
    result.figure("real_run.distance_from_recorded", worst)
    result.check(name, "" if worst <= TOLERANCE else f"up to {worst:.3f} nats away, {TOLERANCE} allowed")
    result.note(f"the largest distance of any loss from the {recorded['precision']} run on a CPU is {worst:.4f} nats")


def resume(context: Context, flags: Sequence[str], folder: Path) -> None:
    """Forget the second half, train it again, and compare the logs letter by letter."""
    before = (folder / "log.txt").read_text()
    for path in folder.glob(f"{context.sizes.train_steps:05d}_*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    launch(flags, compiled=not context.rehearsing)
    same = (folder / "log.txt").read_text() == before
    context.result.check("resumed is bit-identical to uninterrupted", "" if same else "log.txt differs")


def export(context: Context, folder: Path, data: Path, val_loss: float, seq_len: int) -> None:
    """Export the last checkpoint, and let transformers compute the validation loss."""
    target = context.out / "export"
    command = [sys.executable, "-m", "tinytron", "export", "--checkpoint", str(folder), "--out", str(target)]
    subprocess.run(command, cwd=ROOT, check=True)
    if importlib.util.find_spec("transformers") is None:
        context.result.note("transformers is missing: the export was not opened")
        return
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).to(context.device).eval()
    tokens = torch.from_numpy(open_shard(find_shards(str(data), "val")[0])[:].astype("int64"))
    rows = (len(tokens) - 1) // seq_len
    ids = tokens[: rows * seq_len].view(rows, seq_len)
    labels = tokens[1 : rows * seq_len + 1].view(rows, seq_len)
    total = 0.0
    with torch.no_grad():
        for part, targets in zip(ids.split(16), labels.split(16), strict=True):
            logits = model(input_ids=part.to(context.device)).logits.flatten(0, 1).float()
            total += float(
                torch.nn.functional.cross_entropy(logits, targets.flatten().to(context.device), reduction="sum")
            )
    loss = total / labels.numel()
    near = abs(loss - val_loss) <= EXPORT_TOLERANCE
    problem = "" if near else f"loss {loss:.4f} in transformers, {val_loss:.4f} here"
    context.result.check("the exported model computes the same", problem)


def main(context: Context, _: argparse.Namespace) -> None:
    """Train, compare, resume, export."""
    data = prepare(context.sizes, context.out / "data")
    precision = "fp32" if context.rehearsing else context.sizes.precision
    flags = flags_of(context.sizes, data, context.out / "log", precision)
    launch(flags, compiled=not context.rehearsing)
    (folder,) = (path for path in (context.out / "log").iterdir() if path.is_dir())
    losses = read_losses(folder)
    toy = context.rehearsing
    check_losses(context.result, losses, context.sizes.train_steps, 256 if toy else VOCAB, 0.0 if toy else 2.0)
    if not toy:
        compare_with_record(context.result, losses)
    export(context, folder, data, losses["val"][context.sizes.train_steps], int(flags[flags.index("--seq_len") + 1]))
    resume(context, flags, folder)
    for path in (*folder.glob("*_opt"), *folder.glob("*_model.pt"), context.out / "export", data):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    context.result.note(
        f"trained, saved, resumed and exported; validation {losses['val'][context.sizes.train_steps]:.4f}"
    )
    if any(context.result.problems.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main, __doc__)
