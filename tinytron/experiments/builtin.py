"""The built-in jobs, datasets and evaluations. Each is a short file of this package and a line in a table here, so that
listing them imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# key: (module that registers it, description)
JOBS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "gpt/train/pretrain": ("tinytron.experiments.gpt", "pre-train a GPT on token shards"),
        **{
            f"{family}/train/{kind}": ("tinytron.experiments.families", f"{verb} {name}")
            for family, name in (("llama", "a Llama"), ("qwen", "a Qwen"), ("gpt_neox", "a GPT-NeoX"))
            for kind, verb in (("pretrain", "pre-train"), ("finetune", "fine-tune"))
        },
        "data/tokenize_variable_dataset": (
            "tinytron.experiments.tokenize",
            "turn documents into token shards, one after another",
        ),
    }
)
DATASETS: Mapping[str, tuple[str, str]] = MappingProxyType({})
EVALUATIONS: Mapping[str, tuple[str, str]] = MappingProxyType({})
