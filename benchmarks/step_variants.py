"""The ways to train of step_time.py: the same model by Tinytron, plain torch, transformers, litgpt and torchtitan.

All have AdamW (betas 0.9, 0.95; eps 1e-8; decay 0.1 on everything but norms) and clip the gradient's norm to 1. In bf16 a
peer keeps weights, gradients and moments in bf16 alone, which is its fastest way; those with ``autocast`` keep them in fp32
and multiply in bf16. Tinytron does what its ``Trainer`` does: bf16 weights, fp32 gradients, fp32 main weights and moments.
"""

from __future__ import annotations

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from step_plain import PlainGPT
from step_weights import Weights, litgpt_names, their_names

from tinytron.data import Batch
from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.layout import ParallelLayout
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.param_spec import specs_of
from tinytron.kernels.choice import Backend
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.recompute import Recompute
from tinytron.training.batch_preparer import count_targets
from tinytron.training.build import build_model, build_optimizer, optimizer_options, param_wait_hook
from tinytron.training.config import Config, OptimConfig, TrainingConfig
from tinytron.utils.matmul import onednn, onednn_keeps_fp32

LR, BETAS, EPS, DECAY, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """What is trained: the architecture, the precision of matrix products, and where."""

    config: ModelConfig
    precision: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products are in."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]


class Training(ABC):
    """A model and its optimizer."""

    model: nn.Module

    @abstractmethod
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One optimizer step on token ids ``[B, S + 1]``; the mean cross entropy before it, a scalar."""

    @abstractmethod
    def settle(self) -> None:
        """Wait for what the last step left under way."""


class Peer(Training):
    """``loss`` maps token ids to the mean cross entropy of ``model``."""

    def __init__(self, model: nn.Module, loss: Loss, *, compiled: bool = False) -> None:
        self.model = model
        self.loss: Loss = torch.compile(loss) if compiled else loss
        self.params = list(model.parameters())
        groups = [
            {"params": [p for p in self.params if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in self.params if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer: Any = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        loss = self.loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def settle(self) -> None:
        """A peer leaves nothing."""


class Ours(Training):
    """Tinytron's parts, put together and called as ``Trainer`` does."""

    model: GPT

    def __init__(self, case: Case, weights: Weights | None, how: Variant) -> None:
        self.state = ParallelState.create(ParallelLayout(1), case.device)
        self.onednn = case.device.type == "cpu" and onednn_keeps_fp32()
        S = case.config.block_size
        optim = OptimConfig(max_lr=LR, adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_eps=EPS, weight_decay=DECAY)
        flags: Any = {"precision": case.precision, "use_compile": how.compiled, "recompute": how.recompute}
        flags |= {"attn_backend": how.attn_backend, "use_triton_kernels": how.triton}
        train = TrainingConfig(**flags, seq_len=S, total_batch_size=S)
        config = Config(model=case.config, optim=optim, train=train)
        self.model = build_model(config, self.state)
        if weights is not None:
            self.model.load_state_dict(dict(weights), strict=False)  # routers have a bias too, which is zero
        self.optimizer = DistributedOptimizer(build_optimizer(config, self.model), self.state.groups["dp"])
        self.optimizer.attach(self.model, specs_of(self.model), self.state, optimizer_options(config, self.model))
        self.model.wait_for_params = param_wait_hook(self.optimizer, self.model)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        with onednn() if self.onednn else contextlib.nullcontext():  # as world.py has it, here for this variant alone
            return self._step(tokens)

    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        batch = Batch(*shifted(tokens))
        targets = count_targets([batch], self.state.groups["world"]).divisor
        with self.optimizer.accumulate(last=True):
            losses = self.model(batch.input_ids, batch.labels)
            self.optimizer.scale(losses.objective / targets).backward()
        self.optimizer.step(max_norm=MAX_NORM)
        self.optimizer.zero_grad()
        self.model.end_step(self.optimizer.last_skipped)
        return losses.token / targets

    def settle(self) -> None:
        self.optimizer.finish_gather()


def shifted(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read, and what is to be predicted: ``[B, S + 1] -> [B, S], [B, S]``."""
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@contextlib.contextmanager
def made_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """New modules are of this type, on this device."""
    outer = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(outer)


def tinytron(case: Case, weights: Weights | None, how: Variant) -> Training:
    """Our GPT and DistributedOptimizer."""
    return Ours(case, weights, how)


def _weights_dtype(case: Case, autocast: bool) -> torch.dtype:
    return torch.float32 if autocast else case.dtype


def _autocast(case: Case, autocast: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(case.device.type, case.dtype, enabled=autocast)


def plain(case: Case, weights: Weights | None, how: Variant) -> Training:
    """The model of step_plain.py."""
    with made_in(_weights_dtype(case, how.autocast), case.device):
        model = PlainGPT(case.config)
    if weights is not None:
        theirs = {name.removeprefix("model."): weight for name, weight in their_names(case.config, weights).items()}
        experts = {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
        model.load_state_dict({_replaced(name, experts): weight for name, weight in theirs.items()})

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        with _autocast(case, how.autocast):
            mean: torch.Tensor = model(*shifted(tokens))
        return mean

    return Peer(model, loss, compiled=how.compiled)


def _replaced(text: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def transformers(case: Case, weights: Weights | None, how: Variant) -> Training:
    """Hugging Face's LlamaForCausalLM or MixtralForCausalLM, with torch's fused attention and grouped matrix products."""
    library, c = importlib.import_module("transformers"), case.config
    sizes: dict[str, Any] = {
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "num_hidden_layers": c.num_layer,
        "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.resolved_head_dim, "max_position_embeddings": c.block_size, "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}, "tie_word_embeddings": False,
        "use_cache": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if c.use_moe:
        experts = {"num_local_experts": c.num_experts, "num_experts_per_tok": c.num_experts_per_tok}
        settings = library.MixtralConfig(**sizes, **experts, intermediate_size=c.moe_intermediate_size)
        settings._experts_implementation = "grouped_mm"
    else:
        settings = library.LlamaConfig(**sizes, intermediate_size=c.intermediate_size)
    settings._attn_implementation = "sdpa"
    with case.device:
        model = library.AutoModelForCausalLM.from_config(settings, dtype=_weights_dtype(case, how.autocast)).train()
    if weights is not None:
        theirs = their_names(c, weights)
        if c.use_moe:  # in memory they have the experts of a layer as one tensor, as we do
            theirs = {n.replace("block_sparse_moe", "mlp"): w for n, w in theirs.items() if ".experts." not in n}
            for i in range(c.num_layer):
                for name in ("gate_up_proj", "down_proj"):
                    theirs[f"model.layers.{i}.mlp.experts.{name}"] = weights[f"blocks.{i}.mlp.experts.{name}"]
        model.load_state_dict(theirs)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        ids, labels = shifted(tokens)
        with _autocast(case, how.autocast):
            mean: torch.Tensor = model(input_ids=ids, labels=labels, shift_labels=labels).loss
        return mean

    return Peer(model, loss, compiled=how.compiled)


def litgpt(case: Case, weights: Weights | None, how: Variant) -> Training:
    """litgpt's GPT and the loss of its ``pretrain``."""
    library, utils = importlib.import_module("litgpt.model"), importlib.import_module("litgpt.utils")
    c = case.config
    experts: dict[str, Any] = {"mlp_class_name": "LLaMAMLP", "intermediate_size": c.intermediate_size}
    if c.use_moe:
        experts = {"mlp_class_name": "LLaMAMoE", "intermediate_size": c.moe_intermediate_size}
        experts |= {"n_expert": c.num_experts, "n_expert_per_token": c.num_experts_per_tok}
        experts |= {"moe_intermediate_size": c.moe_intermediate_size}
    settings = library.Config(
        block_size=c.block_size, vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size, n_layer=c.num_layer,
        n_head=c.num_attention_heads, n_query_groups=c.num_key_value_heads, n_embd=c.hidden_size,
        head_size=c.resolved_head_dim, rotary_percentage=1.0, rope_base=int(c.rope_theta), parallel_residual=False,
        bias=False, norm_class_name="RMSNorm", norm_eps=c.norm_eps, **experts,
    )  # fmt: skip
    with made_in(_weights_dtype(case, how.autocast), case.device):
        model = library.GPT(settings)
    if weights is not None:
        model.load_state_dict(litgpt_names(c, weights))

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        ids, labels = shifted(tokens)
        with _autocast(case, how.autocast):
            mean: torch.Tensor = utils.chunked_cross_entropy(model(ids), labels, chunk_size=0)
        return mean

    return Peer(model, loss, compiled=how.compiled)


def torchtitan(case: Case, weights: Weights | None, how: Variant) -> Training:
    """torchtitan's Llama 3 with its packed projections, compiled block by block, and the plain form of its loss."""
    llama, c = importlib.import_module("torchtitan.models.llama3"), case.config
    common = importlib.import_module("torchtitan.models.common")
    rope = common.ComplexRoPE.Config(dim=c.resolved_head_dim, max_seq_len=c.block_size, theta=c.rope_theta)
    layers = llama._build_llama3_layers(
        n_layers=c.num_layer, dim=c.hidden_size, n_heads=c.num_attention_heads, n_kv_heads=c.num_key_value_heads,
        hidden_dim=c.intermediate_size, rope=rope, attn_backend="varlen",
    )  # fmt: skip
    attention = importlib.import_module("torchtitan.models.common.attention")
    norm = {"normalized_shape": c.hidden_size, "eps": c.norm_eps}
    for layer in layers:  # its recipes have attention kernels for documents, on GPUs only
        layer.attention.inner_attention = attention.ScaledDotProductAttention.Config()
        layer.attention_norm = common.RMSNorm.Config(**norm)
        layer.ffn_norm = common.RMSNorm.Config(**norm)
    settings = llama.Llama3Model.Config(
        dim=c.hidden_size,
        vocab_size=c.vocab_size,
        tok_embeddings=common.Embedding.Config(num_embeddings=c.vocab_size, embedding_dim=c.hidden_size),
        norm=common.RMSNorm.Config(**norm),
        lm_head=common.Linear.Config(in_features=c.hidden_size, out_features=c.vocab_size),
        layers=layers,
    )
    with case.device:
        model = settings.build()
    if weights is not None:
        adapter = llama.Llama3StateDictAdapter(settings, None)
        adapter._validate_hf_rope_config = lambda *_: None  # would read the folder that the weights are from
        model.load_state_dict(adapter.from_hf(their_names(c, weights)))
    for parameter in model.parameters():  # not model.to(): its rotary table is complex
        parameter.data = parameter.data.to(_weights_dtype(case, how.autocast))
    if how.compiled:
        for layer in model.layers.values():
            layer.compile(fullgraph=True)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        ids, labels = shifted(tokens)
        with _autocast(case, how.autocast):
            return F.cross_entropy(model(ids).flatten(0, 1).float(), labels.flatten())

    return Peer(model, loss)


_MODULES = {"transformers": "transformers", "litgpt": "litgpt.model", "torchtitan": "torchtitan.models.llama3"}


@dataclass(frozen=True)
class Variant:
    """One row of a table: who trains, and how."""

    maker: Callable[[Case, Weights | None, Variant], Training] = field(repr=False)
    compiled: bool = False
    autocast: bool = False
    recompute: Recompute = "none"
    attn_backend: Backend = "auto"
    triton: bool = False  # --use_triton_kernels

    @property
    def library(self) -> str:
        """What has to be installed."""
        return self.maker.__name__

    @property
    def name(self) -> str:
        """How it is called in tables."""
        words = ["plain torch" if self.maker is plain else self.library]
        words += ["autocast"] * self.autocast + ["compiled"] * self.compiled
        if self.recompute != "none":
            words.append(f"--recompute {self.recompute}")
        if self.attn_backend != "auto":
            words.append(f"--attn_backend {self.attn_backend}")
        return ", ".join(words + ["--use_triton_kernels"] * self.triton)

    @property
    def bytes_per_parameter(self) -> int:
        """Weights, gradients, moments and main weights, when matrix products are in bf16."""
        if self.maker is tinytron:
            return 18
        return 16 if self.autocast else 8

    def importable(self) -> str | None:
        """Why the library cannot be used, or ``None``; it is imported now."""
        try:
            importlib.import_module(_MODULES.get(self.library, "torch"))
        except ImportError as error:
            return str(error)
        return None

    def fits(self, config: ModelConfig, precision: str) -> bool:
        """Whether there is such a variant of this model: torchtitan's Llama is dense, fp32 needs no autocast."""
        return not (config.use_moe and self.maker is torchtitan) and not (self.autocast and precision == "fp32")

    def keeps(self, precision: str) -> str:
        """What weights and moments are kept in."""
        if precision == "fp32" or self.autocast:
            return "fp32"
        return "bf16 + fp32 main" if self.maker is tinytron else "bf16"

    def make(self, case: Case, weights: Weights | None) -> Training:
        """Ready to train; without ``weights`` as the library draws them."""
        return self.maker(case, weights, self)


VARIANTS = (  # the first is what others are compared with
    Variant(plain),
    Variant(plain, compiled=True),
    Variant(plain, autocast=True),
    Variant(plain, autocast=True, compiled=True),
    Variant(transformers),
    Variant(transformers, compiled=True),
    Variant(transformers, autocast=True),
    Variant(litgpt),
    Variant(litgpt, compiled=True),
    Variant(torchtitan),
    Variant(torchtitan, compiled=True),
    Variant(tinytron),
    Variant(tinytron, compiled=True),
    Variant(tinytron, compiled=True, recompute="selective"),
    Variant(tinytron, compiled=True, recompute="full"),
)


def join_alone() -> None:
    """A process group of this process only, which our optimizer wants."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
