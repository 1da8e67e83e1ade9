"""A decoder-only transformer: embedding, pre-norm blocks, final norm, head and loss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.param_spec import Kind, ParamSpec, Shard
from tinytron.distributed.sharding import Box, box_of, whole_shape
from tinytron.errors import ConfigError
from tinytron.kernels.attention import VARLEN_BACKENDS
from tinytron.kernels.choice import DEFAULT, Kernels
from tinytron.model.block import Block, ParallelBlock
from tinytron.model.config import ModelConfig
from tinytron.model.modules.attn import Attention, LayerCache
from tinytron.model.modules.emb import RotaryEmbedding, TokenEmbedding
from tinytron.model.modules.linear import PackedLinear, ResidualLinear
from tinytron.model.modules.lora import LowRank
from tinytron.model.modules.loss import LossSums, cross_entropy_of_logits, fused_linear_cross_entropy
from tinytron.model.modules.moe import Experts, MoE, MoEStats, Router, RouterTrace
from tinytron.model.modules.norm import LayerNorm, RMSNorm, make_norm
from tinytron.model.modules.recompute import Recompute
from tinytron.model.modules.rope import rotary_frequencies
from tinytron.model.modules.routed import RoutedTokens, routed_tokens
from tinytron.utils.sequences import Documents, visible


class TracedBatch(NamedTuple):
    """A micro-batch's tokens on this rank, the choices of each expert layer's router for them (``T = B s``, row-major), and
    the mask of padding tokens, if there are any."""

    input_ids_Bs: torch.Tensor
    choices: list[RouterTrace]
    padding_Bs: torch.Tensor | None = None


class GPT(nn.Module):
    """The model. Weights are created on ``device`` in ``dtype`` and drawn by ``init_weights``. Without a ``seed`` they stay
    uninitialized, for callers that set all of them. ``kernels`` selects the implementation of each operation.

    ``forward(input_ids)`` returns logits; with ``labels`` it returns ``LossSums`` instead and never builds the logits. With
    ``state`` (default: this process alone) the inputs are this rank's part of the sequences, and the experts are spread
    over the expert-parallel group. Raises: ConfigError if the heads do not fit the layout.
    """

    attention: ClassVar[type[Attention]] = Attention  # a subclass of the GPT may have one of its own
    step_load: torch.Tensor
    load: torch.Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int | None = 1337,
        kernels: Kernels = DEFAULT,
        recompute: Recompute = "none",
        z_loss_coef: float = 0.0,
        state: ParallelState | None = None,
    ) -> None:
        super().__init__()
        self.config, self.z_loss_coef, self.state, self.kernels = config, z_loss_coef, state, kernels
        self.needs_mask = kernels.attention not in VARLEN_BACKENDS
        self.layer_windows = [config.window(layer) for layer in range(config.num_layer)]
        self.windows = set(self.layer_windows)
        outer = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):  # otherwise torch would draw initial values that are thrown away
                self.wte = TokenEmbedding(config.vocab_size, config.hidden_size)
                learned = config.position_type == "learned"
                self.wpe = TokenEmbedding(config.block_size, config.hidden_size) if learned else None
                block = ParallelBlock if config.parallel_residual else Block
                self.blocks = nn.ModuleList(
                    block(config, layer, kernels, recompute, state, self.attention) for layer in range(config.num_layer)
                )
                self.final_norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps, kernels)
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.to_empty(device=device)
            table = torch.promote_types(dtype, torch.float32)
            frequencies, scale = rotary_frequencies(config)
            with torch.device(device):
                self.rope = RotaryEmbedding(frequencies.to(device), config.block_size, table, scale)
        finally:
            torch.set_default_dtype(outer)
        if config.tied_lm_head:
            self.lm_head.weight = self.wte.weight
        # The model calls this with a module before it uses the module's parameters; an optimizer that gathers parameters
        # in the background waits here. (It is not a forward hook, because torch.compile would trace that.)
        self.wait_for_params: Callable[[nn.Module], None] = _no_wait
        self.moe_layers = [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]
        # Rows per expert layer and expert: in the current optimizer step (this rank), and since the last report (all
        # ranks).
        shape = (len(self.moe_layers), config.num_experts)
        for name in ("step_load", "load"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64, device=device), persistent=False)
        self.counts_hits = False  # also in training; in evaluation the loss always counts them
        self.recorded: TracedBatch | None = None  # from the last training forward pass, if the routers record
        for layer in self.moe_layers:
            layer.router.bias.zero_()
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every weight from Normal(0, init_std) as a function of (seed, name) alone, so that weights are the same on
        every layout and device.

        Projections into the residual stream use init_std / sqrt(2 num_layer) (GPT-2, section 2.3); norms are one, biases
        zero. With muP (``mup_base_width``; arXiv:2203.03466, table 8) matrices have 1 / sqrt(width_mult) of that.
        """
        residual_std = self.config.init_std / (2 * self.config.num_layer) ** 0.5
        for layer in self.moe_layers:
            layer.router.bias.zero_()
        for spec in self.param_specs():
            parameter = self.get_parameter(spec.name)
            if spec.kind == "norm":
                parameter.fill_(1.0)
            elif spec.kind == "bias":
                parameter.zero_()
            elif spec.kind != "adapter":
                std = residual_std if spec.writes_residual else self.config.init_std
                std = std / self.config.width_mult**0.5 if spec.kind == "matrix" else std
                fill_normal(parameter, spec, box_of(spec, self.state), std, seed)

    def param_specs(self) -> list[ParamSpec]:
        """One ``ParamSpec`` per parameter, in registration order; a tied head is listed once, as the embedding."""
        specs: dict[str, ParamSpec] = {}
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
                specs[name] = self._spec(module, name, tuple(parameter.shape))
        return [specs[name] for name, _ in self.named_parameters()]

    def _spec(self, module: nn.Module, name: str, shape: tuple[int, ...]) -> ParamSpec:
        if isinstance(module, Experts):
            shards = (Shard("ep", 0),)
            shape = whole_shape(shape, shards, self.state.layout) if self.state else shape
            into_residual = name.endswith("down_proj")
            blocks = () if into_residual else (shape[1] // 2,) * 2
            return ParamSpec(name, shape, "matrix", shards, True, into_residual, blocks)
        kinds: dict[type | nn.Module, Kind] = {
            RMSNorm: "norm",
            LayerNorm: "norm",
            Router: "router",
            LowRank: "adapter",
            TokenEmbedding: "embedding",
            self.lm_head: "head",
        }
        kind = kinds.get(module) or kinds.get(type(module), "matrix")
        if name.endswith(".bias"):
            kind = "bias"
        into_residual = isinstance(module, ResidualLinear)
        row_blocks = module.row_blocks if isinstance(module, PackedLinear) else ()
        return ParamSpec(name, shape, kind, writes_residual=into_residual, row_blocks=row_blocks)

    def compile_blocks(self) -> None:
        """Compile every block in place, without changing parameter names; blocks share their compiled graphs."""
        for block in self.blocks:
            assert isinstance(block, Block), "the constructor makes only Blocks"
            block.compile_parts()

    def hidden_states(
        self,
        input_ids_Bs: torch.Tensor,
        positions: torch.Tensor | None = None,
        documents: Documents | None = None,
        cache: Sequence[LayerCache] | None = None,
        padding_Bs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[MoEStats]]:
        """The output of everything except the head, ``[B, s] -> [B, s, D]``, and the routing statistics of the expert
        layers without ``padding_Bs``.

        ``positions`` (this rank's part) default to 0 .. S - 1. ``documents`` describe the whole sequences; their mask is
        built here, once for all blocks with the same sliding window. With a ``cache`` (one entry per block, instead of
        documents) the ids continue the tokens in the cache, and ``positions`` are required. Raises: ConfigError beyond
        ``block_size``.
        """
        s = input_ids_Bs.shape[1]
        # With a cache each sequence-parallel rank processes whole sequences of its own.
        S = s * (self.state.layout.sep if self.state and cache is None else 1)
        if self.config.block_size < S:
            raise ConfigError(
                f"a sequence of {S} tokens exceeds --block_size {self.config.block_size}; use --block_size {S}"
            )
        self.wait_for_params(self.wte)
        x_BsD = self.wte(input_ids_Bs)
        first = self.state.group_rank("sep") * s if self.state else 0
        if self.wpe is not None:
            self.wait_for_params(self.wpe)
            own = torch.arange(first, first + s, device=input_ids_Bs.device) if positions is None else positions
            x_BsD = x_BsD + self.wpe(own)
        if self.config.dropout > 0:
            x_BsD = F.dropout(x_BsD, self.config.dropout, self.training)
        rotation = self.rope(first, s, positions)
        seen = dict.fromkeys(self.windows, documents)
        if self.needs_mask and cache is None:
            seen = {w: visible(documents, w, len(x_BsD), S, x_BsD.dtype, x_BsD.device) for w in self.windows}
        all_stats = []
        caches: Sequence[LayerCache | None] = [None] * len(self.blocks) if cache is None else cache
        for block, window, kept in zip(self.blocks, self.layer_windows, caches, strict=True):
            self.wait_for_params(block)
            x_BsD, stats = block(x_BsD, rotation, seen[window], kept, padding_Bs)
            if stats is not None:
                all_stats.append(stats)
        self.wait_for_params(self.final_norm)
        out: torch.Tensor = self.final_norm(x_BsD)
        return out if self.config.output_scale == 1 else out * self.config.output_scale, all_stats

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        documents: Documents | None = None,
        weights: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        routing_scale: torch.Tensor | None = None,
        with_logits: bool = False,
    ) -> torch.Tensor | LossSums | tuple[torch.Tensor, LossSums]:
        """Logits ``[B, s, V]``; with ``labels`` ``[B, s]`` (already shifted; -100 is ignored) the loss *sums*, in which a
        target counts ``weights`` ``[B, s]`` times (default 1).

        Two arguments affect only the routers' losses and statistics: tokens in ``padding`` ``[B, s]`` do not count, and
        the losses, which are sums over tokens, are multiplied by ``routing_scale``. For the defaults see ``routed_tokens``.

        ``with_logits`` returns ``(logits, sums)`` for ``labels``. It costs the memory of all logits, which otherwise are
        never whole.
        """
        routed: RoutedTokens | None = None
        if labels is not None and self.moe_layers:
            routed = routed_tokens(labels, weights, padding, documents, routing_scale, self.state)
        unseen = None if routed is None else routed.padding_Bs
        x_BsD, all_stats = self.hidden_states(input_ids, positions, documents, padding_Bs=unseen)
        self.wait_for_params(self.lm_head)
        if labels is None:
            logits: torch.Tensor = self.lm_head(x_BsD)
            return logits
        weights_T = None if weights is None else weights.flatten()
        if with_logits:
            logits = self.lm_head(x_BsD)
            sums = cross_entropy_of_logits(
                logits.flatten(0, 1),
                labels.flatten(),
                weights_T=weights_T,
                z_loss_coef=self.z_loss_coef,
                count_hits=self.wants_hits,
            )
        else:
            sums = fused_linear_cross_entropy(
                x_BsD.flatten(0, 1),
                self.lm_head.weight,
                labels.flatten(),
                weights_T=weights_T,
                z_loss_coef=self.z_loss_coef,
                by=self.kernels.cross_entropy,
                count_hits=self.wants_hits,
            )
        if sums.per_token is not None:
            sums = sums._replace(per_token=sums.per_token.view_as(labels))
        choices = [stats.choice for stats in all_stats if stats.choice is not None]
        if self.training and choices:
            self.recorded = TracedBatch(input_ids, choices, unseen)
        if routed is not None:
            sums = self.add_routing_losses(sums, all_stats, routed)
        return (logits, sums) if with_logits else sums

    @property
    def wants_hits(self) -> bool:
        """True if the loss also counts the targets that are the likeliest token."""
        return self.counts_hits or not self.training

    def add_routing_losses(self, sums: LossSums, all_stats: list[MoEStats], routed: RoutedTokens) -> LossSums:
        """``sums`` with the routers' losses of a forward pass, whose statistics of the expert layers are ``all_stats``."""
        if self.training:
            self.step_load += torch.stack([stats.load_E for stats in all_stats])
        balance = torch.stack([stats.balance for stats in all_stats]).sum()
        z = torch.stack([stats.z for stats in all_stats]).sum()
        added = self.config.moe_aux_loss_coef * balance + self.config.moe_z_loss_coef * z
        aux = {"moe_balance": balance.detach(), "moe_z": z.detach()}
        objective = sums.objective + added * routed.scale.to(added.dtype)
        counts = {**sums.counts, **dict.fromkeys(aux, routed.number)}
        return sums._replace(objective=objective, aux={**sums.aux, **aux}, counts=counts)

    @torch.no_grad()
    def end_step(self, skipped: torch.Tensor | None = None) -> None:
        """Finish an optimizer step: sum the experts' load over all ranks and move the balancing bias against it, unless the
        step was ``skipped`` (a device scalar, 1 or 0). Collective over the world if there are expert layers."""
        if not self.moe_layers:
            return
        load_LE = sum_over(self.step_load, self.state.groups["world"]) if self.state else self.step_load
        if (rate := self.config.moe_bias_update_rate) > 0:
            excess_LE = load_LE - load_LE.double().mean(1, keepdim=True)
            if skipped is not None:
                excess_LE = excess_LE * (1 - skipped)
            for layer, excess_E in zip(self.moe_layers, excess_LE, strict=True):
                layer.router.bias -= rate * excess_E.sign().to(layer.router.bias.dtype)
        self.load += load_LE
        self.step_load.zero_()

    def take_load(self) -> list[list[int]]:
        """Rows that each expert of each expert layer got since the last call, over all ranks; the host waits."""
        load_LE: list[list[int]] = self.load.tolist()
        self.load.zero_()
        return load_LE


def _no_wait(module: nn.Module) -> None:
    """The default ``wait_for_params``, for parameters that are never gathered in the background."""


def fill_normal(parameter: torch.Tensor, spec: ParamSpec, box: Box, std: float, seed: int) -> None:
    """Set ``parameter``, the ``box`` of the global tensor that this rank holds, to its part of the global draw.

    Stacked tensors are drawn one by one from their index, and only those that this rank holds.
    """
    if not spec.stacked:
        parameter.copy_(box.cut(named_normal(spec.name, spec.shape, std, seed)))
        return
    for index, tensor in enumerate(parameter, start=box.start[0]):
        drawn = named_normal(f"{spec.name}.{index}", spec.shape[1:], std, seed)
        tensor.copy_(drawn[box.slices[1:]])


def named_normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> torch.Tensor:
    """A Normal(0, std) tensor that depends only on (seed, name): fp32, drawn on the CPU, so that all devices agree."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * std
