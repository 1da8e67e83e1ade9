"""The GPT with experts against its twin in loops; recomputation; the load and the balancing bias; initial weights."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.model.test_gpt import SIZES, B, CountOps, S, Twin, assert_same_gradients, gradients, make_batch, sums
from tests.naive import moe as naive
from tinytron.distributed.layout import ParallelLayout
from tinytron.kernels.grouped_gemm import ROW_STEP
from tinytron.model import GPT, ModelConfig
from tinytron.model.gpt import named_normal
from tinytron.utils.sequences import documents_of

E, K = 6, 2
MOE: dict[str, Any] = SIZES | {
    "num_layer": 3,
    "use_moe": True,
    "num_experts": E,
    "num_experts_per_tok": K,
    "moe_intermediate_size": 8,
    "moe_aux_loss_coef": 0.2,
    "moe_z_loss_coef": 0.05,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dense first": {"first_k_dense": 2},
    "shared": {"num_shared_experts": 2, "first_k_dense": 1},
    "batch": {"moe_aux_loss_scope": "batch"},
    "sigmoid": {"moe_router_score": "sigmoid", "norm_topk_prob": False, "tied_lm_head": False},
    "all": {
        "moe_router_score": "sigmoid", "first_k_dense": 1, "num_shared_experts": 1, "bias": True, "qk_norm": True,
        "moe_aux_loss_scope": "batch",
    },
}  # fmt: skip


def make_model(variant: str = "plain", dtype: torch.dtype = torch.float64, seed: int = 1, **options: Any) -> GPT:
    """Large weights, norms and biases off their neutral values, and balancing biases that change the choice."""
    model = GPT(ModelConfig(**MOE | VARIANTS[variant]), dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
        for layer in model.moe_layers:
            layer.router.bias.copy_(torch.randn(E, generator=generator) * 0.1)
    return model


class MoETwin(Twin):
    """The twin of test_gpt.py; layers with a router are naive experts, whose decisions are kept by layer."""

    def __init__(self, model: GPT, sizes: dict[str, Any]) -> None:
        super().__init__({n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}, sizes)
        self.sizes, self.biases = sizes, {n: b.tolist() for n, b in model.named_buffers() if n.endswith("router.bias")}
        self.decisions: dict[str, list[list[naive.Routed]]] = {}

    def feed_forward(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        if prefix + "router.weight" not in self.w:
            return super().feed_forward(prefix, x)
        rules = naive.Rules(
            K,
            self.sizes.get("moe_router_score", "softmax"),
            self.sizes.get("norm_topk_prob", True),
            self.biases[prefix + "router.bias"],
        )
        plain = {n.removeprefix(prefix): w for n, w in self.w.items() if n.startswith(prefix) and "shared" not in n}
        out, decisions = naive.moe(x, plain, rules)
        self.decisions.setdefault(prefix, []).append(decisions)
        if prefix + "shared.gate_up_proj.weight" in self.w:
            out = out + super().feed_forward(prefix + "shared.", x)
        return out

    def routing_losses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Balance and z of all layers, after the logits of the whole batch."""
        balance, z = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for rows in self.decisions.values():
            flat = list(itertools.chain(*rows))
            balance = balance + naive.balance([flat] if self.sizes.get("moe_aux_loss_scope") == "batch" else rows, E)
            z = z + torch.stack([d.log_partition**2 for d in flat]).sum()
        return balance, z


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_load_and_every_gradient_equal_the_twin(variant: str) -> None:
    model = make_model(variant)
    twin = MoETwin(model, MOE | VARIANTS[variant])
    ids, labels = make_batch()
    losses = sums(model, ids, labels)
    rows = zip(ids.tolist(), labels.tolist(), strict=True)
    token = torch.stack([twin.loss(twin.logits(row), targets) for row, targets in rows]).sum()
    balance, z = twin.routing_losses()
    targets_per_token = int((labels != -100).sum()) / labels.numel()
    assert targets_per_token < 1  # so that a division by targets makes means over tokens of the other terms
    expected = token + (0.2 * balance + 0.05 * z) * targets_per_token
    for found, wanted in (
        (losses.token, token),
        (losses.objective, expected),
        (losses.aux["moe_balance"], balance),
        (losses.aux["moe_z"], z),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    assert not any(value.requires_grad for value in losses.aux.values())
    theirs = dict(zip(twin.w, torch.autograd.grad(expected, list(twin.w.values())), strict=True))
    assert_same_gradients(gradients(losses.objective, model), theirs, tolerance=1e-10)
    assert model.step_load.tolist() == [naive.load(list(itertools.chain(*r)), E) for r in twin.decisions.values()]
    assert len(model.moe_layers) == len(twin.decisions) == 3 - VARIANTS[variant].get("first_k_dense", 0)


# Padding.


REAL = [5, 9, 3, 1]


def padded_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and padding of rows with ``REAL`` tokens. The first of each have no label, like a prompt."""
    ids, labels = torch.randint(1, 29, (2, len(REAL), S), generator=torch.Generator().manual_seed(2))
    padding = torch.arange(S) >= torch.tensor(REAL)[:, None]
    ids[padding], labels[padding] = 0, -100
    labels[0, :3] = labels[1, :8] = -100
    return ids, labels, padding


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("variant", ["plain", "batch", "sigmoid"])
def test_padding_is_no_token(variant: str, recompute: Any) -> None:
    """Loads, losses, gradients and recorded tokens are those of rows that end where their text does."""
    ids, labels, padding = padded_batch()
    model = make_model(variant, recompute=recompute)
    twin = MoETwin(model, MOE | VARIANTS[variant])
    losses = sums(model, ids, labels, padding=padding)
    token = torch.zeros((), dtype=torch.float64)
    for row, targets, n in zip(ids.tolist(), labels.tolist(), REAL, strict=True):
        token = token + twin.loss(twin.logits(row[:n]), targets[:n])
    balance, z = twin.routing_losses()
    targets, tokens = int((labels != -100).sum()), sum(REAL)
    expected = token + (0.2 * balance + 0.05 * z) * targets / tokens
    assert model.step_load.tolist() == [naive.load(list(itertools.chain(*r)), E) for r in twin.decisions.values()]
    assert {name: int(count) for name, count in losses.counts.items()} == {"moe_balance": tokens, "moe_z": tokens}
    torch.testing.assert_close(losses.aux["moe_balance"], balance.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(losses.aux["moe_z"], z.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(losses.objective, expected, rtol=1e-10, atol=0)
    theirs = dict(zip(twin.w, torch.autograd.grad(expected, list(twin.w.values())), strict=True))
    assert_same_gradients(gradients(losses.objective, model), theirs, tolerance=1e-10)


def test_a_document_without_a_target_is_padding_but_a_prompt_and_a_single_token_are_not() -> None:
    ids, labels, padding = padded_batch()
    padding[1, 8:] = False  # (there is none in that row)
    starts = torch.tensor([[0, 5], [0, 8], [0, 3], [0, 1]])  # in row 1 the last token is a document, and has no target
    labels[1, 7], labels[1, 8], labels[3, 0] = 4, -100, 3
    positions = torch.arange(S) - torch.where(torch.arange(S) >= starts[:, 1:], starts[:, 1:], 0)
    found, expected = make_model(), make_model()
    mine = sums(found, ids, labels, positions, documents_of(positions))
    theirs = sums(expected, ids, labels, positions, documents_of(positions), padding=padding)
    assert found.step_load.sum(1).tolist() == [K * sum(REAL)] * 3
    assert torch.equal(found.step_load, expected.step_load)
    assert torch.equal(mine.objective, theirs.objective)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("variant", ["plain", "batch"])
def test_the_routers_weight_does_not_grow_when_labels_are_few(variant: str, weighted: bool) -> None:
    """Divided by its targets, the objective has the terms of the routers as means over tokens."""
    model, added = make_model(variant), []
    ids, labels = make_batch()
    for number in (1, 3, 8):
        few = torch.full_like(labels, -100)
        few[0, :number] = 1
        weights = torch.linspace(0.5, 2, labels.numel()).view_as(labels) if weighted else None
        total = number if weights is None else weights[0, :number].sum()
        losses = sums(model, ids, few, weights=weights)
        added.append(float((losses.objective - losses.token).detach() / total))
        mean = {name: float(value / losses.counts[name]) for name, value in losses.aux.items()}
        assert added[-1] == pytest.approx(0.2 * mean["moe_balance"] + 0.05 * mean["moe_z"], rel=1e-6)
    assert added == pytest.approx([added[0]] * 3, rel=1e-6)


def test_logits_equal_the_twin_and_count_nothing() -> None:
    model = make_model("all")
    twin, (ids, _) = MoETwin(model, MOE | VARIANTS["all"]), make_batch()
    expected = torch.stack([twin.logits(row) for row in ids.tolist()])
    torch.testing.assert_close(model(ids), expected, rtol=1e-10, atol=1e-10)
    assert not model.step_load.any()


# Recomputation.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_changes_nothing_and_counts_the_load_once(
    recompute: Any, dtype: torch.dtype, dropout: float
) -> None:
    ids, labels = make_batch()
    results = []
    for choice in ("none", recompute):
        config = ModelConfig(**MOE | {"num_shared_experts": 1, "dropout": dropout})
        model = GPT(config, dtype=dtype, recompute=choice).train()
        torch.manual_seed(5)
        losses = sums(model, ids, labels)
        grads = gradients(losses.objective, model)
        results.append((losses.objective, losses.aux, grads, model.step_load))
    (plain, plain_aux, plain_grads, plain_load), (other, other_aux, other_grads, other_load) = results
    assert torch.equal(plain, other)
    assert plain_aux == other_aux
    assert all(torch.equal(plain_grads[name], other_grads[name]) for name in plain_grads)
    assert torch.equal(plain_load, other_load)
    assert plain_load.sum(1).tolist() == [B * S * K] * 3


def kept(recompute: Any) -> Counter[tuple[torch.dtype, int]]:
    """Storages that autograd keeps alive in one more expert layer, without the weights: (precision, elements)."""
    found = []
    for layers in (3, 4):
        config = ModelConfig(**MOE | {"num_layer": layers, "num_shared_experts": 1})
        model = GPT(config, dtype=torch.bfloat16, recompute=recompute).train()
        storages: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor, storages: dict[int, torch.Tensor] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids, labels = make_batch()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = sums(model, ids, labels)
        assert losses.objective.requires_grad
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found.append(
            Counter(
                (t.dtype, t.untyped_storage().nbytes() // t.itemsize) for p, t in storages.items() if p not in weights
            )
        )
    return found[1] - found[0]


def test_what_recomputation_keeps_of_experts() -> None:
    """``full``: the inputs of attention and of the mixture. ``selective``: no value behind a gate. Rows never in fp32."""
    D, F = MOE["hidden_size"], MOE["moe_intermediate_size"]
    none, selective, full = kept("none"), kept("selective"), kept("full")
    assert {size: n for (dtype, size), n in full.items() if dtype == torch.bfloat16} == {B * S * D: 2}
    assert all(size < B * S * D for dtype, size in full if dtype == torch.float32)
    gated = (torch.bfloat16, E * ROW_STEP * F)
    assert none[gated] == 1
    assert selective[gated] == 0
    assert all(size < B * S * K * D for dtype, size in none + selective if dtype == torch.float32)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_the_choice_is_never_made_again(recompute: Any) -> None:
    """A second choice could differ in a tie, and ranks would wait for each other: top-k runs once per layer."""
    ids, labels = make_batch()
    model = make_model(recompute=recompute)
    with CountOps() as ops:
        sums(model, ids, labels).objective.backward()
    assert ops.calls["topk"] == 3
    assert ops.calls["silu"] > 3  # the experts' inner values are


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_a_choice_that_would_differ_when_made_again_is_kept(recompute: Any) -> None:
    """The bias moves between forward and backward, as a tie or another kernel could move it: gradients stay."""
    ids, labels = make_batch()
    plain = make_model()
    expected = gradients(sums(plain, ids, labels).objective, plain)
    model = make_model(recompute=recompute)
    losses = sums(model, ids, labels)
    for layer in model.moe_layers:
        layer.router.bias += torch.linspace(-5, 5, E)
    found = gradients(losses.objective, model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# The load and the balancing bias.


def test_the_bias_moves_against_the_load_once_per_step() -> None:
    config = ModelConfig(**MOE | {"moe_bias_update_rate": 0.25, "first_k_dense": 1})
    model = GPT(config, dtype=torch.float64)
    model.step_load.copy_(torch.tensor([[4, 0, 2, 2, 1, 3], [0, 0, 0, 0, 0, 12]]))  # mean 2 in both layers
    model.end_step()
    first = [[-0.25, 0.25, 0.0, 0.0, 0.25, -0.25], [0.25, 0.25, 0.25, 0.25, 0.25, -0.25]]
    assert [layer.router.bias.tolist() for layer in model.moe_layers] == first
    assert not model.step_load.any()
    model.step_load.copy_(torch.tensor([[4, 0, 2, 2, 1, 3], [2, 2, 2, 2, 2, 2]]))
    model.end_step()
    assert model.moe_layers[0].router.bias.tolist() == [2 * value for value in first[0]]
    assert model.moe_layers[1].router.bias.tolist() == first[1]  # balanced: it stays
    assert model.load.tolist() == [[8, 0, 4, 4, 2, 6], [2, 2, 2, 2, 2, 14]]  # since the last report


def test_a_mean_load_that_is_no_whole_number_is_not_rounded() -> None:
    config = ModelConfig(**MOE | {"moe_bias_update_rate": 1.0, "first_k_dense": 2})
    model = GPT(config)
    model.step_load.copy_(torch.tensor([[1, 0, 0, 0, 0, 0]]))  # mean 1/6
    model.end_step()
    assert model.moe_layers[0].router.bias.tolist() == [-1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_the_load_adds_up_over_micro_batches_of_training_only() -> None:
    model, (ids, labels) = make_model(), make_batch()
    sums(model.eval(), ids, labels)
    assert not model.step_load.any()
    sums(model.train(), ids, labels)
    once = model.step_load.clone()
    sums(model, ids, labels)
    assert torch.equal(model.step_load, 2 * once)
    model.end_step()
    assert torch.equal(model.load, 2 * once)
    biases = [layer.router.bias for layer in model.moe_layers]
    fresh = make_model()
    assert all(
        torch.equal(mine, layer.router.bias) for mine, layer in zip(biases, fresh.moe_layers, strict=True)
    )  # rate 0


def test_the_bias_evens_out_the_load_in_the_end() -> None:
    config = ModelConfig(**MOE | {"moe_bias_update_rate": 0.01, "first_k_dense": 2})
    model = GPT(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        model.moe_layers[0].router.weight.mul_(0.1)
    ids = torch.randint(29, (16, S), generator=torch.Generator().manual_seed(4))

    def most() -> float:
        model.step_load.zero_()
        with torch.no_grad():
            sums(model, ids, ids)
        return float(model.step_load.max() / model.step_load.double().mean())

    before = most()
    for _ in range(60):
        model.step_load.zero_()
        with torch.no_grad():
            sums(model, ids, ids)
        model.end_step()
    assert before > 1.5
    assert most() < 1 + (before - 1) / 2


def test_a_dense_model_ends_its_step_without_effect() -> None:
    GPT(ModelConfig(**SIZES)).end_step()


# Initial weights.

INIT: dict[str, Any] = {"num_layer": 2, "hidden_size": 32, "num_attention_heads": 2, "moe_intermediate_size": 24}


def expert_weights(model: GPT) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if ".experts." in n}


def test_an_expert_is_a_function_of_seed_name_and_global_index() -> None:
    model = GPT(ModelConfig(**MOE | INIT), seed=3)
    std = {"gate_up_proj": 0.02, "down_proj": 0.02 / (2 * 2) ** 0.5}
    names = [f"blocks.{i}.mlp.experts.{part}" for i in range(2) for part in ("gate_up_proj", "down_proj")]
    weights = expert_weights(model)
    assert list(weights) == names
    for name in names:
        for expert in range(E):
            drawn = named_normal(f"{name}.{expert}", weights[name].shape[1:], std[name.split(".")[-1]], 3)
            assert torch.equal(weights[name][expert], drawn)


@pytest.mark.parametrize("ep", [2, 3, 6])
def test_ranks_of_an_expert_group_hold_slices_of_the_same_experts(ep: int) -> None:
    whole = GPT(ModelConfig(**MOE | INIT), seed=3)
    layout, each = ParallelLayout(ep, ep=ep), E // ep
    for rank in range(ep):
        state: Any = SimpleNamespace(layout=layout, groups={"sep": None, "ep": None}, rank=rank)
        part = GPT(ModelConfig(**MOE | INIT), seed=3, state=state)
        for name, weight in part.named_parameters():
            expected = whole.get_parameter(name)
            expected = expected[rank * each : (rank + 1) * each] if ".experts." in name else expected
            assert torch.equal(weight, expected), name
        assert [(s.name, s.shape) for s in part.param_specs()] == [(s.name, s.shape) for s in whole.param_specs()]


def test_all_experts_differ_and_have_the_right_scale() -> None:
    parts: dict[tuple[Any, ...], torch.Tensor] = {}
    for name, weight in expert_weights(GPT(ModelConfig(**MOE | INIT), seed=3)).items():
        for expert in range(E):
            halves = weight[expert].chunk(2) if name.endswith("gate_up_proj") else (weight[expert],)
            parts |= {(name, expert, half): part for half, part in enumerate(halves)}
            std = 0.02 if name.endswith("gate_up_proj") else 0.01
            assert float(weight[expert].std()) == pytest.approx(std, rel=5 / (2 * weight[expert].numel()) ** 0.5)
    assert len(parts) == 2 * E * 3
    for a, b in itertools.combinations(parts.values(), 2):
        pair = torch.stack([a.flatten(), b.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) * a.numel() ** 0.5 < 5


def test_param_specs_of_experts_router_and_shared_experts() -> None:
    model = GPT(ModelConfig(**MOE | {"num_layer": 1, "num_shared_experts": 2}))
    specs = {s.name.removeprefix("blocks.0.mlp."): s for s in model.param_specs() if ".mlp." in s.name}
    found = {name: (s.shape, s.kind, s.shards, s.stacked, s.writes_residual, s.row_blocks) for name, s in specs.items()}
    assert found == {
        "router.weight": ((E, 16), "router", (), False, False, ()),
        "experts.gate_up_proj": ((E, 16, 16), "matrix", (("ep", 0),), True, False, (8, 8)),
        "experts.down_proj": ((E, 16, 8), "matrix", (("ep", 0),), True, True, ()),
        "shared.gate_up_proj.weight": ((32, 16), "matrix", (), False, False, (16, 16)),
        "shared.down_proj.weight": ((16, 16), "matrix", (), False, True, ()),
    }


# Copies.


def test_a_copy_of_a_compiled_model_has_weights_of_its_own() -> None:
    """Compiled methods are bound to the module that they were compiled for."""
    ids, labels = make_batch()
    model = make_model("shared", torch.float32)
    expected = sums(model, ids, labels).objective
    model.compile_blocks()
    copied, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model.blocks))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(sums(copied, ids, labels).objective, expected)
    copied.blocks = read
    assert torch.equal(sums(copied, ids, labels).objective, expected)
