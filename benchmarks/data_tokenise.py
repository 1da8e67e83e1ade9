"""MB/s of text to token shards: a part of data.py, which see.

All read the same JSON lines (Python's standard library, a file a line, over and over) with the same byte-level BPE of 8,192
tokens. The limit is ``encode_batch_fast`` of the package tokenizers with one thread, on texts that are in memory, results
thrown away: what one core can do if it does nothing else. The others read the file and write uint16 shards, or all ids into
one file; their time is that of the whole command less that of the same command on one short document (imports, processes).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rounds import ratio, spread

CORPUS_BYTES, VOCAB, TRAIN_BYTES, BATCH = 64_000_000, 8192, 8_000_000, 256
SCRIPT = Path(__file__).parents[1] / "scripts" / "tokenize_dataset.py"


def make_corpus(folder: Path) -> tuple[Path, int]:
    """A file of JSON lines with about ``CORPUS_BYTES`` of text, and how many bytes of text it has."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    texts = [text for path in files if (text := path.read_text("utf-8", errors="replace")).strip()]
    path, size = folder / "corpus.jsonl", 0
    with path.open("w") as out:
        while size < CORPUS_BYTES:
            for text in texts:
                out.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode())
                if size >= CORPUS_BYTES:
                    break
    return path, size


def texts_of(path: Path) -> Iterator[str]:
    """The texts of a file of JSON lines."""
    with path.open() as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train(path: Path, to: Path) -> None:
    """The tokenizer that all use."""
    from tinytron.data.tokenizers import first_bytes, train_bpe

    train_bpe(first_bytes(texts_of(path), TRAIN_BYTES), VOCAB).save(str(to))


# What runs in processes of its own.


def encode_alone(path: str, tokenizer: str) -> None:
    """Prints the seconds that encoding takes when all texts are in memory."""
    from tokenizers import Tokenizer

    backend, texts = Tokenizer.from_file(tokenizer), list(texts_of(Path(path)))
    batches = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
    start = time.perf_counter()
    for batch in batches:
        backend.encode_batch_fast(batch, add_special_tokens=False)
    print(time.perf_counter() - start)


_backend: Any = None  # of a worker process of the pool


def _load(tokenizer: str) -> None:
    from tokenizers import Tokenizer

    global _backend
    _backend = Tokenizer.from_file(tokenizer)


def _encode(line: str) -> list[int]:
    return [0, *_backend.encode(json.loads(line)["text"], add_special_tokens=False).ids]


def pool(path: str, tokenizer: str, output: str, workers: str) -> None:
    """The usual way: documents go to a multiprocessing.Pool one by one in chunks, lists of ids come back."""
    tokens = np.empty(2**27, np.uint16)
    count = 0
    with open(path) as lines, multiprocessing.Pool(int(workers), _load, (tokenizer,)) as processes:
        for ids in processes.imap(_encode, lines, chunksize=16):
            tokens[count : count + len(ids)] = ids
            count += len(ids)
    tokens[:count].tofile(output)


# The comparison.


def seconds_of(command: list[str], *, times: int = 1) -> float:
    """Of a command, or of as many of the same at once."""
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(times)
    ]
    said = [process.communicate()[0] for process in running]
    passed = time.perf_counter() - start
    if any(process.returncode for process in running):
        raise RuntimeError(f"{' '.join(command)} failed")
    own = [float(text) for text in said if text.replace(".", "").strip().isdigit()]
    return max(own) if own else passed


def tokenise(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A table of MB/s."""
    corpus, size = make_corpus(folder)
    short, tokenizer = folder / "short.jsonl", folder / "tokenizer.json"
    short.write_text('{"text": "short"}\n')
    train(corpus, tokenizer)
    cores = len(os.sched_getaffinity(0))

    def alone(path: Path, processes: int) -> float:
        return seconds_of([sys.executable, __file__, "encode_alone", str(path), str(tokenizer)], times=processes)

    def piped(path: Path, processes: int) -> float:
        return seconds_of(
            [sys.executable, __file__, "pool", str(path), str(tokenizer), str(folder / "pool.bin"), str(processes)]
        )

    def ours(path: Path, processes: int) -> float:
        output = folder / "ours"
        shutil.rmtree(output, ignore_errors=True)
        options = {"dataset_path": path, "tokenizer_path": tokenizer, "output_dir": output, "num_proc": processes}
        flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        return seconds_of([sys.executable, str(SCRIPT), *flags])

    ways: dict[str, tuple[Callable[[Path, int], float], int]] = {"tokenizers alone": (alone, 1)}
    for workers in dict.fromkeys((1, cores)):
        ways[f"tinytron, --num_proc {workers}"] = ours, workers
        ways[f"multiprocessing.Pool({workers}).imap, lists"] = piped, workers
    if cores > 1:
        ways[f"tokenizers alone, {cores} processes at once"] = alone, cores
    starts: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}  # of all processes together
    for _ in range(args.rounds):
        for name, (way, processes) in ways.items():
            start = 0.0 if way is alone else way(short, processes)
            texts = size * (processes if way is alone else 1)
            starts[name].append(start)
            rates[name].append(texts / 1e6 / (way(corpus, processes) - start))
    print(f"\n{size / 1e6:.0f} MB of text, {VOCAB} tokens, {cores} cores\n")
    print(f"| | MB/s | per process | of tokenizers alone x processes | of {cores} at once | start s |")
    print("|---|---|---|---|---|---|")
    limit, together = rates["tokenizers alone"], list(rates.values())[-1]
    for name, own in rates.items():
        processes = ways[name][1]
        each = [rate / processes for rate in own]
        parts = f"{spread(each, '.2f')} | {ratio(each, limit):.3f}"
        at_once = f"{ratio(own, together):.3f}" if processes == cores else ""
        print(f"| {name} | {spread(own, '.2f')} | {parts} | {at_once} | {np.median(starts[name]):.2f} |")
    return {"bytes": size, "MB_per_second": rates, "start": starts}


if __name__ == "__main__":
    children: dict[str, Callable[..., None]] = {"encode_alone": encode_alone, "pool": pool}
    children[sys.argv[1]](*sys.argv[2:])
