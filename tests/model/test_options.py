"""The options of other model families against a twin in plain loops: norms, feed-forward layers, positions, windows,
biases and residuals, with documents, recomputation and compilation. (Against Hugging Face's models: tests/interop.)"""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.models import redrawn
from tests.model.test_gpt import PACKED, SIZES, B, S, Twin, assert_same_gradients, gradients, make_batch, sums
from tinytron.kernels.attention import attend
from tinytron.kernels.choice import Backend, Kernels
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.norm import LayerNorm
from tinytron.utils.sequences import documents_of

GPT2: dict[str, Any] = {
    "norm_type": "layer", "mlp_type": "gelu_tanh", "position_type": "learned", "bias": True, "num_key_value_heads": 4,
}  # fmt: skip
NEOX: dict[str, Any] = {
    "norm_type": "layer", "mlp_type": "gelu", "rotary_fraction": 0.5, "parallel_residual": True, "bias": True,
    "num_key_value_heads": 4, "tied_lm_head": False,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "layer norm": {"norm_type": "layer", "qk_norm": True, "norm_eps": 0.1},
    "gelu": {"mlp_type": "gelu"},
    "gelu tanh": {"mlp_type": "gelu_tanh", "mlp_bias": True},
    "learned": {"position_type": "learned"},
    "odd heads": {"position_type": "learned", "head_dim": 5},
    "partial": {"rotary_fraction": 0.5},
    "parallel": {"parallel_residual": True},
    "qkv bias": {"qkv_bias": True},
    "attention bias": {"attention_bias": True},
    "window": {"sliding_window": 3},
    "window of itself": {"sliding_window": 1},
    "some windows": {"sliding_window": 4, "sliding_window_layers": (1,), "num_layer": 3},
    "wide window": {"sliding_window": S},
    "linear": {"rope_scaling": "linear", "rope_scaling_factor": 3.0},
    "gpt2": GPT2,
    "neox": NEOX,
    "neox in turn": NEOX | {"parallel_residual": False, "sliding_window": 5, "num_layer": 3},
}


def make_model(variant: str, dtype: torch.dtype = torch.float64, **options: Any) -> GPT:
    return redrawn(GPT(ModelConfig(**SIZES | VARIANTS[variant]), dtype=dtype, **options))


class OptionTwin(Twin):
    """``Twin`` with the options, each as its definition says."""

    def __init__(self, model: GPT, sizes: dict[str, Any]) -> None:
        weights = {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}
        super().__init__(weights, sizes)
        self.sizes, self.layer = sizes, 0

    def logits(self, ids: list[int]) -> torch.Tensor:
        x = self.w["wte.weight"][ids]
        if "wpe.weight" in self.w:
            x = x + self.w["wpe.weight"][self.positions[: len(ids)]]
        for layer in range(self.L):
            self.layer, prefix = layer, f"blocks.{layer}."
            attended = self.attention(prefix + "attn.", self.norm(prefix + "attn_norm.weight", x))
            if self.sizes.get("parallel_residual"):
                x = x + attended + self.feed_forward(prefix + "mlp.", self.norm(prefix + "mlp_norm.weight", x))
            else:
                x = x + attended
                x = x + self.feed_forward(prefix + "mlp.", self.norm(prefix + "mlp_norm.weight", x))
        head = self.w.get("lm_head.weight", self.w["wte.weight"])
        return self.norm("final_norm.weight", x) @ head.T

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        bias = self.w.get(name.replace(".weight", ".bias"))
        if bias is None:
            return super().norm(name, x)
        centred = x - x.mean(-1, keepdim=True)
        return centred * ((centred**2).mean(-1, keepdim=True) + self.eps) ** -0.5 * self.w[name] + bias

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        if self.sizes.get("position_type") == "learned":
            return x
        own, R = self.H, int(self.H * self.sizes.get("rotary_fraction", 1.0))
        slower, positions = self.sizes.get("rope_scaling_factor", 1.0), self.positions
        self.H, self.positions = R, [p / slower for p in positions]  # type: ignore[misc]
        turned = super().rotated(x[:, :R])
        self.H, self.positions = own, positions
        return torch.cat([turned, x[:, R:]], dim=1)

    def attention(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        N, K, H = self.N, self.K, self.H
        packed = self.linear(prefix + "qkv_proj", x)
        layers = self.sizes.get("sliding_window_layers") or range(self.L)
        window = self.sizes.get("sliding_window", 0) if self.layer in layers else 0
        rows = []
        for n in range(N):
            kv = n // (N // K)
            q, k, v = (packed[:, i * H : (i + 1) * H] for i in (n, N + kv, N + K + kv))
            if prefix + "q_norm.weight" in self.w:
                q, k = self.norm(prefix + "q_norm.weight", q), self.norm(prefix + "k_norm.weight", k)
            q, k = self.rotated(q), self.rotated(k)
            out = []
            for t in range(len(x)):
                first = max(0, t + 1 - window) if window else 0
                weights = (q[t] @ k[first : t + 1].T / H**0.5).exp()
                out.append(weights @ v[first : t + 1] / weights.sum())
            rows.append(torch.stack(out))
        return self.linear(prefix + "out_proj", torch.cat(rows, dim=1))

    def feed_forward(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        if prefix + "gate_up_proj.weight" in self.w:
            return super().feed_forward(prefix, x)
        h = self.linear(prefix + "up_proj", x)
        if self.sizes["mlp_type"] == "gelu":
            gated = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        else:
            gated = h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2
        return self.linear(prefix + "down_proj", gated)


def check(model: GPT, variant: str, lengths: list[int] | None = None, tolerance: float = 1e-10) -> None:
    """Loss and every gradient equal the twin's, on ``lengths`` documents in the rows if there are any."""
    twin, (ids, labels) = OptionTwin(model, SIZES | VARIANTS[variant]), make_batch()
    if lengths is None:
        losses = sums(model, ids, labels)
        rows = list(zip(ids.tolist(), labels.tolist(), strict=True))
    else:
        positions = torch.cat([torch.arange(n) for n in lengths]).view(B, S)
        losses = sums(model, ids, labels, positions, documents_of(positions))
        parts = zip(ids.flatten().split(lengths), labels.flatten().split(lengths), strict=True)
        rows = [(part.tolist(), targets.tolist()) for part, targets in parts]
    expected = torch.stack([twin.loss(twin.logits(row), targets) for row, targets in rows]).sum()
    torch.testing.assert_close(losses.objective.double(), expected, rtol=tolerance, atol=0)
    used = {name: w for name, w in twin.w.items() if w.requires_grad}
    theirs = dict(zip(used, torch.autograd.grad(expected, list(used.values())), strict=True))
    mine = {name: grad.double() for name, grad in gradients(losses.objective, model).items()}
    for grads in (mine, theirs):  # nothing depends on a single key's scale, or on keys all moved alike
        for name in [n for n in grads if window_of_one(variant) and ("q_norm" in n or "k_norm" in n)]:
            del grads[name]
    zero = {name for name, grad in theirs.items() if float(grad.abs().max()) < 1e-12}
    assert all(float(mine.pop(name).abs().max()) < 1e-9 for name in zero)
    assert_same_gradients(mine, {n: g for n, g in theirs.items() if n not in zero}, tolerance)


def window_of_one(variant: str) -> bool:
    return VARIANTS[variant].get("sliding_window") == 1


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient_equal_the_twin(variant: str, backend: Backend) -> None:
    check(make_model(variant, kernels=Kernels(attention=backend)), variant)


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("variant", ["learned", "window", "some windows", "gpt2", "neox", "neox in turn"])
def test_packed_documents_equal_the_twin_on_each_alone(variant: str, backend: Backend) -> None:
    check(make_model(variant, kernels=Kernels(attention=backend)), variant, PACKED)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("variant", ["some windows", "gpt2", "neox in turn"])
def test_recomputation(variant: str, recompute: Any) -> None:
    check(make_model(variant, recompute=recompute), variant, PACKED)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("variant", ["some windows", "gpt2", "neox in turn"])
def test_compiled_blocks(variant: str, recompute: Any) -> None:
    torch._dynamo.reset()
    model = make_model(variant, torch.float32, recompute=recompute)
    model.compile_blocks()
    check(model, variant, tolerance=1e-4)
    check(model, variant, PACKED, tolerance=1e-4)


def test_flash_gets_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that asks plain attention."""
    given: list[object] = []

    def flash_attn_func(*qkv: torch.Tensor, window_size: tuple[int, int] = (-1, -1), **_: object) -> torch.Tensor:
        given.append(window_size)
        return attend(*qkv, backend="math", window=window_size[0] + 1)  # type: ignore[misc]

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    check(make_model("some windows", kernels=Kernels(attention="flash")), "some windows")
    assert given == [(-1, -1), (3, 0), (-1, -1)]


def test_one_mask_serves_all_layers_of_a_window() -> None:
    model = make_model("some windows")
    seen: list[Any] = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    model(make_batch()[0])
    assert seen[0] is None
    assert seen[2] is None
    assert tuple(seen[1].mask.shape) == (1, 1, S, S)
    assert [int(row.isfinite().sum()) for row in seen[1].mask[0, 0]] == [min(t + 1, 4) for t in range(S)]


def test_positions_of_learned_tables_are_those_given() -> None:
    model, (ids, _) = make_model("learned"), make_batch()
    shifted = torch.arange(3, 3 + S).expand(B, S)
    twin = OptionTwin(model, SIZES | VARIANTS["learned"])
    twin.positions = list(range(3, 3 + S))
    expected = torch.stack([twin.logits(row) for row in ids.tolist()])
    torch.testing.assert_close(model(ids, positions=shifted), expected, rtol=1e-10, atol=1e-10)


# What parameters are, and how they begin.


def test_kinds_and_first_values() -> None:
    model = GPT(ModelConfig(**SIZES | GPT2 | {"num_layer": 1, "init_std": 0.5}), dtype=torch.float64)
    kinds = {spec.name: spec.kind for spec in model.param_specs()}
    norms = {"blocks.0.attn_norm", "blocks.0.mlp_norm", "final_norm"}
    assert {n for n, kind in kinds.items() if kind == "norm"} == {f"{n}.weight" for n in norms}
    assert {n for n, kind in kinds.items() if kind == "embedding"} == {"wte.weight", "wpe.weight"}
    projections = {"attn.qkv_proj", "attn.out_proj", "mlp.up_proj", "mlp.down_proj"}
    biases = {f"{n}.bias" for n in norms} | {f"blocks.0.{n}.bias" for n in projections}
    assert {n for n, kind in kinds.items() if kind == "bias"} == biases
    assert {n for n, kind in kinds.items() if kind == "matrix"} == {f"blocks.0.{n}.weight" for n in projections}
    for spec in model.param_specs():
        value = model.get_parameter(spec.name).detach()
        if spec.kind in ("norm", "bias"):
            assert torch.equal(value, torch.full_like(value, float(spec.kind == "norm")))
        else:
            std = 0.5 / 2**0.5 if spec.writes_residual else 0.5
            assert abs(float(value.std()) / std - 1) < 0.25, spec.name


def test_without_a_seed_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPT, "init_weights", lambda *_: pytest.fail("drawn"))
    model = GPT(ModelConfig(**SIZES, use_moe=True, num_experts=4, num_experts_per_tok=2), seed=None)
    assert not any(layer.router.bias.any() for layer in model.moe_layers)


# The norm by itself.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_has_its_statistics_in_fp32(dtype: torch.dtype) -> None:
    norm = LayerNorm(64, 1e-5).to(dtype)
    x = (torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 3 + 100).to(dtype)
    wide = x.double()
    expected = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert (
        float((norm(x).detach().double() - expected).abs().max())
        < 3 * 2.0 ** (-8 if dtype == torch.bfloat16 else -11) * 4
    )
