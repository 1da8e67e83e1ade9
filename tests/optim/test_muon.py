"""Muon against its formulas written out; its AdamW part against torch's."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch

from tinytron.optim import Muon
from tinytron.optim.muon import orthogonalize

# Polar Express, arXiv:2505.16932: five steps, safety 2e-2, cushion 2.
QUINTICS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


NEAR_ONE = 0.15  # what five steps leave: they end with all singular values in [0.87, 1.14], not nearer


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(rows: int, cols: int, values: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with these singular values, and its polar factor."""
    u, _, v = torch.linalg.svd(normal(rows, cols), full_matrices=False)
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v, u @ v


def polar(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """By singular values: each quintic acts on them alone, the singular vectors stay."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (s.square().sum().sqrt() * 1.02 + 1e-6)
    for a, b, c in (QUINTICS + [QUINTICS[-1]] * steps)[:steps]:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


# Orthogonalization.


@pytest.mark.parametrize(("rows", "cols"), [(8, 8), (12, 5), (5, 12), (1, 9), (9, 1)])
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_each_step_is_its_quintic_on_the_singular_values(rows: int, cols: int, steps: int) -> None:
    matrix = normal(rows, cols)
    torch.testing.assert_close(orthogonalize(matrix, steps), polar(matrix, steps), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (24, 16), (16, 24)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_singular_values_become_one(rows: int, cols: int, scale: float) -> None:
    values = [10 ** (-2 * i / 15) for i in range(16)]  # a condition number of 100
    matrix, factor = with_singular_values(rows, cols, [scale * v for v in values])
    found = orthogonalize(matrix)
    assert torch.linalg.svdvals(found).sub(1).abs().max() < NEAR_ONE
    assert torch.linalg.matrix_norm(found - factor, 2) < NEAR_ONE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_works_in_its_own_precision(dtype: torch.dtype) -> None:
    matrix, factor = with_singular_values(16, 24, [10 ** (-i / 15) for i in range(16)])
    found = orthogonalize(matrix.to(dtype))
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert torch.linalg.matrix_norm(found.double() - polar(matrix.to(dtype).double()), 2) < tolerance
    assert torch.linalg.matrix_norm(found.double() - factor, 2) < 0.2


def test_a_stack_is_done_matrix_by_matrix() -> None:
    stack = normal(4, 6, 3) * torch.tensor([1.0, 100.0, 1e-3, 0.0]).double().view(4, 1, 1)
    found = orthogonalize(stack)
    for one, whole in zip(stack[:3], found[:3], strict=True):
        torch.testing.assert_close(whole, polar(one), rtol=1e-10, atol=1e-10)
    assert torch.equal(found[3], torch.zeros(6, 3, dtype=torch.float64))


# The step.


class Reference:
    """One matrix, one row block after the other, one formula a line."""

    def __init__(self, p: torch.Tensor, blocks: tuple[int, ...], options: dict[str, Any]) -> None:
        self.p, self.blocks, self.o = p.clone(), blocks or (p.shape[0],), options
        self.m = torch.zeros_like(p)
        self.v: torch.Tensor | None = None

    def step(self, g: torch.Tensor) -> None:
        o, mu = self.o, self.o.get("momentum", 0.95)
        self.m = mu * self.m + (1 - mu) * g
        u = (1 - mu) * g + mu * self.m
        parts, first = [], 0
        for height in self.blocks:
            block = u[first : first + height]
            parts.append(polar(block, o.get("ns_steps", 5)) * math.sqrt(max(1, height / block.shape[1])))
            first += height
        u = torch.cat(parts)
        if o.get("normuon"):
            u = self.normalized(u)
        decay = o.get("weight_decay", 0.0) * self.p
        if o.get("cautious"):
            decay = torch.where(u * self.p >= 0, decay, torch.zeros_like(decay))
        self.p = self.p - o["lr"] * (u + decay)

    def normalized(self, u: torch.Tensor) -> torch.Tensor:
        beta2 = self.o.get("normuon_beta2", 0.95)
        rows, cols = u.shape
        if rows >= cols:
            r = torch.stack([(row**2).sum() / cols for row in u])[:, None]
        else:
            r = torch.stack([(col**2).sum() / rows for col in u.T])[None, :]
        self.v = (1 - beta2) * r + beta2 * (torch.zeros_like(r) if self.v is None else self.v)
        scaled = u / self.v.clamp(min=1e-10) ** 0.5
        return scaled * (u**2).sum() ** 0.5 / (scaled**2).sum() ** 0.5


OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.5, "ns_steps": 3},
    {"weight_decay": 0.3},
    {"weight_decay": 0.3, "cautious": True},
    {"normuon": True},
    {"normuon": True, "normuon_beta2": 0.6, "weight_decay": 0.3, "cautious": True},
]
SHAPES: list[tuple[tuple[int, int], tuple[int, ...]]] = [
    ((6, 6), ()),
    ((12, 5), ()),
    ((5, 12), ()),
    ((14, 6), (8, 3, 3)),  # packed queries, keys, values: a tall block and two wide ones
    ((10, 4), (5, 5)),  # packed gate and up
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("shape", "blocks"), SHAPES, ids=str)
def test_steps_equal_the_formulas(shape: tuple[int, int], blocks: tuple[int, ...], options: dict[str, Any]) -> None:
    p = torch.nn.Parameter(normal(*shape, seed=1))
    reference = Reference(p.detach(), blocks, {"lr": 0.1, **options})
    muon = Muon([{"params": [p], "kind": "muon", "row_blocks": blocks}], lr=0.1, **options)
    for step in range(4):
        p.grad = normal(*shape, seed=10 + step)
        given = p.grad.clone()
        muon.step()
        reference.step(given)
        torch.testing.assert_close(p.detach(), reference.p, rtol=1e-10, atol=1e-10)
        assert torch.equal(p.grad, given)  # the gradient is not touched
    torch.testing.assert_close(muon.state[p]["momentum_buffer"], reference.m, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("blocks", [(), (5, 5)])
def test_each_expert_of_a_stack_is_a_matrix_of_its_own(blocks: tuple[int, ...], options: dict[str, Any]) -> None:
    experts, shape = 3, (10, 4)
    p = torch.nn.Parameter(normal(experts, *shape, seed=1))
    references = [Reference(one, blocks, {"lr": 0.1, **options}) for one in p.detach()]
    muon = Muon([{"params": [p], "kind": "muon", "row_blocks": blocks}], lr=0.1, **options)
    for step in range(3):
        p.grad = normal(experts, *shape, seed=10 + step) * torch.tensor([1.0, 1e3, 1e-3]).double().view(3, 1, 1)
        muon.step()
        for one, reference, grad in zip(p.detach(), references, p.grad, strict=True):
            reference.step(grad)
            torch.testing.assert_close(one, reference.p, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rest", [1, 40])
def test_a_matrix_without_a_gradient_stays_where_it_is(rest: int, options: dict[str, Any]) -> None:
    """An expert without tokens, and one block of a packed matrix; only decay goes on, and later steps are as if they had
    rested. With momentum left over, an orthogonalized update would be of full size."""
    p, start = torch.nn.Parameter(normal(3, 10, 4, seed=1)), normal(3, 10, 4, seed=1)
    muon = Muon([{"params": [p], "kind": "muon", "row_blocks": (5, 5)}], lr=0.1, **options)
    p.grad = normal(3, 10, 4, seed=10)
    muon.step()
    moved, moment = p.detach().clone(), muon.state[p].get("second_moment", torch.zeros(())).clone()
    assert (moved - start).abs().amax((1, 2)).min() > 0.01
    for step in range(rest):
        p.grad = normal(3, 10, 4, seed=20 + step)
        p.grad[0], p.grad[2, 5:] = 0, 0
        muon.step()
    keep = (1 - 0.1 * options.get("weight_decay", 0.0)) ** rest
    torch.testing.assert_close(p.detach()[0], moved[0] * keep, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.detach()[2, 5:], moved[2, 5:] * keep, rtol=1e-12, atol=1e-12)
    assert (p.detach() - moved)[1].abs().max() > 0.01
    if options.get("normuon"):
        assert torch.equal(muon.state[p]["second_moment"][0], moment[0])
    momentum = muon.state[p]["momentum_buffer"][0].norm() / (1 - muon.param_groups[0]["momentum"])
    assert momentum == pytest.approx(normal(3, 10, 4, seed=10)[0].norm() * muon.param_groups[0]["momentum"] ** rest)


def test_a_gradient_however_small_moves_a_matrix() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float32))
    muon = Muon([{"params": [p], "kind": "muon"}], lr=1.0)
    p.grad = torch.eye(4)
    muon.step()
    first = p.detach().clone()
    p.grad = torch.full((4, 4), 1e-30)  # its square is zero
    muon.step()
    assert not torch.equal(p.detach(), first)


def test_tall_matrices_move_further_in_torchs_orientation() -> None:
    """``[out, in]``: sqrt(out / in) if there are more outputs than inputs, else one."""
    for rows, cols, factor in ((16, 4, 2.0), (4, 16, 1.0), (4, 4, 1.0)):
        p = torch.nn.Parameter(torch.zeros(rows, cols, dtype=torch.float64))
        p.grad, turn = with_singular_values(rows, cols, [1.0, 0.8, 0.6, 0.4])
        Muon([{"params": [p], "kind": "muon"}], lr=1.0).step()
        torch.testing.assert_close(p.detach(), -factor * turn, rtol=0, atol=NEAR_ONE * factor)
        assert torch.linalg.svdvals(p.detach()).mean() == pytest.approx(factor, rel=NEAR_ONE)


def test_normuon_keeps_the_norm_and_evens_out_the_rows() -> None:
    sizes, spreads = [], []
    for normuon in (False, True):
        p = torch.nn.Parameter(torch.zeros(24, 6, dtype=torch.float64))
        muon = Muon([{"params": [p], "kind": "muon"}], lr=1.0, normuon=normuon)
        for _ in range(2):
            p.grad = normal(24, 6) * torch.linspace(0.1, 3, 24).double().view(24, 1)
            before = p.detach().clone()
            muon.step()
        update = p.detach() - before
        sizes.append(float(update.norm()))
        rows = update.norm(dim=1)
        spreads.append(float(rows.std() / rows.mean()))
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-10)
    assert spreads[1] < 1e-6 < 0.1 < spreads[0]


def test_normuon_sees_the_history() -> None:
    """A row that was large before is held back now."""
    p = torch.nn.Parameter(torch.zeros(8, 2, dtype=torch.float64))
    muon = Muon([{"params": [p], "kind": "muon"}], lr=1.0, normuon=True, momentum=0.0)
    for grad in (torch.eye(8, 2), torch.ones(8, 2) + torch.eye(8, 2).flip(0)):
        p.grad, before = grad.double(), p.detach().clone()
        muon.step()
    rows = (p.detach() - before).norm(dim=1)
    assert rows[0] < 0.5 * rows[2]


def test_cautious_decay_leaves_what_moves_the_other_way() -> None:
    """The update is the identity's polar factor: ones on the diagonal, zero elsewhere (zero agrees with any sign)."""
    start = torch.tensor([[2.0, -1.0], [3.0, -2.0]], dtype=torch.float64)
    moved = []
    for decay in (0.0, 0.5):
        p = torch.nn.Parameter(start.clone())
        p.grad = torch.eye(2, dtype=torch.float64)
        Muon([{"params": [p], "kind": "muon"}], lr=0.1, cautious=True, weight_decay=decay).step()
        moved.append(p.detach())
    expected = -0.1 * 0.5 * torch.tensor([[2.0, -1.0], [3.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(moved[1] - moved[0], expected, rtol=1e-12, atol=1e-12)


# Skipped steps.


def groups_for(seed: int) -> list[dict[str, Any]]:
    matrix, stack, scalar = (
        torch.nn.Parameter(normal(*s, seed=seed + i)) for i, s in enumerate([(6, 4), (2, 4, 6), (5,)])
    )
    return [
        {"params": [matrix], "kind": "muon", "row_blocks": (3, 3), "weight_decay": 0.1},
        {"params": [stack], "kind": "muon", "weight_decay": 0.1},
        {"params": [scalar], "kind": "adamw", "weight_decay": 0.1},
    ]


def everything(muon: Muon) -> list[torch.Tensor]:
    params = [p for group in muon.param_groups for p in group["params"]]
    return [t.detach().clone() for p in params for t in (p, *muon.state[p].values())]


def step_with(muon: Muon, seed: int, value: float | None = None) -> None:
    for i, group in enumerate(muon.param_groups):
        for p in group["params"]:
            p.grad = normal(*p.shape, seed=seed + i)
            if value is not None:
                p.grad.view(-1)[0] = value
    muon.step()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_found_inf_leaves_everything_unchanged(steps_before: int, value: float) -> None:
    disturbed, plain = (Muon(groups_for(0), lr=0.1, normuon=True, cautious=True) for _ in range(2))
    assert disturbed._step_supports_amp_scaling
    for muon, step in itertools.product((disturbed, plain), range(steps_before)):
        step_with(muon, seed=10 * step)
    before = everything(disturbed)
    disturbed.found_inf = torch.ones(())
    step_with(disturbed, seed=100, value=value)
    if steps_before:
        found = everything(disturbed)
        assert len(found) == len(before)
        assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    disturbed.found_inf = torch.zeros(())
    for muon in (disturbed, plain):  # and it goes on as if nothing had been
        step_with(muon, seed=200)
    assert all(torch.equal(a, b) for a, b in zip(everything(disturbed), everything(plain), strict=True))


def test_parameters_without_a_gradient_are_left_alone() -> None:
    muon = Muon(groups_for(0), lr=0.1)
    before = [p.detach().clone() for g in muon.param_groups for p in g["params"]]
    muon.step()
    assert all(
        torch.equal(a, p) for a, p in zip(before, (p for g in muon.param_groups for p in g["params"]), strict=True)
    )
    assert not any(muon.state.values())


# The AdamW part.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rest_is_torchs_adamw(dtype: torch.dtype) -> None:
    shapes = [(7,), (3, 4), (2, 3, 4)]
    mine, theirs = ([torch.nn.Parameter(normal(*s).to(dtype)) for s in shapes] for _ in range(2))

    def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:], "weight_decay": 0.2}]

    muon = Muon([{**g, "kind": "adamw"} for g in groups(mine)], lr=0.1, betas=(0.8, 0.95), eps=1e-3)
    adamw = torch.optim.AdamW(groups(theirs), lr=0.1, betas=(0.8, 0.95), eps=1e-3, fused=True)
    for step in range(5):
        for optimizer, params in ((muon, mine), (adamw, theirs)):
            for i, p in enumerate(params):
                p.grad = normal(*p.shape, seed=10 * step + i).to(dtype)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_its_states_can_be_saved_and_loaded() -> None:
    first, second = (Muon(groups_for(0), lr=0.1, normuon=True) for _ in range(2))
    step_with(first, seed=0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch shares the tensors otherwise
    for mine, theirs in zip(second.param_groups, first.param_groups, strict=True):
        for p, other in zip(mine["params"], theirs["params"], strict=True):
            p.data.copy_(other.data)
    for muon in (first, second):
        step_with(muon, seed=50)
    assert all(torch.equal(a, b) for a, b in zip(everything(first), everything(second), strict=True))
