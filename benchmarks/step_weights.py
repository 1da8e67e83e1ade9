"""The same initial weights for all variants of step_time.py, by the names that each library has for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tinytron.interop.families import FAMILIES
from tinytron.model import GPT, ModelConfig

Weights = Mapping[str, torch.Tensor]


def initial_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights by Tinytron's names, in fp32 on the CPU; with norms that are not all one, so that exchanged ones show."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
        assert name in model.state_dict(), "parameters are saved under their names"
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def their_names(config: ModelConfig, weights: Weights) -> dict[str, torch.Tensor]:
    """``weights`` by the names of Hugging Face's Llama, or Mixtral."""
    family = FAMILIES["mixtral" if config.use_moe else "llama"]
    specs = GPT(config, device="meta", seed=None).param_specs()
    parts = [part for spec in specs for part in family.parts(spec, weights[spec.name], config)]
    return {part.name: part.view.reshape(part.shape) for part in parts}


def litgpt_names(config: ModelConfig, weights: Weights) -> dict[str, torch.Tensor]:
    """litgpt packs queries, keys and values as we do, and no gates with ups."""
    outside = {"wte": "transformer.wte", "final_norm": "transformer.ln_f", "lm_head": "lm_head"}
    theirs = {f"{name}.weight": weights[f"{ours}.weight"] for ours, name in outside.items()}
    same = {"attn_norm": "norm_1", "attn.qkv_proj": "attn.qkv", "attn.out_proj": "attn.proj", "mlp_norm": "norm_2"}
    for i in range(config.num_layer):
        ours, layer = f"blocks.{i}", f"transformer.h.{i}"
        theirs |= {f"{layer}.{name}.weight": weights[f"{ours}.{own}.weight"] for own, name in same.items()}
        parts: dict[str, tuple[torch.Tensor, torch.Tensor]]
        if config.use_moe:
            theirs[f"{layer}.mlp.gate.weight"] = weights[f"{ours}.mlp.router.weight"]
            pairs = zip(*(weights[f"{ours}.mlp.experts.{n}"] for n in ("gate_up_proj", "down_proj")), strict=True)
            parts = {f"{layer}.mlp.experts.{e}": pair for e, pair in enumerate(pairs)}
        else:
            own = (weights[f"{ours}.mlp.gate_up_proj.weight"], weights[f"{ours}.mlp.down_proj.weight"])
            parts = {f"{layer}.mlp": own}
        for name, (gate_up, down) in parts.items():
            gate, up = gate_up.chunk(2)
            theirs |= {f"{name}.fc_1.weight": gate, f"{name}.fc_2.weight": up, f"{name}.proj.weight": down}
    return theirs
