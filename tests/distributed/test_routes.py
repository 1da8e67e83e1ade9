"""Dispatch and combine on one process, against loops over tokens and choices (P5)."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.expert_rows import combine, dispatch
from tinytron.distributed.expert_parallel.comm import plan_dispatch

T, K, E, D = 7, 3, 5, 4
GENERATOR = torch.Generator()
CHOICES: dict[str, list[list[int]]] = {
    "even": [[(t + i) % E for i in range(K)] for t in range(T)],
    "skew": [[0, 1 + t % 2, 3] for t in range(T)],  # expert 4 gets nothing
    "two experts": [[4, 2, 4] for _ in range(T)],  # a token may even choose one twice
    "all to the last": [[E - 1]] * T,
    "all to the first": [[0]] * T,
    "one token": [[3, 0]],
}
CASES = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


def rows_of(choice: list[list[int]]) -> list[tuple[int, int]]:
    """(token, which choice) of each row that should reach the experts: by expert, then token, then choice."""
    places = [(e, t, i) for t, chosen in enumerate(choice) for i, e in enumerate(chosen)]
    return [(t, i) for _, t, i in sorted(places)]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR.manual_seed(sum(shape))).requires_grad_()


@CASES
def test_rows_come_by_expert_and_within_it_in_token_order(choice: list[list[int]]) -> None:
    routes = plan_dispatch(torch.tensor(choice), E, None)
    x = normal(len(choice), D)
    rows = dispatch(x, routes, None)
    assert torch.equal(rows, x[[t for t, _ in rows_of(choice)]])
    counts = [sum(chosen.count(e) for chosen in choice) for e in range(E)]
    assert routes.counts == routes.rows_e.tolist() == counts
    assert routes.rows_e.dtype == torch.int64
    assert routes.send == routes.recv == [sum(counts)]


@CASES
def test_dispatch_gradient_is_the_sum_over_a_tokens_rows(choice: list[list[int]]) -> None:
    routes = plan_dispatch(torch.tensor(choice), E, None)
    x = normal(len(choice), D)
    cotangent = normal(len(choice) * len(choice[0]), D).detach()
    (grad,) = torch.autograd.grad(dispatch(x, routes, None), x, cotangent)
    expected = torch.zeros_like(x)
    for row, (t, _) in enumerate(rows_of(choice)):
        expected[t] += cotangent[row]
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


@CASES
def test_combine_is_the_weighted_sum_of_a_tokens_rows(choice: list[list[int]]) -> None:
    routes = plan_dispatch(torch.tensor(choice), E, None)
    tokens, k = len(choice), len(choice[0])
    rows, weight = normal(tokens * k, D), normal(tokens, k)
    out = combine(rows, weight, routes, None)
    cotangent = normal(tokens, D).detach()
    expected, rows_grad, weight_grad = torch.zeros(tokens, D).double(), torch.zeros_like(rows), torch.zeros_like(weight)
    for row, (t, i) in enumerate(rows_of(choice)):
        expected[t] += weight[t, i].detach() * rows[row].detach()
        rows_grad[row] = weight[t, i].detach() * cotangent[t]
        weight_grad[t, i] = (rows[row].detach() * cotangent[t]).sum()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out, (rows, weight), cotangent)
    torch.testing.assert_close(found, (rows_grad, weight_grad), rtol=1e-12, atol=1e-12)


@CASES
def test_there_and_back_is_the_identity(choice: list[list[int]]) -> None:
    """With one-hot weights whichever choice is taken, and then the gradient is the cotangent itself."""
    routes = plan_dispatch(torch.tensor(choice), E, None)
    x, (tokens, k) = normal(len(choice), D), (len(choice), len(choice[0]))
    cotangent = normal(tokens, D + 1)[:, 1:].detach()
    for taken in range(k):
        one_hot = torch.zeros(tokens, k, dtype=torch.float64)
        one_hot[:, taken] = 1
        out = combine(dispatch(x, routes, None), one_hot, routes, None)
        assert torch.equal(out, x)
        (grad,) = torch.autograd.grad(out, x, cotangent)
        assert torch.equal(grad, cotangent)


@CASES
def test_each_row_sees_its_own_expert(choice: list[list[int]]) -> None:
    """Expert e multiplies by e + 1: the outcome tells who did the work."""
    routes = plan_dispatch(torch.tensor(choice), E, None)
    x, weight = normal(len(choice), D), normal(len(choice), len(choice[0]))
    factor = torch.repeat_interleave(torch.arange(1.0, E + 1).double(), routes.rows_e)
    out = combine(dispatch(x, routes, None) * factor[:, None], weight, routes, None)
    for t, chosen in enumerate(choice):
        scale = sum(weight[t, i] * (e + 1) for i, e in enumerate(chosen))
        torch.testing.assert_close(out[t], scale * x[t], rtol=1e-12, atol=1e-12)


def test_numerical_gradients() -> None:
    routes = plan_dispatch(torch.tensor(CHOICES["skew"]), E, None)

    def through(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return combine(dispatch(x, routes, None).sin(), weight, routes, None)

    assert torch.autograd.gradcheck(through, (normal(T, D), normal(T, K)))


def test_a_gradient_may_lie_anyhow() -> None:
    routes = plan_dispatch(torch.tensor(CHOICES["skew"]), E, None)
    rows, weight = normal(T * K, D), normal(T, K)
    cotangent = normal(D, T).detach()
    found = [
        torch.autograd.grad(combine(rows, weight, routes, None), (rows, weight), gradient)
        for gradient in (cotangent.t(), cotangent.t().contiguous())
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_sums_of_16_bit_rows_are_in_the_precision_of_the_weights() -> None:
    """256 and seven ones: in bf16 each addition would lose its one; in fp32 there is one rounding, at the end."""
    k = 8
    routes = plan_dispatch(torch.arange(k).view(1, k), k, None)
    rows = torch.tensor([[256.0], *[[1.0]] * (k - 1)], dtype=torch.bfloat16)
    out = combine(rows, torch.ones(1, k), routes, None)
    assert out.dtype == torch.bfloat16
    assert out.tolist() == [[264.0]]  # 263, rounded

    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(dispatch(x, routes, None), x, rows)
    assert grad.dtype == torch.bfloat16
    assert grad.tolist() == [[264.0]]


def test_weights_are_not_rounded_to_the_rows_precision() -> None:
    routes = plan_dispatch(torch.tensor([[0, 1]]), 2, None)
    weight = torch.tensor([[1 + 2**-12, -1.0]])
    out = combine(torch.ones(2, 1, dtype=torch.bfloat16), weight, routes, None)
    assert out.tolist() == [[2**-12]]  # in bf16 the first weight would be 1
