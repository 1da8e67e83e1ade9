"""The tensors of Hugging Face's model families: whose part of ours each of theirs is. One table a family, both ways.

A table maps our modules to theirs: ``{i}`` is a layer, ``{e}`` an expert. Several of theirs make one of ours: they are its
blocks of rows, in order. The pairing of rotary elements is the same on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tinytron.distributed.param_spec import ParamSpec
from tinytron.model.config import ModelConfig

Table = dict[str, tuple[str, ...]]


def _decoder(feed_forward: Table) -> Table:
    """The names that Llama and its successors share."""
    layer = "model.layers.{i}."
    attention = f"{layer}self_attn."
    return {
        "wte": ("model.embed_tokens",),
        "blocks.{i}.attn_norm": (f"{layer}input_layernorm",),
        "blocks.{i}.attn.qkv_proj": (f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"),
        "blocks.{i}.attn.q_norm": (f"{attention}q_norm",),
        "blocks.{i}.attn.k_norm": (f"{attention}k_norm",),
        "blocks.{i}.attn.out_proj": (f"{attention}o_proj",),
        "blocks.{i}.mlp_norm": (f"{layer}post_attention_layernorm",),
        **{f"blocks.{{i}}.mlp.{ours}": tuple(layer + name for name in theirs) for ours, theirs in feed_forward.items()},
        "final_norm": ("model.norm",),
        "lm_head": ("lm_head",),
    }


_DENSE: Table = {"gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"), "down_proj": ("mlp.down_proj",)}
_QWEN_EXPERTS: Table = {
    "router": ("mlp.gate",),
    "experts.gate_up_proj": ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"),
    "experts.down_proj": ("mlp.experts.{e}.down_proj",),
}
_MIXTRAL_EXPERTS: Table = {
    "router": ("block_sparse_moe.gate",),
    "experts.gate_up_proj": ("block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3"),
    "experts.down_proj": ("block_sparse_moe.experts.{e}.w2",),
}
_NEOX: Table = {
    "wte": ("gpt_neox.embed_in",),
    "blocks.{i}.attn_norm": ("gpt_neox.layers.{i}.input_layernorm",),
    "blocks.{i}.attn.qkv_proj": ("gpt_neox.layers.{i}.attention.query_key_value",),
    "blocks.{i}.attn.out_proj": ("gpt_neox.layers.{i}.attention.dense",),
    "blocks.{i}.mlp_norm": ("gpt_neox.layers.{i}.post_attention_layernorm",),
    "blocks.{i}.mlp.up_proj": ("gpt_neox.layers.{i}.mlp.dense_h_to_4h",),
    "blocks.{i}.mlp.down_proj": ("gpt_neox.layers.{i}.mlp.dense_4h_to_h",),
    "final_norm": ("gpt_neox.final_layer_norm",),
    "lm_head": ("embed_out",),
}
_GPT2: Table = {
    "wte": ("transformer.wte",),
    "wpe": ("transformer.wpe",),
    "blocks.{i}.attn_norm": ("transformer.h.{i}.ln_1",),
    "blocks.{i}.attn.qkv_proj": ("transformer.h.{i}.attn.c_attn",),
    "blocks.{i}.attn.out_proj": ("transformer.h.{i}.attn.c_proj",),
    "blocks.{i}.mlp_norm": ("transformer.h.{i}.ln_2",),
    "blocks.{i}.mlp.up_proj": ("transformer.h.{i}.mlp.c_fc",),
    "blocks.{i}.mlp.down_proj": ("transformer.h.{i}.mlp.c_proj",),
    "final_norm": ("transformer.ln_f",),
    "lm_head": ("lm_head",),
}


@dataclass(frozen=True)
class Family:
    """One ``model_type``. ``base`` begins the names of all but the head, and is missing in files of the bare model;
    ``transposed`` modules have their weights the other way round; ``by_head`` packs have rows by head first, then by query,
    key and value; tensors that match ``ignored`` are no weights, but tables that older versions saved."""

    model_type: str
    architecture: str
    table: Table
    base: str = "model."
    transposed: frozenset[str] = frozenset()
    by_head: frozenset[str] = frozenset()
    ignored: str = r"\.rotary_emb\.inv_freq$"

    def parts(self, spec: ParamSpec, ours: torch.Tensor, config: ModelConfig, first: int = 0) -> Iterator[Part]:
        """What of theirs our parameter ``spec`` is made of; ``ours`` is the tensor, or of stacked ones (experts) this
        rank's, which begin at index ``first``."""
        if spec.stacked:
            module, suffix = spec.name, ".weight"
        else:
            module, _, kind = spec.name.rpartition(".")
            suffix = f".{kind}"
        layer = re.search(r"\.(\d+)\.", module)
        key = re.sub(r"\.\d+\.", ".{i}.", module, count=1)
        theirs = [name.replace("{i}", layer[1] if layer else "") + suffix for name in self.table[key]]
        if spec.stacked:
            for e, expert in enumerate(ours, start=first):
                yield from _rows([name.replace("{e}", str(e)) for name in theirs], expert, spec.row_blocks)
        elif key in self.by_head:
            head, N = config.resolved_head_dim, config.num_attention_heads
            yield Part(theirs[0], ours.view(3, N, head, *ours.shape[1:]).transpose(0, 1), tuple(ours.shape))
        elif key in self.transposed and ours.ndim == 2:
            yield Part(theirs[0], ours.t(), (ours.shape[1], ours.shape[0]))
        else:
            yield from _rows(theirs, ours, spec.row_blocks)


class Part(NamedTuple):
    """A tensor of theirs: its ``name`` and ``shape``, and the ``view`` of ours that has its elements in its order."""

    name: str
    view: torch.Tensor
    shape: tuple[int, ...]


def _rows(names: list[str], ours: torch.Tensor, blocks: tuple[int, ...]) -> Iterator[Part]:
    views = ours.split(blocks) if len(names) > 1 else (ours,)
    for name, view in zip(names, views, strict=True):
        yield Part(name, view, tuple(view.shape))


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", _decoder(_DENSE)),
        Family("mistral", "MistralForCausalLM", _decoder(_DENSE)),
        Family("qwen2", "Qwen2ForCausalLM", _decoder(_DENSE)),
        Family("qwen3", "Qwen3ForCausalLM", _decoder(_DENSE)),
        Family("mixtral", "MixtralForCausalLM", _decoder(_MIXTRAL_EXPERTS)),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", _decoder(_DENSE | _QWEN_EXPERTS)),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            _NEOX,
            base="gpt_neox.",
            by_head=frozenset({"blocks.{i}.attn.qkv_proj"}),
            ignored=r"\.(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)$",
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            _GPT2,
            base="transformer.",
            transposed=frozenset(module for module in _GPT2 if module.endswith("_proj")),
            ignored=r"\.attn\.(bias|masked_bias)$",
        ),
    )
}
