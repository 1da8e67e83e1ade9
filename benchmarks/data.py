"""The path of the data, from text to batches, beside what else can do it, in the same run.

python benchmarks/data.py [loader] [step] [index] [tokenise] [--rounds 5] [--json FILE]        (without a name: all four)
    needs for peers: pip install datasets tokenizers

loader     tokens/s of one process that reads shuffled samples, 8 at a time, from 4 shards of 2^24 tokens in the page cache
step       share of a training step of a small model on this CPU that is spent waiting for its data
index      seconds and memory to open 10^12 tokens, beside a permutation held in memory (data_index.py)
tokenise   MB/s of text, beside the bare tokenizer and a multiprocessing.Pool (data_tokenise.py)

Candidates take turns, round by round, so that a noisy machine disturbs all alike; a figure is the median over rounds, with
the smallest and the largest in brackets, a ratio the median of ratios within a round. The loader's target is 100 times what
one H200 of a node eats while it trains the 0.25B model of scripts/debug_gpt_0.25b at 45 % of its peak (``eaten_per_gpu``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from data_index import index
from data_tokenise import tokenise
from rounds import ratio, spread
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tinytron.data import (
    GlobalBatchSampler,
    MixtureDataset,
    SampleOptions,
    ShuffledEpochs,
    TokenShardDataset,
    build_train_loader,
    find_shards,
    write_shard,
)
from tinytron.data.formats import HEADER_BYTES
from tinytron.data.mixture import MixtureOrder
from tinytron.data.mixture_file import read_mixture
from tinytron.data.order import Order
from tinytron.data.pack_files import make_pack_files
from tinytron.data.prefetch import prefetched
from tinytron.data.shards import Shard, open_shards
from tinytron.errors import ConfigError
from tinytron.model import GPT, ModelConfig
from tinytron.utils.model import train_flops_per_token
from tinytron.utils.optional import require_package

SHARDS, SHARD_TOKENS, VOCAB, DOCUMENT = 4, 2**24, 50_304, 700  # DOCUMENT: mean tokens
MICRO_BATCH, RANKS, DEPTH = 8, 8, 2
AT_ONCE, AHEAD = "tinytron", "tinytron, read ahead by a thread"
SHARE = {"global_batch": 64, "micro_batch": MICRO_BATCH, "dp_rank": 0, "dp_size": RANKS}
MODEL_025B = ModelConfig(
    block_size=4096, vocab_size=VOCAB, num_layer=12, num_attention_heads=32, num_key_value_heads=4, hidden_size=1024,
    intermediate_size=4096,
)  # fmt: skip
H200_PEAK, MFU, TIMES = 989e12, 0.45, 100


def eaten_per_gpu(seq_len: int) -> float:
    """Tokens/s of one GPU: 45 % of 989 TFLOP/s (bf16, dense) over the FLOP of a token: 6 for every weight that it meets, 12
    for every layer, query channel and token attended to, of which there are (seq_len + 1) / 2 on average."""
    return H200_PEAK * MFU / train_flops_per_token(MODEL_025B, seq_len)


@dataclass
class Candidate:
    """Something that gives batches of ``tokens`` without end. ``kind``: copy, ours or peer."""

    name: str
    kind: str
    items: Iterator[Any]
    tokens: int

    def rate(self, seconds: float = 0.3) -> float:
        """Tokens per second, over about so many seconds."""
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            for _ in range(16):
                next(self.items)
            count += 16
        return count * self.tokens / passed

    def wait(self, batches: int = 100) -> float:
        """Seconds that a consumer waits for a batch, in the median, which after each computes for 2 ms."""
        waits = []
        for _ in range(batches):
            start = time.perf_counter()
            next(self.items)
            waits.append(time.perf_counter() - start)
            while time.perf_counter() < start + 0.002:
                torch.mm(_MATRIX, _MATRIX)  # does not hold Python's lock, like a training step
        return statistics.median(waits)


_MATRIX = torch.ones(256, 256)


# Loader.


def synthetic_shards(folder: Path) -> list[Shard]:
    """Shards of random documents of random lengths, and the offsets at which they begin."""
    random, count = np.random.default_rng(0), SHARD_TOKENS // DOCUMENT
    folder.mkdir()
    for number in range(SHARDS):
        starts = np.concatenate(([0], random.geometric(1 / DOCUMENT, 2 * count).cumsum()))
        path = folder / f"train_{number:06d}.bin"
        write_shard(path, random.integers(0, VOCAB, SHARD_TOKENS, dtype=np.uint16))
        write_shard(path.with_suffix(".docs"), starts[starts < SHARD_TOKENS], np.uint32)
    return open_shards(find_shards(str(folder), "train"))


def copies(shards: Sequence[Shard], seq_len: int) -> list[Candidate]:
    """The limit: the same bytes written in the same portions, but one after another, into memory that is there."""
    count = MICRO_BATCH * seq_len
    inputs, labels = np.empty(count, np.int64), np.empty(count, np.int64)
    wide = np.ones(2**23, np.int64)

    def widen() -> Iterator[None]:
        while True:
            for shard in shards:
                for first in range(0, shard.count - count, count):
                    inputs[:] = shard.tokens[first : first + count]
                    labels[:] = shard.tokens[first + 1 : first + count + 1]
                    yield

    def copy() -> Iterator[None]:
        while True:
            for first in range(0, len(wide) - 2 * count, 2 * count):
                inputs[:] = wide[first : first + count]
                labels[:] = wide[first + count : first + 2 * count]
                yield

    return [
        Candidate("numpy: widen mapped tokens into two int64 arrays, in order", "copy", widen(), count),
        Candidate("numpy: copy 16 bytes a token", "copy", copy(), count),
    ]


def ours(dataset: Dataset[Any], order: Order | None, depth: int = 0) -> Iterator[Any]:
    """The loader as the Trainer makes it, rank 0 of 8; ``depth``: read ahead by a thread."""
    sampler = GlobalBatchSampler(order or ShuffledEpochs(len(dataset), 1337), **SHARE)  # type: ignore[arg-type]
    return prefetched(build_train_loader(dataset, sampler, num_workers=0, pin_memory=False), depth)


def our_candidates(folder: Path, shards: Sequence[Shard], seq_len: int) -> list[Candidate]:
    """One process of ours in its variants."""
    count = MICRO_BATCH * seq_len
    plain = TokenShardDataset(shards, seq_len, VOCAB)
    masked = TokenShardDataset(shards, seq_len, VOCAB, SampleOptions(document_mask=True))
    make_pack_files(shards, seq_len)
    packed = TokenShardDataset(shards, seq_len, VOCAB, SampleOptions(document_mask=True, packing="best_fit"))
    halves = {"a": shards[: SHARDS // 2], "b": shards[SHARDS // 2 :]}
    sources = {name: TokenShardDataset(half, seq_len, VOCAB) for name, half in halves.items()}
    path = folder / "mixture.json"
    entries = [{"name": name, "path": name, "weight": weight} for name, weight in zip(sources, (0.7, 0.3), strict=True)]
    path.write_text(json.dumps({"sources": entries}))
    mixture = MixtureOrder(read_mixture(path), [len(source) for source in sources.values()], seq_len, 1337)
    return [
        Candidate(AT_ONCE, "ours", ours(plain, None), count),
        Candidate(AHEAD, "ours", ours(plain, None, DEPTH), count),
        Candidate("tinytron, document masks", "ours", ours(masked, None), count),
        Candidate("tinytron, best-fit packing and document masks", "ours", ours(packed, None), count),
        Candidate("tinytron, mixture of two", "ours", ours(MixtureDataset(sources, mixture), mixture), count),
    ]  # fmt: skip


class Windows(Dataset[Any]):
    """What most small training scripts have: windows of memory maps, widened one by one."""

    def __init__(self, paths: Sequence[Path], seq_len: int) -> None:
        self.maps = [np.memmap(path, "<u2", "r", HEADER_BYTES) for path in paths]
        self.seq_len, self.each = seq_len, (len(self.maps[0]) - 1) // seq_len

    def __len__(self) -> int:
        return self.each * len(self.maps)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        number, row = divmod(index, self.each)
        first = row * self.seq_len
        window = torch.from_numpy(self.maps[number][first : first + self.seq_len + 1].astype(np.int64))
        return window[:-1], window[1:]


def arrow(folder: Path, shards: Sequence[Shard], seq_len: int) -> Any:
    """A Hugging Face data set of ``seq_len + 1`` ids a row (int32), saved and mapped."""
    datasets, pyarrow = require_package("datasets"), require_package("pyarrow")
    tables = []
    for shard in shards:
        rows = (shard.count - 1) // seq_len
        ids: npt.NDArray[Any] = np.lib.stride_tricks.sliding_window_view(shard.tokens, seq_len + 1)[::seq_len][:rows]
        offsets = np.arange(rows + 1, dtype=np.int32) * (seq_len + 1)
        lists = pyarrow.ListArray.from_arrays(offsets, ids.astype(np.int32).ravel())
        tables.append(pyarrow.table({"input_ids": lists}))
    place = str(folder / f"arrow{seq_len}")
    datasets.disable_progress_bars()
    datasets.Dataset(pyarrow.concat_tables(tables)).save_to_disk(place)
    return datasets.load_from_disk(place).with_format("torch")


def peers(folder: Path, shards: Sequence[Shard], seq_len: int) -> list[Candidate]:
    """torch's DataLoader and DistributedSampler over two data sets, in this process and with two workers."""
    made: list[Candidate] = []
    windows = Windows([shard.path for shard in shards], seq_len)
    data = {"DataLoader + DistributedSampler, numpy.memmap": windows}
    try:
        data["DataLoader + DistributedSampler, Hugging Face datasets"] = arrow(folder, shards, seq_len)
    except ConfigError as error:
        print(f"left out: Hugging Face datasets ({error})")
    for name, dataset in data.items():
        for workers in (0, 2):

            def walk(dataset: Any = dataset, workers: int = workers) -> Iterator[Any]:
                sampler: DistributedSampler[Any] = DistributedSampler(dataset, RANKS, 0)
                loader: DataLoader[Any] = DataLoader(
                    dataset, MICRO_BATCH, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
                )
                epoch = 0
                while True:
                    sampler.set_epoch(epoch)
                    yield from loader
                    epoch += 1

            label = f"{name}, {workers} workers" if workers else name
            made.append(Candidate(label, "peer", walk(), MICRO_BATCH * seq_len))
    return made


def loader(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tables of tokens/s."""
    torch.set_num_threads(1)
    shards, figures = synthetic_shards(folder / "shards"), {}
    for seq_len in (512, 4096):
        made = peers(folder, shards, seq_len)
        for candidate in made:  # whose worker processes are better forked before there are threads
            candidate.rate(0.1)
        made = [*copies(shards, seq_len), *our_candidates(folder, shards, seq_len), *made]
        rates: dict[str, list[float]] = {candidate.name: [] for candidate in made}
        waits: dict[str, list[float]] = {name: [] for name in (AT_ONCE, AHEAD)}
        for round_ in range(args.rounds + 1):
            for candidate in made:
                rate = candidate.rate()
                wait = candidate.wait() if candidate.name in waits else 0.0
                if round_:  # the first warms up
                    rates[candidate.name].append(rate)
                    waits.get(candidate.name, []).append(wait)
        for candidate in made:
            candidate.items.close()  # type: ignore[attr-defined]
        show_rates(seq_len, rates, [c.name for c in made if c.kind == "peer"])
        print("\nA consumer that computes for 2 ms after every batch waits for the next one, in us:", end=" ")
        print("; ".join(f"{name} {spread([w * 1e6 for w in own], '.0f')}" for name, own in waits.items()))
        figures[str(seq_len)] = {"eaten": eaten_per_gpu(seq_len), "tokens_per_second": rates, "waits": waits}
    return figures


def show_rates(seq_len: int, rates: dict[str, list[float]], of_peers: list[str]) -> None:
    """One table; the first candidate is the limit."""
    eaten = eaten_per_gpu(seq_len)
    target = TIMES * eaten
    limit, best = next(iter(rates.values())), max((rates[name] for name in of_peers), key=statistics.median)
    print(f"\n{seq_len} tokens a sample, {MICRO_BATCH} samples a batch; one GPU eats {eaten:,.0f} tok/s\n")
    print(f"| | Mtok/s | of the copy | of the best peer | of the target ({target / 1e6:.1f} Mtok/s) |")
    print("|---|---|---|---|---|")
    for name, own in rates.items():
        shown = spread([rate / 1e6 for rate in own], ".1f")
        parts = f"{ratio(own, limit):.3f} | {ratio(own, best):.2f} | {statistics.median(own) / target:.2f}"
        print(f"| {name} | {shown} | {parts} |")


# Step.


def step(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time to get a batch of 8 x 512 tokens, and to train on it."""
    from zero1 import ADAMW, SEQ_LEN, SIZES

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    sizes: dict[str, Any] = {
        **SIZES["10m"],
        "num_key_value_heads": SIZES["10m"]["num_attention_heads"],
        "block_size": SEQ_LEN,
    }
    config = ModelConfig(**sizes)
    model = GPT(config, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)  # type: ignore[arg-type]
    path = folder / "step_shards"
    path.mkdir()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, SHARD_TOKENS, dtype=np.uint16)
    write_shard(path / "train_000000.bin", tokens)
    dataset = TokenShardDataset(open_shards(find_shards(str(path), "train")), SEQ_LEN, config.vocab_size)
    ways = {"read when asked for": ours(dataset, None), "read ahead by a thread": ours(dataset, None, DEPTH)}
    waits: dict[str, list[float]] = {name: [] for name in ways}
    steps: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(2 * args.rounds + 1):
        for name, batches in ways.items():
            start = time.perf_counter()
            batch = next(batches)
            got = time.perf_counter()
            objective = model(batch.input_ids, batch.labels).objective / batch.labels.numel()
            objective.backward()
            optimizer.step()
            optimizer.zero_grad()
            if round_:
                waits[name].append(got - start)
                steps[name].append(time.perf_counter() - got)
    print(f"\n10.2M parameters, bf16, 8 x {SEQ_LEN} tokens, {threads} threads, {2 * args.rounds} steps\n")
    print("| | wait us | step ms | share |\n|---|---|---|---|")
    for name, own in waits.items():
        share = [w / s for w, s in zip(own, steps[name], strict=True)]
        print(
            f"| {name} | {spread([w * 1e6 for w in own], '.0f')} | {spread([s * 1e3 for s in steps[name]], '.0f')} | "
            f"{statistics.median(share):.4%} |"
        )
    return {"wait": waits, "step": steps}


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "loader": loader, "step": step, "index": index, "tokenise": tokenise,
}  # fmt: skip


def main() -> None:
    """Run, print tables in Markdown, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text_mb", type=float, default=64, help="text to tokenise")
    parser.add_argument("--folder", help="where to write data; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    present = {dist.metadata["Name"].lower() for dist in metadata.distributions()}
    names = [n for n in ("torch", "numpy", "datasets", "pyarrow", "tokenizers") if n in present]
    print(f"# The path of the data, {time.strftime('%Y-%m-%d')}\n")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    print(
        f"{len(os.sched_getaffinity(0))} cores of {platform.processor() or platform.machine()}, "
        f"Python {platform.python_version()}, {versions}; {args.rounds} rounds: `{shlex.join(['python', *sys.argv])}`"
    )
    figures: dict[str, Any] = {"rounds": args.rounds}
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            print(f"\n## {part}", flush=True)
            figures[part] = PARTS[part](args, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
