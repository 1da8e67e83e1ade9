"""The mutants of P12: one scaling factor or one reduction removed at a time, and the run whose parity must see it."""

from __future__ import annotations

from dataclasses import replace

from tests.helpers.mutants import Mutant
from tests.helpers.parity import EXPERTS, Case
from tests.naive.training import Recipe

TRAINER = "tinytron.training.trainer:Trainer."
STEP = TRAINER + "train_step"
REPORTER = "tinytron.training.run.reporter:Reporter.__init__"
PREPARER = "tinytron.training.batch_preparer:"
COUNT, PREPARE = PREPARER + "count_targets", PREPARER + "BatchPreparer.prepare"
FLUSH = "tinytron.metrics.window:StepWindow.flush"
COLLECTIVES = "tinytron.distributed.collectives:"
SUMMED, SENT = COLLECTIVES + "SummedExchange.wait", COLLECTIVES + "SummedExchange.start"
ALL_REDUCE = COLLECTIVES + "start_all_reduce"
EXCHANGE = "tinytron.distributed.exchange:"
EXCHANGE_BACK = EXCHANGE + "_exchange_back"
BUFFER = "tinytron.distributed.zero1.flat_buffer:FlatBuffer."
OPTIMIZER = "tinytron.distributed.zero1.distributed_optimizer:DistributedOptimizer."
SCHEDULE = "tinytron.distributed.zero1.schedule:ReductionSchedule."
OWNERSHIP, BOX = OPTIMIZER + "_ownership", "tinytron.distributed.sharding:Sharding.box"
ULYSSES = "tinytron.distributed.sequence_parallel.ulysses:"
ROWS = "tinytron.kernels.expert_rows:"
GPT, MOE, ROUTER = "tinytron.model.gpt:GPT.", "tinytron.model.modules.moe:MoE.", "tinytron.model.modules.moe:Router."
MUON = "tinytron.optim.muon:Muon."
# Pieces of their source.
GROUP = "group = groups[layout.replicas(axes)]"
DENSE_OVER, CUT_OVER = (
    "group = groups[layout.replicas(axes) if axes else %r]",
    "group = groups[%r if axes else 'world']",
)
PARTS, LOAD = "sum_over(torch.stack(self._parts), self._group)", 'sum_over(self.step_load, self.state.groups["world"])'
GATHER, SUM = "score_TE.gather(1, expert_Tk)", "self.own_N += part"
ADJOINT = "_all_to_all(grad, ctx.recv, ctx.send, ctx.group)"
COPIES = "t.repeat_interleave(P // K, dim=2)"
FIRST_COPIES = "torch.stack([t] + [t.detach()] * (P // K - 1), dim=3).flatten(2, 3)"

_DENSE = Case(world=2, accumulation=2, mask="uneven", small_buckets=True)
_SEP = Case(world=4, accumulation=2, mask="uneven", sep=2, kv_heads=2, small_buckets=True)
_EP = Case(world=4, accumulation=2, mask="uneven", sep=2, ep=2, experts=EXPERTS, shared_experts=1, precision="fp64")
CASES = {
    "dense": _DENSE,
    "replicated": replace(_DENSE, shard=False),
    "copied": replace(_DENSE, view=False),
    "unclipped": replace(_DENSE, recipe=Recipe(clip=100.0)),
    "not overlapped": replace(_DENSE, overlap=False),
    "sep": _SEP,
    "kv heads shared": replace(_SEP, sep=4, kv_heads=1),
    "experts": _EP,
    "experts replicated": replace(_EP, shard=False),
    "padded": replace(_EP, padded=True, mask="few"),
    "batch scope": replace(_EP, experts=replace(EXPERTS, scope="batch", score="sigmoid"), sep=1),
    "muon": replace(_EP, recipe=Recipe(optimizer="normuon", max_lr=0.01, clip=0.3)),
}


def _mutants(case: str, *changes: tuple[str, str, str, str]) -> dict[str, tuple[Mutant, Case]]:
    """By name: what is changed where, in which case."""
    return {name: (Mutant(target, old, new), CASES[case]) for name, target, old, new in changes}


MUTANTS = {
    **_mutants(
        "dense",
        ("targets not summed over ranks", COUNT, "sum_over(torch.stack(rows).sum(0), group)", "torch.stack(rows).sum(0)"),
        ("targets of one micro-batch", COUNT, "torch.stack(rows).sum(0)", "rows[0]"),
        ("gradients not divided by targets", STEP, "losses.objective / divisor", "losses.objective"),
        (
            "gradients divided by micro-batches too",
            STEP,
            "losses.objective / divisor",
            "losses.objective / divisor / len(microbatches)",
        ),
        ("loss not divided by targets", STEP, "name: value / divisor", "name: value"),
        ("loss of the last micro-batch only", STEP, "sums[name] + value if i else value", "value"),
        ("loss not summed over ranks", FLUSH, PARTS, "torch.stack(self._parts)"),
        ("gradients not zeroed", BUFFER + "release_grads", "self._release_grad(param)", "pass"),
        ("no clipping", BUFFER + "scale_grads", ".mul_(factor)", ""),
        ("clip factor not of the norm", OPTIMIZER + "step", "max_norm / (norm + 1e-6)", "max_norm + 0 * norm"),
        ("norm of this rank's shard only", BUFFER + "squared_norm", "self.own.norm_group is not None", "False"),
        ("norm not squared", BUFFER + "squared_norm", ".double().square().sum()", ".double().sum()"),
        ("no root of the norm", OPTIMIZER + "_grad_norm", "total.sqrt()", "total"),
        ("exchanged gradients not summed", SUMMED, SUM, "pass"),
        ("exchanged gradients averaged", SUMMED, SUM, "self.own_N.add_(part).div_(2)"),
        ("gradients not exchanged", SENT, "_exchange([*zip(self.peers, self._sent, self._parts, strict=True)], self.group)",
         "_WorkGroup([part.copy_(own) for part, own in zip(self._parts, self._sent)][:0])"),
        ("no all-gather", BUFFER + "start_param_gather",
         "start_all_gather(self._whole(self.param_data, bucket), own, self.own.group)", "None"),
        ("reduced after every micro-batch", OPTIMIZER + "accumulate", "self._launching = last", "self._launching = True"),
        ("updated before the sum has arrived", OPTIMIZER + "step", "work.wait()", "pass"),
    ),
    **_mutants(
        "replicated",
        ("norm of replicas summed", OWNERSHIP, "if not self.options.shard:", "if False:"),
        ("no all-reduce", ALL_REDUCE, "dist.all_reduce(whole, op=dist.ReduceOp.SUM, group=group, async_op=True)",
         "dist.barrier(group, async_op=True)"),
        ("all-reduce averages", ALL_REDUCE, "dist.ReduceOp.SUM", "dist.ReduceOp.AVG"),
    ),
    **_mutants("copied", ("gradients not copied", BUFFER + "take_grad", "view.copy_(param.grad)", "pass")),
    **_mutants("unclipped", ("clip factor without bound", OPTIMIZER + "step", ", max=1.0)", ", max=1e9)")),
    **_mutants(
        "not overlapped",
        ("buckets left over not reduced", SCHEDULE + "due", "while self._started < len(self.order)",
         "while self._started < len(self.order) - 1"),
    ),
    **_mutants(
        "sep",
        ("targets summed over dp", STEP, 'self.state.groups["world"]', 'self.state.groups["dp"]'),
        ("loss summed over dp", REPORTER, 'state.groups["world"]', 'state.groups["dp"]'),
        ("dense gradients summed over dp", OWNERSHIP, GROUP, DENSE_OVER % "dp"),
        ("dense gradients summed over sep", OWNERSHIP, GROUP, DENSE_OVER % "sep"),
        ("exchange without its adjoint", EXCHANGE_BACK, ADJOINT, "grad.clone()"),
        ("adjoint divided by the ranks", EXCHANGE_BACK, "_all_to_all(grad, ", "_all_to_all(grad / 2, "),
        ("every part at position 0", GPT + "hidden_states", 'self.state.group_rank("sep") * s if self.state else 0', "0"),
        ("every rank has the first part", PREPARE, "cut_sequence(t, rank, size)", "cut_sequence(t, 0, size)"),
    ),
    **_mutants(
        "kv heads shared",
        ("gradient of one copy of a shared head", ULYSSES + "HeadPlan.pack", COPIES, FIRST_COPIES),
    ),
    **_mutants(
        "experts",
        ("expert gradients not summed", OWNERSHIP, GROUP, CUT_OVER % "self"),
        ("expert gradients summed over all", OWNERSHIP, GROUP, CUT_OVER % "world"),
        ("norm of this rank's experts", OWNERSHIP, 'norm_group: dist.ProcessGroup | None = groups["world"]',
         "norm_group: dist.ProcessGroup | None = groups[layout.replicas(axes)]"),
        ("rows not weighted", ROWS + "_WeightedSum.forward", "choices_TkD * weight_Tk.unsqueeze(-1)", "choices_TkD"),
        ("gradients of rows not weighted", ROWS + "_WeightedSum.backward", "grad_T1D * weight_Tk.unsqueeze(-1)",
         "grad_T1D * torch.ones_like(weight_Tk).unsqueeze(-1)"),
        ("gradients of rows not in their order", ROWS + "_WeightedSum.backward", "flatten(0, 1)[order_R]",
         "flatten(0, 1)"),
        ("gradients of sent rows lost", EXCHANGE + "_StartExchange.backward", "return gradient, None",
         "return 0 * gradient, None"),
        ("gradient of one choice", ROWS + "_CopyToChoices.backward", "choices_TkD.sum(1, dtype=wide)", "choices_TkD[:, 0]"),
        ("gradients of rows not sent back", ROWS + "_Permute.backward", "grad[inverse]", "grad"),
        ("router without gradient", ROUTER + "choose", GATHER, GATHER + ".detach()"),
        ("scores not divided by their sum", ROUTER + "choose", "if self.norm_topk:", "if False:"),
        ("bias in the weights", ROUTER + "choose", GATHER, "(score_TE + self.bias).gather(1, expert_Tk)"),
        ("no balance loss", GPT + "add_routing_losses", "self.config.moe_aux_loss_coef * balance", "0 * balance"),
        ("no z-loss", GPT + "add_routing_losses", "self.config.moe_z_loss_coef * z", "0 * z"),
        ("z-loss not weighted", GPT + "add_routing_losses", "self.config.moe_z_loss_coef * z", "z"),
        ("balance not times the experts", MOE + "_stats", "balance = E * ", "balance = "),
        ("load of this part of the sequence", MOE + "_stats", "sum_over(seen.clone(), self.state.groups[group])", "seen"),
        ("load over one part's choices", MOE + "_stats", "rows = seen.sum(", "rows = load_BE.sum("),
        ("load over one choice", MOE + "_stats", "keepdim=True).clamp", "keepdim=True).div(k).clamp"),
        ("probabilities of one token", MOE + "_stats", "view(B, T // B, E).sum(1)", "view(B, T // B, E)[:, 0]"),
        ("load of a step not summed over ranks", GPT + "end_step", LOAD, "self.step_load"),
        ("load of a step summed over dp", GPT + "end_step", 'self.state.groups["world"]', 'self.state.groups["dp"]'),
        ("load of the last micro-batch", GPT + "add_routing_losses", "self.step_load += torch", "self.step_load = torch"),
        ("load never zeroed", GPT + "end_step", "self.step_load.zero_()", "pass"),
        ("bias moves with the load", GPT + "end_step", "layer.router.bias -= rate", "layer.router.bias += rate"),
        ("bias stands still", GPT + "end_step", "(rate := self.config.moe_bias_update_rate) > 0", "False"),
        ("every rank has the first experts", BOX, "self.layout.coordinate(rank, axis) * size[dim]", "0"),
        ("every rank draws the first experts", "tinytron.model.gpt:fill_normal", "start=box.start[0]", "start=0"),
        ("shared experts left out", MOE + "_sum", "out_TD + shared_BsD", "out_TD + 0 * shared_BsD"),
    ),
    **_mutants(
        "experts replicated",
        ("norm of one rank's experts", OWNERSHIP, "groups[layout.pieces(axes)] if axes else None", "None"),
        ("dense gradients summed over ep", OWNERSHIP, GROUP, DENSE_OVER % "ep"),
    ),
    **_mutants(
        "padded",
        ("padding is load", MOE + "_stats", "(~padding_T1).expand", "torch.ones_like(padding_T1).expand"),
        ("padding has probabilities", MOE + "_stats", "prob_TE.masked_fill(padding_T1, 0.0)", "prob_TE"),
        ("padding has a z-loss", MOE + "_stats", "z_T.masked_fill(padding_T1.squeeze(1), 0.0)", "z_T"),
        ("padding counts as tokens", COUNT, "b.tokens()", "b.labels.new_tensor(b.labels.numel())"),
        ("terms of routers per target", GPT + "add_routing_losses", " * routed.scale.to(added.dtype)", ""),
        ("terms of routers logged per target", STEP, "parts |= {name: sums[name] for name in counts}", "counts = {}"),
        ("tokens of the last micro-batch", STEP, "counts[name] + number if i else number", "number"),
    ),
    **_mutants(
        "batch scope",
        ("load of this rank's batch", MOE + "_stats", "sum_over(seen.clone(), self.state.groups[group])", "seen"),
        ("load over one rank's rows", MOE + "_stats", "rows = seen.sum(", "rows = load_E.sum("),
        ("probabilities do not sum to one", ROUTER + "choose",
         'score_TE if self.score == "softmax" else', "score_TE if True else"),
    ),
    **_mutants(
        "muon",
        ("no factor for tall matrices", MUON + "_direction", " * max(1.0, rows / cols) ** 0.5", ""),
        ("packed matrices as one", MUON + "_muon", 'group["row_blocks"] or look_ahead.shape[-2]', "look_ahead.shape[-2]"),
        ("norm of the stack", MUON + "_normalize", "torch.linalg.matrix_norm(u, keepdim=True)", "u.norm()"),
    ),
}  # fmt: skip
