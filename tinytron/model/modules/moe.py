"""Mixture of experts: router, balance terms, and SwiGLU experts spread over the expert-parallel group.

Letters: B batch, s this rank's part of the sequence, T = B s tokens of this rank, k choices per token, E experts, e experts
of this rank, Q rows that arrive here, D model dimension, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from tinytron.distributed.collectives import sum_over
from tinytron.distributed.expert_parallel.comm import Routes, bring_home, dispatch, plan_routes, weighted_sum
from tinytron.distributed.parallel_state import ParallelState
from tinytron.model.config import ModelConfig
from tinytron.model.modules.compiled import CompilesMethods
from tinytron.model.modules.mlp import SwiGLU, gated
from tinytron.model.modules.recompute import Recompute, recomputed


class Choice(NamedTuple):
    """What a router that records keeps of every token, without gradient; weights and margins as wide as the scores."""

    expert_Tk: torch.Tensor  # best first
    weight_Tk: torch.Tensor
    margin_T: torch.Tensor


class MoEStats(NamedTuple):
    """What one layer's routing adds to the loss, as sums over this rank's tokens; its load; its choices, if recorded."""

    balance: torch.Tensor  # sum over tokens of E * sum_e f_e p_te: 1 per token when the load f is even
    z: torch.Tensor  # sum over tokens of logsumexp(router logits)²
    load_E: torch.Tensor  # rows this rank sent to each expert, int64
    choice: Choice | None


class Routing(NamedTuple):
    """The router's decision for each token; scores in fp32 (fp64 for fp64 models)."""

    expert_Tk: torch.Tensor
    weight_Tk: torch.Tensor
    prob_TE: torch.Tensor
    logits_TE: torch.Tensor
    choice: Choice | None


class Router(CompilesMethods):
    """Scores in fp32, top-k choice, optional renormalisation of the chosen scores.

    ``bias`` shifts the choice only, not the weights (auxiliary-loss-free balancing, arXiv:2408.15664): it is moved once
    per optimizer step against the load, and saved. With ``record`` set the choices are returned too.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.score, self.norm_topk = (
            config.num_experts_per_tok,
            config.moe_router_score,
            config.norm_topk_prob,
        )
        self.record = False
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias: torch.Tensor
        self.register_buffer("bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Logits ``[T, E]``."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(wide), self.weight.to(wide))

    def choose(self, logits_TE: torch.Tensor) -> Routing:
        """The decision that follows from the logits. It is kept for the backward pass, never made again."""
        score_TE = logits_TE.softmax(-1) if self.score == "softmax" else logits_TE.sigmoid()
        ranked_TE = score_TE.detach() + self.bias
        expert_Tk = ranked_TE.topk(self.top_k, dim=-1).indices
        weight_Tk = score_TE.gather(1, expert_Tk)
        if self.norm_topk:
            weight_Tk = weight_Tk / _positive(weight_Tk.sum(-1, keepdim=True))
        prob_TE = score_TE if self.score == "softmax" else score_TE / _positive(score_TE.sum(-1, keepdim=True))
        choice = Choice(expert_Tk, weight_Tk.detach(), margin(ranked_TE, expert_Tk)) if self.record else None
        return Routing(expert_Tk, weight_Tk, prob_TE, logits_TE, choice)


def margin(ranked_TE: torch.Tensor, expert_Tk: torch.Tensor) -> torch.Tensor:
    """The last chosen expert's score minus the best score not chosen: ``[T]``, inf where every expert is chosen.

    The scores are those the choice is made by, balancing bias included; ``expert_Tk`` is best first.
    """
    left_TE = ranked_TE.scatter(1, expert_Tk, -math.inf)
    return ranked_TE.gather(1, expert_Tk[:, -1:]).squeeze(1) - left_TE.amax(1)


def _positive(total: torch.Tensor) -> torch.Tensor:
    """A divisor that is not zero, even when all sigmoid scores of a token underflow."""
    return total.clamp(min=torch.finfo(total.dtype).tiny)


ROW_STEP = 32  # an expert's rows are padded to a multiple, on CPUs


class Experts(CompilesMethods):
    """This rank's experts: SwiGLU with weights ``[e, 2F, D]`` (gate first) and ``[e, D, F]``. With ``recompute="full"``
    only the product before the gate is kept, and the gate computed again in the backward pass."""

    liger = False  # whether by kernels/liger.py

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, recompute: Recompute = "none"
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, rows_QD: torch.Tensor, rows_e: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """``[Q, D] -> [Q, D]``: ``rows_e`` rows of each expert in turn; ``counts`` is that on the host."""
        if not all(has_grouped_product(weight) for weight in (self.gate_up_proj, self.down_proj)):
            return self._products(rows_QD, rows_e, counts)
        if rows_QD.is_cuda:
            return self._grouped(rows_QD, rows_e)
        # oneDNN makes a kernel for every new number of rows, which takes as long as the product: let there be few numbers.
        return self._padded(rows_QD, rows_e, sum(-(-count // ROW_STEP) * ROW_STEP for count in counts))

    def compile_parts(self) -> None:
        """Compile what needs no counts on the host: with those every new number would be compiled for."""
        if self.gate_up_proj.dtype == torch.bfloat16:  # the compiler knows grouped products in no other precision
            # For any sizes at once: a second graph, made later, could be met in recomputation instead of the first.
            self.compile_methods("_grouped", "_padded", dynamic=True)

    def _padded(self, rows_QD: torch.Tensor, rows_e: torch.Tensor, padded: int) -> torch.Tensor:
        """With each expert's rows padded, ``padded`` in all."""
        wide_e = (rows_e + ROW_STEP - 1) // ROW_STEP * ROW_STEP
        shift_e = (wide_e.cumsum(0) - wide_e) - (rows_e.cumsum(0) - rows_e)
        place_Q = torch.arange(len(rows_QD), device=rows_QD.device)
        place_Q += shift_e.repeat_interleave(rows_e, output_size=len(rows_QD))
        padded_QD = rows_QD.new_zeros(padded, rows_QD.shape[1]).index_copy(0, place_Q, rows_QD)
        return self._products(padded_QD, wide_e).index_select(0, place_Q)

    def _grouped(self, rows_QD: torch.Tensor, rows_e: torch.Tensor) -> torch.Tensor:
        return self._products(rows_QD, rows_e)

    def _products(self, rows_QD: torch.Tensor, rows_e: torch.Tensor, counts: Sequence[int] = ()) -> torch.Tensor:
        gate_up_Q2F = grouped_linear(rows_QD, self.gate_up_proj, rows_e, counts)
        return recomputed(self.recompute, self._gate_and_down, gate_up_Q2F, rows_e, counts)

    def _gate_and_down(self, gate_up_Q2F: torch.Tensor, rows_e: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return grouped_linear(gated(gate_up_Q2F, by_liger=self.liger), self.down_proj, rows_e, counts)


class MoE(CompilesMethods):
    """Dispatch, experts, weighted sum, and shared experts that see every token (arXiv:2401.06066).

    Shapes: ``[B, s, D]`` and the router's logits ``[T, E]`` -> ``[B, s, D]`` and ``MoEStats``. The router runs before, with
    what else is recomputed (``Block``); its decision is here, and kept. ``recompute="full"`` keeps nothing between
    dispatch and sum, ``selective`` all but cheap activations: nothing is sent twice. Collective over the expert group in
    forward and backward; over the sequence group (balance scope ``sequence``) or the world (``batch``) for the load, in
    forward.
    """

    def __init__(self, config: ModelConfig, state: ParallelState | None, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config, self.state = config, state
        self.group = state.groups["ep"] if state else None
        # Full: the whole mixture is computed again. Selective: the shared expert and the experts see to it themselves.
        self.recompute: Recompute = "full" if recompute == "full" else "none"
        self.recompute_shared: Recompute = "selective" if recompute == "selective" else "none"
        self.router = Router(config)
        local = config.num_experts // (state.layout.ep if state else 1)
        # Selective for experts: all of what follows their first product, which is its argument and so kept.
        behind_gate: Recompute = "full" if recompute == "selective" else "none"
        self.experts = Experts(local, config.hidden_size, config.moe_intermediate_size, behind_gate)
        width = config.num_shared_experts * config.moe_intermediate_size
        self.triton = False  # whether by kernels/expert_rows_triton.py
        self.shared = SwiGLU(config.hidden_size, width, config.has_mlp_bias) if width else None

    def forward(self, x_BsD: torch.Tensor, logits_TE: torch.Tensor) -> tuple[torch.Tensor, MoEStats]:
        routing = self.router.choose(logits_TE)
        routes = plan_routes(routing.expert_Tk, self.config.num_experts, self.group, by_triton=self.triton)
        out_BsD = recomputed(self.recompute, self._mixture, x_BsD, routing.weight_Tk, routes)
        return out_BsD, self._stats(routing, x_BsD.shape[0])

    def compile_parts(self) -> None:
        """Compile what lies between the exchanges. A rank gets another number of rows at every step."""
        self.compile_methods("_sum", "_shared_output")
        self.router.compile_methods("choose")
        self.experts.compile_parts()

    def _mixture(self, x_BsD: torch.Tensor, weight_Tk: torch.Tensor, routes: Routes) -> torch.Tensor:
        dispatched = dispatch(x_BsD.flatten(0, 1), routes, self.group)
        shared_BsD = self._shared_output(x_BsD)  # while the rows are on their way
        rows_QD = dispatched.arrive()
        del dispatched  # it holds the rows as they came
        rows_QD = self.experts(rows_QD, routes.rows_e, routes.counts)
        rows_RD = bring_home(rows_QD, routes, self.group)
        return self._sum(rows_RD, weight_Tk, routes.order_R, routes.inverse_R, shared_BsD).view_as(x_BsD)

    def _shared_output(self, x_BsD: torch.Tensor) -> torch.Tensor | None:
        return None if self.shared is None else recomputed(self.recompute_shared, self.shared, x_BsD)

    def _sum(
        self,
        rows_RD: torch.Tensor,
        weight_Tk: torch.Tensor,
        order_R: torch.Tensor,
        inverse_R: torch.Tensor,
        shared_BsD: torch.Tensor | None,
    ) -> torch.Tensor:
        out_TD = weighted_sum(rows_RD, weight_Tk, order_R, inverse_R, self.triton)
        return out_TD if shared_BsD is None else out_TD + shared_BsD.flatten(0, 1)

    def _stats(self, routing: Routing, B: int) -> MoEStats:
        """Balance: Switch Transformer's loss (arXiv:2101.03961, section 2.2) times the tokens it stands for.

        It is linear in the probabilities, so each rank adds its own tokens' part and only the loads, which carry no
        gradient, are summed over ranks: over the sequence's ranks, or over all ranks of the micro-batch.
        """
        (T, k), E = routing.expert_Tk.shape, self.config.num_experts
        row_T1 = torch.arange(T, device=routing.expert_Tk.device).unsqueeze(1) // (T // B)
        index = (row_T1 * E + routing.expert_Tk).flatten()
        load_BE = torch.zeros(B * E, dtype=torch.int64, device=index.device)
        load_BE = load_BE.scatter_add_(0, index, torch.ones_like(index)).view(B, E)
        prob_BE = routing.prob_TE.view(B, T // B, E).sum(1)
        load_E = load_BE.sum(0)
        z = torch.logsumexp(routing.logits_TE, dim=-1).square().sum()
        if self.config.moe_aux_loss_scope == "sequence":
            seen, group, ranks = load_BE, "sep", self.state.layout.sep if self.state else 1
            rows = k * (T // B) * ranks
        else:
            ranks = self.state.layout.world_size if self.state else 1
            seen, group, rows = load_E, "world", k * T * ranks
        if self.state is not None and ranks > 1:
            seen = sum_over(seen.clone(), self.state.groups[group])
        balance = E * (prob_BE * (seen.to(prob_BE.dtype) / rows)).sum()
        return MoEStats(balance, z, load_E, routing.choice)


def has_grouped_product(weight_eFD: torch.Tensor) -> bool:
    """Whether torch has one product for all experts: bf16, fp32 on CPUs; widths of whole 16 bytes."""
    fits = weight_eFD.dtype == torch.bfloat16 or (weight_eFD.dtype == torch.float32 and weight_eFD.device.type == "cpu")
    return fits and all(width * weight_eFD.element_size() % 16 == 0 for width in weight_eFD.shape[1:])


def grouped_linear(
    rows_QD: torch.Tensor, weight_eFD: torch.Tensor, rows_e: torch.Tensor, counts: Sequence[int] = ()
) -> torch.Tensor:
    """Each row times its expert's transposed weight; rows are grouped by expert. ``[Q, D] -> [Q, F]``.

    One grouped GEMM, or else one product per expert, for which ``counts`` is ``rows_e`` on the host. Experts without rows
    get a zero gradient.
    """
    if has_grouped_product(weight_eFD):
        ends_e = rows_e.cumsum(0).to(torch.int32)
        out: torch.Tensor = F.grouped_mm(rows_QD, weight_eFD.transpose(1, 2), offs=ends_e)
        return out
    return looped_linear(rows_QD, weight_eFD, counts)


def looped_linear(rows_QD: torch.Tensor, weight_eFD: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """``grouped_linear`` as one product per expert: any dtype, any device."""
    rows = rows_QD.split(list(counts))
    return torch.cat([its @ weight.t() for its, weight in zip(rows, weight_eFD, strict=True)])
