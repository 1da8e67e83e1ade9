"""``tinytron evaluate --checkpoint log/<run> --tasks FILE.jsonl --data PATH``: a model's answers to multiple-choice tasks,
and its loss on held-out data."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from tinytron.cli.generate import CHECKPOINT_HELP
from tinytron.data import Batch
from tinytron.errors import ConfigError
from tinytron.evaluation.choices import Item, encode_items, log_probs, read_items, summarize
from tinytron.evaluation.held_out import default_seq_len, held_out, is_texts, measure
from tinytron.inference.engine import not_finite
from tinytron.interop.open import model_source, open_model
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
from tinytron.text.run_tokenizer import RunTokenizer, tokenizer_of_run
from tinytron.utils.flags import Parser, parse_strictly, whole_number
from tinytron.utils.paths import user_path
from tinytron.utils.training import DTYPES, device_of, write_atomically


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description="Answer multiple-choice items with a trained model, or measure its loss on held-out data.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=user_path, required=True, metavar="PATH", help=CHECKPOINT_HELP)
    add("--tasks", type=user_path, nargs="+", default=[], metavar="FILE", help="files of items, a line of JSON each")
    add(
        "--data",
        type=user_path,
        metavar="PATH",
        help="measure the loss on this: a folder or pattern of token shards, or a file of text (.txt, .jsonl, .parquet)",
    )
    add(
        "--text_key",
        default="text",
        metavar="KEY",
        help="key of the text in a row of a .jsonl or .parquet file",
    )
    add("--seq_len", type=whole_number, help="tokens per sample of --data; default: as trained, or at most 4096")
    add("--tokenizer", type=user_path, metavar="FILE", help="a tokenizer.json; default: the one beside the run's data")
    add("--out", type=user_path, metavar="FILE", help="default: results.json beside the checkpoint")
    add("--batch_tokens", type=whole_number, default=8192, help="tokens computed at a time, padding included")
    add("--device", help="default: cuda if there is a GPU, else cpu")
    add("--dtype", choices=DTYPES, help="precision of weights; default: that of the file")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Answer the tasks, measure the loss, write and return the results. Raises: TinytronError; OSError (a full disk)."""
    if args.batch_tokens < 1:
        raise ConfigError(f"--batch_tokens {args.batch_tokens} must be at least 1")
    if not args.tasks and args.data is None:
        raise ConfigError("nothing to evaluate; give --tasks FILE.jsonl, --data PATH, or both")
    names = [path.stem for path in args.tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--tasks has two files called {min(twice)}, one name in the results; rename one")
    tasks = {path.stem: read_items(path) for path in args.tasks}
    source = model_source(args.checkpoint)
    model, config = open_model(source, device_of(args.device), DTYPES.get(args.dtype), say=print)
    content: dict[str, Any] = {"checkpoint": str(source), "torch": str(torch.__version__)}
    if tasks:
        tokenizer = tokenizer_of_run(config, args.tokenizer, args.checkpoint)
        content["results"] = {
            name: _answer(name, items, model, tokenizer, args.batch_tokens) for name, items in tasks.items()
        }
    if args.data is not None:
        content["data"] = _measure(args, model, config)
    out = args.out or (source if source.is_dir() else source.parent) / "results.json"
    write_atomically(out, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))
    print(f"wrote {out}")
    return content


def _answer(name: str, items: list[Item], model: GPT, tokenizer: RunTokenizer, batch_tokens: int) -> dict[str, Any]:
    """The accuracies of one task."""

    def loss(batch: Batch) -> LossSums:
        sums: LossSums = model(batch.input_ids, batch.labels)
        return sums

    longest, weight = model.config.block_size, model.lm_head.weight
    rows = encode_items(items, tokenizer, longest)
    scores = log_probs(model, loss, rows, longest=longest, tokens_per_batch=batch_tokens, device=weight.device)
    if not all(map(math.isfinite, scores)):
        raise not_finite(f"scores of the task {name}", weight.dtype)
    found = summarize(items, rows, scores)
    print(
        f"{name}: accuracy {found['accuracy']:.4f} ± {found['accuracy_stderr']:.4f}, per token "
        f"{found['accuracy_per_token']:.4f}, per byte {found['accuracy_per_byte']:.4f} over {found['items']} items"
    )
    return found


def _measure(args: argparse.Namespace, model: GPT, config: dict[str, Any]) -> dict[str, Any]:
    """The loss on ``--data``. Token shards need no tokenizer."""
    longest = model.config.block_size
    seq_len = default_seq_len(config, longest) if args.seq_len is None else args.seq_len
    if not 1 <= seq_len <= longest:
        raise ConfigError(f"--seq_len {seq_len} must be 1 to {longest}, the longest sequence that the model reads")
    tokenizer: RunTokenizer | None = None
    try:
        tokenizer = tokenizer_of_run(config, args.tokenizer, args.checkpoint)
    except ConfigError:
        if args.tokenizer is not None or is_texts(args.data):
            raise
    data = held_out(args.data, model, config, tokenizer, seq_len, args.batch_tokens, args.text_key)
    found = measure(model, data).fields()
    bits = "" if "bits_per_byte" not in found else f", {found['bits_per_byte']:.4f} bits per byte"
    what = "" if data.split is None else f" ({data.split} split)"
    print(
        f"{args.data}{what}: loss {found['loss']:.4f} nats per token, perplexity {found['perplexity']:.4f}{bits} over "
        f"{found['tokens']:,} tokens in samples of {seq_len}"
    )
    return {"path": str(args.data), "split": data.split, "seq_len": seq_len, **found}


def main(argv: Sequence[str], prog: str = "tinytron evaluate") -> None:
    """Answer the tasks and measure the data that ``argv`` names, and write the results. Raises: TinytronError; OSError."""
    run(parse_strictly(_parser(prog), argv))
