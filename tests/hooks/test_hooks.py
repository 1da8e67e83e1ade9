"""Activations and their gradients at every point against the naive twin, on every layout; replaced activations; and points
cost nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of
from tests.naive.gpt import Experts, Shape, forward
from tinytron import hooks
from tinytron.distributed import ParallelLayout, ParallelState
from tinytron.errors import ConfigError
from tinytron.hooks import Seen
from tinytron.inference import SamplingOptions, complete
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.attn import Attention
from tinytron.model.modules.recompute import Recompute
from tinytron.utils.sequences import documents_of

Pools = Callable[[int], Ranks]
Arrays = dict[str, tuple[Any, Any]]  # by point: activation and gradient
B, S, VOCAB = 4, 8, 29
EXPERTS = Experts(top_k=2, first_k_dense=1)


def make_model(
    moe: bool = False, state: ParallelState | None = None, recompute: Recompute = "none", **other: Any
) -> GPT:
    """Two layers; with ``moe`` the second one has experts, and a shared one."""
    experts: dict[str, Any] = {
        **{"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6},
        **{"num_shared_experts": 1, "first_k_dense": 1, "moe_aux_loss_coef": 0.0},
    }
    config = ModelConfig(
        block_size=16, vocab_size=VOCAB, num_layer=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16,
        intermediate_size=24, init_std=0.3, tied_lm_head=False, **(experts if moe else {}), **other,
    )  # fmt: skip
    return GPT(config, dtype=torch.float64, seed=5, state=state, recompute=recompute)


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCAB, (B, S + 1), generator=torch.Generator().manual_seed(3))
    labels = tokens[:, 1:].clone()
    labels[1, 3:] = -100
    return tokens[:, :-1], labels


Change = Callable[[torch.Tensor], torch.Tensor]


def expected_of(moe: bool, change: dict[str, Change] | None = None) -> Arrays:
    """All activations and gradients by autograd through the naive twin."""
    weights = {name: w.detach() for name, w in make_model(moe).state_dict().items()}
    weights["wte.weight"].requires_grad_()
    found: dict[str, torch.Tensor] = {}

    def at(name: str, x: torch.Tensor) -> torch.Tensor:
        found[name] = (change or {}).get(name, lambda x: x)(x)
        return found[name]

    ids, labels = make_batch()
    shape = Shape(layers=2, heads=4, kv_heads=2, experts=EXPERTS if moe else None)
    logits = forward(weights, ids, shape, at)[0]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    grads = torch.autograd.grad(loss, list(found.values()))
    return {name: (found[name].detach().numpy(), grad.numpy()) for name, grad in zip(found, grads, strict=True)}


def found_of(model: GPT, seen: Seen) -> Arrays:
    return {name: (seen[name].numpy().copy(), seen.gradient(name).numpy().copy()) for name in hooks.points_of(model)}


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert list(found) == list(expected) or set(found) == set(expected)
    for name, pair in expected.items():
        for what, mine, theirs in zip(("activation", "gradient"), found[name], pair, strict=True):
            assert mine.shape == theirs.shape, f"{what} of {name}"
            error = np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)
            assert error < 1e-10, f"{what} of {name}: {error:.1e}"


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_one_process_sees_what_the_twin_sees(moe: bool, recompute: Recompute) -> None:
    model, (ids, labels) = make_model(moe, recompute=recompute), make_batch()
    with hooks.on(model, record=["*"], perturb=["*"]) as seen:
        model(ids, labels).objective.backward()
    assert_equal(found_of(model, seen), expected_of(moe))
    assert all(module.taps is None for module in model.modules() if isinstance(module, hooks.HasPoints))
    norms = seen.gradient_norms()
    for name, (_, gradient) in expected_of(moe).items():
        assert norms.pop(f"intermediate_grad_norms/{name}") == pytest.approx(np.linalg.norm(gradient))
    assert not norms


def test_names_are_the_documented_ones() -> None:
    block = ("input", "post_attn", "mlp.input", "post_mlp")
    attention = tuple(f"attn.{name}" for name in ("input", "q", "k", "v", "pre_proj"))
    expected = {f"blocks.0.{name}" for name in (*block, *attention, "mlp.pre_proj")}
    expected |= {f"blocks.1.{name}" for name in (*block, *attention, "mlp.shared.pre_proj")}
    assert set(hooks.points_of(make_model(moe=True))) == expected


def _on_layout(
    sep: int, ep: int, moe: bool, recompute: Recompute, change: bool = False
) -> tuple[int, Arrays, dict[str, float]]:
    """The whole sequences of this rank. A job for the pool."""
    layout = ParallelLayout(torch.distributed.get_world_size(), sep, ep)
    state = ParallelState.create(layout, torch.device("cpu"))
    model, (ids, labels) = make_model(moe, state, recompute), make_batch()
    rows, s = B // layout.dp, S // sep
    row, column = state.group_rank("dp") * rows, state.group_rank("sep") * s
    part = (slice(row, row + rows), slice(column, column + s))
    with hooks.on(model, record=["*"], perturb=["*"], whole=True, replace=CHANGES if change else {}) as seen:
        model(ids[part].contiguous(), labels[part].contiguous()).objective.backward()
    return row, found_of(model, seen), seen.gradient_norms()


LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2), (4, 2, 2), (4, 4, 1), (4, 2, 4)]


@pytest.mark.parametrize(("world", "sep", "ep"), LAYOUTS)
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.sample(8)
def test_every_layout_sees_what_the_twin_sees(
    ranks: Pools, world: int, sep: int, ep: int, recompute: Recompute
) -> None:
    expected = expected_of(moe=True)
    rows = B * sep // world
    for row, found, norms in ranks(world).run(_on_layout, sep, ep, True, recompute):
        mine = {name: tuple(x[row : row + rows] for x in pair) for name, pair in expected.items()}
        assert_equal(found, mine)
        for name, (_, gradient) in expected.items():
            assert norms[f"intermediate_grad_norms/{name}"] == pytest.approx(np.linalg.norm(gradient))


def minus_mean(x: torch.Tensor) -> torch.Tensor:
    """Needs the whole sequence."""
    return 2 * x - x.mean(1, keepdim=True)


CHANGES: dict[str, Change] = {"blocks.0.post_attn": minus_mean, "blocks.1.attn.v": minus_mean}


@pytest.mark.parametrize(("world", "sep"), [(1, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_replaced_activation_is_what_goes_on(ranks: Pools, world: int, sep: int, recompute: Recompute) -> None:
    """With its gradient, also where the function needs other ranks' tokens."""
    expected, rows = expected_of(False, CHANGES), B * sep // world
    for row, found, _ in ranks(world).run(_on_layout, sep, 1, False, recompute, True):
        assert_equal(found, {name: tuple(x[row : row + rows] for x in pair) for name, pair in expected.items()})


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_compiled_blocks_see_the_same_and_stay_compiled(moe: bool) -> None:
    model, (ids, labels) = make_model(moe, recompute="selective"), make_batch()
    model.compile_blocks()
    before = model(ids, labels).objective
    before.backward()
    with hooks.on(model, record=["*"], perturb=["*"]) as seen:
        model(ids, labels).objective.backward()
    assert_equal(found_of(model, seen), expected_of(moe))
    compiled = [module._compiled_call_impl is not None for module in model.blocks]
    assert compiled == [True, not moe]
    assert torch.equal(model(ids, labels).objective, before)


class Counting(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(model: GPT) -> int:
    ids, labels = make_batch()
    with Counting() as counting:
        model(ids, labels).objective.backward()
    return sum(counting.counts.values())


@pytest.mark.parametrize(("moe", "recompute", "expected"), [
    (False, "none", 391), (False, "full", 559), (True, "none", 644), (True, "full", 892),
])  # fmt: skip
def test_without_hooks_no_operation_is_added(moe: bool, recompute: Recompute, expected: int) -> None:
    """The numbers are those of the commit before there were points; they change with the model's own operations."""
    model = make_model(moe, recompute=recompute)
    assert operations(model) == expected
    with hooks.on(model, record=["*"], perturb=["*"]):
        assert operations(model) > expected
    assert operations(model) == expected


# Generation.


def test_generation_is_steered_as_a_pass_over_all_tokens_is() -> None:
    model, prompt = make_model(), [3, 1, 4, 1, 5]
    options = SamplingOptions(max_new_tokens=6, temperature=0)
    direction = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = complete(model, [prompt], options).samples[0].tokens
    steer: dict[str, Change] = {"blocks.0.post_mlp": lambda x: x + 8 * direction}
    with hooks.on(model, replace=steer, record=["blocks.1.attn.q"]) as seen:
        steered = complete(model, [prompt], options).samples[0].tokens
        assert seen["blocks.1.attn.q"].shape == (1, 1, 4, 4)
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert steered == ids[5:]
    assert steered != plain
    assert complete(model, [prompt], options).samples[0].tokens == plain


# Use.


def test_contexts_nest_and_an_error_leaves_nothing() -> None:
    model, (ids, labels) = make_model(), make_batch()
    double: dict[str, Change] = {"blocks.0.input": lambda x: 2 * x}
    with (
        hooks.on(model, record=["blocks.0.input"]) as outer,
        hooks.on(model, replace=double, record=["blocks.0.input"]) as inner,
    ):
        model(ids, labels)
    assert torch.equal(inner["blocks.0.input"], 2 * outer["blocks.0.input"])
    with pytest.raises(ZeroDivisionError), hooks.on(model, replace={"*": lambda x: x / (1 // 0)}):
        model(ids, labels)
    assert all(module.taps is None for module in model.modules() if isinstance(module, hooks.HasPoints))


def test_without_gradients_nothing_is_perturbed() -> None:
    model, (ids, labels) = make_model(), make_batch()
    with hooks.on(model, perturb=["*"], record=["*.q"]) as seen, torch.no_grad():
        model(ids, labels)
    assert sorted(seen) == ["blocks.0.attn.q", "blocks.1.attn.q"]
    assert len(seen) == 2
    assert seen.gradient_norms() == {}


class OwnAttention(Attention):
    """Every part is overridden: keys and values are tripled, a token sees itself only, and outputs are halved twice."""

    def _project_inner(self, x_BsD: torch.Tensor) -> torch.Tensor:
        return 3 * super()._project_inner(x_BsD)

    def preprocess_qkv(self, qkv_BsMH: torch.Tensor, rotation: Any) -> Any:
        q, k, v = super().preprocess_qkv(qkv_BsMH, rotation)
        return q / 3, k, v

    def build_mask(self, documents: Any) -> Any:
        assert documents is None
        return documents_of(torch.zeros(B, S, dtype=torch.int64))

    def attn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Any) -> torch.Tensor:
        return super().attn(q, k, v, documents) / 2

    def postprocess_attn(self, out_BsNH: torch.Tensor) -> torch.Tensor:
        return out_BsNH / 2

    def output_proj(self, out_BsNH: torch.Tensor) -> torch.Tensor:
        return super().output_proj(out_BsNH) + 1


class OwnGPT(GPT):
    attention = OwnAttention


def test_parts_of_attention_are_overridden() -> None:
    model, (ids, labels) = make_model(), make_batch()
    own = OwnGPT(model.config, dtype=torch.float64, seed=5)
    with hooks.on(own, record=["blocks.0.*"]) as seen, hooks.on(model, record=["blocks.0.*"]) as plain:
        own(ids, labels)
        model(ids, labels)
    of = "blocks.0.attn."
    torch.testing.assert_close(seen[of + "q"], plain[of + "q"])
    torch.testing.assert_close(seen[of + "v"], 3 * plain[of + "v"])
    torch.testing.assert_close(seen[of + "pre_proj"], 3 * plain[of + "v"].repeat_interleave(2, dim=2) / 4)
    projected = own.blocks[0].attn.out_proj(seen[of + "pre_proj"].flatten(2))
    torch.testing.assert_close(seen["blocks.0.post_attn"], seen["blocks.0.input"] + projected + 1)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("mlp_type", ["gelu", "swiglu"])
def test_every_kind_of_block_is_the_sum_of_its_points(parallel: bool, mlp_type: str) -> None:
    other: dict[str, Any] = {"parallel_residual": parallel, "mlp_type": mlp_type, "norm_type": "layer", "qk_norm": True}
    model, (ids, labels) = make_model(**other), make_batch()
    with hooks.on(model, record=["*"]) as seen:
        model(ids, labels)
    for i, block in enumerate(model.blocks):
        here = {name.removeprefix(f"blocks.{i}."): x for name, x in seen.items() if name.startswith(f"blocks.{i}.")}
        torch.testing.assert_close(here["attn.input"], block.attn_norm(here["input"]))
        torch.testing.assert_close(
            here["post_attn"], here["input"] + block.attn.out_proj(here["attn.pre_proj"].flatten(2))
        )
        normed = block.mlp_norm(here["input" if parallel else "post_attn"])
        torch.testing.assert_close(here["mlp.input"], normed)
        torch.testing.assert_close(here["post_mlp"], here["post_attn"] + block.mlp.down_proj(here["mlp.pre_proj"]))


# Errors.


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught, hooks.on(options.pop("model", make_model()), **options):
        pass
    return str(caught.value)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    text = refusal(record=["blocks.0.attn.qq"])
    assert text.startswith("hooks: blocks.0.attn.qq matches no point of this GPT")
    assert "blocks.0.attn.q" in text.split("GPT")[1]
    assert refusal(perturb=["x"]) == "hooks: x matches no point of this GPT; use one such as blocks.0.input"


def test_a_model_without_points_is_refused() -> None:
    assert refusal(model=nn.Linear(1, 1), record=["*"]) == (
        "hooks: this Linear has no named points; use Tinytron's GPT, or build your modules on tinytron.hooks.HasPoints"
    )


def test_a_function_that_returns_something_else_is_refused() -> None:
    model, (ids, labels) = make_model(), make_batch()
    for result, made in ((None, "a NoneType"), (torch.zeros(2), r"\[2\] torch.float32")):
        with (
            hooks.on(model, replace={"blocks.0.input": lambda x, result=result: result}),
            pytest.raises(
                ConfigError, match=f"the function for blocks.0.input returned {made}; return a tensor like the given"
            ),
        ):
            model(ids, labels)


def test_what_was_not_seen_is_an_error() -> None:
    model, (ids, labels) = make_model(), make_batch()
    with hooks.on(model, record=["*.post_mlp"], perturb=["blocks.0.input"]) as seen:
        with pytest.raises(ConfigError, match=r"blocks.0.input was not recorded; recorded are none: no forward pass"):
            seen["blocks.0.input"]
        with pytest.raises(ConfigError, match=r"blocks.0.input was not perturbed in a forward pass. Points .*: none"):
            seen.gradient("blocks.0.input")
        loss = model(ids, labels).objective
        with pytest.raises(ConfigError, match=r"blocks.0.input has no gradient yet; call backward"):
            seen.gradient("blocks.0.input")
        loss.backward()
        with pytest.raises(ConfigError, match=r"recorded are blocks.0.post_mlp, blocks.1.post_mlp"):
            seen["blocks.0.input"]
        with pytest.raises(
            ConfigError, match=r"post_mlp was not perturbed in a forward pass. Points .*: blocks.0.input"
        ):
            seen.gradient("blocks.0.post_mlp")


def test_one_point_and_what_was_not_recorded() -> None:
    model = GPT(config_of(*TINY).model)
    with hooks.on(model, record="blocks.0.input") as seen:
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert list(seen) == ["blocks.0.input"]
    assert "blocks.1.input" not in seen
    assert seen.get("blocks.1.input") is None
    assert seen.get("blocks.0.input") is seen["blocks.0.input"]
