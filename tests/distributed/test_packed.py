"""Documents packed into rows that are cut among ranks: losses and gradients are those of one process, also where a
document crosses a cut; and pieces of the code without which they are not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.mutants import Mutant, mutated
from tests.helpers.ranks import Ranks
from tinytron.distributed import ParallelLayout, ParallelState
from tinytron.distributed.sequence_parallel.ulysses import cut_sequence
from tinytron.kernels.choice import Backend, Kernels
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.loss import LossSums
from tinytron.utils.sequences import IGNORE_INDEX, documents_of

Pools = Callable[[int], Ranks]
S, VOCAB = 16, 29
# Lengths of documents: across the cuts at 4, 8 and 12, ending at them, one over all ranks, and of single tokens.
ROWS = [[3, 6, 7], [4, 4, 8], [16], [1, 1, 1, 1, 2, 10]]
MOE: dict[str, Any] = {
    "use_moe": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "moe_aux_loss_coef": 0.05,
    "moe_z_loss_coef": 0.01,
}


@dataclass(frozen=True)
class Case:
    """One model on the packed rows; ``masked`` is False for rows whose positions begin anew but whose tokens see all."""

    kv_heads: int = 2
    backend: Backend = "sdpa"
    qk_norm: bool = False
    recompute: str = "none"
    moe: bool = False
    ep: int = 1
    masked: bool = True
    given: bool = True  # the positions; else they are counted from the start of the row
    padded: bool = False  # two documents across cuts have no target: that says they are padding
    options: tuple[tuple[str, Any], ...] = ()  # of the architecture

    def model(self, state: ParallelState | None) -> GPT:
        """Weights are a function of their names, so those of the whole model; large, so that attention is not even."""
        config = ModelConfig(
            block_size=S,
            vocab_size=VOCAB,
            num_layer=2,
            num_attention_heads=4,
            num_key_value_heads=self.kv_heads,
            hidden_size=16,
            intermediate_size=20,
            qk_norm=self.qk_norm,
            init_std=0.4,
            **(MOE if self.moe else {}),
            **dict(self.options),
        )
        recompute: Any = self.recompute
        options: dict[str, Any] = {
            "kernels": Kernels(attention=self.backend),
            "recompute": recompute,
            "z_loss_coef": 0.01,
        }
        return GPT(config, dtype=torch.float64, state=state, **options)


def _losses(case: Case, state: ParallelState | None) -> tuple[LossSums, dict[str, torch.Tensor]]:
    """Loss sums and gradients: of the whole batch, or of this rank's part."""
    random = torch.Generator().manual_seed(7)
    ids, labels = torch.randint(VOCAB, (2, len(ROWS), S), generator=random)
    labels[0, 5] = labels[2, -3:] = IGNORE_INDEX
    if case.padded:
        labels[0, 9:] = labels[1, 4:8] = labels[2] = IGNORE_INDEX
        labels[3, 8:] = IGNORE_INDEX  # of a document with targets in another part
    weights = torch.rand(ids.shape, generator=random)
    positions = torch.tensor([[i for n in row for i in range(n)] for row in ROWS])
    documents = documents_of(positions) if case.masked else None
    model = case.model(state)
    parts = [
        cut_sequence(whole, state.group_rank("sep"), state.layout.sep) if state else whole
        for whole in (ids, labels, positions, weights)
    ]
    sums = model(*parts[:2], parts[2] if case.given else None, documents, parts[3])
    sums.objective.backward()
    return sums, {name: weight.grad for name, weight in model.named_parameters()}


def _differences(case: Case, mutant: Mutant | None = None) -> list[str]:
    """What is not as in one process, on this rank; with a mutant alive in the ranks' model only."""
    world = dist.get_world_size()
    expected, grads = _losses(case, None)
    state = ParallelState.create(ParallelLayout(world, sep=world, ep=case.ep), torch.device("cpu"))
    with mutated(mutant) if mutant else contextlib.nullcontext():
        sums, parts = _losses(case, state)
    found = []

    def compare(what: str, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        error = float((mine - theirs).norm() / theirs.norm())
        if not error <= 1e-10:
            found.append(f"{what}: relative error {error:.2e}")

    for name in ("objective", "token"):
        total = getattr(sums, name).detach().clone()
        dist.all_reduce(total)
        compare(name, total, getattr(expected, name).detach())
    assert sums.per_token is not None
    assert expected.per_token is not None
    compare("per_token", sums.per_token, cut_sequence(expected.per_token, state.rank, world))
    for name, part in parts.items():
        whole = grads[name]
        if part.shape != whole.shape:  # this rank's experts, who had all ranks' tokens
            whole = whole.chunk(case.ep)[state.group_rank("ep")]
            dist.all_reduce(part, group=state.groups["edp"])
        else:
            dist.all_reduce(part)
        compare(f"gradient of {name}", part, whole)
    return found


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_documents_across_cuts(ranks: Pools, world: int, kv_heads: int) -> None:
    for backend, qk_norm in (("sdpa", False), ("math", True)):
        case = Case(kv_heads, backend, qk_norm)  # type: ignore[arg-type]
        for found in ranks(world).run(_differences, case):
            assert not found, f"{case}: {found}"


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_documents_across_cuts_recomputed(ranks: Pools, world: int, moe: bool, recompute: str) -> None:
    for found in ranks(world).run(_differences, Case(1, recompute=recompute, moe=moe)):
        assert not found, found


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_documents_across_cuts_with_experts(ranks: Pools, world: int, ep: int) -> None:
    for found in ranks(world).run(_differences, Case(moe=True, ep=ep)):
        assert not found, found


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (4, 2)])
def test_documents_without_a_target_are_padding_across_cuts(ranks: Pools, world: int, ep: int) -> None:
    for found in ranks(world).run(_differences, Case(moe=True, ep=ep, padded=True)):
        assert not found, found
    total = Mutant("tinytron.model.modules.routed:routed_tokens", "weights_Bs, total=total", "weights_Bs")
    for found in ranks(world).run(_differences, Case(moe=True, ep=ep, padded=True), total):
        assert found, "a rank that judges by its own part alone is not seen"


LEARNED = (("position_type", "learned"), ("norm_type", "layer"), ("bias", True), ("sliding_window", 5))
PARALLEL = (("parallel_residual", True), ("rotary_fraction", 0.5), ("norm_type", "layer"), ("qkv_bias", True))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_architectures_of_other_families(ranks: Pools, world: int, masked: bool) -> None:
    for case in (
        Case(masked=masked, options=(*LEARNED, ("mlp_type", "gelu_tanh"))),
        Case(masked=False, given=False, options=LEARNED),
        Case(1, masked=masked, options=(*PARALLEL, ("mlp_type", "gelu"), ("sliding_window", 9))),
        Case(masked=masked, moe=True, ep=2, options=(*PARALLEL, ("dense_layers", (0,)), ("sliding_window_layers", (1,)),
             ("sliding_window", 3))),
    ):  # fmt: skip
        for found in ranks(world).run(_differences, case):
            assert not found, f"{case}: {found}"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_positions_without_masks(ranks: Pools, world: int) -> None:
    for found in ranks(world).run(_differences, Case(masked=False)):
        assert not found, found


FORWARD, HIDDEN = "tinytron.model.gpt:GPT.forward", "tinytron.model.gpt:GPT.hidden_states"
ATTENTION, DOCUMENTS = (
    "tinytron.model.modules.attn:Attention.attn",
    "tinytron.model.modules.attn:Documents.with_mask",
)
MUTANTS = {
    "mask not applied": (Mutant(ATTENTION, "documents=documents", "documents=None"), Case()),
    "the future is seen": (Mutant(DOCUMENTS, ".tril_()", ""), Case()),
    "earlier documents are seen": (Mutant(DOCUMENTS, ".mT == ", ".mT >= "), Case()),
    "positions begin at 0 in every part": (Mutant(HIDDEN, "self.rope(first, s, positions)", "self.rope(0, s)"), Case()),
    # Behind a mask, positions that go on give the same scores: these must be seen where there is none.
    "no reset of positions": (
        Mutant(HIDDEN, "self.rope(first, s, positions)", "self.rope(first, s)"),
        Case(masked=False),
    ),
    "targets not weighted": (Mutant(FORWARD, "None if weights is None else weights.flatten()", "None"), Case()),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mutant_is_seen(ranks: Pools, name: str) -> None:
    mutant, case = MUTANTS[name]
    for found in ranks(2).run(_differences, case, mutant):
        assert found, f"{name}: the comparison does not see it"


def test_a_document_behind_a_mask_does_not_feel_where_it_stands(ranks: Pools) -> None:
    mutant, case = MUTANTS["no reset of positions"]
    for found in ranks(2).run(_differences, replace(case, masked=True), mutant):
        assert not found, found
