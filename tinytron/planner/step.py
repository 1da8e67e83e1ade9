"""The memory of one micro-batch's forward and backward pass, measured by running the model on tensors without memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tinytron.distributed.layout import ParallelLayout
from tinytron.kernels.attention import VARLEN_BACKENDS
from tinytron.kernels.choice import Backend, Kernels
from tinytron.kernels.grouped_gemm import ROW_STEP
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.attn import Attention
from tinytron.model.modules.loss import LossSums
from tinytron.model.modules.recompute import Recompute
from tinytron.planner.ledger import AllocationTracker
from tinytron.planner.pretend import DeviceKind, FakeDeviceMode, PretendState, UniformRoutingMode, with_fake_memory
from tinytron.utils.sequences import Documents


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The properties of one rank's work that determine its memory. ``batch_size`` and ``seq_len`` describe the whole
    sequences that the ranks of a sequence-parallel group share."""

    dtype: torch.dtype
    batch_size: int
    seq_len: int
    micro_batches: int = 1
    recompute: Recompute = "none"
    attn_backend: Backend = "auto"
    documents: bool = False
    padding: bool = False
    device: DeviceKind = "cpu"


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one rank in a step.

    ``tables``: rotary angles, router biases and counters. ``batch``: a step's ids, labels, positions and padding marks.
    ``layers``: the values that each block keeps for its backward pass. ``activations``: all of ``layers``, the embedding's
    output, masks and the final norm. ``loss``: the gradients that the fused loss computes in the forward pass.
    ``peak``: activations, loss and everything else that is alive at the peak, which is in ``peak_phase``.
    """

    tables: int
    batch: int
    layers: tuple[int, ...]
    activations: int
    loss: int
    peak: int
    peak_phase: str


def meta_model(config: ModelConfig, work: Workload, layout: ParallelLayout) -> GPT:
    """The model of rank 0 with shapes only. Raises: ConfigError if the heads do not fit the layout."""
    # Kernels for documents keep the same tensors as torch's flash kernel, and planning must not need their package.
    flash = work.attn_backend in VARLEN_BACKENDS
    model = GPT(
        config,
        dtype=work.dtype,
        device="meta",
        seed=None,
        kernels=Kernels(attention="sdpa" if flash else work.attn_backend),
        recompute=work.recompute,
        state=PretendState.of(layout),
    )
    if flash:
        model.needs_mask = False
        for attention in (module for module in model.modules() if isinstance(module, Attention)):
            attention.window = 0  # windows need no mask either
    return model


def step_memory(model: GPT, work: Workload, layout: ParallelLayout) -> StepMemory:
    """Run one forward and backward pass of ``model`` (from ``meta_model``; its parameters become fake tensors)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode()
    owned = with_fake_memory(model, fake)
    B, s = work.batch_size, work.seq_len // layout.sep
    with fake:
        model.step_load = torch.zeros(model.step_load.shape, dtype=torch.int64)
        ids_Bs, labels_Bs = (torch.zeros(B, s, dtype=torch.int64) for _ in range(2))
        positions = None
        documents = None
        scale = torch.zeros(())
        if work.documents:
            positions = torch.zeros(B, s, dtype=torch.int64)
            documents = Documents(torch.zeros(B + 1, dtype=torch.int32), work.seq_len)
        if work.attn_backend in VARLEN_BACKENDS:
            documents = None
        padding = torch.zeros(B, s, dtype=torch.bool) if work.padding else None
        inputs = [t for t in (ids_Bs, labels_Bs, positions, padding) if t is not None]
        gradients = _expect_gradients(model, accumulated=work.micro_batches > 1)
        ledger = AllocationTracker([*owned, *inputs, *gradients, model.step_load], on_cpu=work.device == "cpu")
        marks = _mark_blocks(model, ledger)
        with FakeDeviceMode(work.device), UniformRoutingMode(_even_rows(model.config, layout, B * s)), ledger:
            ledger.phase = "forward"
            sums = model(ids_Bs, labels_Bs, positions, documents, padding=padding, routing_scale=scale)
            assert isinstance(sums, LossSums), "labels were given"
            after_forward = ledger.live
            ledger.phase = "backward"
            _backward(sums.objective / ids_Bs.numel())
    parameters = sum(p.nbytes for p in model.parameters())
    return StepMemory(
        tables=sum(t.nbytes for t in owned) - parameters + model.step_load.nbytes + model.load.nbytes,
        batch=work.micro_batches * sum(t.nbytes for t in inputs),
        layers=tuple(after - before for before, after in zip(marks[:-1:2], marks[1::2], strict=True)),
        activations=marks[-1],
        loss=after_forward - marks[-1],
        peak=ledger.peak,
        peak_phase=ledger.peak_phase,
    )


def _backward(loss: torch.Tensor) -> None:
    """Run the backward pass. ``loss.backward()`` would disable ``FakeDeviceMode``, in which blocks must be recomputed."""
    engine = torch.autograd.Variable._execution_engine
    seed = torch.ones_like(loss)
    engine.run_backward((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _mark_blocks(model: GPT, ledger: AllocationTracker) -> list[int]:
    """A list that the next forward pass fills with the live bytes before and after every block, and then before the
    loss."""
    marks: list[int] = []

    def mark(*_: object) -> None:
        marks.append(ledger.live)

    def mark_loss(*_: object) -> None:
        marks.append(ledger.live)
        ledger.phase = "loss"

    for block in model.blocks:
        block.register_forward_pre_hook(mark)
        block.register_forward_hook(mark)
    model.final_norm.register_forward_hook(mark_loss)
    return marks


def _expect_gradients(model: GPT, *, accumulated: bool) -> list[torch.Tensor]:
    """Handle gradients as the flat buffers do: the first gradients are moved to the buffers and freed; gradients of later
    micro-batches are cast and added to the buffers. Returns the buffers' gradients, if any exist before the pass."""
    there: list[torch.Tensor] = []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        if accumulated:
            main = torch.promote_types(parameter.dtype, torch.float32)
            parameter.grad_dtype = main
            parameter.grad = torch.zeros(parameter.shape, dtype=main)
            there.append(parameter.grad)
        else:
            parameter.register_post_accumulate_grad_hook(_forget)
    return there


def _forget(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _even_rows(config: ModelConfig, layout: ParallelLayout, tokens: int) -> list[int]:
    """The numbers that ``plan_dispatch`` reads if all experts get nearly the same load: rows sent to and received from each
    rank, and rows of each expert. Experts alternately get half a ``ROW_STEP`` more and less, because padding to whole
    steps adds half a step on average."""
    rows = tokens * config.num_experts_per_tok
    ranks, experts = _shares(rows, layout.ep), _shares(rows, config.num_experts // layout.ep)
    half = min(ROW_STEP // 2, *experts)
    for more in range(1, len(experts), 2):
        experts[more] += half
        experts[more - 1] -= half
    return [*ranks, *ranks, *experts]


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]
