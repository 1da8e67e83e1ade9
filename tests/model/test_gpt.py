"""The GPT against a twin in plain loops; recomputation, dropout, precision and compilation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.models import redrawn
from tinytron.errors import ConfigError
from tinytron.kernels.choice import Backend, Kernels
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.loss import LossSums
from tinytron.utils.sequences import IGNORE_INDEX, Documents

B, S = 2, 9
SIZES: dict[str, Any] = {
    "block_size": 16,
    "vocab_size": 29,
    "num_layer": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 20,
    "init_std": 0.02,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "untied": {"tied_lm_head": False},
    "bias": {"bias": True},
    "qk_norm": {"qk_norm": True},
    "head_dim": {"head_dim": 6},
    "numbers": {"rope_theta": 50.0, "norm_eps": 0.3},
    "all": {"tied_lm_head": False, "bias": True, "qk_norm": True, "head_dim": 6, "num_layer": 3},
}
PACKED = [4, 5, 1, 8]  # documents in the 2 x 9 tokens


def make_model(variant: str = "plain", dtype: torch.dtype = torch.float64, **options: Any) -> GPT:
    return redrawn(GPT(ModelConfig(**SIZES | VARIANTS[variant]), dtype=dtype, **options))


def make_batch(vocab_size: int = SIZES["vocab_size"]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids, labels = torch.randint(vocab_size, (2, B, S), generator=generator)
    labels[0, 3] = labels[1, -2:] = IGNORE_INDEX
    return ids, labels


class Twin:
    """The same function, one token row, layer and head at a time. Knows only sizes and the weights' names."""

    def __init__(self, weights: dict[str, torch.Tensor], sizes: dict[str, Any]) -> None:
        self.w = weights
        self.L, self.N, self.K = sizes["num_layer"], sizes["num_attention_heads"], sizes["num_key_value_heads"]
        self.H = sizes.get("head_dim") or sizes["hidden_size"] // self.N
        self.theta, self.eps = sizes.get("rope_theta", 10000.0), sizes.get("norm_eps", 1e-6)
        self.positions = list(range(S))

    def logits(self, ids: list[int]) -> torch.Tensor:
        """``[S, V]`` for one sequence."""
        x = self.w["wte.weight"][ids]
        for layer in range(self.L):
            prefix = f"blocks.{layer}."
            x = x + self.attention(prefix + "attn.", self.norm(prefix + "attn_norm.weight", x))
            x = x + self.feed_forward(prefix + "mlp.", self.norm(prefix + "mlp_norm.weight", x))
        head = self.w.get("lm_head.weight", self.w["wte.weight"])
        return self.norm("final_norm.weight", x) @ head.T

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x * ((x**2).mean(-1, keepdim=True) + self.eps) ** -0.5 * self.w[name]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        rows = []
        for position, row in zip(self.positions, x, strict=False):
            angles = [position * self.theta ** (-2 * i / self.H) for i in range(self.H // 2)]
            turn = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=torch.complex128)
            turned = torch.complex(row[: self.H // 2], row[self.H // 2 :]) * turn
            rows.append(torch.cat([turned.real, turned.imag]))
        return torch.stack(rows)

    def attention(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        N, K, H = self.N, self.K, self.H
        packed = self.linear(prefix + "qkv_proj", x)  # columns: N query heads, K key heads, K value heads
        outs = []
        for n in range(N):
            kv = n // (N // K)
            q = packed[:, n * H : (n + 1) * H]
            k = packed[:, (N + kv) * H : (N + kv + 1) * H]
            v = packed[:, (N + K + kv) * H : (N + K + kv + 1) * H]
            if prefix + "q_norm.weight" in self.w:
                q, k = self.norm(prefix + "q_norm.weight", q), self.norm(prefix + "k_norm.weight", k)
            q, k = self.rotated(q), self.rotated(k)
            weights = torch.tril((q @ k.T / H**0.5).exp())
            outs.append(weights @ v / weights.sum(1, keepdim=True))
        return self.linear(prefix + "out_proj", torch.cat(outs, dim=1))

    def feed_forward(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.linear(prefix + "gate_up_proj", x).tensor_split(2, dim=1)  # gate first
        return self.linear(prefix + "down_proj", gate / (1 + (-gate).exp()) * up)

    def loss(self, logits: torch.Tensor, labels: list[int], z_coef: float = 0.0) -> torch.Tensor:
        """The sum over one sequence's valid targets."""
        total = logits.new_zeros(())
        for row, label in zip(logits, labels, strict=True):
            if label != -100:
                log_partition = row.exp().sum().log()
                total = total + log_partition - row[label] + z_coef * log_partition**2
        return total


def twin_of(model: GPT, variant: str) -> Twin:
    weights = {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}
    return Twin(weights, SIZES | VARIANTS[variant])


def sums(model: GPT, *args: Any, **kwargs: Any) -> LossSums:
    losses = model(*args, **kwargs)
    assert isinstance(losses, LossSums)
    return losses


def gradients(loss: torch.Tensor, model: GPT) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_gradients(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, grad in mine.items():
        scale = float(theirs[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            grad, theirs[name], rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


# The whole function.


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient_equal_the_twin(variant: str, backend: Backend) -> None:
    model = make_model(variant, kernels=Kernels(attention=backend))
    twin = twin_of(model, variant)
    ids, labels = make_batch()
    losses = sums(model, ids, labels)
    rows = zip(ids.tolist(), labels.tolist(), strict=True)
    expected = torch.stack([twin.loss(twin.logits(row), targets) for row, targets in rows]).sum()
    torch.testing.assert_close(losses.objective, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(losses.token, expected, rtol=1e-10, atol=0)
    theirs = dict(zip(twin.w, torch.autograd.grad(expected, list(twin.w.values())), strict=True))
    assert_same_gradients(gradients(losses.objective, model), theirs, tolerance=1e-10)


@pytest.mark.parametrize("variant", ["plain", "all"])
def test_logits_equal_the_twin(variant: str) -> None:
    model = make_model(variant)
    twin, (ids, _) = twin_of(model, variant), make_batch()
    expected = torch.stack([twin.logits(row) for row in ids.tolist()])
    torch.testing.assert_close(model(ids), expected, rtol=1e-10, atol=1e-10)


def test_z_loss_equals_the_twin() -> None:
    model = make_model("untied", z_loss_coef=0.01)
    twin, (ids, labels) = twin_of(model, "untied"), make_batch()
    rows = list(zip([twin.logits(row) for row in ids.tolist()], labels.tolist(), strict=True))
    expected = torch.stack([twin.loss(*row, z_coef=0.01) for row in rows]).sum()
    losses = sums(model, ids, labels)
    torch.testing.assert_close(losses.objective, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(losses.token, torch.stack([twin.loss(*row) for row in rows]).sum(), rtol=1e-10, atol=0)
    theirs = dict(zip(twin.w, torch.autograd.grad(expected, list(twin.w.values())), strict=True))
    assert_same_gradients(gradients(losses.objective, model), theirs, tolerance=1e-10)


@pytest.mark.parametrize("restart_positions", [True, False])
@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_packed_documents_equal_the_twin_on_each_alone(backend: Backend, restart_positions: bool) -> None:
    """With and without positions that begin at each document: scores see relative positions only."""
    model = make_model("all", kernels=Kernels(attention=backend))
    twin, (ids, labels) = twin_of(model, "all"), make_batch()
    cu_seqlens = torch.tensor([0, *itertools.accumulate(PACKED)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in PACKED]).view(B, S) if restart_positions else None
    losses = sums(model, ids, labels, positions=positions, documents=Documents(cu_seqlens, max(PACKED)))
    parts = zip(ids.flatten().split(PACKED), labels.flatten().split(PACKED), strict=True)
    expected = torch.stack([twin.loss(twin.logits(i.tolist()), t.tolist()) for i, t in parts]).sum()
    torch.testing.assert_close(losses.objective, expected, rtol=1e-10, atol=0)
    theirs = dict(zip(twin.w, torch.autograd.grad(expected, list(twin.w.values())), strict=True))
    assert_same_gradients(gradients(losses.objective, model), theirs, tolerance=1e-10)


def test_given_positions_equal_the_twin() -> None:
    model, (ids, labels) = make_model("qk_norm"), make_batch()
    twin = twin_of(model, "qk_norm")
    expected = []
    positions = [[3, 0, 7, 15, 8, 1, 2, 5, 4], [0, 2, 4, 6, 8, 10, 12, 14, 15]]
    for row, targets, at in zip(ids.tolist(), labels.tolist(), positions, strict=True):
        twin.positions = at
        expected.append(twin.loss(twin.logits(row), targets))
    losses = sums(model, ids, labels, positions=torch.tensor(positions))
    torch.testing.assert_close(losses.objective, torch.stack(expected).sum(), rtol=1e-10, atol=0)


def test_a_tied_head_is_one_parameter() -> None:
    tied, untied = make_model("plain"), make_model("untied")
    assert tied.lm_head.weight is tied.wte.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert untied.lm_head.weight is not untied.wte.weight


def test_too_long_a_sequence_names_the_block_size_to_use() -> None:
    model = make_model()
    model(torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"a sequence of 17 tokens exceeds --block_size 16; use --block_size 17"):
        model(torch.zeros(1, 17, dtype=torch.long))


# Precision.


def test_bf16_model_is_near_the_exact_one() -> None:
    model = make_model("all", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.rope.cos.dtype == torch.float32
    exact = make_model("all", dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    ids, labels = make_batch()
    losses, expected = sums(model, ids, labels), sums(exact, ids, labels)
    assert losses.objective.dtype == torch.float32
    torch.testing.assert_close(losses.objective.double(), expected.objective, rtol=1e-2, atol=0)
    theirs = gradients(expected.objective, exact)
    for name, grad in gradients(losses.objective, model).items():
        assert (grad.double() - theirs[name]).norm() < 0.1 * theirs[name].norm(), name


@pytest.mark.parametrize(
    ("dtype", "table"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_rotary_table_is_at_least_fp32(dtype: torch.dtype, table: torch.dtype) -> None:
    assert make_model(dtype=dtype).rope.cos.dtype == table
    assert torch.get_default_dtype() == torch.float32  # left as it was


# Recomputation.


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_neither_loss_nor_gradients(recompute: Any, dropout: float) -> None:
    ids, labels = make_batch()
    results = []
    for choice in ("none", recompute):
        config = ModelConfig(**SIZES, dropout=dropout)
        model = GPT(config, dtype=torch.float64, recompute=choice).train()
        torch.manual_seed(5)
        losses = sums(model, ids, labels)
        results.append((losses.objective, gradients(losses.objective, model)))
    (plain, plain_grads), (other, other_grads) = results
    assert torch.equal(plain, other)
    assert all(torch.equal(plain_grads[name], other_grads[name]) for name in plain_grads)


def bytes_saved(recompute: Any, num_layer: int) -> int:
    """Memory that autograd keeps alive between forward and backward, beside the weights."""
    model = GPT(ModelConfig(**SIZES | {"num_layer": num_layer}), recompute=recompute)
    ids, labels = make_batch()
    storages: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)  # an address freed in between could be used again
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = sums(model, ids, labels)
    losses.objective.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def test_full_recomputation_saves_only_the_input_of_each_block() -> None:
    one_activation = B * S * SIZES["hidden_size"] * 4
    assert bytes_saved("full", 6) - bytes_saved("full", 2) == 4 * one_activation
    assert bytes_saved("none", 6) - bytes_saved("none", 2) > 4 * 8 * one_activation


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_recomputation_repeats_what_it_says(backend: Backend) -> None:
    """``full`` repeats a block's products and attention; ``selective`` keeps those and repeats the cheap rest."""
    ids, labels = make_batch()
    calls: dict[str, dict[str, int]] = {}
    for recompute in ("none", "full", "selective"):
        model = make_model(kernels=Kernels(attention=backend), recompute=recompute)  # type: ignore[arg-type]
        with CountOps() as ops:
            sums(model, ids, labels).objective.backward()
        calls[recompute] = ops.calls
    layers = SIZES["num_layer"]
    # Three of four products: the last, down_proj's, is needed by nothing in backward, and recomputation stops early.
    assert calls["full"]["mm"] == calls["none"]["mm"] + 3 * layers
    assert calls["selective"]["mm"] == calls["none"]["mm"]
    # The backward pass computes silu again anyway.
    assert calls["selective"]["silu"] == calls["full"]["silu"] == calls["none"]["silu"] + layers == 3 * layers
    if backend == "sdpa":
        attention = "_scaled_dot_product_flash_attention_for_cpu"
        assert calls["none"][attention] == calls["selective"][attention] == layers
        assert calls["full"][attention] == 2 * layers


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_nothing_is_recomputed_without_gradients(recompute: Any) -> None:
    model, (ids, labels) = make_model(recompute=recompute), make_batch()
    with torch.no_grad():
        assert torch.equal(model(ids, labels).token, make_model()(ids, labels).token)


# Dropout.


def test_dropout_is_random_in_training_and_absent_in_evaluation() -> None:
    ids, labels = make_batch()
    model = GPT(ModelConfig(**SIZES, dropout=0.5), dtype=torch.float64)
    plain = GPT(ModelConfig(**SIZES), dtype=torch.float64)
    torch.manual_seed(0)
    assert sums(model.train(), ids, labels).token != sums(model, ids, labels).token
    torch.manual_seed(0)
    again = sums(model, ids, labels).token
    torch.manual_seed(0)
    assert sums(model, ids, labels).token == again
    assert torch.equal(sums(model.eval(), ids, labels).token, sums(plain, ids, labels).token)


def test_dropout_acts_on_embedding_attention_and_block_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def recorded(x: torch.Tensor, p: float = 0.5, training: bool = True) -> torch.Tensor:
        if training and p > 0:
            assert p == 0.1
            shapes.append(tuple(x.shape))
        return x

    monkeypatch.setattr(F, "dropout", recorded)
    ids, labels = make_batch()
    model = GPT(ModelConfig(**SIZES, dropout=0.1), kernels=Kernels(attention="math"))
    model.train()(ids, labels)
    stream, scores = (B, S, 16), (B, 2, 2, S, S)
    assert shapes == [stream, *[scores, stream, stream] * SIZES["num_layer"]]
    shapes.clear()
    model.eval()(ids, labels)
    assert shapes == []


# Compilation.


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_compiled_blocks_keep_names_loss_and_gradients(recompute: Any) -> None:
    ids, labels = make_batch()
    plain = make_model(dtype=torch.float32)
    model = make_model(dtype=torch.float32, recompute=recompute)
    model.compile_blocks()
    assert list(model.state_dict()) == list(plain.state_dict())
    losses, expected = sums(model, ids, labels), sums(plain, ids, labels)
    torch.testing.assert_close(losses.objective, expected.objective)
    theirs = gradients(expected.objective, plain)
    assert_same_gradients(gradients(losses.objective, model), theirs, tolerance=1e-5)
    assert list(model.state_dict()) == list(plain.state_dict())
