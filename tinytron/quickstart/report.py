"""The quickstart's report: samples from the model, its loss curve, and its validation loss in nats per token and in bits
per byte, next to what gzip -9 and xz -9 need for the same bytes."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import torch

from tinytron.checkpoint import CheckpointFiles, load_model, newest_checkpoint
from tinytron.data.formats import open_shard
from tinytron.data.shards import find_shards
from tinytron.errors import CheckpointError
from tinytron.inference import SamplingOptions, complete
from tinytron.quickstart.prepare import FLAGS
from tinytron.text.run_tokenizer import RunTokenizer, find_tokenizer
from tinytron.text.tokenizers import TextTokenizer
from tinytron.training import Config
from tinytron.training.run.folder import run_folder
from tinytron.utils.optional import require_package
from tinytron.utils.texts import next_generation, watch_command

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
    for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines():
        step, stage, loss = line.split()
        losses[stage].append((int(step), float(loss)))
    return losses


def read_bits_per_byte(folder: Path) -> float | None:
    """The last validation's bits per byte from log.jsonl; ``None`` if it has none."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [record["bits_per_byte"] for record in records if record["stage"] == "val" and "bits_per_byte" in record]
    return found[-1] if found else None


def held_out_text(tokenizer: TextTokenizer, shards: list[Path], seq_len: int) -> bytes:
    """The text of the validation targets: the tokens of every shard in whole samples, without the shard's first token."""
    texts = []
    for shard in shards:
        tokens = open_shard(shard)
        used = (len(tokens) - 1) // seq_len * seq_len
        texts.append(tokenizer.decode(tokens[1 : used + 1].tolist()))
    return "".join(texts).encode()


def draw(losses: dict[str, list[tuple[int, float]]], gzip_loss: float, xz_loss: float, path: Path) -> None:
    """Draw the loss curve, with lines for the compressors, and save it as a PNG."""
    figure = require_package("matplotlib.figure", "quickstart").Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
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


def read_prompts(folder: Path) -> list[str]:
    """The prompts that ``prepare`` chose for the data. A folder from an earlier version has none; then samples start
    without a prompt."""
    try:
        found: dict[str, list[str]] = json.loads((folder / FLAGS).read_text(encoding="utf-8"))
    except OSError:
        found = {}
    return found.get("prompts") or ["", "", ""]


def print_samples(files: CheckpointFiles, found: RunTokenizer, texts: list[str]) -> None:
    """Print a continuation of each of ``texts`` by the trained model, on a GPU if there is one."""
    model, _ = load_model(files.model, "cuda" if torch.cuda.is_available() else "cpu")
    prompts = [found.prompt_ids(prompt) for prompt in texts]
    options = SamplingOptions(max_new_tokens=SAMPLE_TOKENS, temperature=0.7, top_k=50, stop_tokens=found.stop_tokens)
    made = complete(model, prompts, options, decode=found.tokenizer.decode, vocab_size=found.tokenizer.vocab_size)
    for sample in made.samples:
        print(f"\n--- sample ---\n{texts[sample.prompt]}{sample.text}")


def report(config: Config) -> None:
    """Report on the run that ``config`` describes. Raises: CheckpointError without a checkpoint."""
    files = finished_run(config)
    found = find_tokenizer(config.data.dataset_path)
    print_samples(files, found, read_prompts(Path(str(config.data.dataset_path))))

    losses = read_losses(files.folder)
    model_bits = read_bits_per_byte(files.folder)
    if not losses["val"] or model_bits is None:
        print("\nno validation loss in the logs (--no-do_val): nothing to compare with gzip and xz")
        return
    shards = find_shards(str(config.data.dataset_path), "val")
    text = held_out_text(found.tokenizer, shards, config.train.seq_len)
    val_loss = losses["val"][-1][1]
    bits = {
        "this model": model_bits,
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
    to_nats = val_loss / model_bits  # from bits per byte to nats per token
    draw(losses, bits["gzip -9"] * to_nats, bits["xz -9"] * to_nats, files.folder / "loss.png")
    print(f"\nvalidation loss after {files.step} steps: {val_loss:.4f} nats per token")
    print(f"the same {len(text):,} held-out bytes in bits per byte (less is better):")
    for name, value in bits.items():
        print(f"  {name:<11} {value:.3f}")
    print(f"loss curve: {files.folder / 'loss.png'}\nweights:    {files.model}")
    print(f"{watch_command(files.folder)} (its curves on a page in the browser; --once: a table here)")
    print(next_generation(files.folder, "--max_new_tokens", 200))
