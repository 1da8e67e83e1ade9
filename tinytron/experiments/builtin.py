"""The built-in jobs, datasets and evaluations. Each is a short file of this package and a line in a table here, so that
listing them imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# key: (module that registers it, description)
JOBS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "gpt/train/pretrain": ("tinytron.experiments.gpt", "pre-train a GPT on token shards"),
        "gpt/train/contrastive": ("tinytron.experiments.aligned", "train a GPT on pairs of answers (DPO)"),
        "gpt/train/kl": ("tinytron.experiments.aligned", "pre-train in two stages, the second with a KL penalty"),
        "gpt/train/lora": ("tinytron.experiments.aligned", "train all weights of a GPT, then adapters (LoRA)"),
        "gpt/train/distill": ("tinytron.experiments.aligned", "train a GPT on data and the predictions of a teacher"),
        "gpt/train/grpo": ("tinytron.experiments.aligned", "train a GPT by rewards for its answers (GRPO)"),
        "backbone/train/distill": (
            "tinytron.experiments.aligned",
            "train a model of Hugging Face on data and the predictions of a teacher",
        ),
        "backbone/train/grpo": (
            "tinytron.experiments.aligned",
            "train a model of Hugging Face by rewards for its answers (GRPO)",
        ),
        "backbone/train/contrastive": (
            "tinytron.experiments.aligned",
            "train a model of Hugging Face on pairs of answers (DPO)",
        ),
        "gpt/evaluate": ("tinytron.experiments.evaluate", "evaluate a GPT of a run by named evaluations"),
        "backbone/evaluate": (
            "tinytron.experiments.evaluate",
            "evaluate a model of Hugging Face by named evaluations",
        ),
        **{
            f"{family}/train/{kind}": ("tinytron.experiments.families", f"{verb} {name}")
            for family, name in (("llama", "a Llama"), ("qwen", "a Qwen"), ("gpt_neox", "a GPT-NeoX"))
            for kind, verb in (("pretrain", "pre-train"), ("finetune", "fine-tune"))
        },
        "data/tokenize_variable_dataset": (
            "tinytron.experiments.tokenize",
            "turn documents into token shards, one after another",
        ),
        "data/tokenize_blockwise_dataset": (
            "tinytron.experiments.tokenize",
            "turn documents into token shards, each into one row of architecture.block_size tokens",
        ),
        "data/tokenize_contrastive_dataset": (
            "tinytron.experiments.tokenize",
            "turn pairs of a better and a worse answer into token shards of paired rows",
        ),
    }
)
# Other names of jobs, which theseus' pages use.
SYNONYMS: Mapping[str, str] = MappingProxyType({"gpt/pretrain": "gpt/train/pretrain"})
_NAMES = (
    "fineweb",
    "fineweb-edu",
    "c4",
    "pile",
    "pg19",
    "wikitext",
    "tinystories",
    "alpaca",
    "ultrachat",
    "gsm8k",
    "squad",
    "mmlu",
    "winogrande",
    "mnli",
    "qqp",
    "sst2",
    "siqa",
    "cfq",
    "hh-rlhf",
    "ultrafeedback",
)
# Their descriptions are the docstrings, because importing the module is cheap.
DATASETS: Mapping[str, tuple[str, str]] = MappingProxyType(dict.fromkeys(_NAMES, ("tinytron.experiments.datasets", "")))
_EVALUATIONS = (
    *("alpaca", "arithmetic", "blimp", "cfq", "mmlu", "mnli", "qqp", "siqa", "squad", "sst2", "winogrande"),
    *("fineweb_ppl", "pile_ppl", "pg19_ppl", "tinystories_ppl"),
    *("mnli_ppl", "qqp_ppl", "siqa_ppl", "sst2_ppl", "winogrande_ppl"),
)
_OF_FILES = ("bbq", "clutrr", "fever", "longbench", "longhealth", "mtob", "pes2o_ppl", "pile_injected_ppl")
EVALUATIONS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(_EVALUATIONS, ("tinytron.experiments.evaluations", "")),
        **dict.fromkeys(_OF_FILES, ("tinytron.experiments.evaluations_of_files", "")),
        "lagging": ("tinytron.experiments.lagging", ""),
    }
)
