"""The Triton kernel of symmetric products against plain ones, and Muon with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.triton_interpreter import interpreted, near
from tinytron.kernels.choice import Kernels, TritonKernel
from tinytron.optim import Muon
from tinytron.optim.muon import orthogonalize

gram_triton = interpreted("gram_triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mirrored(product: torch.Tensor) -> bool:
    """Whether tiles of 64 equal the ones that mirror them; within those on the diagonal a sum's order may differ."""
    apart = torch.ones(product.shape[-2:], dtype=torch.bool).tril(-64)
    return torch.equal(product[..., apart], product.mT[..., apart])


# Tiles of 64: one, two, three and four of them in a row, whole and not.
SHAPES = [(1, 1), (1, 9), (17, 5), (64, 64), (70, 40), (130, 300), (200, 3), (2, 65, 20), (2, 3, 33, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_equals_the_product_in_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(*shape).to(dtype)
    found = gram_triton.gram(x)
    assert found.dtype == dtype
    near(found, x.double() @ x.double().mT, ulps=4)
    assert mirrored(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (17, 17), (64, 64), (150, 150), (3, 70, 70)], ids=str)
def test_plus_square_equals_the_formula_in_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a = normal(*shape)
    a = ((a + a.mT) / 8).to(dtype)
    found = gram_triton.plus_square(a, -2.5, 0.75)
    exact = -2.5 * a.double() + 0.75 * a.double() @ a.double()
    near(found, exact, ulps=4)
    assert mirrored(found)


@pytest.mark.parametrize("m", [100, 128, 130, 300])
def test_large_tiles_give_the_same(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_triton, "FEW_TILES", 0)
    x = normal(2, m, 40)
    near(gram_triton.gram(x), x.double() @ x.double().mT, ulps=4)


def test_inputs_may_lie_anyhow() -> None:
    x = normal(40, 70).t()
    near(gram_triton.gram(x), x.double() @ x.double().mT, ulps=4)


class Launches:
    """In place of the kernel: what it was launched with."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **options: self.seen.append((grid, options))


@pytest.mark.parametrize(("setting", "precision"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_tf32_only_where_torch_is_told_so(setting: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches, before = Launches(), torch.get_float32_matmul_precision()
    monkeypatch.setattr(gram_triton, "_tiles", launches)
    torch.set_float32_matmul_precision(setting)
    try:
        gram_triton.gram(normal(8, 4))
    finally:
        torch.set_float32_matmul_precision(before)
    assert [options["PRECISION"] for _, options in launches.seen] == [precision]


def test_half_of_the_tiles_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    monkeypatch.setattr(gram_triton, "_tiles", launches)
    for shape in ((64, 3), (65, 3), (3, 300, 3), (2048, 3)):
        gram_triton.gram(torch.empty(shape))
    assert [grid for grid, _ in launches.seen] == [(1, 1), (3, 1), (15, 3), (136, 1)]
    assert [options["BLOCK"] for _, options in launches.seen] == [64, 64, 64, 128]


# Muon.


@pytest.mark.parametrize("shape", [(12, 12), (9, 70), (70, 9), (3, 20, 8), (3, 8, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_orthogonalize_is_the_same_function(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = normal(*shape).to(dtype)
    exact, found = orthogonalize(matrix.double()), orthogonalize(matrix, by="triton")
    assert found.dtype == dtype
    error, eager_error = ((m.double() - exact).norm() / exact.norm() for m in (found, orthogonalize(matrix)))
    assert error <= (1e-5 if dtype == torch.float32 else eager_error)
    assert not orthogonalize(torch.zeros(shape, dtype=dtype), by="triton").any()


OPTIONS: list[dict[str, Any]] = [{}, {"normuon": True, "weight_decay": 0.3, "cautious": True, "ns_steps": 6}]


def stepped(by: TritonKernel, dtype: torch.dtype, options: dict[str, Any]) -> list[torch.Tensor]:
    """Parameters after two steps: packed rows, a stack of experts, and what is no matrix."""
    params = [
        torch.nn.Parameter(normal(*shape, seed=n).to(dtype)) for n, shape in enumerate([(14, 6), (2, 10, 4), (5,)])
    ]
    kinds = [("muon", (8, 3, 3)), ("muon", (5, 5)), ("adamw", ())]
    groups = [
        {"params": [p], "kind": kind, "row_blocks": blocks} for p, (kind, blocks) in zip(params, kinds, strict=True)
    ]
    muon = Muon(groups, lr=0.1, kernels=Kernels(gram=by), **options)
    for step in range(2):
        for n, p in enumerate(params):
            p.grad = normal(*p.shape, seed=10 * step + n).to(dtype)
        muon.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_muons_step_is_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stepped("torch", torch.float32, options)
    calls, kernel = [], gram_triton.gram
    monkeypatch.setattr(gram_triton, "gram", lambda x: calls.append(1) or kernel(x))
    found = stepped("triton", torch.float32, options)
    assert len(calls) == 2 * options.get("ns_steps", 5) * 5  # steps, iterations, blocks
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_fp64_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_triton, "_launch", None)
    for one, other in zip(stepped("triton", torch.float64, {}), stepped("torch", torch.float64, {}), strict=True):
        assert torch.equal(one, other)
