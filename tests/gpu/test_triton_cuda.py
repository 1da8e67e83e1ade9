"""Our Triton kernels on a CUDA device; run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.device import DEVICE, GPU_TEST, REHEARSING, matmul_precision, no_host_waits, only_a_gpu_shows, sized
from tests.gpu.trained import EXPERTS, stepped, trained
from tests.helpers.expert_rows import combine, dispatch
from tests.helpers.triton_interpreter import interpreted
from tinytron.distributed.expert_parallel import comm
from tinytron.model.modules.loss import fused_linear_cross_entropy
from tinytron.optim.muon import orthogonalize
from tinytron.utils.sequences import IGNORE_INDEX

pytestmark = GPU_TEST

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton")
    if REHEARSING:
        interpreted("cross_entropy_triton")  # and all others: the interpreter's bf16 is mended


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def near(mine: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert mine.shape == exact.shape
    assert (mine.double() - exact.double()).norm() <= tolerance * exact.double().norm()


def unwaited() -> Any:
    """A context in which the host must not wait for the device. Triton's interpreter reads what it computes with."""
    return nullcontext() if REHEARSING else no_host_waits()


def same_twice_without_waiting(run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """The results, of a run that compiles the kernels and of 3 that must equal it, and during which the host must not wait
    for the device."""
    first = run()
    torch.cuda.synchronize()
    for _ in range(sized(3, 1)):
        with unwaited():
            again = run()
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
        sums = fused_linear_cross_entropy(
            *inputs, labels, weights_T=weights, by="triton" if by_triton else "torch", **options
        )
        assert sums.per_token is not None
        return [sums.objective.detach(), sums.token, sums.per_token, *torch.autograd.grad(sums.objective, inputs)]

    return run


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("T", "D", "V"),
    sized([(4096, 768, 50304), (1000, 1536, 50257), (33, 64, 151936), (5, 64, 37)], [(5, 8, 37), (3, 8, 4100)]),
)
def test_loss(T: int, D: int, V: int, dtype: torch.dtype) -> None:
    run = loss_and_gradients(dtype, T, D, V, z_loss_coef=1e-3, chunk_tokens=1024)
    mine, eager = same_twice_without_waiting(lambda: run(True)), run(False)
    for one, other in zip(mine, eager, strict=True):
        assert one.dtype == other.dtype
        near(one, other, TOLERANCE[dtype])


def test_loss_equals_fp64() -> None:
    run = loss_and_gradients(torch.float32, *sized((300, 256, 50304), (4, 8, 530)), z_loss_coef=1e-3)
    for one, other in zip(run(True), run(False, wide=True), strict=True):
        near(one, other, 1e-5)


def test_a_chunk_of_more_than_2_to_the_31_logits() -> None:
    T, V = sized((17000, 131072), (9, 1100))  # 2.2e9 logits: 4.2 GiB in bf16
    if torch.cuda.mem_get_info()[0] < sized(12, 1) * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    hidden, weight, labels = normal(T, 16, dtype=torch.bfloat16), normal(V, 16, dtype=torch.bfloat16), torch.arange(T)
    with torch.no_grad():
        whole, parts = (
            fused_linear_cross_entropy(hidden, weight, labels.to(DEVICE), chunk_tokens=n, by="triton")
            for n in (T, sized(500, 4))
        )
    assert whole.per_token is not None
    assert parts.per_token is not None
    near(whole.per_token, parts.per_token, 1e-6)


def test_loss_takes_less_memory_than_its_twin() -> None:
    T, V = sized((2048, 50304), (4, 300))
    run, peaks = loss_and_gradients(torch.bfloat16, T, 256, V, chunk_tokens=T), []
    for by_triton in (False, True):
        run(by_triton)
        torch.cuda.reset_peak_memory_stats()
        run(by_triton)
        peaks.append(torch.cuda.max_memory_allocated())
    only_a_gpu_shows("its bytes")
    assert peaks[0] - peaks[1] > 0.9 * 4 * T * V  # no logits in fp32


# Experts.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "k", "D"),
    sized([(8192, 2, 768), (4096, 8, 2048), (100, 4, 3072), (3, 1, 5000), (4096, 3, 100)], [(5, 2, 33), (2, 1, 2100)]),
)
def test_experts_rows(T: int, k: int, D: int, dtype: torch.dtype) -> None:
    torch.manual_seed(T)
    x, rows, weight = normal(T, D, dtype=dtype), normal(T * k, D, dtype=dtype), torch.rand(T, k, device=DEVICE)
    routes = comm.plan_dispatch(torch.rand(T, 32, device=DEVICE).topk(k).indices, 32, None)
    grad = normal(T, D, dtype=dtype)

    def run(by_triton: bool = True, wide: bool = False) -> list[torch.Tensor]:
        inputs = [(t.double() if wide else t).detach().requires_grad_() for t in (x, rows, weight)]
        by: Any = "triton" if by_triton else "torch"
        out = combine(dispatch(inputs[0], routes, None, by) + inputs[1], inputs[2], routes, None, by)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    mine, eager, exact = same_twice_without_waiting(run), run(False), run(False, wide=True)
    for one, other, true in zip(mine, eager, exact, strict=True):
        assert one.dtype == other.dtype
        near(one, true, TOLERANCE[dtype])


# Symmetric products.


@pytest.mark.parametrize(
    "shape",
    sized(
        [(768, 768), (768, 3072), (2048, 2048), (3072, 1000), (1, 900), (100, 7), (8, 1024, 512)],
        [(70, 24), (2, 17, 5)],
    ),
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "setting"), [(torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "high")]
)
def test_symmetric_products(shape: tuple[int, ...], dtype: torch.dtype, setting: str) -> None:
    from tinytron.kernels.gram_triton import gram, plus_square

    torch.manual_seed(shape[-1])
    x = (normal(*shape) / shape[-1] ** 0.5).to(dtype)
    tolerance = 1e-5 if (dtype, setting) == (torch.float32, "highest") else 1e-2
    with matmul_precision(setting):
        (product,) = same_twice_without_waiting(lambda: [gram(x)])
        near(product, x.double() @ x.double().mT, tolerance)
        (sums,) = same_twice_without_waiting(lambda: [plus_square(product, -2.5, 0.75)])
        near(sums, -2.5 * product.double() + 0.75 * product.double() @ product.double(), tolerance)
    below = torch.tril(torch.ones(shape[-2], shape[-2], device=DEVICE, dtype=torch.bool), -128)
    assert torch.equal(product.mT[..., below], product[..., below])  # a tile and its mirror


@pytest.mark.parametrize("shape", sized([(768, 768), (3072, 768), (8, 256, 768)], [(9, 20)]), ids=str)
def test_orthogonalize(shape: tuple[int, ...]) -> None:
    matrix = normal(*shape)
    with matmul_precision("highest"):
        (mine,) = same_twice_without_waiting(lambda: [orthogonalize(matrix, by="triton")])
        near(mine, orthogonalize(matrix.double()), 1e-4)
    with matmul_precision("high"):
        near(orthogonalize(matrix, by="triton"), orthogonalize(matrix.double()), 2e-2)


# Training.

SLOWLY = ("--num_layer", 1, "--total_batch_size", 24, "--muon_ns_steps", 1)  # what the interpreter does in a second
FLAGS = [
    "--precision bf16",
    "--precision fp32 --optimizer muon --muon_normuon",
    f"--precision bf16 {EXPERTS} --recompute full",
    "--z_loss_coef 0.001 --precision fp16",
    f"--precision bf16 {EXPERTS} --use_compile",
    "--precision bf16 --optimizer muon --use_compile",
]


@pytest.mark.parametrize("flags", FLAGS[: sized(len(FLAGS), 3)])
def test_training_with_them_gives_the_same_losses(flags: str, tmp_path: Path) -> None:
    steps, runs, small = sized(6, 2), {}, sized((), SLOWLY)
    for name, more in (("plain", []), ("kernels", ["--use_triton_kernels"]), ("again", ["--use_triton_kernels"])):
        if name == "again" and REHEARSING:
            continue  # the interpreter runs one program after the other: nothing could differ
        runs[name] = trained(steps, tmp_path / name, "--deterministic", *flags.split(), *small, *more)
    assert len(runs["plain"].losses) == steps
    assert runs["kernels"].losses == pytest.approx(runs["plain"].losses, rel=5e-3)
    assert runs["kernels"].norms == pytest.approx(runs["plain"].norms, rel=5e-2)
    only_a_gpu_shows("whether a kernel repeats itself")
    assert runs["kernels"].losses == runs["again"].losses
    assert all(torch.equal(runs["again"].weights[name], weight) for name, weight in runs["kernels"].weights.items())


@pytest.mark.parametrize("flags", ["", "--optimizer muon", "--precision fp16"][: sized(3, 1)])
def test_a_step_with_them_never_waits_for_the_host(flags: str, tmp_path: Path) -> None:
    given = (*flags.split(), *(() if "--precision" in flags else ("--precision", "bf16")), *sized((), SLOWLY))
    trainer = stepped(tmp_path, "--max_steps", 3, "--use_triton_kernels", *given).run(1)
    batches = trainer.next_batches()
    torch.cuda.synchronize()
    with unwaited():
        trainer.one_step(batches)
    assert torch.isfinite(trainer.kept[-1][0])
