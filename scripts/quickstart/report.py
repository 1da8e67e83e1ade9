"""Quickstart, part 3: what a run has learned.

python scripts/quickstart/report.py [the flags of the training run]

Prints the validation loss in nats per token and in bits per byte beside what gzip -9 and xz -9 need for the same bytes,
samples from the model, and draws the loss curve. Needs a run on the shards of scripts/quickstart/prepare.py.
"""

from __future__ import annotations

import gzip
import lzma
import math
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tokenizers import Tokenizer

from tinytron.checkpoint import CheckpointFiles, load_model, newest_checkpoint
from tinytron.cli import entry
from tinytron.data.formats import open_shard
from tinytron.data.shards import find_shards
from tinytron.errors import CheckpointError
from tinytron.inference import SamplingOptions, complete
from tinytron.training import Config, build_config, parse_args
from tinytron.training.run.folder import run_folder

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

PROMPTS = ("def read_lines(path):\n", "class Stack:\n", "import os\n")
EOT = "<|endoftext|>"
SAMPLE_TOKENS = 120


def finished_run(config: Config) -> CheckpointFiles:
    """The newest checkpoint of the run that ``config`` describes. Raises: CheckpointError if there is none."""
    folder = run_folder(config)
    files = newest_checkpoint(folder)
    if files is None:
        raise CheckpointError(
            f"nothing to report: {folder} has no checkpoint (runs with --debug or --no-do_save write none)"
        )
    return files


def read_losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """``{"train": [(step, loss), ...], "val": [...]}`` from log.txt."""
    losses: dict[str, list[tuple[int, float]]] = {"train": [], "val": []}
    for line in (folder / "log.txt").read_text().splitlines():
        step, stage, loss = line.split()
        losses[stage].append((int(step), float(loss)))
    return losses


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes each token id stands for; end-of-text stands for none.

    Byte-level BPE writes bytes as characters: printable Latin-1 as itself, the others as 256, 257, ... in order.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    names = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return [b"" if name == EOT else bytes(byte_of[c] for c in name) for name in names]


def predicted_bytes(tokenizer: Tokenizer, shards: list[Path], seq_len: int) -> tuple[int, bytes]:
    """How many targets validation has, and the bytes they stand for."""
    meaning, count, text = token_bytes(tokenizer), 0, []
    for shard in shards:
        tokens = open_shard(shard)
        used = (len(tokens) - 1) // seq_len * seq_len
        count += used
        text += [meaning[t] for t in tokens[1 : used + 1].tolist()]
    return count, b"".join(text)


def draw(losses: dict[str, list[tuple[int, float]]], gzip_loss: float, xz_loss: float, path: Path) -> None:
    """The loss curve, with the compressors' marks, as a PNG."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*zip(*losses["train"], strict=True), color="tab:blue", alpha=0.35, linewidth=0.8, label="training batch")
    if losses["val"]:
        axes.plot(*zip(*losses["val"], strict=True), "o-", color="tab:blue", markersize=4, label="validation")
    axes.axhline(gzip_loss, color="tab:red", linestyle="--", linewidth=1, label="gzip -9")
    axes.axhline(xz_loss, color="tab:orange", linestyle="--", linewidth=1, label="xz -9")
    axes.set(
        xlabel="optimizer step", ylabel="loss [nats per token]", title="Held-out text: the model and the compressors"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def print_samples(files: CheckpointFiles, tokenizer: Any) -> None:
    """A continuation of each of ``PROMPTS`` by the trained model, on the best device."""
    model, _ = load_model(files.model, "cuda" if torch.cuda.is_available() else "cpu")
    eot = tokenizer.token_to_id(EOT)
    prompts = [[eot, *tokenizer.encode(prompt).ids] for prompt in PROMPTS]
    options = SamplingOptions(max_new_tokens=SAMPLE_TOKENS, temperature=0.7, top_k=50, stop_tokens=(eot,))
    for sample in complete(model, prompts, options, decode=tokenizer.decode).samples:
        print(f"\n--- sample ---\n{PROMPTS[sample.prompt]}{sample.text}")


def main() -> None:
    """Report on the run that the command line describes."""
    config = build_config(parse_args())
    files = finished_run(config)
    data = Path(config.data.dataset_path or "")
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    print_samples(files, tokenizer)

    losses = read_losses(files.folder)
    if not losses["val"]:
        print("\nno validation loss in log.txt (--no-do_val): nothing to compare with gzip and xz")
        return
    count, text = predicted_bytes(tokenizer, find_shards(str(data), "val"), config.train.seq_len)
    val_loss = losses["val"][-1][1]
    bits = {
        "this model": val_loss * count / math.log(2) / len(text),
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
    to_nats = math.log(2) * len(text) / count
    draw(losses, bits["gzip -9"] * to_nats, bits["xz -9"] * to_nats, files.folder / "loss.png")
    print(f"\nvalidation loss after {files.step} steps: {val_loss:.4f} nats per token")
    print(f"the same {len(text):,} held-out bytes in bits per byte (less is better):")
    for name, value in bits.items():
        print(f"  {name:<11} {value:.3f}")
    print(f"loss curve: {files.folder / 'loss.png'}\nweights:    {files.model}")


if __name__ == "__main__":
    entry.run(main)
