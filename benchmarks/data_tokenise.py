"""MB/s of text to token shards: a part of data.py, which see.

All read the same JSON lines (Python's standard library, a file a line, over and over) with the same byte-level BPE of 8,192
tokens. The limit is ``encode_batch_fast`` of the package tokenizers with one thread, on texts that are in memory, results
thrown away: what one core can do if it does nothing else. The others read the file and write uint16 shards, or all ids into
one file; their time is that of the whole command less that of the same command on one short document (imports, processes).
MB per CPU second, of all processes of a command, hardly depends on what else the machine does; MB/s does.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rounds import ratio, spread

VOCAB, TRAIN_BYTES, BATCH = 8192, 8_000_000, 256
SCRIPT = Path(__file__).parents[1] / "scripts" / "tokenize_dataset.py"


def make_corpus(folder: Path, at_least: int) -> tuple[Path, int]:
    """A file of JSON lines with ``at_least`` so many bytes of text, and how many it has."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    texts = [text for path in files if (text := path.read_text("utf-8", errors="replace")).strip()]
    path, size = folder / "corpus.jsonl", 0
    with path.open("w") as out:
        while size < at_least:
            for text in texts:
                out.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode())
                if size >= at_least:
                    break
    return path, size


def texts_of(path: Path) -> Iterator[str]:
    """The texts of a file of JSON lines."""
    with path.open() as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train(path: Path, to: Path) -> None:
    """The tokenizer that all use."""
    from tinytron.text.tokenizers import first_bytes, train_bpe

    train_bpe(first_bytes(texts_of(path), TRAIN_BYTES), VOCAB).save(str(to))


class Cost(NamedTuple):
    """Seconds, and seconds of the processor."""

    wall: float
    cpu: float


# What runs in processes of its own.


def encode_alone(path: str, tokenizer: str) -> None:
    """Prints the seconds, and those of the processor, that encoding takes when all texts are in memory."""
    from tokenizers import Tokenizer

    backend, texts = Tokenizer.from_file(tokenizer), list(texts_of(Path(path)))
    batches = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
    start, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        backend.encode_batch_fast(batch, add_special_tokens=False)
    print(time.perf_counter() - start, time.process_time() - cpu)


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


def timed(*command: str) -> None:
    """Runs a command; prints its seconds, and those of the processor for it and all that it started."""
    pr_set_child_subreaper = 36  # what loses its parent becomes a child of this process, and is counted with it (Linux)
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    passed = time.perf_counter() - start
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(passed, used.ru_utime + used.ru_stime)


# The comparison.


def run(*command: str, times: int = 1) -> Cost:
    """Of a function above, in as many processes at once."""
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, __file__, *command]
    running = [subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(times)]
    said = [process.communicate()[0].split() for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"{' '.join(words)} failed")
    return Cost(max(float(wall) for wall, _ in said), sum(float(cpu) for _, cpu in said))


def tokenise(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A table of MB/s."""
    corpus, size = make_corpus(folder, int(args.text_mb * 1e6))
    short, tokenizer = folder / "short.jsonl", folder / "tokenizer.json"
    short.write_text('{"text": "short"}\n')
    train(corpus, tokenizer)
    cores = len(os.sched_getaffinity(0))

    def alone(path: Path, processes: int) -> Cost:
        return run("encode_alone", str(path), str(tokenizer), times=processes)

    def piped(path: Path, processes: int) -> Cost:
        command = ["pool", str(path), str(tokenizer), str(folder / "pool.bin"), str(processes)]
        return run("timed", sys.executable, __file__, *command)

    def ours(path: Path, processes: int) -> Cost:
        output = folder / "ours"
        shutil.rmtree(output, ignore_errors=True)
        options = {"dataset_path": path, "tokenizer_path": tokenizer, "output_dir": output, "num_proc": processes}
        options |= {"chunksize": 64}  # 1 MB: of the usual 4 MB a corpus this small has too few to end together
        flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        return run("timed", sys.executable, str(SCRIPT), *flags)

    ways: dict[str, tuple[Callable[[Path, int], Cost], int]] = {}
    for number in dict.fromkeys((1, cores)):
        ways[f"tokenizers alone, {number} at once"] = alone, number
        ways[f"tinytron, --num_proc {number}"] = ours, number
        ways[f"multiprocessing.Pool({number}).imap, lists"] = piped, number
    starts: dict[str, list[Cost]] = {name: [] for name in ways}
    costs: dict[str, list[Cost]] = {name: [] for name in ways}  # of as much text as one process alone has
    for _ in range(args.rounds):
        for name, (way, number) in ways.items():
            start, share = (Cost(0, 0), number) if way is alone else (way(short, number), 1)
            whole = way(corpus, number)
            starts[name].append(start)
            costs[name].append(Cost((whole.wall - start.wall) / share, (whole.cpu - start.cpu) / share))
    print(f"\n{size / 1e6:.0f} MB of text, {VOCAB} tokens, {cores} cores\n")
    print("| | MB/s | of tokenizers alone, as many at once | MB per CPU s | of tokenizers alone | start s |")
    print("|---|---|---|---|---|---|")
    figures: dict[str, Any] = {"bytes": size}
    for name, own in costs.items():
        wall, cpu = ([size / 1e6 / cost[i] for cost in own] for i in range(2))
        figures[name] = {"MB/s": wall, "MB/cpu s": cpu, "start": starts[name]}
        base = figures[f"tokenizers alone, {ways[name][1]} at once"]
        begun = statistics.median(cost.wall for cost in starts[name])
        rates = f"{spread(wall, '.2f')} | {ratio(wall, base['MB/s']):.3f}"
        per_cpu = f"{spread(cpu, '.2f')} | {ratio(cpu, base['MB/cpu s']):.3f}"
        print(f"| {name} | {rates} | {per_cpu} | {begun:.1f} |")
    return figures


if __name__ == "__main__":
    children: dict[str, Callable[..., None]] = {"encode_alone": encode_alone, "pool": pool, "timed": timed}
    children[sys.argv[1]](*sys.argv[2:])
