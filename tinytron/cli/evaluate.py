"""``tinytron evaluate --checkpoint log/<run> --tasks FILE.jsonl``: multiple-choice tasks on a trained model."""

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
from tinytron.evaluation.choices import encode_items, log_probs, read_items, summarize
from tinytron.inference.engine import not_finite
from tinytron.interop.open import model_source, open_model
from tinytron.model.modules.loss import LossSums
from tinytron.text.run_tokenizer import tokenizer_of_run
from tinytron.utils.flags import Parser, parse_strictly, whole_number
from tinytron.utils.paths import user_path
from tinytron.utils.training import DTYPES, device_of, write_atomically


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description="Answer multiple-choice items with a trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=user_path, required=True, metavar="PATH", help=CHECKPOINT_HELP)
    add("--tasks", type=user_path, nargs="+", required=True, metavar="FILE", help="files of items, a line of JSON each")
    add("--tokenizer", type=user_path, metavar="FILE", help="a tokenizer.json; default: the one beside the run's data")
    add("--out", type=user_path, metavar="FILE", help="default: results.json beside the checkpoint")
    add("--batch_tokens", type=whole_number, default=8192, help="tokens computed at a time, padding included")
    add("--device", help="default: cuda if there is a GPU, else cpu")
    add("--dtype", choices=DTYPES, help="precision of weights; default: that of the file")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Answer the tasks, write and return the results. Raises: TinytronError; OSError if the file cannot be written."""
    if args.batch_tokens < 1:
        raise ConfigError(f"--batch_tokens {args.batch_tokens} must be at least 1")
    names = [path.stem for path in args.tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--tasks has two files called {min(twice)}, one name in the results; rename one")
    tasks = {path.stem: read_items(path) for path in args.tasks}
    source = model_source(args.checkpoint)
    device = device_of(args.device)
    model, config = open_model(source, device, DTYPES.get(args.dtype), say=print)
    tokenizer, longest = tokenizer_of_run(config, args.tokenizer, args.checkpoint), model.config.block_size

    def loss(batch: Batch) -> LossSums:
        sums: LossSums = model(batch.input_ids, batch.labels)
        return sums

    results: dict[str, Any] = {}
    for name, items in tasks.items():
        rows = encode_items(items, tokenizer, longest)
        scores = log_probs(model, loss, rows, longest=longest, tokens_per_batch=args.batch_tokens, device=device)
        if not all(map(math.isfinite, scores)):
            raise not_finite(f"scores of the task {name}", next(model.parameters()).dtype)
        results[name] = found = summarize(items, rows, scores)
        print(
            f"{name}: accuracy {found['accuracy']:.4f} ± {found['accuracy_stderr']:.4f}, per token "
            f"{found['accuracy_per_token']:.4f}, per byte {found['accuracy_per_byte']:.4f} over {found['items']} items"
        )
    content = {"checkpoint": str(source), "torch": str(torch.__version__), "results": results}
    out = args.out or (source if source.is_dir() else source.parent) / "results.json"
    write_atomically(out, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))
    print(f"wrote {out}")
    return content


def main(argv: Sequence[str], prog: str = "tinytron evaluate") -> None:
    """Answer the tasks that ``argv`` names, and write the results. Raises: TinytronError; OSError."""
    run(parse_strictly(_parser(prog), argv))
