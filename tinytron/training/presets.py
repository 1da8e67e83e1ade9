"""Named sizes: ``--preset NAME`` stands for the flags that are written in this file, and nowhere else.

Options are applied in this order: the defaults, the preset, ``--config`` files in their order, the other flags. The name is
not an option of the run: giving the same flags by hand leads to the same run folder. To add a preset, add an entry to
``PRESETS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from tinytron.errors import ConfigError
from tinytron.utils.flags import nearest


@dataclass(frozen=True)
class Preset:
    """The flags of a preset. ``about`` describes it in a line, ``parameters`` is the parameter count at the preset's
    vocabulary (or the default one), and ``options`` has the values by the name of their flag."""

    about: str
    parameters: int
    options: Mapping[str, Any]


def _shape(layers: int, heads: int, kv_heads: int, hidden: int, intermediate: int) -> dict[str, Any]:
    """The five sizes that every preset sets."""
    return {
        "num_layer": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
    }


def _batch(seq_len: int, total: int, micro: int) -> dict[str, Any]:
    """Sequence length, tokens per step and sequences per micro-batch."""
    return {"seq_len": seq_len, "total_batch_size": total, "batch_size": micro}


def _rates(max_lr: float, min_lr: float) -> dict[str, Any]:
    """Peak and last learning rate."""
    return {"max_lr": max_lr, "min_lr": min_lr}


# A peak rate to try first, by optimizer, for the smaller models.
GOOD_MAX_LR: Mapping[str, float] = MappingProxyType({"adam": 2e-3, "muon": 0.02})
# AdamW from 0.1B to 3B, as in scripts/lib/launch.sh.
_ADAM = _rates(6e-4, 6e-5)
# Muon's peak rate is 0.02 at these sizes; embeddings and norms, which AdamW updates, get half of it.
_MUON = {
    "optimizer": "muon",
    "max_lr": GOOD_MAX_LR["muon"],
    "min_lr": 2e-4,
    "embedding_lr_mult": 0.5,
    "scalar_lr_mult": 0.5,
}
_MODERN = {"init_std": 0.02, **_MUON}
_GPT2 = {
    **{"vocab_size": 50257, "norm_type": "layer", "norm_eps": 1e-5, "mlp_type": "gelu_tanh", "bias": True},
    **{"position_type": "learned", "tied_lm_head": True, "init_std": 0.02},
}
# nanoGPT's character model: no biases, exact GELU. Its LayerNorm has no bias either; Tinytron's always has one.
_NANOGPT = {
    **{"vocab_size": 65, "norm_type": "layer", "norm_eps": 1e-5, "mlp_type": "gelu", "position_type": "learned"},
    **{"init_std": 0.02, "warmup_steps": 100, "adam_beta2": 0.99},
}

# theseus, whose GELU is that of JAX, the tanh approximation. Its schedule decays over the last hundredth of the steps.
_THESEUS = {
    **_shape(32, 16, 16, 2048, 8192),
    **_batch(512, 512 * 512, 8),
    **{"vocab_size": 100288, "norm_type": "layer", "norm_eps": 1e-5, "mlp_type": "gelu_tanh", "bias": True},
    **{"tied_lm_head": True, "init_std": 0.02, **_rates(3e-4, 3e-6)},
    **{"lr_schedule": "wsd", "warmup_ratio": 0.005, "warmup_start": 0.01, "wsd_decay_fraction": 0.01},
}

_SIZES: Mapping[str, Preset] = MappingProxyType(
    {
        "tiny": Preset(
            "for minutes on a CPU",
            15_829_248,
            {**_shape(4, 4, 2, 256, 704), **_batch(256, 8192, 32), **_MODERN},
        ),
        "small": Preset(
            "for hours on a CPU, minutes on a GPU",
            49_357_312,
            {**_shape(8, 8, 4, 512, 1408), **_batch(512, 2**15, 16), **_MODERN},
        ),
        "nanogpt-char": Preset(
            "nanoGPT's config/train_shakespeare_char.py",
            10_750_080,
            {
                **_shape(6, 6, 6, 384, 1536),
                **_batch(256, 64 * 256, 64),
                **_NANOGPT,
                **_rates(1e-3, 1e-4),
                "dropout": 0.2,
            },
        ),
        "nanogpt-char-cpu": Preset(
            "the same with the flags of nanoGPT's README for CPUs",
            805_248,
            {**_shape(4, 4, 4, 128, 512), **_batch(64, 12 * 64, 12), **_NANOGPT, **_rates(1e-3, 1e-4)},
        ),
        "gpt2": Preset(
            "GPT-2 124M",
            124_439_808,
            {**_shape(12, 12, 12, 768, 3072), **_batch(1024, 2**19, 8), **_GPT2, **_ADAM},
        ),
        "gpt2-medium": Preset(
            "GPT-2 355M",
            354_823_168,
            {**_shape(24, 16, 16, 1024, 4096), **_batch(1024, 2**19, 8), **_GPT2, **_rates(3e-4, 3e-5)},
        ),
        "smollm-135m": Preset(
            "Llama architecture, deep and narrow, as SmolLM2",
            134_515_008,
            {
                **_shape(30, 9, 3, 576, 1536),
                **_batch(2048, 2**19, 8),
                **{"vocab_size": 49152, "norm_eps": 1e-5, "rope_theta": 1e5, "init_std": 0.04, **_rates(3e-3, 3e-4)},
            },
        ),
        "llama-160m": Preset(
            "Llama architecture, untied head",
            162_417_408,
            {
                **_shape(12, 12, 12, 768, 3072),
                **_batch(2048, 2**19, 8),
                **{"vocab_size": 32000, "tied_lm_head": False, "init_std": 0.02, **_ADAM},
            },
        ),
        "pythia-160m": Preset(
            "GPT-NeoX architecture",
            162_322_944,
            {
                **_shape(12, 12, 12, 768, 3072),
                **_batch(2048, 2**21, 8),
                **{"norm_type": "layer", "norm_eps": 1e-5, "mlp_type": "gelu", "bias": True},
                **{"parallel_residual": True, "rotary_fraction": 0.25, "tied_lm_head": False, "init_std": 0.02},
                **_ADAM,
            },
        ),
        "qwen3-0.6b": Preset(
            "Qwen3 architecture: heads of 128, QK-norm",
            596_049_920,
            {
                **_shape(28, 16, 8, 1024, 3072),
                **{"vocab_size": 151936, "head_dim": 128, "qk_norm": True, "rope_theta": 1e6, "init_std": 0.02},
                **_ADAM,
            },
        ),
        "0.25b": Preset("scripts/debug_gpt_0.25b", 230_843_392, {**_shape(12, 32, 4, 1024, 4096), **_ADAM}),
        "0.3b-a0.17b": Preset(
            "scripts/debug_gpt_0.3b_a0.17b: 8 experts, 2 active",
            224_520_960,
            {
                **_shape(12, 32, 4, 768, 3072),
                **{"use_moe": True, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 768},
                **_ADAM,
            },
        ),
        "1b": Preset("scripts/gpt_1b", 1_537_574_912, {**_shape(24, 64, 8, 2048, 8192), **_ADAM}),
        "1b-modern": Preset(
            "scripts/gpt_1b_modern: heads of 128, QK-norm",
            1_453_712_384,
            {**_shape(28, 16, 4, 2048, 6144), "head_dim": 128, "qk_norm": True, **_ADAM},
        ),
        "3b": Preset("scripts/gpt_3b", 2_745_583_616, {**_shape(36, 16, 4, 2048, 10240), **_ADAM}),
        "7b": Preset("scripts/gpt_7b", 7_856_721_920, {**_shape(32, 128, 16, 4096, 16384), **_rates(3e-4, 3e-5)}),
    }
)

# The defaults of each system. Lengths, intervals and paths are left to flags.
_SYSTEMS: Mapping[str, Preset] = MappingProxyType(
    {
        "tinytron": Preset(
            "the defaults, by name",
            525_534_208,
            {**_shape(32, 128, 8, 1024, 4096), **_batch(4096, 524288, 8), **_rates(4e-3, 3e-5), "warmup_steps": 1000},
        ),
        "timl": Preset(
            "GPT-2 as in timl's documented command",
            124_439_808,
            {
                **_SIZES["gpt2"].options,
                **{"dropout": 0.1, "batch_size": 32, "seed": 0},
                **{"min_lr": 1e-5, "adam_beta1": 0.8, "warmup_ratio": 0.01, "warmup_steps": 0},
            },
        ),
        "theseus": Preset("theseus with its adamw", 1_816_858_624, {**_THESEUS, "decay_all": True}),
        "theseus-muon": Preset(
            "theseus with its muon",
            1_816_858_624,
            {
                **_THESEUS,
                **{"optimizer": "muon", "muon_normuon": True, "muon_cautious": True, "weight_decay": 0.0},
                **{"embedding_lr_mult": 15.0, "head_lr_mult": 0.2, "scalar_lr_mult": 25.0},
                **{"adam_beta1": 0.8, "adam_eps": 1e-10},
            },
        ),
        "gpt2fun": Preset(
            "GPT-2 with gpt2fun's defaults",
            124_475_904,
            {
                **_SIZES["gpt2"].options,
                **{"vocab_size": 50304, "batch_size": 16, "min_lr": 0.0, "warmup_steps": 700, "seed": 42},
            },
        ),
    }
)
# Families, at a size of theirs.
_FAMILIES: Mapping[str, str] = MappingProxyType({"llama": "llama-160m", "qwen": "qwen3-0.6b", "neox": "pythia-160m"})

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        **_SIZES,
        **_SYSTEMS,
        **{name: replace(_SIZES[size], about=f"the same as {size}") for name, size in _FAMILIES.items()},
    }
)


def preset_options(name: str) -> dict[str, Any]:
    """The options of the preset ``name``; case and underscores do not matter. Raises: ConfigError for an unknown name, with
    the nearest name and all of them."""
    preset = PRESETS.get(name.lower().replace("_", "-"))
    if preset is None:
        raise ConfigError(f"--preset {name} is unknown{nearest(name, PRESETS)}; use one of {', '.join(PRESETS)}")
    return dict(preset.options)


def preset_table() -> str:
    """The presets as a Markdown table, for docs/reference/presets.md: one column for each of the five sizes, and one for
    all other flags."""
    shape = list(_shape(0, 0, 0, 0, 0))
    names = ["preset", "parameters", *(f"`--{name}`" for name in shape), "and"]
    lines = [f"| {' | '.join(names)} |\n", f"|---|---:|{'---:|' * len(shape)}---|\n"]
    for name, preset in PRESETS.items():
        sizes = [str(preset.options[option]) for option in shape]
        further = " ".join(_flag(option, value) for option, value in preset.options.items() if option not in shape)
        cells = [f"`{name}`, {preset.about}", f"{preset.parameters / 1e6:,.2f}M", *sizes, f"`{further}`"]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def _flag(option: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {value}"
