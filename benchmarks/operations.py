"""The operations of a training step, one by one: what each has to compute and to move, the least time that takes here, and
the time it takes, beside what torch offers instead; and the ways to attend, with and without documents.

python benchmarks/operations.py [--model 10m] [--precision bf16 fp32] [--threads 2] [--batch 4] [--seq_len 512]
python benchmarks/operations.py --device cuda --model 1b --precision bf16 --seq_len 4096

Forward and backward together, for the shapes of a model of step_time.py. Floor: the larger of FLOPs over the measured rate
of matrix products, and of bytes (every input, output and gradient once, no intermediate) over the measured rate of copies.
A figure is the median over rounds in which the alternatives take turns. Documents are of 1/8 of a sequence on average.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from rounds import copy_rate, median_ms
from step_rounds import release
from step_time import MODELS, model_config

from tinytron.errors import ConfigError
from tinytron.kernels.attention import VARLEN_BACKENDS, attend
from tinytron.kernels.attention_tiled import tiled_attention
from tinytron.kernels.choice import Backend, Kernels, check_device
from tinytron.kernels.rope import rotate
from tinytron.kernels.swiglu import swiglu
from tinytron.model import ModelConfig
from tinytron.model.modules.emb import RotaryEmbedding
from tinytron.model.modules.loss import fused_linear_cross_entropy
from tinytron.model.modules.norm import RMSNorm
from tinytron.utils.matmul import onednn_keeps_fp32, use_onednn
from tinytron.utils.profile import measured_matmul_rate
from tinytron.utils.sequences import Documents, documents_of, visible
from tinytron.utils.training import DTYPES

Run = Callable[[], object]


@dataclass
class Operation:
    """One row: what is computed and moved, ours, and what it replaces (``None``: torch's own is used)."""

    name: str
    flops: float
    elements: float
    run: Run
    other_name: str = ""
    other: Run | None = None


@dataclass(frozen=True)
class Case:
    """``B`` sequences of ``S`` tokens of the model ``config``, in ``dtype`` on ``device``."""

    config: ModelConfig
    B: int
    S: int
    dtype: torch.dtype
    device: torch.device

    def new(self, *shape: int) -> torch.Tensor:
        """Random numbers."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values."""
        c = self.config
        N, K, H = c.num_attention_heads, c.num_key_value_heads, c.resolved_head_dim
        return self.new(self.B, self.S, N, H), self.new(self.B, self.S, K, H), self.new(self.B, self.S, K, H)


def differentiated(f: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Run:
    """Forward and backward of ``f``; the gradient is random."""
    inputs = tuple(x.requires_grad_() for x in inputs)
    grad = torch.randn_like(f(*inputs).detach())
    return lambda: torch.autograd.grad(f(*inputs), inputs, grad)


def operations(case: Case) -> Iterator[Operation]:
    """Those of a block, then those outside."""
    B, S, dtype, new, c = case.B, case.S, case.dtype, case.new, case.config
    D, N, K, H = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.resolved_head_dim
    T, inner, V = B * S, c.intermediate_size, c.vocab_size
    products = {"query, key, value": (D, (N + 2 * K) * H), "attention out": (N * H, D)}
    for name, (n_in, n_out) in {**products, "gate, up": (D, 2 * inner), "down": (inner, D)}.items():
        moved = 2 * (T * (n_in + n_out) + n_in * n_out) + T * n_out
        yield Operation(name, 6 * T * n_in * n_out, moved, differentiated(F.linear, new(T, n_in), new(n_out, n_in)))
    q, k, v = case.qkv()

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, backend="sdpa")

    flops, elements = 7 * 2 * (B * N * S * (S + 1) / 2) * H, 5 * q.numel() + 6 * k.numel()
    if case.device.type == "cpu":
        tiled = differentiated(tiled_attention, q, k, v)
        yield Operation("attention", flops, elements, tiled, "SDPA", differentiated(sdpa, q, k, v))
    else:
        yield Operation("attention", flops, elements, differentiated(sdpa, q, k, v))
    norm = RMSNorm(D, 1e-5).to(case.device, dtype)
    yield Operation(
        "RMSNorm", 0, 5 * T * D, differentiated(norm, new(B, S, D)),
        "F.rms_norm", differentiated(lambda x: F.rms_norm(x, (D,), norm.weight, 1e-5), new(B, S, D)),
    )  # fmt: skip

    def plain_gate(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    yield Operation(
        "silu(gate) * up", 0, 8 * T * inner, differentiated(swiglu, new(T, 2 * inner)),
        "torch", differentiated(plain_gate, new(T, 2 * inner)),
    )  # fmt: skip
    with case.device:
        rotation = RotaryEmbedding(10000.0 ** -(torch.arange(0, H, 2) / H), S, torch.float32, 1.0)(0, S)
    heads = new(B, S, N + K, H)
    yield Operation("rotation", 0, 4 * heads.numel(), differentiated(lambda x: rotate(x, rotation), heads))
    hidden, weight, labels = new(T, D), new(V, D), torch.randint(V, (T,), device=case.device)
    yield Operation(
        "head and loss", 6 * T * D * V, 2 * (T * D + V * D),
        differentiated(lambda x, w: fused_linear_cross_entropy(x, w, labels).objective, hidden, weight),
        "logits, cross_entropy", differentiated(lambda x, w: F.cross_entropy((x @ w.t()).float(), labels), hidden, weight),
    )  # fmt: skip


def cut_into_documents(case: Case) -> Documents:
    """Every row cut at random, into 8 documents on average; on the device."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(case.S).repeat(case.B, 1)
    for row in positions:
        cuts = torch.randperm(case.S - 1, generator=generator)[: min(7, case.S - 1)].add(1).sort().values
        for start in cuts.tolist():
            row[start:] = torch.arange(case.S - start)
    documents = documents_of(positions)
    return documents._replace(cu_seqlens=documents.cu_seqlens.to(case.device))


def attention_runs(case: Case, packed: bool) -> tuple[dict[str, Run], list[str]]:
    """The ways of ``--attn_backend`` to attend, and lines on those that cannot run here. Masks are made before, as a model
    makes them once for all of its layers."""
    documents = cut_into_documents(case) if packed else None
    masked = visible(documents, 0, case.B, case.S, case.dtype, case.device)
    runs: dict[str, Run] = {}
    missing = []
    for backend in get_args(Backend):
        if backend == "auto" and case.device.type != "cpu":
            continue  # the same as SDPA
        try:
            check_device(Kernels(attention=backend), case.device, case.dtype)
            q, k, v = case.qkv()
            seen = documents if backend in VARLEN_BACKENDS else masked
            run = differentiated(_attending(backend, seen), q, k, v)
            run()  # to see whether it fits
            runs[backend] = run
        except ConfigError as error:
            missing.append(str(error))
        except torch.OutOfMemoryError:
            missing.append(f"{backend} does not fit into memory")
            release(case.device)
    return runs, missing


def _attending(backend: Backend, documents: Documents | None) -> Callable[..., torch.Tensor]:
    return lambda q, k, v: attend(q, k, v, backend=backend, documents=documents)


OPERATIONS_HEAD = (
    "| operation | GFLOP | MiB | floor, ms | ms | of the floor | instead of | ms | ratio |\n"
    "|---|---:|---:|---:|---:|---:|---|---:|---:|"
)
ATTENTION_HEAD = "| --attn_backend | ms | with documents, ms |\n|---|---:|---:|"


def operation_rows(case: Case, rate: float, bandwidth: float, rounds: int) -> Iterator[str]:
    """The lines of the table of the operations."""
    for op in operations(case):
        found = median_ms([op.run, *([op.other] if op.other else [])], rounds, case.device)
        moved = op.elements * case.dtype.itemsize
        floor = 1e3 * max(op.flops / rate, moved / bandwidth)
        peer = f"{op.other_name} | {found[1]:.2f} | {found[1] / found[0]:.2f}" if op.other else "| |"
        yield (
            f"| {op.name} | {op.flops / 1e9:.2f} | {moved / 2**20:.1f} | {floor:.2f} | {found[0]:.2f} | "
            f"{floor / found[0]:.0%} | {peer} |"
        )


def attention_times(case: Case, rounds: int) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Milliseconds of each way to attend, without and with documents, and notes on those that cannot run here."""
    found: list[dict[str, float]] = []
    notes: list[str] = []
    for packed in (False, True):
        runs, missing = attention_runs(case, packed)
        found.append(dict(zip(runs, median_ms(list(runs.values()), rounds, case.device), strict=True)))
        notes += [note for note in missing if note not in notes]
        del runs
        release(case.device)
    return found[0], found[1], notes


def attention_rows(plain: dict[str, float], packed: dict[str, float]) -> Iterator[str]:
    """The lines of the table of the ways to attend."""
    for backend in get_args(Backend):
        if backend in plain or backend in packed:
            cells = " | ".join(f"{column[backend]:.2f}" if backend in column else "" for column in (plain, packed))
            yield f"| {backend} | {cells} |"


def main() -> None:
    """Print the tables of each precision."""
    dense = [name for name, sizes in MODELS.items() if not sizes[-1]]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=dense, default="10m")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    for name, default in (("threads", torch.get_num_threads()), ("batch", 4), ("seq_len", 512), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and this machine has none; use --device cpu")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as the trainer has it
    if device.type == "cpu" and onednn_keeps_fp32():
        use_onednn()
    place = f"{args.threads} threads" if device.type == "cpu" else torch.cuda.get_device_name()
    bandwidth = copy_rate(device)
    for precision in args.precision:
        case = Case(model_config(args.model, args.seq_len), args.batch, args.seq_len, DTYPES[precision], device)
        rate = measured_matmul_rate(device, case.dtype)
        print(
            f"\n{args.model}, {precision}, {args.batch} x {args.seq_len} tokens, {place}, torch {torch.__version__}: "
            f"matrix products {rate / 1e9:.0f} GFLOP/s, copies {bandwidth / 1e9:.0f} GB/s\n"
        )
        print(OPERATIONS_HEAD)
        for row in operation_rows(case, rate, bandwidth, args.rounds):
            print(row, flush=True)
        plain, packed, notes = attention_times(case, args.rounds)
        print("\n".join(["", ATTENTION_HEAD, *attention_rows(plain, packed), "", *(f"not here: {n}" for n in notes)]))


if __name__ == "__main__":
    main()
