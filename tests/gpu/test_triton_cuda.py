"""Our Triton kernels on a CUDA device; run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_cuda import TINY, step_of
from tests.helpers.expert_rows import combine, dispatch
from tinytron.distributed.expert_parallel import comm
from tinytron.model.modules.loss import fused_linear_cross_entropy
from tinytron.optim.muon import orthogonalize
from tinytron.utils.sequences import IGNORE_INDEX

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def near(mine: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert mine.shape == exact.shape
    assert (mine.double() - exact.double()).norm() <= tolerance * exact.double().norm()


@contextmanager
def tf32(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def same_twice_without_waiting(run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """The results, of a run that compiles the kernels and of 5 that must equal it, and during which the host must not wait
    for the device."""
    first = run()
    torch.cuda.synchronize()
    for _ in range(5):
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other)
    return first


# The loss.


def loss_and_gradients(dtype: torch.dtype, T: int, D: int, V: int, **options: Any) -> Callable[..., list[torch.Tensor]]:
    torch.manual_seed(T + V)
    hidden, weight = normal(T, D, dtype=dtype), (normal(V, D) / D**0.5).to(dtype)
    labels, weights = torch.randint(V, (T,), device=DEVICE), torch.rand(T, device=DEVICE)
    labels[::7], weights[::5] = IGNORE_INDEX, 0

    def run(by_triton: bool, wide: bool = False) -> list[torch.Tensor]:
        inputs = [(x.double() if wide else x).detach().requires_grad_() for x in (hidden, weight)]
        sums = fused_linear_cross_entropy(*inputs, labels, weights_T=weights, by_triton=by_triton, **options)
        assert sums.per_token is not None
        return [sums.objective.detach(), sums.token, sums.per_token, *torch.autograd.grad(sums.objective, inputs)]

    return run


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("T", "D", "V"), [(4096, 768, 50304), (1000, 1536, 50257), (2048, 3072, 50304), (33, 64, 151936), (5, 64, 37)]
)
def test_loss(T: int, D: int, V: int, dtype: torch.dtype) -> None:
    run = loss_and_gradients(dtype, T, D, V, z_loss_coef=1e-3, chunk_tokens=1024)
    mine, eager = same_twice_without_waiting(lambda: run(True)), run(False)
    for one, other in zip(mine, eager, strict=True):
        assert one.dtype == other.dtype
        near(one, other, TOLERANCE[dtype])


def test_loss_equals_fp64() -> None:
    run = loss_and_gradients(torch.float32, 300, 256, 50304, z_loss_coef=1e-3)
    for one, other in zip(run(True), run(False, wide=True), strict=True):
        near(one, other, 1e-5)


def test_a_chunk_of_more_than_2_to_the_31_logits() -> None:
    T, V = 17000, 131072  # 2.2e9 logits: 4.2 GiB in bf16
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    hidden, weight, labels = normal(T, 16, dtype=torch.bfloat16), normal(V, 16, dtype=torch.bfloat16), torch.arange(T)
    with torch.no_grad():
        whole, parts = (
            fused_linear_cross_entropy(hidden, weight, labels.to(DEVICE), chunk_tokens=n, by_triton=True)
            for n in (T, 500)
        )
    assert whole.per_token is not None
    assert parts.per_token is not None
    near(whole.per_token, parts.per_token, 1e-6)


def test_loss_takes_less_memory_than_its_twin() -> None:
    run, peaks = loss_and_gradients(torch.bfloat16, 2048, 256, 50304, chunk_tokens=2048), []
    for by_triton in (False, True):
        run(by_triton)
        torch.cuda.reset_peak_memory_stats()
        run(by_triton)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] - peaks[1] > 0.9 * 4 * 2048 * 50304  # no logits in fp32


# Experts.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "k", "D"), [(8192, 2, 768), (4096, 8, 2048), (100, 4, 3072), (3, 1, 5000), (4096, 3, 100)]
)
def test_experts_rows(T: int, k: int, D: int, dtype: torch.dtype) -> None:
    torch.manual_seed(T)
    x, rows, weight = normal(T, D, dtype=dtype), normal(T * k, D, dtype=dtype), torch.rand(T, k, device=DEVICE)
    routes = comm.plan_routes(torch.rand(T, 32, device=DEVICE).topk(k).indices, 32, None)
    grad = normal(T, D, dtype=dtype)

    def run(by_triton: bool = True, wide: bool = False) -> list[torch.Tensor]:
        inputs = [(t.double() if wide else t).detach().requires_grad_() for t in (x, rows, weight)]
        chosen = routes._replace(by_triton=by_triton)
        out = combine(dispatch(inputs[0], chosen, None) + inputs[1], inputs[2], chosen, None)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    mine, eager, exact = same_twice_without_waiting(run), run(False), run(False, wide=True)
    for one, other, true in zip(mine, eager, exact, strict=True):
        assert one.dtype == other.dtype
        near(one, true, TOLERANCE[dtype])


# Symmetric products.


@pytest.mark.parametrize(
    "shape",
    [(768, 768), (768, 3072), (2048, 2048), (3072, 1000), (1, 900), (100, 7), (16, 512, 768), (8, 1024, 512)],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "setting"), [(torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "high")]
)
def test_symmetric_products(shape: tuple[int, ...], dtype: torch.dtype, setting: str) -> None:
    from tinytron.kernels.triton_symmetric import gram, plus_square

    torch.manual_seed(shape[-1])
    x = (normal(*shape) / shape[-1] ** 0.5).to(dtype)
    tolerance = 1e-5 if (dtype, setting) == (torch.float32, "highest") else 1e-2
    with tf32(setting):
        (product,) = same_twice_without_waiting(lambda: [gram(x)])
        near(product, x.double() @ x.double().mT, tolerance)
        (sums,) = same_twice_without_waiting(lambda: [plus_square(product, -2.5, 0.75)])
        near(sums, -2.5 * product.double() + 0.75 * product.double() @ product.double(), tolerance)
    below = torch.tril(torch.ones(shape[-2], shape[-2], device=DEVICE, dtype=torch.bool), -128)
    assert torch.equal(product.mT[..., below], product[..., below])  # a tile and its mirror


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (512, 2048), (8, 256, 768)], ids=str)
def test_orthogonalize(shape: tuple[int, ...]) -> None:
    matrix = normal(*shape)
    with tf32("highest"):
        (mine,) = same_twice_without_waiting(lambda: [orthogonalize(matrix, by_triton=True)])
        near(mine, orthogonalize(matrix.double()), 1e-4)
    with tf32("high"):
        near(orthogonalize(matrix, by_triton=True), orthogonalize(matrix.double()), 2e-2)


# Training.

MOE = "--use_moe --num_experts 8 --num_experts_per_tok 2 --moe_intermediate_size 128"
FLAGS = [
    "",
    "--z_loss_coef 0.001 --precision fp16",
    "--precision fp32 --optimizer muon --muon_normuon",
    "--optimizer muon --use_compile",
    f"{MOE} --recompute full",
    f"{MOE} --use_compile",
]


@pytest.mark.parametrize("flags", FLAGS)
def test_training_with_them_gives_the_same_losses(flags: str, tmp_path: Path) -> None:
    losses = []
    for name, more in (("plain", []), ("kernels", ["--use_triton_kernels"]), ("again", ["--use_triton_kernels"])):
        command = [sys.executable, "pretrain_debug.py", *TINY, "--log_dir", str(tmp_path / name), "--max_steps", "8"]
        subprocess.run([*command, "--deterministic", *flags.split(), *more], check=True, timeout=300)
        (log,) = (tmp_path / name).glob("*/log.jsonl")
        losses.append([json.loads(line)["loss"] for line in log.read_text().splitlines()])
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[1] == losses[2]


@pytest.mark.parametrize("flags", ["", "--optimizer muon", "--precision fp16"])
def test_a_step_with_them_never_waits_for_the_host(flags: str, tmp_path: Path) -> None:
    assert step_of("error", ["--use_triton_kernels", *flags.split()], tmp_path).startswith("waits: 0 in ")
