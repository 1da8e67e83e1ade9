"""The time of one training step by Tinytron and by its peers: the same model, batch, precision and AdamW, in one run.

python benchmarks/step_time.py [--models 10m 20m-moe] [--precision bf16] [--rounds 5] [--out benchmarks/results/NAME]

Before anything is timed every variant gets the same weights and trains a few steps in fp32: a variant whose losses differ
from the first one's computes something else, which is an error. A figure is the median over rounds of tokens/s, and of
the ratio to the first variant in the same round. All variants are in memory at once and take turns, round by round, so that
a noisy machine disturbs all alike. On a GPU where they would not fit together, one follows another, and one that does not
fit is a row that says so. MFU is one formula for all: tinytron.utils.model.train_flops_per_token.

Peak memory on a CPU is the growth of the resident set of a process of its own, from before the model was built to the peak
in the steps after the first (Linux only); on a GPU it is the peak of allocated memory in those steps. A peer that is not
installed is left out: pip install transformers; pip install --no-deps litgpt torchtitan, and what they then ask for.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from resident import is_measurable, peak_resident, reset_peak, resident
from step_report import Table, machine, write
from step_rounds import fit_together, release, run_in_turns, run_one_by_one
from step_variants import VARIANTS, Case, Variant, join_alone
from step_weights import initial_weights

from tinytron.errors import first_line
from tinytron.model import ModelConfig
from tinytron.utils.matmul import onednn, onednn_keeps_fp32
from tinytron.utils.model import count_parameters, train_flops_per_token
from tinytron.utils.profile import measured_matmul_rate, peak_flops

# Layers, hidden size, query heads, key and value heads, feed-forward width (of one expert), vocabulary, experts.
MODELS: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "tiny": (2, 64, 4, 2, 96, 128, 0),
    "tiny-moe": (2, 64, 4, 2, 32, 128, 4),
    "10m": (8, 256, 4, 2, 704, 8192, 0),
    "50m": (9, 576, 9, 3, 1536, 16384, 0),
    "20m-moe": (6, 256, 4, 2, 384, 8192, 8),
    "0.1b": (12, 768, 6, 3, 2048, 32000, 0),
    "0.1b-h64": (12, 768, 12, 6, 2048, 32000, 0),
    "0.1b-moe": (8, 512, 4, 4, 512, 32000, 8),
    "0.25b": (16, 1024, 8, 4, 2816, 32000, 0),
    "0.25b-h64": (16, 1024, 16, 8, 2816, 32000, 0),
    "0.5b": (18, 1536, 12, 6, 4096, 32000, 0),
    "1b": (18, 2048, 16, 8, 5632, 32000, 0),
    "3b": (28, 3072, 24, 8, 8192, 32000, 0),
    "0.3b-a0.17b": (14, 768, 6, 6, 768, 50304, 8),
}
TOP_K = 2
CHECKED_LAYERS = 4
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # of losses, in nats; one that is a bf16 itself comes in steps of 0.06


def model_config(name: str, seq_len: int) -> ModelConfig:
    """A model of the table. Balance terms are off, because not all peers have them."""
    layers, width, heads, kv_heads, inner, vocab, experts = MODELS[name]
    return ModelConfig(
        block_size=seq_len, vocab_size=vocab, num_layer=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        hidden_size=width, intermediate_size=inner, norm_eps=1e-5, init_std=0.05, tied_lm_head=False,
        use_moe=experts > 0, num_experts=max(experts, TOP_K), num_experts_per_tok=TOP_K, moe_intermediate_size=inner,
        moe_aux_loss_coef=0.0,
    )  # fmt: skip


def random_batches(config: ModelConfig, rows: int, count: int, device: torch.device) -> list[torch.Tensor]:
    """Token ids ``[rows, S + 1]``, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, config.block_size + 1)
    return [torch.randint(config.vocab_size, shape, generator=generator).to(device) for _ in range(count)]


def check(config: ModelConfig, device: torch.device, variants: Sequence[Variant]) -> str:
    """Losses before and after two steps in fp32 of the first layers, so that large models fit too. A compiled variant is
    compared as it is without compilation. Raises: SystemExit unless they are the same."""
    config = replace(config, num_layer=min(config.num_layer, CHECKED_LAYERS))
    weights = initial_weights(config)
    torch.set_float32_matmul_precision("highest")
    batches = random_batches(config, 1, 3, device)
    base: tuple[str, list[float]] | None = None
    distance = 0.0
    eager = [replace(v, compiled=False, recompute="none", attn_backend="auto") for v in variants]
    plainly = [v for v in dict.fromkeys(eager) if v.fits(config, "fp32")]
    for variant in plainly:
        try:
            training = variant.make(Case(config, "fp32", device), weights)
            losses = [float(training.step(tokens)) for tokens in batches]
        except Exception as error:
            if variant.library == "tinytron":
                raise
            print(f"  not compared in fp32: {variant.name} ({first_line(error)})", flush=True)
            continue
        finally:
            training = None  # type: ignore[assignment]
            release(device)
        base = base or (variant.name, losses)
        distance = max(distance, compare(variant.name, losses, *base, TOLERANCE["fp32"]))
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as the trainer has it
    if base is None:
        return "no variant to compare in fp32 (all chosen ones use autocast)"
    first, *_, last = base[1]
    names = ", ".join(v.name for v in plainly)
    return f"same losses in fp32, {first:.5f} and after 2 steps {last:.5f}, within {distance:.1e}: {names}"


def compare(name: str, losses: Sequence[float], base: str, expected: Sequence[float], tolerance: float) -> float:
    """The largest difference. Raises: SystemExit if it is above ``tolerance``."""
    distance = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    if not distance <= tolerance:
        shown = [", ".join(f"{x:.6f}" for x in values) for values in (losses, expected)]
        raise SystemExit(
            f"error: {name} computes something else than {base}: its losses are {shown[0]}, those of {base} {shown[1]}, "
            f"and {tolerance} is allowed"
        )
    return distance


def measure_memory(variant: Variant, case: Case, rows: int, threads: int, queue: Any) -> None:
    """In a process of its own: how much the resident set grows by a model that trains; ``None`` where Linux is not."""
    if not is_measurable():
        queue.put(None)
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    variant.importable()
    join_alone()
    batches = random_batches(case.config, rows, 2, case.device)
    if variant.compiled:  # the compiler itself is not the model's memory
        x = torch.ones(8, requires_grad=True)
        torch.compile(torch.sin)(x).sum().backward()
    gc.collect()
    before = resident()
    training = variant.make(case, None)
    training.step(batches[0])
    gc.collect()
    reset_peak()
    for tokens in batches:
        training.step(tokens)
    training.settle()
    queue.put(peak_resident() - before)


def peak_in_child(variant: Variant, case: Case, rows: int) -> int | None:
    """Bytes; ``None`` where they cannot be measured."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=measure_memory, args=(variant, case, rows, torch.get_num_threads(), queue))
    process.start()
    process.join()
    return None if process.exitcode or queue.empty() else queue.get()


def measure(name: str, precision: str, variants: Sequence[Variant], args: argparse.Namespace) -> Table:
    """One table: check, timing, memory. Raises: SystemExit for a variant that disagrees."""
    device = torch.device(args.device)
    case = Case(model_config(name, args.seq_len), precision, device)
    weights = initial_weights(case.config)
    print(f"\n{name}, {precision}: {check(case.config, device, variants)}", flush=True)
    fitting = [v for v in variants if v.fits(case.config, precision)]
    batches = random_batches(case.config, args.batch, 8, device)
    torch._dynamo.reset()
    run = run_in_turns if fit_together(case, fitting) else run_one_by_one
    rows = run(case, fitting, weights, batches, args.rounds, args.steps)
    ran = [row for row in rows if row.first_loss is not None]
    tf32 = device.type == "cuda" and precision == "fp32"
    for row in ran:
        allowed = TOLERANCE["bf16" if tf32 else precision]
        compare(row.name, [row.first_loss or math.nan], ran[0].name, [ran[0].first_loss or math.nan], allowed)
    if device.type == "cpu" and args.memory:
        for variant, row in zip(fitting, rows, strict=True):
            row.peak_bytes = peak_in_child(variant, case, args.batch) if row.seconds else None
    rate, source = peak_flops(device, case.dtype)
    if device.type == "cpu" and onednn_keeps_fp32():
        with onednn():  # MFU refers to the faster of both libraries
            rate = max(rate, measured_matmul_rate(device, case.dtype))
    shape = case.config
    flops = train_flops_per_token(shape, args.seq_len)
    total = count_parameters(shape).total
    return Table(name, precision, total, args.batch, args.seq_len, flops, rate, source, rows)


def chosen_variants(wanted: Sequence[str] | None, eager: bool = False) -> list[Variant]:
    """Those whose names contain one of ``wanted`` (``eager``: and that are not compiled), but not of missing libraries: it
    prints a line for each. Raises: ValueError if nothing is left."""
    known = [variant for variant in VARIANTS if not (eager and variant.compiled)]
    found = [variant for variant in known if not wanted or any(part in variant.name for part in wanted)]
    if not found:
        raise ValueError(f"--variants {' '.join(wanted or ())} fits none of: {'; '.join(v.name for v in known)}")
    missing = {v.library: reason for v in found if (reason := v.importable()) is not None}
    for library, reason in missing.items():
        print(f"left out: {library} ({reason}); pip install {library}", flush=True)
    if not (left := [v for v in found if v.library not in missing]):
        raise ValueError(f"nothing to measure: {', '.join(missing)} cannot be imported; use --variants tinytron")
    return left


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["10m"])
    parser.add_argument("--precision", nargs="+", choices=TOLERANCE, default=["bf16"])
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a variant in one round")
    parser.add_argument("--variants", nargs="+", help="parts of names; default: all")
    parser.add_argument("--eager", action="store_true", help="leave the compiled variants out")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one")
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory (CPU)"
    )
    parser.add_argument("--out", type=Path, help="write OUT.md, OUT.json and OUT.png")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write them."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    for flag in ("batch", "seq_len", "rounds", "steps"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)} must be at least 1; use {parser.get_default(flag)}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # of peers, about what they are going to change
    try:
        variants = chosen_variants(args.variants, args.eager)
    except ValueError as error:
        parser.error(str(error))
    join_alone()
    print(machine(torch.device(args.device)))
    tables = []
    for name in args.models:
        for precision in args.precision:
            tables.append(measure(name, precision, variants, args))
            print("\n".join(["", *tables[-1].lines()]), flush=True)
            if args.out:  # after every table: a long run that is stopped leaves what it has
                settings = {**vars(args), "out": str(args.out)}
                command = ["python", *sys.orig_argv[1:]] if argv is None else ["step_time.py", *argv]
                written = write(args.out, tables, torch.device(args.device), settings, command)
    if args.out:
        print(written)


if __name__ == "__main__":
    main()
