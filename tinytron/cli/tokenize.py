"""``tinytron tokenize``: text to token shards for training, on all cores."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from tinytron.data.shards import split_of
from tinytron.text.options import parse_options
from tinytron.text.tokenize import tokenize_dataset
from tinytron.utils.signals import StopRequest

DESCRIPTION = """Text to token shards for training, on all cores.

{prog} --dataset_path corpus.jsonl --tokenizer_name gpt2
{prog} --dataset_path my_texts/ --train_bpe 16384 --val_fraction 0.01
{prog} --dataset_path HuggingFaceFW/fineweb-edu --dataset_name sample-10BT --streaming \\
    --encoding_name gpt2 --output_dir data/fineweb-edu

Interrupted? The same command continues. Afterwards: tinytron data info data/corpus
"""


def main(argv: Sequence[str] | None = None, prog: str = "tinytron tokenize") -> int:
    """Options of ``argv`` (default: the command line) -> shards, and how to train on them. Returns 0, or 128 and the signal
    that stopped it. Raises: TinytronError."""
    options = parse_options(argv, DESCRIPTION.format(prog=prog), prog)
    stop = StopRequest()
    with stop.listening():
        outcome = tokenize_dataset(options, stop)
    manifest = outcome.manifest
    if manifest is None:
        name = signal.Signals(outcome.received).name
        print(f"stopped by {name}; the same command continues where it was", file=sys.stderr, flush=True)
        return 128 + outcome.received
    if not outcome.fresh:
        print(f"{outcome.folder} is there already: nothing to do")
        return 0
    for split, tokens in manifest.tokens.items():
        shards = len(manifest.shards_of(split))
        documents = manifest.documents[split]
        print(f"{split}: {documents:,} documents, {tokens:,} tokens, {shards} shards in {outcome.folder}")
    if not any(split_of(shard.name) == "train" for shard in manifest.shards):
        print("these are validation shards: move them into the folder of the training shards, and train with --do_val")
        return 0
    vocab_size = -(-manifest.tokenizer.vocab_size // 64) * 64
    print(f"train with: python pretrain_debug.py --dataset_path {outcome.folder} --vocab_size {vocab_size}")
    return 0
