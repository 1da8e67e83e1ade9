"""``tinytron tokenize``: turn text into token shards for training, on all cores."""

from __future__ import annotations

import math
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinytron.data.manifest import Manifest
from tinytron.data.shards import split_of
from tinytron.text.options import TokenizeOptions, parse_options
from tinytron.text.tokenize import tokenize_dataset
from tinytron.utils.signals import StopRequest
from tinytron.utils.texts import counted, program_words

DESCRIPTION = """Turn text into token shards for training, on all cores.

%(prog)s --dataset_path corpus.jsonl --tokenizer_name gpt2
%(prog)s --dataset_path my_texts/ --train_bpe 16384 --val_fraction 0.01
%(prog)s --dataset_path input.txt --train_chars --val_fraction 0.1
%(prog)s --dataset_path HuggingFaceFW/fineweb-edu --dataset_name sample-10BT \\
    --streaming --encoding_name gpt2 --output_dir data/fineweb-edu

After an interruption, the same command continues. Afterwards: tinytron data info data/corpus
"""


def into_cache_dir(options: TokenizeOptions) -> TokenizeOptions:
    """``options`` as timl's command means them: without ``--output_dir``, the shards go to ``--cache_dir``, and downloads
    from the hub to ``hub`` in it."""
    if options.cache_dir is None or options.output_dir is not None:
        return options
    return replace(options, output_dir=options.cache_dir, cache_dir=str(Path(options.cache_dir) / "hub"))


def main(argv: Sequence[str] | None = None, prog: str | None = None, *, into_cache: bool = False) -> int:
    """Write the shards that ``argv`` (default: the command line) describes, and print how to train on them. ``into_cache``:
    see ``into_cache_dir``. Returns 0, or 128 plus the signal that stopped it. Raises: TinytronError."""
    options = parse_options(argv, DESCRIPTION, prog)
    if into_cache:
        options = into_cache_dir(options)
    pretrain = ["python", "pretrain_debug.py"] if prog is None else [*program_words(), "pretrain"]
    stop = StopRequest()
    with stop.listening():
        outcome = tokenize_dataset(options, stop)
    manifest = outcome.manifest
    if manifest is None:
        name = signal.Signals(outcome.received).name
        print(f"stopped by {name}; the same command continues from here", file=sys.stderr, flush=True)
        return 128 + outcome.received
    if not outcome.fresh:
        print(f"{outcome.folder} already has the shards: nothing to do")
        return 0
    for split, tokens in manifest.tokens.items():
        shards = len(manifest.shards_of(split))
        numbers = ((manifest.documents[split], "document"), (tokens, "token"), (shards, "shard"))
        print(f"{split}: {', '.join(counted(*number) for number in numbers)} in {outcome.folder}")
    if not any(split_of(shard.name) == "train" for shard in manifest.shards):
        print("these are validation shards: move them to the folder of the training shards, and train with --do_val")
        return 0
    if manifest.paired:
        print("these are pairs for preference training: tinytron.data.pairs.PairDataset reads them")
        return 0
    print(f"train with: {shlex.join(pretrain)} {training_flags(outcome.folder, manifest)}")
    return 0


@dataclass(frozen=True)
class _Size:
    """A model for data of up to ``tokens``, and how to train it: sequence length, and tokens per step."""

    tokens: float
    num_layer: int
    heads: int
    hidden_size: int
    intermediate_size: int
    seq_len: int
    batch: int
    epochs: int = 1


# About 20 tokens per parameter (arXiv:2203.15556, section 3), but large enough to learn something from a few pages.
_SIZES = (
    _Size(3e6, 4, 4, 256, 704, 256, 2**13, epochs=10),
    _Size(1e8, 6, 6, 384, 1024, 512, 2**15, epochs=4),
    _Size(1e9, 8, 8, 512, 1408, 1024, 2**16),
    _Size(8e9, 12, 12, 768, 2048, 1024, 2**17),
    _Size(math.inf, 24, 16, 1024, 2816, 2048, 2**19),
)


def training_flags(folder: Path, manifest: Manifest) -> str:
    """The flags that train a model of suitable size on ``folder``."""
    shards = {split: [s.tokens for s in manifest.shards if split_of(s.name) == split] for split in ("train", "val")}
    tokens = sum(shards["train"])
    size = next(size for size in _SIZES if tokens <= size.tokens)
    row = manifest.row
    seq_len = row or min(size.seq_len, 2 ** max(0, (max(shards["train"]) - 1).bit_length() - 4))
    batch = max(seq_len, min(size.batch, 2 ** max(0, tokens.bit_length() - 4)) // seq_len * seq_len)
    samples = sum((count - (row is None)) // seq_len for count in shards["train"] if count)
    steps = samples * size.epochs // (batch // seq_len)
    flags = {
        "dataset_path": shlex.quote(str(folder)),
        "vocab_size": -(-manifest.tokenizer.vocab_size // 64) * 64,
        "num_layer": size.num_layer,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "seq_len": seq_len,
        "batch_size": min(8, batch // seq_len),
        "total_batch_size": batch,
        "max_epochs": size.epochs,
        "warmup_steps": min(1000, max(1, steps // 10)),
    }
    validates = " --do_val" if any(count + (row is not None) > seq_len for count in shards["val"]) else ""
    return " ".join(f"--{name} {value}" for name, value in flags.items()) + validates
