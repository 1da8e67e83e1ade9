"""How long a save holds training up: ours, plain ``torch.save``, and torch's distributed ``async_save``.

python benchmarks/checkpoint.py [--size 10m|50m] [--world 2] [--rounds 5] [--folder DIR] [--json FILE]

The same model and ZeRO-1 optimizer for all; every rank saves what it owns, rank 0 the weights too. Ways take turns. *stall*
is the time until the training loop goes on; *written* until the files are complete; *steps* the time of the training steps
done meanwhile, relative to steps without a save. Checksums and fsync are part of ours, not of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from zero1 import SEQ_LEN, SIZES, Ours, run_ranks

from tinytron.checkpoint import CheckpointSaver
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.parallel_state import ParallelState
from tinytron.model import ModelConfig

STEPS = 4  # of training after the start of a save, and before the next


class Way:
    """One way to save: ``start`` returns when training may go on, ``end`` when all is written."""

    def __init__(self, name: str, start: Callable[[Path], Any], end: Callable[[Any], None]) -> None:
        self.name, self.start, self.end = name, start, end


def own_tensors(ours: Ours, rank: int) -> dict[str, torch.Tensor]:
    """What this rank would lose: its shards with their states, and on rank 0 the weights."""
    tensors = {}
    for i, (param, state) in enumerate(ours.optimizer.inner.state.items()):
        tensors[f"rank{rank}/{i}/main"] = param.detach()
        tensors |= {f"rank{rank}/{i}/{k}": v for k, v in state.items() if torch.is_tensor(v)}
    return tensors | (dict(ours.model.state_dict()) if rank == 0 else {})


def ways(ours: Ours, state: ParallelState) -> list[Way]:
    """What is compared."""
    group = dist.new_group(backend="gloo")
    saver = CheckpointSaver(Path(), ours.model, ours.optimizer, state)

    def our_start(folder: Path, wait: bool) -> CheckpointSaver:
        saver.folder = folder
        saver.save(1, CheckpointMeta(), wait=wait)
        return saver

    def torch_start(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(own_tensors(ours, state.rank), folder / f"{state.rank}.pt")
        dist.barrier()

    def dcp_start(folder: Path) -> Any:
        tensors: dict[str, Any] = own_tensors(ours, state.rank)
        return dcp.async_save(tensors, checkpoint_id=folder, process_group=group)

    return [
        Way("tinytron, in the background", lambda f: our_start(f, False), lambda saver: saver.close(print)),
        Way("tinytron, waiting", lambda f: our_start(f, True), lambda saver: saver.close(print)),
        Way("torch.save, waiting", torch_start, lambda _: None),
        Way("torch.distributed async_save", dcp_start, lambda future: future.result()),
    ]


def measure(rank: int, args: argparse.Namespace, rendezvous: str, queue: Any) -> None:
    """One rank of the benchmark."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // args.world))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.world)
    sizes = {**SIZES[args.size], "num_key_value_heads": SIZES[args.size]["num_attention_heads"], "block_size": SEQ_LEN}
    ours = Ours("tinytron", ModelConfig(**sizes), torch.bfloat16)
    state = ParallelState.create(ParallelLayout(args.world, 1, 1), torch.device("cpu"))
    tokens = torch.randint(sizes["vocab_size"], (1, SEQ_LEN + 1), generator=torch.Generator().manual_seed(rank))

    def steps() -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(STEPS):
            ours.step(tokens)
        ours.settle()
        dist.barrier()
        return time.perf_counter() - start

    steps()
    made = ways(ours, state)
    rows: list[dict[str, Any]] = [{"name": way.name, "stall": [], "written": [], "steps": []} for way in made]
    for round_ in range(args.rounds + 1):
        for way, row in zip(made, rows, strict=True):
            folder, plain = Path(args.folder) / f"{round_}", steps()
            dist.barrier()
            start = time.perf_counter()
            handle = way.start(folder)
            stall = time.perf_counter() - start
            busy = steps()
            way.end(handle)
            dist.barrier()
            written = max(stall, time.perf_counter() - start - (busy if way.name.endswith("waiting") else 0))
            row["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            dist.barrier()
            if rank == 0:
                shutil.rmtree(folder)
            if round_:  # the first warms up: buffers, plans, imports
                for key, value in (("stall", stall), ("written", written), ("steps", busy / plain)):
                    row[key].append(value)
    if rank == 0:
        queue.put((sum(p.numel() for p in ours.model.parameters()), rows))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Run, print a table, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.folder = args.folder or folder
        count, rows = run_ranks(measure, args)
    print(f"\n{count / 1e6:.1f}M parameters, bf16, {args.world} gloo processes, torch {torch.__version__}")
    print(f"{'way':<30} {'stall s':>8} {'written s':>10} {'steps':>6} {'B/param':>8} {'stall vs torch.save':>20}")
    plain = statistics.median(next(row for row in rows if row["name"].startswith("torch.save"))["stall"])
    for row in rows:
        stall, written, steps = (statistics.median(row[key]) for key in ("stall", "written", "steps"))
        print(
            f"{row['name']:<30} {stall:>8.3f} {written:>10.2f} {steps:>6.2f} {row['bytes'] / count:>8.2f} "
            f"{stall / plain:>20.3f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"parameters": count, "rows": rows}, indent=2))


if __name__ == "__main__":
    mp.set_start_method("spawn", force=True)
    main()
