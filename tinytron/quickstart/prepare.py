"""The quickstart's data: find text, train a byte-level BPE tokenizer on it, write token shards, and choose a model.

Without a path of the user the corpus is the source code of the running Python's standard library (without its tests), which
every machine has. Progress goes to stderr. A second call finds everything done.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinytron.data.manifest import MANIFEST
from tinytron.errors import DataError
from tinytron.text.options import TokenizeOptions
from tinytron.text.sources import file_states
from tinytron.text.state import recipe_hash
from tinytron.text.tokenize import finished, tokenize_dataset
from tinytron.utils.lock import wait_for_lock
from tinytron.utils.paths import files_below
from tinytron.utils.profile import measured_matmul_rate
from tinytron.utils.texts import counted
from tinytron.utils.training import write_atomically

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
CODE_PROMPTS = ("def read_lines(path):\n", "class Stack:\n", "import os\n")  # for the standard library
PROMPTS, PROMPT_CHARS = 3, 60  # for other text: number of prompts, lines of the held-out part, and their maximum length
HELD_OUT = 20  # one part in 20 is kept for validation: whole files, or the end of each file if there are few
MIN_BYTES = 100_000
FLAGS, LOCK = "prepared.json", "prepare.lock"  # FLAGS is written last
CPU_SECONDS = 360  # the target training time
CPU_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CpuSize:
    """A model for CPUs.

    ``flops`` is the FLOPs per token. ``part`` is the model's training speed relative to the rate of large matrix products,
    including all other work of a step (in bf16; twice that in fp32). ``max_lr`` is the peak learning rate of Muon.
    """

    flags: dict[str, Any]
    flops: float
    part: float
    max_lr: float
    reason: str
    validations: int
    most_steps: int


def _shape(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, tokens: int) -> dict[str, Any]:
    shape = {"num_layer": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return shape | {"intermediate_size": intermediate, "seq_len": 256, "total_batch_size": tokens}


# The larger model needs about two million tokens to be worth its FLOPs. With fewer FLOPs than that, the smaller one reads
# 2.3 times the text, in steps of half the size, and is validated less often (docs/benchmarks.md, The quickstart).
LARGER_FROM = 6e13  # FLOPs
LARGER = CpuSize(_shape(6, 256, 4, 2, 704, 8192), 3.6e7, 0.25, 0.01, "fast enough for the larger of two models", 4, 420)
SMALLER = CpuSize(
    _shape(4, 192, 3, 1, 512, 4096), 1.53e7, 0.16, 0.02, "too slow for a larger model to read enough text", 2, 2000
)


def say(text: str) -> None:
    """Print progress to stderr; stdout is for the results."""
    print(text, file=sys.stderr, flush=True)


def find_files(data: str | None) -> list[Path]:
    """The files of the corpus: every file below ``data``, or the standard library's sources. Raises: DataError if there are
    none."""
    root = Path(data) if data else Path(sysconfig.get_paths()["stdlib"])
    if root.is_file():
        return [root]
    files = [
        path
        for path in sorted(files_below(root))
        if data or (path.suffix == ".py" and not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]))
    ]
    if not files:
        raise DataError(f"DATA={data} holds no files; name a text file or a folder of text files")
    return files


def read_documents(files: list[Path]) -> Iterator[tuple[str, str]]:
    """Name and text of each UTF-8 file; other files are skipped."""
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield "/".join(path.parts[-2:]), text


def split(documents: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The training texts and the held-out texts. About a 20th of the corpus is held out: whole files, chosen by a hash of
    their names (no large ones, so that there are many), or the end of each file if there are few."""
    if len(documents) < 2 * HELD_OUT:
        cuts = [(text, len(text) - len(text) // HELD_OUT) for _, text in documents]
        return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts if text[cut:]]
    by_hash = sorted(documents, key=lambda named: hashlib.sha256(named[0].encode()).digest())
    wanted = sum(len(text) for _, text in documents) / HELD_OUT
    train: list[str] = []
    held_out: list[str] = []
    for _, text in by_hash:
        chosen = len(text) < wanted / 4 and sum(map(len, held_out)) < wanted
        (held_out if chosen else train).append(text)
    return train, held_out


def prompts_from(held_out: list[str]) -> list[str]:
    """Prompts for samples: evenly spread lines of the held-out text; long lines are cut at a space."""
    lines = [line for text in held_out for line in text.splitlines() if len(line.split()) > 1]
    chosen = [lines[(2 * n + 1) * len(lines) // (2 * PROMPTS)] for n in range(PROMPTS)] if lines else held_out[:PROMPTS]
    return [cut_at_space(line.strip(), PROMPT_CHARS) for line in dict.fromkeys(chosen)]


def cut_at_space(line: str, longest: int) -> str:
    """``line``, or as many of its words as fit into ``longest`` characters, but at least a part of the first word."""
    return line if len(line) <= longest else line[: longest + 1].rpartition(" ")[0] or line[:longest]


def cpu_size(rate: float) -> tuple[CpuSize, int]:
    """The model for a CPU whose bf16 products run at ``rate`` [FLOP/s], and its number of steps in ``CPU_SECONDS``."""
    size = LARGER if CPU_SECONDS * rate * LARGER.part >= LARGER_FROM else SMALLER
    steps = int(CPU_SECONDS * rate * size.part / (size.flags["total_batch_size"] * size.flops))
    return size, max(100, min(size.most_steps, steps))


def choose_model(train_tokens: int, vocab_size: int) -> dict[str, Any]:
    """Model and training length for this machine: a larger model with a GPU, otherwise one that trains in minutes."""
    flags: dict[str, Any]
    if torch.cuda.is_available():
        flags = {"num_layer": 12, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
        flags |= {"intermediate_size": 1536, "seq_len": 1024, "total_batch_size": 32 * 1024, "dropout": 0.1}
        flags |= {"max_lr": 1e-2, "min_lr": 1e-4, "precision": "bf16"}
        steps = max(200, 10 * train_tokens // (32 * 1024))
        validations = 4
    else:
        rates = {p: measured_matmul_rate(torch.device("cpu"), dtype) for p, dtype in CPU_PRECISIONS.items()}
        precision = max(rates, key=lambda p: rates[p])
        say(
            f"matmul rate: {', '.join(f'{p} {r / 1e9:.0f} GFLOP/s' for p, r in rates.items())}: training in {precision}"
        )
        size, steps = cpu_size(rates[precision] * (1 if precision == "bf16" else 2))
        flags = size.flags | {"max_lr": size.max_lr, "min_lr": size.max_lr / 100, "precision": precision}
        validations = size.validations
        say(
            f"model: {flags['num_layer']} layers of {flags['hidden_size']}, {steps} steps of "
            f"{flags['total_batch_size']:,} tokens by Muon, to take five minutes: {size.reason}"
        )
    every = max(50, -(-steps // validations))
    flags |= {"optimizer": "muon", "embedding_lr_mult": 0.5, "scalar_lr_mult": 0.5}
    flags |= {"block_size": flags["seq_len"], "vocab_size": vocab_size, "init_std": 0.02, "max_steps": steps}
    return flags | {"warmup_steps": steps // 20, "val_every_steps": every, "save_every_steps": every}


def write_texts(path: Path, texts: list[str]) -> int:
    """Write the texts as JSON lines, unless an earlier call has done so; returns their size in bytes."""
    if not path.exists():  # the tokenizer pipeline continues only from a file that has not changed
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        write_atomically(path, lambda file: file.write(lines.encode()))
    return sum(len(text.encode()) for text in texts)


def write_corpus(folder: Path, files: list[Path], vocab_size: int, data: str | None) -> dict[str, Any]:
    """Write tokenizer and shards to ``folder``; returns the ``flags`` for training on them and ``prompts`` for samples."""
    documents = list(read_documents(files))
    size = sum(len(text.encode()) for _, text in documents)
    if size < MIN_BYTES:
        raise DataError(f"DATA={data} holds {size} bytes of UTF-8 text; give at least {MIN_BYTES:,} to learn from")
    train, held_out = split(documents)
    train_bytes = write_texts(folder / "train.jsonl", train)
    held_out_bytes = write_texts(folder / "val.jsonl", held_out)
    say(f"corpus: {counted(len(documents), 'file')}, {size / 1e6:.1f} MB, {held_out_bytes / 1e6:.2f} MB held out")
    options = TokenizeOptions(
        dataset_path=str(folder / "train.jsonl"),
        val_path=str(folder / "val.jsonl"),
        train_bpe=vocab_size,
        train_bpe_bytes=train_bytes,
        token_dtype="uint16" if vocab_size <= 2**16 else "uint32",
        output_dir=str(folder),
        num_proc=0,  # the library's own threads are enough
    )
    manifest = tokenize_dataset(options, say=say, repair=True).manifest
    assert manifest is not None, "only a request to stop ends without a manifest"
    found = manifest.tokenizer.vocab_size
    tokens = manifest.tokens["train"]
    say(f"tokenizer: {found} tokens of {train_bytes / tokens:.2f} bytes; {tokens:,} to train on")
    prompts = prompts_from(held_out) if data else CODE_PROMPTS
    return {"flags": choose_model(tokens, found), "prompts": prompts}


def prepare(folder: Path, files: list[Path], vocab_size: int, data: str | None) -> dict[str, Any]:
    """The training flags for ``folder``, which is filled first unless an earlier call has done so. Only one process works
    at a time, and a later one continues the work of an interrupted one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(folder / LOCK, say):
            # Folders of earlier versions have no manifest.
            whole = finished(folder) is not None or not (folder / MANIFEST).exists()
            if not (whole and (folder / FLAGS).exists()):
                text = json.dumps(write_corpus(folder, files, vocab_size, data), indent=2)
                write_atomically(folder / FLAGS, lambda file: file.write(text.encode()))
            flags: dict[str, Any] = json.loads((folder / FLAGS).read_text(encoding="utf-8"))["flags"]
            return flags
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error}); use a folder on a disk with space") from error


def training_flags(data: str | None, out: Path, vocab_size: int, workers: int) -> list[str]:
    """The flags of ``tinytron pretrain`` for the text below ``data``, whose shards go to a folder of their own in ``out``.
    ``workers`` processes share the sequences of a step. Raises: DataError."""
    files = find_files(data)
    name = recipe_hash({"files": file_states(files), "vocab_size": vocab_size, "cuda": torch.cuda.is_available()})[:8]
    folder = out / name
    flags: dict[str, Any] = {"exp_name": f"quickstart_{name}", "dataset_path": folder}
    flags |= prepare(folder, files, vocab_size, data)
    flags["batch_size"] = max(1, min(32, flags["total_batch_size"] // flags["seq_len"] // workers))
    return ["--do_val", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]
