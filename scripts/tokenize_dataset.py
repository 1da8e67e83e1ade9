"""Text to token shards for training, on all cores.

python scripts/tokenize_dataset.py --dataset_path corpus.jsonl --tokenizer_name gpt2
python scripts/tokenize_dataset.py --dataset_path my_texts/ --train_bpe 16384 --val_fraction 0.01
python scripts/tokenize_dataset.py --dataset_path HuggingFaceFW/fineweb-edu --dataset_name sample-10BT --streaming \\
    --encoding_name gpt2 --output_dir data/fineweb-edu

Interrupted? The same command continues. Afterwards: python -m tinytron.data info data/corpus
"""

from __future__ import annotations

import signal
import sys

from tinytron.cli import entry
from tinytron.text.options import parse_options
from tinytron.text.tokenize import tokenize_dataset
from tinytron.utils.signals import STOP_SIGNALS, StopRequest


def main() -> None:
    """Options -> shards, and how to train on them."""
    options = parse_options(description=__doc__)
    stop = StopRequest()
    with stop.listening((*STOP_SIGNALS, signal.SIGINT)):
        outcome = tokenize_dataset(options, stop)
    manifest = outcome.manifest
    if manifest is None:
        name = signal.Signals(outcome.received).name
        print(f"stopped by {name}; the same command continues where it was", file=sys.stderr, flush=True)
        sys.exit(128 + outcome.received)
    if not outcome.fresh:
        print(f"{outcome.folder} is there already: nothing to do")
        return
    for split, tokens in manifest.tokens.items():
        shards = len(manifest.shards_of(split))
        print(
            f"{split}: {manifest.documents[split]:,} documents, {tokens:,} tokens, {shards} shards in {outcome.folder}"
        )
    vocab_size = -(-manifest.tokenizer.vocab_size // 64) * 64
    print(f"train with: python pretrain_debug.py --dataset_path {outcome.folder} --vocab_size {vocab_size}")


if __name__ == "__main__":
    entry.run(main)
