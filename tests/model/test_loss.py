"""The fused head and loss against torch's own cross entropy on the full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.kernel_packages import install
from tinytron.model.modules.loss import cross_entropy_of_logits, fused_linear_cross_entropy
from tinytron.utils.sequences import IGNORE_INDEX

T, D, V = 37, 16, 53


def problem(dtype: torch.dtype = torch.float64, tokens: int = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and labels; the first, the last and every fifth label are ignored."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(V, (tokens,), generator=generator)
    labels[::5] = labels[-1:] = IGNORE_INDEX
    return hidden, weight, labels


def full_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z_coef: float) -> torch.Tensor:
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    for row, label in zip(logits, labels.tolist(), strict=True):
        if label != -100:
            loss = loss + z_coef * row.exp().sum().log() ** 2
    return loss


def token_weights() -> torch.Tensor:
    """Positive ones, and 0 for every third target; ignored targets get any of both."""
    weights = torch.rand(T, generator=torch.Generator().manual_seed(3)) + 0.1
    weights[::3] = 0
    return weights


def weighted_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, z_coef: float
) -> torch.Tensor:
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    z_term = logits.logsumexp(1).square() * (labels != -100)
    return (weights.to(loss.dtype) * (loss + z_coef * z_term)).sum()


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, inputs)]


class Watch(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, and how often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return out


@pytest.mark.parametrize("z_coef", [0.0, 0.01])
@pytest.mark.parametrize("chunk", [1, 8, T - 1, T, 1000, None])
def test_equals_cross_entropy_of_full_logits_in_fp64(chunk: int | None, z_coef: float) -> None:
    hidden, weight, labels = problem()
    expected = full_loss(hidden, weight, labels, z_coef)
    losses = fused_linear_cross_entropy(hidden, weight, labels, z_loss_coef=z_coef, chunk_tokens=chunk)
    torch.testing.assert_close(losses.objective, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.token, full_loss(hidden, weight, labels, 0.0), rtol=1e-12, atol=0)
    mine, theirs = gradients(losses.objective, hidden, weight), gradients(expected, hidden, weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("z_coef", [0.0, 0.01])
def test_lower_precision_is_near_the_exact_loss(dtype: torch.dtype, tolerance: float, z_coef: float) -> None:
    hidden, weight, labels = problem(dtype)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = full_loss(exact[0], exact[1], labels, z_coef)
    losses = fused_linear_cross_entropy(hidden, weight, labels, z_loss_coef=z_coef, chunk_tokens=8)
    assert losses.objective.dtype == losses.token.dtype == torch.float32
    torch.testing.assert_close(losses.objective.double(), expected, rtol=tolerance, atol=0)
    for mine, theirs in zip(gradients(losses.objective, hidden, weight), gradients(expected, *exact), strict=True):
        assert (mine - theirs).norm() < tolerance * theirs.norm()


def test_weight_gradient_is_summed_over_chunks_in_fp32() -> None:
    hidden, weight, labels = problem(torch.bfloat16, tokens=4096)
    weight.grad_dtype = torch.float32  # as the flat gradient buffers set it
    fused_linear_cross_entropy(hidden, weight, labels, chunk_tokens=8).objective.backward()
    exact = weight.detach().double().requires_grad_()
    (expected,) = gradients(full_loss(hidden.detach().double(), exact, labels, 0.0), exact)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    # 512 roundings of a growing bf16 sum would lose ten times as much.
    assert (weight.grad.double() - expected).norm() < 3e-3 * expected.norm()


def test_ignored_labels_give_exactly_nothing() -> None:
    hidden, weight, labels = problem()
    losses = fused_linear_cross_entropy(hidden, weight, labels, z_loss_coef=0.1, chunk_tokens=8)
    grad_hidden, _ = gradients(losses.objective, hidden, weight)
    assert torch.equal(grad_hidden.abs().sum(1) == 0, labels == IGNORE_INDEX)


def test_all_labels_ignored_gives_zero_and_finite_gradients() -> None:
    hidden, weight, labels = problem()
    losses = fused_linear_cross_entropy(
        hidden, weight, torch.full_like(labels, IGNORE_INDEX), z_loss_coef=0.1, chunk_tokens=8
    )
    assert losses.objective.item() == losses.token.item() == 0.0
    assert all(not g.any() for g in gradients(losses.objective, hidden, weight))


def test_no_tokens_at_all_is_a_zero_loss() -> None:
    hidden, weight, labels = problem()
    losses = fused_linear_cross_entropy(hidden[:0], weight, labels[:0])
    assert losses.objective.item() == 0.0
    assert not gradients(losses.objective, weight)[0].any()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = problem(torch.float32)
    losses = fused_linear_cross_entropy(hidden * 1e3, weight, labels, chunk_tokens=8)
    expected = F.cross_entropy(hidden * 1e3 @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(losses.token, expected)
    assert all(g.isfinite().all() for g in gradients(losses.objective, hidden, weight))


def test_the_incoming_gradient_scales_both_gradients() -> None:
    hidden, weight, labels = problem()
    plain = gradients(fused_linear_cross_entropy(hidden, weight, labels).objective, hidden, weight)
    scaled = gradients(fused_linear_cross_entropy(hidden, weight, labels).objective * 3 / 7, hidden, weight)
    torch.testing.assert_close(scaled, [g * 3 / 7 for g in plain], rtol=1e-14, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(weighted: bool) -> None:
    hidden, weight, labels = problem(tokens=6)
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, -1.0, 1.0]) if weighted else None
    options: dict[str, Any] = {"weights_T": weights, "z_loss_coef": 0.1, "chunk_tokens": 4}

    class Rerun(torch.autograd.Function):
        """The fused loss, called again in backward: gradcheck differentiates a graph more than once."""

        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(hidden, weight)
            return fused_linear_cross_entropy(hidden, weight, labels, **options).objective

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            with torch.enable_grad():
                losses = fused_linear_cross_entropy(*inputs, labels, **options)
            return torch.autograd.grad(losses.objective, inputs, grad)

    assert torch.autograd.gradcheck(Rerun.apply, (hidden, weight))


def test_full_logits_are_never_allocated() -> None:
    tokens, vocab, chunk = 512, 1000, 64
    hidden = torch.randn(tokens, D, requires_grad=True)
    weight = torch.randn(vocab, D, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    with Watch() as watch:
        losses = fused_linear_cross_entropy(hidden, weight, labels, z_loss_coef=0.1, chunk_tokens=chunk)
        losses.objective.backward()
    assert 0 < watch.largest <= chunk * vocab


def test_default_chunks_are_smaller_than_the_logits() -> None:
    tokens, vocab = 1024, 2**14
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    with Watch() as watch:
        fused_linear_cross_entropy(hidden, weight, torch.randint(vocab, (tokens,))).objective.backward()
    assert watch.largest <= tokens * vocab // 4


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_no_gradient_is_computed(context: Callable[[], Any]) -> None:
    hidden, weight, labels = problem()
    with context(), Watch() as watch:
        losses = fused_linear_cross_entropy(hidden, weight, labels, chunk_tokens=T)
    assert watch.calls["mm"] == 1
    assert not losses.objective.requires_grad
    torch.testing.assert_close(losses.token, full_loss(hidden, weight, labels, 0.0).detach())


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_costs_nothing(frozen: str) -> None:
    hidden, weight, labels = problem()
    expected = gradients(full_loss(hidden, weight, labels, 0.0), hidden, weight)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    with Watch() as watch:
        losses = fused_linear_cross_entropy(hidden, weight, labels, chunk_tokens=T)
    assert watch.calls["mm"] == 2  # the logits and one gradient
    free, index = (weight, 1) if frozen == "hidden" else (hidden, 0)
    torch.testing.assert_close(gradients(losses.objective, free), [expected[index]])


def test_token_loss_is_detached_and_differs_by_the_z_term() -> None:
    hidden, weight, labels = problem()
    losses = fused_linear_cross_entropy(hidden, weight, labels, z_loss_coef=0.5)
    assert not losses.token.requires_grad
    valid = (labels != IGNORE_INDEX).tolist()
    z_term = sum(row.exp().sum().log() ** 2 for row, ok in zip(hidden @ weight.T, valid, strict=True) if ok)
    torch.testing.assert_close(losses.objective - losses.token, 0.5 * z_term)


def test_second_backward_raises() -> None:
    hidden, weight, labels = problem()
    losses = fused_linear_cross_entropy(hidden, weight, labels)
    losses.objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once: call the model again"):
        losses.objective.backward()


def test_double_differentiation_raises() -> None:
    hidden, weight, labels = problem()
    scale = torch.tensor(2.0, dtype=hidden.dtype, requires_grad=True)
    losses = fused_linear_cross_entropy(hidden, weight, labels)
    (grad,) = torch.autograd.grad(losses.objective * scale, [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inputs_are_left_as_they_were() -> None:
    hidden, weight, labels = problem()
    before = [t.detach().clone() for t in (hidden, weight, labels)]
    fused_linear_cross_entropy(hidden, weight, labels, chunk_tokens=8).objective.backward()
    assert all(torch.equal(t.detach(), b) for t, b in zip((hidden, weight, labels), before, strict=True))


# Weights of targets, and the losses of single tokens.


@pytest.mark.parametrize("z_coef", [0.0, 0.01])
@pytest.mark.parametrize("chunk", [1, 8, T - 1, T, 1000, None])
def test_weights_multiply_each_targets_loss_and_gradient(chunk: int | None, z_coef: float) -> None:
    hidden, weight, labels = problem()
    weights = token_weights()
    expected = weighted_loss(hidden, weight, labels, weights, z_coef)
    losses = fused_linear_cross_entropy(
        hidden, weight, labels, weights_T=weights, z_loss_coef=z_coef, chunk_tokens=chunk
    )
    torch.testing.assert_close(losses.objective, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.token, weighted_loss(hidden, weight, labels, weights, 0.0), rtol=1e-12, atol=0)
    mine, theirs = gradients(losses.objective, hidden, weight), gradients(expected, hidden, weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_weights_in_lower_precision(dtype: torch.dtype, tolerance: float, kind: torch.dtype) -> None:
    hidden, weight, labels = problem(dtype)
    weights = (3 * token_weights()).to(kind)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = weighted_loss(exact[0], exact[1], labels, weights, 0.01)
    losses = fused_linear_cross_entropy(hidden, weight, labels, weights_T=weights, z_loss_coef=0.01, chunk_tokens=8)
    assert losses.objective.dtype == losses.token.dtype == torch.float32
    torch.testing.assert_close(losses.objective.double(), expected, rtol=tolerance, atol=0)
    for mine, theirs in zip(gradients(losses.objective, hidden, weight), gradients(expected, *exact), strict=True):
        assert (mine - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weights_of_one_change_no_bit(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(dtype)
    plain, ones = (
        fused_linear_cross_entropy(hidden, weight, labels, weights_T=weights, z_loss_coef=0.01, chunk_tokens=8)
        for weights in (None, torch.ones(T))
    )
    pairs = zip(gradients(plain.objective, hidden, weight), gradients(ones.objective, hidden, weight), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(plain.objective, ones.objective)
    assert torch.equal(plain.token, ones.token)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_weight_of_zero_is_an_ignored_label(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(dtype)
    weights = (token_weights() > 0).float()
    masked = labels.masked_fill(weights == 0, IGNORE_INDEX)
    zero = fused_linear_cross_entropy(hidden, weight, labels, weights_T=weights, z_loss_coef=0.01, chunk_tokens=8)
    ignored = fused_linear_cross_entropy(hidden, weight, masked, z_loss_coef=0.01, chunk_tokens=8)
    pairs = zip(gradients(zero.objective, hidden, weight), gradients(ignored.objective, hidden, weight), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(zero.objective, ignored.objective)
    assert torch.equal(zero.token, ignored.token)


@pytest.mark.parametrize("chunk", [1, 8, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [None, token_weights()], ids=["plain", "weighted"])
def test_losses_of_single_tokens(dtype: torch.dtype, chunk: int | None, weights: torch.Tensor | None) -> None:
    """Unweighted and without the z-term, zero where ignored, detached."""
    hidden, weight, labels = problem(dtype)
    losses = fused_linear_cross_entropy(hidden, weight, labels, weights_T=weights, z_loss_coef=0.1, chunk_tokens=chunk)
    assert losses.per_token is not None
    assert not losses.per_token.requires_grad
    assert losses.per_token.dtype == torch.promote_types(dtype, torch.float32)
    logits = hidden.detach().double() @ weight.detach().double().T
    expected = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(losses.per_token.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(losses.per_token == 0, labels == IGNORE_INDEX)
    counted = losses.per_token if weights is None else losses.per_token * weights
    torch.testing.assert_close(counted.sum(), losses.token, rtol=1e-6, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_losses_of_single_tokens_without_grad(context: Callable[[], Any]) -> None:
    hidden, weight, labels = problem()
    with context():
        found = fused_linear_cross_entropy(hidden, weight, labels, weights_T=token_weights()).per_token
    expected = F.cross_entropy(hidden.detach() @ weight.detach().T, labels, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 8, None])
@pytest.mark.parametrize("by", ["torch", "cut"])
def test_hits_are_the_targets_that_are_the_likeliest_token(
    chunk: int | None, weighted: bool, by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those that count; the first of equal logits is the likeliest; gradients are the same."""
    install(monkeypatch)
    hidden, weight, labels = problem()
    with torch.no_grad():
        weight[7] = weight[3]  # tokens 3 and 7 are always equal
    likeliest = (hidden @ weight.T).argmax(1)
    assert 3 in likeliest
    labels = torch.where((labels != IGNORE_INDEX) & (torch.arange(T) % 2 == 0), likeliest, labels)
    labels[likeliest == 3] = 7
    labels[int((likeliest == 3).nonzero()[0])] = 3
    weights = token_weights() if weighted else None
    counted = labels != IGNORE_INDEX if weights is None else (labels != IGNORE_INDEX) & (weights > 0)
    expected = int(((likeliest == labels) & counted).sum())
    assert 0 < expected < int(counted.sum())
    options: dict[str, Any] = {"weights_T": weights, "chunk_tokens": chunk, "by": by}
    losses = fused_linear_cross_entropy(hidden, weight, labels, **options, count_hits=True)
    assert losses.hits is not None
    assert (int(losses.hits), losses.hits.dtype) == (expected, torch.int64)
    plain = fused_linear_cross_entropy(hidden, weight, labels, **options)
    assert plain.hits is None
    both = (gradients(sums.objective, hidden, weight) for sums in (losses, plain))
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))
    whole = cross_entropy_of_logits(hidden @ weight.T, labels, weights_T=weights, count_hits=True)
    assert whole.hits is not None
    assert int(whole.hits) == expected
