"""Rows that hold several documents: each is as if it were alone. Against the model on one document at a time without
mask, positions or padding, and against Hugging Face's Llama."""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.models import redrawn
from tests.model.test_gpt import SIZES, CountOps, assert_same_gradients, gradients, sums
from tinytron.kernels.attention import attend
from tinytron.kernels.choice import Backend, Kernels
from tinytron.model import GPT, ModelConfig
from tinytron.utils.sequences import IGNORE_INDEX, documents_of

S = 12
ROWS = [[5, 3, 4], [12], [1, 1, 10], [2, 9, 1]]  # lengths of documents
LENGTHS = [length for row in ROWS for length in row]
MOE: dict[str, Any] = {
    "use_moe": True,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    # Over a sequence or a batch: these see which documents stand together, and are meant to.
    "moe_aux_loss_coef": 0.0,
    "moe_z_loss_coef": 0.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "qk_norm": {"qk_norm": True, "num_key_value_heads": 1, "bias": True, "tied_lm_head": False},
    "moe": MOE,
    "moe_all": MOE | {"qk_norm": True, "num_shared_experts": 1, "first_k_dense": 1, "moe_router_score": "sigmoid"},
}
TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def make_model(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> GPT:
    return redrawn(GPT(ModelConfig(**SIZES | KINDS[kind]), dtype=dtype, z_loss_coef=0.01, **options))


def make_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels of which some are ignored, and weights of which some are zero: ``[4, 12]``."""
    generator = torch.Generator().manual_seed(2)
    ids, labels = torch.randint(SIZES["vocab_size"], (2, len(ROWS), S), generator=generator)
    labels[0, 3] = labels[1, -2:] = labels[2, 0] = IGNORE_INDEX
    weights = torch.rand(ids.shape, generator=generator)
    weights[3, 2:5] = 0
    return ids, labels, weights


def make_positions(rows: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def sums_alone(model: GPT, weighted: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Objective, plain loss and the losses of single tokens, one document after the other."""
    parts = [tensor.flatten().split(LENGTHS) for tensor in make_batch()]
    found = [
        sums(model, ids[None], labels[None], weights=weights[None] if weighted else None)
        for ids, labels, weights in zip(*parts, strict=True)
    ]
    per_token = [losses.per_token[0] for losses in found if losses.per_token is not None]
    totals = (torch.stack([getattr(losses, name) for losses in found]).sum() for name in ("objective", "token"))
    return *totals, torch.cat(per_token)  # type: ignore[return-value]


def check_against_alone(model: GPT, tolerance: float, *, weighted: bool = False) -> None:
    """Losses, gradients of all weights, losses of single tokens and logits of ``model``, on all documents at once."""
    ids, labels, weights = make_batch()
    positions = make_positions(ROWS)
    documents = documents_of(positions)
    assert documents.cu_seqlens.diff().tolist() == LENGTHS
    losses = sums(model, ids, labels, positions, documents, weights if weighted else None)
    logits = model(ids, positions=positions, documents=documents)

    plain = GPT(model.config, dtype=model.wte.weight.dtype, z_loss_coef=0.01, kernels=Kernels(attention="math"))
    plain.load_state_dict(model.state_dict())
    objective, token, per_token = sums_alone(plain, weighted)
    torch.testing.assert_close(losses.objective, objective, rtol=tolerance, atol=0)
    torch.testing.assert_close(losses.token, token, rtol=tolerance, atol=0)
    assert losses.per_token is not None
    assert losses.per_token.shape == ids.shape
    counted = losses.per_token * weights if weighted else losses.per_token
    torch.testing.assert_close(losses.token, counted.sum(), rtol=tolerance, atol=0)
    torch.testing.assert_close(losses.per_token.flatten(), per_token, rtol=tolerance, atol=10 * tolerance)
    assert_same_gradients(gradients(losses.objective, model), gradients(objective, plain), tolerance)
    expected = torch.cat([plain(document[None])[0] for document in ids.flatten().split(LENGTHS)])
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(logits.flatten(0, 1), expected, rtol=0, atol=tolerance * scale)


# Each document as if it were alone.


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_document_is_as_if_it_were_alone(
    kind: str, backend: Backend, dtype: torch.dtype, tolerance: float
) -> None:
    check_against_alone(make_model(kind, dtype, kernels=Kernels(attention=backend)), tolerance)


@pytest.mark.parametrize("kind", ["gqa", "moe"])
def test_weights_of_targets(kind: str) -> None:
    check_against_alone(make_model(kind), 1e-10, weighted=True)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("kind", ["qk_norm", "moe_all"])
def test_recomputation(kind: str, backend: Backend, recompute: Any) -> None:
    check_against_alone(make_model(kind, kernels=Kernels(attention=backend), recompute=recompute), 1e-10)


def _stand_in_for_flash() -> SimpleNamespace:
    """The package's two functions, by plain attention on one document at a time."""

    def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        parts = [t.split(cu.diff().tolist()) for t in (q, k, v)]
        return torch.cat([attend(*(t[None] for t in part), backend="math")[0] for part in zip(*parts, strict=True)])

    return SimpleNamespace(
        flash_attn_func=lambda q, k, v, **_: attend(q, k, v, backend="math"), flash_attn_varlen_func=varlen
    )


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_flash_gets_the_boundaries_and_no_mask(monkeypatch: pytest.MonkeyPatch, recompute: Any) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", _stand_in_for_flash())
    model = make_model("gqa", kernels=Kernels(attention="flash"), recompute=recompute)
    with CountOps() as ops:
        check_against_alone(model, 1e-10)
    assert "searchsorted" not in ops.calls


def test_positions_are_used() -> None:
    """Scores see differences of positions only, so a masked document cannot show them: without masks they must."""
    model, (ids, labels, _) = make_model("gqa"), make_batch()
    restarted = sums(model, ids, labels, positions=make_positions(ROWS)).token
    assert not torch.allclose(restarted, sums(model, ids, labels).token, rtol=1e-6)


# Hugging Face's Llama.


def _llama(model: GPT) -> Any:
    """A LlamaForCausalLM with the weights of ``model``."""
    transformers = pytest.importorskip("transformers")
    sizes = model.config
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layer,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        max_position_embeddings=sizes.block_size,
        rms_norm_eps=sizes.norm_eps,
        rope_theta=sizes.rope_theta,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    mine = model.state_dict()
    theirs = {
        "model.embed_tokens.weight": mine["wte.weight"],
        "model.norm.weight": mine["final_norm.weight"],
        "lm_head.weight": mine["lm_head.weight"],
    }
    H, N, K = sizes.resolved_head_dim, sizes.num_attention_heads, sizes.num_key_value_heads
    for i in range(sizes.num_layer):
        block = {n.removeprefix(f"blocks.{i}."): w for n, w in mine.items() if n.startswith(f"blocks.{i}.")}
        q, k, v = block["attn.qkv_proj.weight"].split((N * H, K * H, K * H))
        gate, up = block["mlp.gate_up_proj.weight"].chunk(2)
        named = {
            **{"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v},
            **{"self_attn.o_proj": block["attn.out_proj.weight"], "mlp.down_proj": block["mlp.down_proj.weight"]},
            **{"mlp.gate_proj": gate, "mlp.up_proj": up, "input_layernorm": block["attn_norm.weight"]},
            "post_attention_layernorm": block["mlp_norm.weight"],
        }
        theirs |= {f"model.layers.{i}.{name}.weight": weight for name, weight in named.items()}
    llama = transformers.LlamaForCausalLM(config)
    llama.load_state_dict(theirs)
    return llama.eval()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_logits_are_those_of_hugging_faces_llama(backend: Backend, masked: bool) -> None:
    model = make_model("gqa", torch.float32, kernels=Kernels(attention=backend))
    ids, positions = make_batch()[0], make_positions(ROWS)
    seen = torch.zeros(len(ROWS), 1, S, S, dtype=torch.bool)
    for row, lengths in zip(seen[:, 0], ROWS if masked else [[S]] * len(ROWS), strict=True):
        start = 0
        for length in lengths:
            row[start : start + length, start : start + length] = torch.ones(length, length, dtype=torch.bool).tril()
            start += length
    with torch.no_grad():
        mine = model(ids, positions=positions, documents=documents_of(positions) if masked else None)
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        theirs = _llama(model)(input_ids=ids, position_ids=positions, attention_mask=bias, use_cache=False).logits
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


# What the mask costs.


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_the_mask_is_made_once(backend: Backend, recompute: Any) -> None:
    ids, labels, _ = make_batch()
    model = GPT(ModelConfig(**SIZES | {"num_layer": 5}), kernels=Kernels(attention=backend), recompute=recompute)
    with CountOps() as ops:
        sums(model, ids, labels, documents=documents_of(make_positions(ROWS))).objective.backward()
    assert ops.calls["searchsorted"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_keep_no_mask_of_their_own(dtype: torch.dtype) -> None:
    ids, labels, _ = make_batch()

    def masks_saved(num_layer: int) -> int:
        model = GPT(ModelConfig(**SIZES | {"num_layer": num_layer}), dtype=dtype)
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        documents = documents_of(make_positions(ROWS))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = sums(model, ids, labels, documents=documents)
        sizes = Counter(storage.nbytes() for storage in storages.values())
        assert held.objective.requires_grad
        return sizes[len(ROWS) * S * S * dtype.itemsize]

    assert masks_saved(2) == masks_saved(6) == 1


# Compilation.


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_compiled_blocks_serve_any_number_of_documents(recompute: Any) -> None:
    """One graph for all, and whole: compiled again for a new number of documents, a run would never be done compiling."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    ids, labels, _ = make_batch()
    plain = make_model("gqa", torch.float32)
    model = make_model("gqa", torch.float32, recompute=recompute)
    model.compile_blocks()
    for rows in (ROWS, [[S]] * 4, [[1] * S] * 4, [[3, 9], [4, 8], [6, 6], [2, 10]], [[3, 9], [2, 1, 9], [12], [12]]):
        positions = make_positions(rows)
        losses, expected = (sums(m, ids, labels, positions, documents_of(positions)) for m in (model, plain))
        torch.testing.assert_close(losses.objective, expected.objective)
        assert_same_gradients(gradients(losses.objective, model), gradients(expected.objective, plain), 1e-5)
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
