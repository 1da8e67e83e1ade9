"""Seconds and memory to open 10^12 tokens: a part of data.py, which see.

A process of its own opens each candidate, so that its growth is that of the candidate. The shards are sparse files: their
headers, sizes and manifest are read, the tokens are zeros.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import spread

from tinytron.data import GlobalBatchSampler, ShuffledEpochs, TokenShardDataset, build_train_loader, find_shards
from tinytron.data.formats import HEADER_BYTES, MAGIC
from tinytron.data.manifest import Manifest, ShardFacts, TokenizerFacts, write_manifest
from tinytron.data.shards import open_shards

SHARDS, SHARD_TOKENS, SEQ_LEN, VOCAB = 7451, 2**27, 4096, 50_304


def sparse_folder(folder: Path) -> None:
    """10^12 tokens: shards that have a header and a length, and a manifest."""
    folder.mkdir()
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:4] = MAGIC, 1, 0, SHARD_TOKENS
    facts = [ShardFacts(f"train_{n:06d}.bin", SHARD_TOKENS, 2**17, f"{n:064x}") for n in range(SHARDS)]
    for fact in facts:
        with open(folder / fact.name, "wb") as file:
            file.write(header.tobytes())
            file.truncate(HEADER_BYTES + 2 * SHARD_TOKENS)
    tokenizer = TokenizerFacts("train_bpe", "50257", "0" * 64, 50_257, 50_256, "<|endoftext|>", "prepend")
    documents, tokens = {"train": 2**17 * SHARDS}, {"train": SHARD_TOKENS * SHARDS}
    write_manifest(
        folder, Manifest("uint16", "timl", tokenizer, {}, {}, "synthetic", documents, tokens, 0, True, facts)
    )


def open_ours(folder: str, lap: Callable[[str], None]) -> None:
    """From a folder to the first batch, and a step far away."""
    paths = find_shards(folder, "train")
    lap("find_shards")
    shards = open_shards(paths)
    lap("open_shards")
    dataset = TokenShardDataset(shards, SEQ_LEN, VOCAB)
    sampler = GlobalBatchSampler(
        ShuffledEpochs(len(dataset), 1337), global_batch=64, micro_batch=8, dp_rank=0, dp_size=8
    )
    lap("data set, order, sampler")
    next(iter(build_train_loader(dataset, sampler, num_workers=0, pin_memory=False)))
    lap("first batch")
    sampler.samples_of_step(10**6)
    lap("samples of step 10^6")


def permute(kind: str, lap: Callable[[str], None]) -> None:
    """An order held in memory, as torch's samplers make it (they then turn it into a list of Python integers)."""
    count = SHARDS * ((SHARD_TOKENS - 1) // SEQ_LEN)
    if kind == "torch.randperm":
        order: Any = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    else:
        order = np.random.default_rng(0).permutation(count)
    lap("permutation")
    assert len(order) == count


def open_in_child(kind: str, folder: str) -> None:
    """One candidate in a process of its own; prints its laps and the growth of its resident memory as JSON."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, last, laps = resident(), time.perf_counter(), {}

    def lap(name: str) -> None:
        nonlocal last
        laps[name] = time.perf_counter() - last
        laps["MiB"] = (resident() - before) / 2**20
        last = time.perf_counter()

    if kind == "tinytron":
        open_ours(folder, lap)
    else:
        permute(kind, lap)
    print(json.dumps(laps))


def index(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time and memory to open 10^12 tokens."""
    sparse_folder(folder / "sparse")
    kinds = ("tinytron", "torch.randperm", "numpy permutation")
    laps: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind in kinds:
            command = [sys.executable, __file__, kind, str(folder / "sparse")]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            laps[kind].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"\n{SHARDS} shards of 2^27 tokens, samples of {SEQ_LEN}\n\n| | | s | MiB more |\n|---|---|---|---|")
    figures = {}
    for kind, own in laps.items():
        memory = [lap.pop("MiB") for lap in own]
        for name in own[0]:
            print(f"| {kind} | {name} | {spread([lap[name] for lap in own], '.4f')} | |")
        total = [sum(lap.values()) for lap in own]
        print(f"| {kind} | **together** | {spread(total, '.3f')} | {spread(memory, ',.0f')} |")
        figures[kind] = {"laps": own, "MiB": memory}
    return figures


if __name__ == "__main__":
    open_in_child(*sys.argv[1:])
