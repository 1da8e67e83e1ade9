"""Our models with the weights and names of Hugging Face's Llama, Qwen3 and Mixtral."""

from __future__ import annotations

from typing import Any

import torch

from tinytron.model import GPT


def to_hugging_face(model: GPT) -> Any:
    """Mixtral for a model with experts, Qwen3 for one with QK-norm, else Llama; all with an untied head."""
    import transformers

    config, mine = model.config, model.state_dict()
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layer,
        "intermediate_size": config.moe_intermediate_size if config.use_moe else config.intermediate_size,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.resolved_head_dim, "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": None,
        "bos_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }  # fmt: skip
    if config.use_moe:
        sizes["experts_implementation"] = "eager"  # the others have no fp64
        experts = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
        theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **experts))
    elif config.qk_norm:
        theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    else:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    theirs.to(next(model.parameters()).dtype).load_state_dict(_renamed(mine, model))
    return theirs.eval()


def _renamed(mine: dict[str, torch.Tensor], model: GPT) -> dict[str, torch.Tensor]:
    H, N, K = model.config.resolved_head_dim, model.config.num_attention_heads, model.config.num_key_value_heads
    theirs = {
        "model.embed_tokens.weight": mine["wte.weight"],
        "model.norm.weight": mine["final_norm.weight"],
        "lm_head.weight": mine["lm_head.weight"],
    }
    plain = {
        "attn.out_proj.weight": "self_attn.o_proj.weight", "attn.q_norm.weight": "self_attn.q_norm.weight",
        "attn.k_norm.weight": "self_attn.k_norm.weight", "attn_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight", "mlp.down_proj.weight": "mlp.down_proj.weight",
        "mlp.router.weight": "mlp.gate.weight", "mlp.experts.gate_up_proj": "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj": "mlp.experts.down_proj",
    }  # fmt: skip
    for layer in range(model.config.num_layer):
        block = {n.removeprefix(f"blocks.{layer}."): w for n, w in mine.items() if n.startswith(f"blocks.{layer}.")}
        named = {plain[name]: weight for name, weight in block.items() if name in plain}
        parts = block["attn.qkv_proj.weight"].split((N * H, K * H, K * H))
        named |= {f"self_attn.{x}_proj.weight": part for x, part in zip("qkv", parts, strict=True)}
        if "mlp.gate_up_proj.weight" in block:
            named["mlp.gate_proj.weight"], named["mlp.up_proj.weight"] = block["mlp.gate_up_proj.weight"].chunk(2)
        theirs |= {f"model.layers.{layer}.{name}": weight for name, weight in named.items()}
    return theirs
