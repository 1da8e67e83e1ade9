"""Mixture of experts: router, balance terms, and SwiGLU experts spread over the expert-parallel group.

Letters: B batch, s this rank's part of the sequence, T = B s tokens of this rank, k choices per token, E experts, e experts
of this rank, Q rows received by this rank, D model dimension, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from tinytron.distributed.collectives import sum_over
from tinytron.distributed.expert_parallel.comm import DispatchPlan, combine, dispatch, plan_dispatch
from tinytron.distributed.parallel_state import ParallelState
from tinytron.kernels.choice import DEFAULT, Kernels
from tinytron.kernels.expert_rows import weighted_sum
from tinytron.kernels.grouped_gemm import grouped_linear, has_grouped_product, pad_rows, padded_count
from tinytron.kernels.swiglu import swiglu
from tinytron.model.config import ModelConfig
from tinytron.model.modules.compiled import CompilesMethods
from tinytron.model.modules.mlp import SwiGLU
from tinytron.model.modules.recompute import EXPERT_PARTS, Recompute, recomputed


class RouterTrace(NamedTuple):
    """A recorded router choice for every token, without gradient; weights and margins are in the scores' precision."""

    expert_Tk: torch.Tensor  # best first
    weight_Tk: torch.Tensor
    margin_T: torch.Tensor


class MoEStats(NamedTuple):
    """Statistics of one layer: the routing terms of the loss, as sums over this rank's tokens without padding; its load;
    and its choices, if recorded."""

    balance: torch.Tensor  # sum over tokens of E * sum_e f_e p_te: 1 per token when the load f is even
    z: torch.Tensor  # sum over tokens of logsumexp(router logits)²
    load_E: torch.Tensor  # rows this rank sent to each expert, int64
    choice: RouterTrace | None


class RoutingDecision(NamedTuple):
    """The router's decision for each token; scores are in fp32 (fp64 for fp64 models)."""

    expert_Tk: torch.Tensor
    weight_Tk: torch.Tensor
    prob_TE: torch.Tensor
    logits_TE: torch.Tensor
    choice: RouterTrace | None


class Router(CompilesMethods):
    """The router: scores in fp32, the choice of the top k, and optional renormalization of the chosen scores.

    ``bias`` affects only the choice, not the weights (auxiliary-loss-free balancing, arXiv:2408.15664). It is moved against
    the load once per optimizer step, and it is saved in checkpoints. With ``record``, decisions include a trace.
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
        """The router's logits, ``[T, E]``."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(wide), self.weight.to(wide))

    def choose(self, logits_TE: torch.Tensor) -> RoutingDecision:
        """The decision for the given logits. It is kept for the backward pass and never recomputed."""
        score_TE = logits_TE.softmax(-1) if self.score == "softmax" else logits_TE.sigmoid()
        ranked_TE = score_TE.detach() + self.bias
        expert_Tk = ranked_TE.topk(self.top_k, dim=-1).indices
        weight_Tk = score_TE.gather(1, expert_Tk)
        if self.norm_topk:
            weight_Tk = weight_Tk / _positive(weight_Tk.sum(-1, keepdim=True))
        prob_TE = score_TE if self.score == "softmax" else score_TE / _positive(score_TE.sum(-1, keepdim=True))
        choice = RouterTrace(expert_Tk, weight_Tk.detach(), margin(ranked_TE, expert_Tk)) if self.record else None
        return RoutingDecision(expert_Tk, weight_Tk, prob_TE, logits_TE, choice)


def margin(ranked_TE: torch.Tensor, expert_Tk: torch.Tensor) -> torch.Tensor:
    """The last chosen expert's score minus the best score not chosen: ``[T]``, inf if every expert is chosen.

    The scores are the ones that determine the choice, including the balancing bias; ``expert_Tk`` is best first.
    """
    left_TE = ranked_TE.scatter(1, expert_Tk, -math.inf)
    return ranked_TE.gather(1, expert_Tk[:, -1:]).squeeze(1) - left_TE.amax(1)


def _positive(total: torch.Tensor) -> torch.Tensor:
    """``total`` clamped to a nonzero divisor, because all sigmoid scores of a token can underflow."""
    return total.clamp(min=torch.finfo(total.dtype).tiny)


class Experts(CompilesMethods):
    """This rank's experts: SwiGLU with weights ``[e, 2F, D]`` (gate first) and ``[e, D, F]``. With
    ``recompute="full"`` only the product before the gate is kept, and the gate is recomputed in the
    backward pass."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        recompute: Recompute = "none",
        kernels: Kernels = DEFAULT,
    ) -> None:
        super().__init__()
        self.recompute, self.by = recompute, kernels.swiglu
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, rows_QD: torch.Tensor, rows_e: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Apply the experts, ``[Q, D] -> [Q, D]``: ``rows_e`` has the number of rows of each expert, in order; ``counts``
        has the same numbers on the host."""
        if all(has_grouped_product(weight) for weight in (self.gate_up_proj, self.down_proj)):
            return self._grouped(rows_QD, rows_e, padded_count(rows_QD, counts))
        return self._products(rows_QD, rows_e, counts)

    def compile_parts(self) -> None:
        """Compile the grouped products. They do not need counts on the host; with those, every new count would be
        compiled separately."""
        if self.gate_up_proj.dtype == torch.bfloat16:  # the compiler supports no other precision
            # Compiled for any size at once: recomputation could otherwise use a second graph that was compiled later.
            self.compile_methods("_grouped", dynamic=True)

    def _grouped(self, rows_QD: torch.Tensor, rows_e: torch.Tensor, padded: int | None = None) -> torch.Tensor:
        """Apply the experts after padding each expert's rows, to ``padded`` rows in total; ``None``: no padding."""
        if padded is None:
            return self._products(rows_QD, rows_e)
        padded_QD, padded_e, place_Q = pad_rows(rows_QD, rows_e, padded)
        return self._products(padded_QD, padded_e).index_select(0, place_Q)

    def _products(self, rows_QD: torch.Tensor, rows_e: torch.Tensor, counts: Sequence[int] = ()) -> torch.Tensor:
        gate_up_Q2F = grouped_linear(rows_QD, self.gate_up_proj, rows_e, counts)
        return recomputed(self.recompute, self._gate_and_down, gate_up_Q2F, rows_e, counts)

    def _gate_and_down(self, gate_up_Q2F: torch.Tensor, rows_e: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return grouped_linear(swiglu(gate_up_Q2F, self.by), self.down_proj, rows_e, counts)


class MoE(CompilesMethods):
    """A mixture-of-experts layer: dispatch, experts, weighted sum, and shared experts that process every token
    (arXiv:2401.06066).

    Shapes: ``[B, s, D]`` and the router's logits ``[T, E]`` -> ``[B, s, D]`` and ``MoEStats``. The router's
    logits are computed earlier, with the other recomputed parts (``Block``); its decision is made here, and kept.
    Collective over the expert group in the forward and the backward pass; for the load, in the forward pass,
    also over the sequence group (balance scope ``sequence``) or the world (``batch``).
    """

    def __init__(
        self,
        config: ModelConfig,
        state: ParallelState | None,
        recompute: Recompute = "none",
        kernels: Kernels = DEFAULT,
    ) -> None:
        super().__init__()
        self.config, self.state, self.by = config, state, kernels.expert_rows
        self.group = state.groups["ep"] if state else None
        self.recompute = EXPERT_PARTS[recompute]
        self.router = Router(config)
        local = config.num_experts // (state.layout.ep if state else 1)
        width = config.moe_intermediate_size
        self.experts = Experts(local, config.hidden_size, width, self.recompute.after_first_product, kernels)
        shared = config.num_shared_experts * width
        self.shared = SwiGLU(config.hidden_size, shared, config.has_mlp_bias, kernels) if shared else None

    def forward(
        self,
        x_BsD: torch.Tensor,
        logits_TE: torch.Tensor,
        padding_Bs: torch.Tensor | None = None,
        with_stats: bool = True,
    ) -> tuple[torch.Tensor, MoEStats | None]:
        """Apply the layer. The experts also process the tokens in ``padding_Bs``, but the statistics leave them out."""
        routing = self.router.choose(logits_TE)
        routes = plan_dispatch(routing.expert_Tk, self.config.num_experts, self.group)
        out_BsD = recomputed(self.recompute.mixture, self._mixture, x_BsD, routing.weight_Tk, routes)
        return out_BsD, self._stats(routing, x_BsD.shape[0], padding_Bs) if with_stats else None

    def compile_parts(self) -> None:
        """Compile the parts between the exchanges; only those, because a rank's number of rows changes in every step."""
        self.compile_methods("_sum", "_shared_output")
        self.router.compile_methods("choose")
        self.experts.compile_parts()

    def _mixture(self, x_BsD: torch.Tensor, weight_Tk: torch.Tensor, routes: DispatchPlan) -> torch.Tensor:
        dispatched = dispatch(x_BsD.flatten(0, 1), routes, self.group, self.by)
        shared_BsD = self._shared_output(x_BsD)  # overlaps with the exchange of rows
        rows_QD = dispatched.wait()
        del dispatched  # it keeps the rows as received alive
        rows_QD = self.experts(rows_QD, routes.rows_e, routes.counts)
        rows_RD = combine(rows_QD, routes, self.group)
        return self._sum(rows_RD, weight_Tk, routes.order_R, routes.inverse_R, shared_BsD).view_as(x_BsD)

    def _shared_output(self, x_BsD: torch.Tensor) -> torch.Tensor | None:
        return None if self.shared is None else recomputed(self.recompute.shared, self.shared, x_BsD)

    def _sum(
        self,
        rows_RD: torch.Tensor,
        weight_Tk: torch.Tensor,
        order_R: torch.Tensor,
        inverse_R: torch.Tensor,
        shared_BsD: torch.Tensor | None,
    ) -> torch.Tensor:
        out_TD = weighted_sum(rows_RD, weight_Tk, order_R, inverse_R, self.by)
        return out_TD if shared_BsD is None else out_TD + shared_BsD.flatten(0, 1)

    def _stats(self, routing: RoutingDecision, B: int, padding_Bs: torch.Tensor | None) -> MoEStats:
        """The layer's statistics. ``balance`` is Switch Transformer's loss (arXiv:2101.03961, section 2.2) times its number
        of tokens.

        The loss is linear in the probabilities, so each rank adds only the part of its own tokens. Only the loads, which
        have no gradient, are summed over ranks: over the ranks that share a sequence, or over all ranks of the micro-batch.
        """
        (T, k), E = routing.expert_Tk.shape, self.config.num_experts
        row_T1 = torch.arange(T, device=routing.expert_Tk.device).unsqueeze(1) // (T // B)
        index = (row_T1 * E + routing.expert_Tk).flatten()
        load_BE = torch.zeros(B * E, dtype=torch.int64, device=index.device)
        counted = torch.ones_like(index)
        prob_TE = routing.prob_TE
        z_T = _squared_lse(routing.logits_TE)
        if padding_Bs is not None:
            padding_T1 = padding_Bs.reshape(T, 1)
            counted = (~padding_T1).expand(T, k).flatten().to(index.dtype)
            prob_TE = prob_TE.masked_fill(padding_T1, 0.0)
            z_T = z_T.masked_fill(padding_T1.squeeze(1), 0.0)
        load_BE = load_BE.scatter_add_(0, index, counted).view(B, E)
        prob_BE = prob_TE.view(B, T // B, E).sum(1)
        load_E = load_BE.sum(0)
        if self.config.moe_aux_loss_scope == "sequence":
            seen, group, ranks = load_BE, "sep", self.state.layout.sep if self.state else 1
        else:
            seen, group, ranks = load_E, "world", self.state.layout.world_size if self.state else 1
        if self.state is not None and ranks > 1:
            seen = sum_over(seen.clone(), self.state.groups[group])
        rows = seen.sum(-1, keepdim=True).clamp(min=1)  # choices in the sequence, or in the micro-batch of all ranks
        balance = E * (prob_BE * (seen.to(prob_BE.dtype) / rows)).sum()
        return MoEStats(balance, z_T.sum(), load_E, routing.choice)


def _squared_lse(logits_TE: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits_TE, dim=-1).square()
