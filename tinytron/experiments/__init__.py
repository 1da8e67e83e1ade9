"""The built-in jobs, data sets and evaluations. Each stands in a short file of this package; a new one is a file, and a
line of its table here (or an import of it, if listing may take as long as importing it)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# key: (module that registers it, what it does)
JOBS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "gpt/train/pretrain": ("tinytron.experiments.gpt", "pre-train a GPT on token shards"),
        "data/tokenize_variable_dataset": (
            "tinytron.experiments.tokenize",
            "turn documents into token shards, one after another",
        ),
    }
)
DATASETS: Mapping[str, tuple[str, str]] = MappingProxyType({})
EVALUATIONS: Mapping[str, tuple[str, str]] = MappingProxyType({})
