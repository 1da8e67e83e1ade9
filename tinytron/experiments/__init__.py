"""The built-in jobs, datasets and evaluations. Each is a short file of this package and a line in a table here, so that
listing them imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# key: (module that registers it, description)
JOBS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "gpt/train/pretrain": ("tinytron.experiments.gpt", "pre-train a GPT on token shards"),
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
_DATASETS = {
    "fineweb": "Web pages in English: the sample of 10 billion tokens.",
    "fineweb-edu": "Educational web pages in English: the sample of 10 billion tokens.",
    "c4": "Web pages in English, filtered.",
    "pile": "The Pile without its copyrighted parts: web, code, papers, forums.",
    "pg19": "Books of Project Gutenberg from before 1919, one a document.",
    "wikitext": "Lines of good Wikipedia articles (WikiText-103, untokenized).",
    "tinystories": "Short stories in the words of a small child.",
    "alpaca": "52,000 instructions, some with an input, and their answers.",
    "ultrachat": "200,000 dialogues of several turns.",
    "gsm8k": "Word problems of grade school with worked solutions.",
    "squad": "Questions about paragraphs of Wikipedia, whose answers are phrases of the paragraph.",
    "mmlu": "Questions of 57 subjects with four answers each.",
    "winogrande": "Sentences with a blank, and two ways to fill it.",
    "mnli": "Pairs of sentences: does the first one imply the second?",
    "qqp": "Pairs of questions: do they ask the same?",
    "sst2": "Sentences of film reviews: positive or negative?",
    "cfq": "Questions and the queries that answer them, for compositional generalization (split mcd1).",
    "hh-rlhf": "Dialogues with a helpful and harmless answer, and a worse one.",
    "ultrafeedback": "Answers to prompts, the best one and a worse one.",
}
DATASETS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {key: ("tinytron.experiments.datasets", text) for key, text in _DATASETS.items()}
)
EVALUATIONS: Mapping[str, tuple[str, str]] = MappingProxyType({})
