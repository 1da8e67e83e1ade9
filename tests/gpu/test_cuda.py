"""What only a CUDA device can show; run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.attn import Backend, attend
from tinytron.model.modules.loss import LossSums, fused_linear_cross_entropy
from tinytron.utils.profile import peak_flops
from tinytron.utils.sequences import Documents, documents_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CONFIG = ModelConfig(
    block_size=256,
    vocab_size=1000,
    num_layer=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    hidden_size=256,
    intermediate_size=512,
)
TINY = shlex.split(
    "--use_mock_data --mock_data_num_samples 64 --total_batch_size 2048 --batch_size 2 --seq_len 128 --num_layer 2 "
    "--num_attention_heads 8 --num_key_value_heads 4 --hidden_size 256 --intermediate_size 512 --vocab_size 512"
)


def _losses_and_grads(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = GPT(CONFIG, dtype=dtype, device=device)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 257), generator=torch.Generator().manual_seed(0)).to(device)
    sums = model(tokens[:, :-1], tokens[:, 1:])
    assert isinstance(sums, LossSums)
    (sums.objective / 512).backward()
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return sums.token.detach().cpu(), grads


def test_cuda_equals_cpu_in_fp64() -> None:
    (loss, grads), (cpu_loss, cpu_grads) = (_losses_and_grads(d, torch.float64) for d in ("cuda", "cpu"))
    torch.testing.assert_close(loss, cpu_loss, rtol=1e-10, atol=1e-10)
    for name, grad in cpu_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_bf16_loss_is_close_to_fp64() -> None:
    (loss, _), (exact, _) = _losses_and_grads("cuda", torch.bfloat16), _losses_and_grads("cpu", torch.float64)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_waits_for_nothing(weighted: bool) -> None:
    hidden = torch.randn(512, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    labels = torch.randint(0, 1000, (512,), device="cuda")
    weights = torch.rand(512, device="cuda") if weighted else None
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_linear_cross_entropy(hidden, weight, labels, weights_T=weights, chunk_tokens=100).objective.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("window", [0, 1, 30, 100, 128])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_flash_attention_equals_math(backend: Backend, packed: bool, window: int) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    qkv = [torch.randn(2, 128, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (8, 2, 2)]
    documents = Documents(torch.tensor([0, 50, 128, 200, 256], device="cuda", dtype=torch.int32), 78)
    given = documents if packed else None
    flash, math = (attend(*qkv, backend=b, documents=given, window=window) for b in (backend, "math"))
    torch.testing.assert_close(flash, math, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(flash)
    for mine, theirs in zip(*(torch.autograd.grad(out, qkv, grad) for out in (flash, math)), strict=True):
        assert (mine - theirs).norm() < 2e-2 * theirs.norm()


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("sdpa", torch.float64, 1e-8),
        ("sdpa", torch.bfloat16, 0.1),
        ("flash", torch.bfloat16, 0.1),
        ("varlen", torch.bfloat16, 0.1),
    ],
)
def test_packed_documents_are_as_if_alone(backend: Backend, dtype: torch.dtype, tolerance: float) -> None:
    """Against each document by itself on the CPU in fp64. Rounding in bf16 costs a gradient up to 5%."""
    if backend == "flash":
        pytest.importorskip("flash_attn")
    lengths = [50, 206, 100, 100, 56]
    model = GPT(CONFIG, dtype=dtype, device="cuda", attn_backend=backend)
    exact = GPT(CONFIG, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    ids, labels = torch.randint(0, CONFIG.vocab_size, (2, 2, 256), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 256)
    documents = documents_of(positions)
    on_device = documents._replace(cu_seqlens=documents.cu_seqlens.cuda())
    sums = model(ids.cuda(), labels.cuda(), positions.cuda(), on_device)
    parts = zip(ids.flatten().split(lengths), labels.flatten().split(lengths), strict=True)
    alone = [exact(part[None], targets[None]) for part, targets in parts]
    assert isinstance(sums, LossSums)
    expected = torch.stack([losses.objective for losses in alone]).sum()
    torch.testing.assert_close(sums.objective.cpu().double(), expected, rtol=min(tolerance, 2e-3), atol=0)
    (sums.objective / 512).backward()
    (expected / 512).backward()
    for (name, mine), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert (mine.grad.cpu().double() - theirs.grad).norm() < tolerance * theirs.grad.norm(), name


def test_the_mask_of_documents_waits_for_nothing() -> None:
    documents = Documents(torch.tensor([0, 50, 128, 200, 256], device="cuda", dtype=torch.int32), 78)
    torch.cuda.set_sync_debug_mode("error")
    try:
        documents.with_mask(2, 128, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peak_is_known_or_measured() -> None:
    peak, source = peak_flops(torch.device("cuda"), torch.bfloat16)
    assert peak > 1e12
    assert source in ("data sheet", "measured")


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--deterministic"],
        ["--precision", "fp16"],
        ["--use_compile"],
        ["--attn_backend", "varlen", "--sliding_window", "50", "--deterministic"],
        ["--attn_backend", "varlen", "--recompute", "selective", "--use_compile"],
    ],
    ids=str,
)
def test_training_runs_and_learns_nothing_wrong(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "pretrain_debug.py", *TINY, "--log_dir", str(tmp_path), "--max_steps", "8", *options]
    subprocess.run(command, check=True, timeout=300)
    (log,) = tmp_path.glob("*/log.jsonl")
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert len(losses) == 8
    assert all(5.5 < loss < 7.0 for loss in losses)  # ln 512 = 6.24


STEP = """
import sys, torch, warnings
from tinytron.training import Trainer, build_config, parse_args
trainer = Trainer(build_config(parse_args(sys.argv[2:])))
steps = trainer.data.steps(trainer.step)
first, second = next(steps), next(steps)
trainer.train_step(first)
torch.cuda.synchronize()
torch.cuda.set_sync_debug_mode(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trainer.train_step(second)
torch.cuda.set_sync_debug_mode("default")
print("waits:", sum("synchronizing" in str(one.message) for one in caught), "in", len(second))
"""


def step_of(mode: str, flags: list[str], log_dir: Path) -> str:
    """A second training step under torch's ``mode`` of telling about waits; what it printed last."""
    command = [sys.executable, "-c", STEP, mode, *TINY, "--log_dir", str(log_dir), "--debug", *flags]
    return subprocess.run(command, check=True, timeout=300, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--precision bf16 --recompute full --z_loss_coef 0.001",
        "--precision fp16 --recompute selective",
        "--spike_sigma 8 --spike_window 6",
        "--optimizer muon --muon_normuon",
        "--sliding_window 32 --qk_norm",
        "--attn_backend varlen --sliding_window 32 --recompute selective",
        "--no-use_distributed_optimizer",
    ],
)
def test_training_step_never_waits_for_the_host(flags: str, tmp_path: Path) -> None:
    assert step_of("error", flags.split(), tmp_path).startswith("waits: 0 in ")


def test_experts_wait_once_per_exchange(tmp_path: Path) -> None:
    flags = "--use_moe --num_experts 8 --num_experts_per_tok 2 --moe_intermediate_size 128"
    waits, microbatches = map(int, re.findall(r"[0-9]+", step_of("warn", flags.split(), tmp_path)))
    assert waits == 2 * microbatches  # once in each of two layers
