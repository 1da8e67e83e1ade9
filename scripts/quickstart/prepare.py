"""Quickstart, part 1: find text, train a byte-level BPE tokenizer on it, write token shards, and choose a model.

python scripts/quickstart/prepare.py [--data path/to/text/files] [--out data/quickstart]

Without ``--data`` the corpus is the source code of the running Python's standard library (without its tests), which every
machine has. Progress goes to stderr; the last thing printed, to stdout, are the flags for pretrain_debug.py. A second
call finds everything done and prints the same flags.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tinytron.cli import entry
from tinytron.data import write_shard
from tinytron.errors import DataError
from tinytron.utils.profile import measured_matmul_rate
from tinytron.utils.training import write_atomically

EOT = "<|endoftext|>"
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
HELD_OUT = 20  # one file in 20 is kept for validation, or the last 20th of each file if there are few


def say(text: str) -> None:
    """Progress for people; stdout is for the flags."""
    print(text, file=sys.stderr, flush=True)


def find_files(data: str | None) -> list[Path]:
    """The corpus: every text file below ``data``, or the standard library's sources.

    Raises: DataError if there is none.
    """
    root = Path(data) if data else Path(sysconfig.get_paths()["stdlib"])
    if root.is_file():
        return [root]
    pattern = "*" if data else "*.py"
    files = [
        path
        for path in sorted(root.rglob(pattern))
        if path.is_file() and (data or not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]))
    ]
    if not files:
        raise DataError(f"DATA={data} holds no files; name a text file or a folder of text files")
    return files


def read_documents(files: list[Path]) -> Iterator[tuple[Path, str]]:
    """The files that are UTF-8 text; others are skipped."""
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield path, text


def split(documents: list[tuple[Path, str]]) -> tuple[list[str], list[str]]:
    """Training and held-out texts: whole files by a hash of their names, or parts of each file if there are few."""
    if len(documents) < 2 * HELD_OUT:
        cuts = [(text, len(text) - len(text) // HELD_OUT) for _, text in documents]
        return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts if text[cut:]]

    def held_out(path: Path) -> bool:
        return hashlib.sha256("/".join(path.parts[-2:]).encode()).digest()[0] % HELD_OUT == 0

    return [t for p, t in documents if not held_out(p)], [t for p, t in documents if held_out(p)]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (GPT-2, section 2.2): no text is out of vocabulary, and tokens decode to exactly the bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents in one row, an end-of-text token before each."""
    eot = tokenizer.token_to_id(EOT)
    return np.concatenate([[eot, *encoding.ids] for encoding in tokenizer.encode_batch(texts)]).astype(np.uint16)


def choose_model(train_tokens: int, vocab_size: int) -> dict[str, object]:
    """Model and training length for this machine: a larger preset with a GPU, one sized for minutes without."""
    if torch.cuda.is_available():
        model = {"num_layer": 12, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
        model |= {"intermediate_size": 1536, "seq_len": 1024, "batch_size": 32, "total_batch_size": 32 * 1024}
        model |= {"max_lr": 1.5e-3, "min_lr": 1e-4, "dropout": 0.1, "precision": "bf16"}
        steps = max(200, 10 * train_tokens // (32 * 1024))
    else:
        rates = {p: measured_matmul_rate(torch.device("cpu"), d) for p, d in CPU_PRECISIONS.items()}
        precision = max(rates, key=lambda p: rates[p])
        say(
            f"matmul rate: {', '.join(f'{p} {r / 1e9:.0f} GFLOP/s' for p, r in rates.items())}: training in {precision}"
        )
        model = {"num_layer": 6, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
        model |= {"intermediate_size": 704, "seq_len": 256, "batch_size": 16, "total_batch_size": 16 * 256}
        model |= {"max_lr": 4e-3, "min_lr": 1e-4, "precision": precision}
        steps = 1000
    every = max(50, steps // 8)
    model |= {"block_size": model["seq_len"], "vocab_size": vocab_size, "init_std": 0.02, "max_steps": steps}
    return model | {"warmup_steps": steps // 20, "val_every_steps": every, "save_every_steps": every}


CPU_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare(data: str | None, out: Path, vocab_size: int) -> Path:
    """Everything before training, in a folder named after the corpus; done once. Returns the folder."""
    files = find_files(data)
    identity = [(str(p), p.stat().st_size, int(p.stat().st_mtime)) for p in files]
    folder = out / hashlib.sha256(json.dumps([identity, vocab_size]).encode()).hexdigest()[:8]
    if (folder / "flags.json").exists():  # written last
        say(f"data: {folder} (made before)")
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train, val = split(list(read_documents(files)))
    if not train or not val:
        raise DataError(f"DATA={data} holds too little UTF-8 text; give at least a few kilobytes")
    say(f"corpus: {len(files)} files, {sum(len(t.encode()) for t in train + val) / 1e6:.1f} MB")
    tokenizer = train_tokenizer(train, vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = encode(tokenizer, train)
    write_shard(folder / "train_000000.bin", tokens)
    write_shard(folder / "val_000000.bin", encode(tokenizer, val))
    bytes_per_token = sum(len(t.encode()) for t in train) / len(tokens)
    say(
        f"tokenizer: {tokenizer.get_vocab_size()} tokens, {bytes_per_token:.2f} bytes per token; {len(tokens):,} to train on"
    )
    flags = choose_model(len(tokens), tokenizer.get_vocab_size())
    write_atomically(folder / "flags.json", lambda file: file.write(json.dumps(flags, indent=2).encode()))
    return folder


def main() -> None:
    """Prepare, then print the flags of the training command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="text file or folder; default: Python's standard library")
    parser.add_argument("--out", default="data/quickstart", help="where the token shards go")
    parser.add_argument("--vocab_size", type=int, default=4096, help="size of the tokenizer's vocabulary")
    args = parser.parse_args()
    folder = prepare(args.data, Path(args.out), args.vocab_size)
    flags = json.loads((folder / "flags.json").read_text())
    words = ["--dataset_path", str(folder), "--do_val"]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    print(shlex.join(words))


if __name__ == "__main__":
    entry.run(main)
