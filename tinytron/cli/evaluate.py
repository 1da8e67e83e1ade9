"""``tinytron evaluate --checkpoint log/<run> --tasks FILE.jsonl --data PATH``: score a model on multiple-choice tasks and
registered evaluations, and measure its loss on held-out data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tinytron.errors import ConfigError
from tinytron.evaluation.held_out import default_seq_len, held_out, measure
from tinytron.evaluation.kinds import ChoiceFile
from tinytron.evaluation.named import find_evaluations
from tinytron.evaluation.report import RESULTS, run_all, run_one, shown, write_results
from tinytron.evaluation.sources import DataSource, Measured, data_sources
from tinytron.evaluation.subject import Subject
from tinytron.evaluation.validate import ValResult, total
from tinytron.interop.open import CHECKPOINT_HELP, local_checkpoint, open_model
from tinytron.model import GPT
from tinytron.registry import load_module
from tinytron.text.run_tokenizer import RunTokenizer, tokenizer_of_run
from tinytron.utils.flags import Parser, parse_strictly, whole_number
from tinytron.utils.paths import expanded, user_path
from tinytron.utils.texts import table
from tinytron.utils.training import DTYPES, device_of


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        usage="%(prog)s --checkpoint MODEL --data PATH --tasks FILE [--flag value ...]",
        description="""Score a trained model on multiple-choice items, or measure its loss on held-out data.

%(prog)s --checkpoint log/my_run --data data/corpus
%(prog)s --checkpoint openai-community/gpt2 --tasks arc_easy.jsonl
%(prog)s --checkpoint openai-community/gpt2 --evaluations winogrande sst2 --eval_length 200
""",
    )
    add = parser.add_argument
    add("--checkpoint", type=expanded, required=True, metavar="MODEL", help=CHECKPOINT_HELP)
    add(
        "--tasks",
        type=user_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of items, one JSON object per line",
    )
    add(
        "--evaluations",
        nargs="+",
        default=[],
        metavar="NAME",
        help="registered evaluations; tinytron jobs --evaluations lists them",
    )
    add("--eval_length", type=whole_number, default=-1, metavar="N", help="items of each evaluation; default: all")
    add(
        "--eval_data_dir",
        type=user_path,
        metavar="DIR",
        help="local data of evaluations, such as DIR/mnli.jsonl; default: the hub",
    )
    add("--load", action="append", default=[], metavar="MODULE", help="import this, which registers your evaluations")
    add(
        "--data",
        type=expanded,
        nargs="+",
        default=[],
        metavar="PATH",
        help="measure the loss on this data: folders or patterns of token shards, text files (.txt, .jsonl, .parquet), "
        "URLs of either, or mixture files (.json)",
    )
    add(
        "--text_key",
        default="text",
        metavar="KEY",
        help="key of the text in a .jsonl or .parquet row",
    )
    add("--seq_len", type=whole_number, help="tokens per sample of --data; default: as in training, but at most 4096")
    add("--tokenizer", type=user_path, metavar="FILE", help="a tokenizer.json; default: the one next to the run's data")
    add(
        "--out",
        type=user_path,
        metavar="FILE",
        help="default: results.json next to a local checkpoint, otherwise in the current folder",
    )
    add("--batch_tokens", type=whole_number, default=8192, help="tokens per forward pass, including padding")
    add("--device", help="default: cuda if there is a GPU, else cpu")
    add("--dtype", choices=DTYPES, help="data type of the weights; default: the one stored in the checkpoint")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score the tasks, measure the loss, write and return the results. Raises: TinytronError; OSError (a full disk)."""
    if args.batch_tokens < 1:
        raise ConfigError(f"--batch_tokens {args.batch_tokens} must be at least 1")
    if not args.tasks and not args.data and not args.evaluations:
        raise ConfigError("nothing to evaluate; give --tasks FILE.jsonl, --evaluations NAME, --data PATH, or several")
    if args.eval_length < -1 or args.eval_length == 0:
        raise ConfigError(f"--eval_length {args.eval_length} must be at least 1; leave it out to use all items")
    for module in args.load:
        load_module(module)
    names = [path.stem for path in args.tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--tasks has two files called {min(twice)}, and results go by file name; rename one")
    tasks = [ChoiceFile(path) for path in args.tasks]
    named = find_evaluations(args.evaluations, args.eval_length, args.eval_data_dir)
    if twice := {one.name for one in named} & set(names):
        raise ConfigError(f"--tasks and --evaluations both have a {min(twice)}; rename the file")
    data = data_sources(args.data, say=print) if args.data else None
    source = local_checkpoint(args.checkpoint, say=print)
    is_here = Path(args.checkpoint.removeprefix("file://")).exists()
    model, config = open_model(source, device_of(args.device), DTYPES.get(args.dtype), say=print)
    content: dict[str, Any] = {
        "checkpoint": str(source) if is_here else args.checkpoint,
        "torch": str(torch.__version__),
    }
    if tasks or named:
        tokenizer = tokenizer_of_run(config, args.tokenizer, source)
        subject = Subject.of_checkpoint(model, tokenizer, args.batch_tokens)
        for evaluation in [*tasks, *named]:
            evaluation.prepare(tokenizer, subject.longest)
        content["results"] = {task.name: _answer(task, subject) for task in tasks}
        if named:
            content["results"] |= (found := run_all(named, subject))
            print(shown(found))
    if data is not None:
        content["data"] = _measure(args, data, model, config, source)
    beside = source if source.is_dir() else source.parent
    out = args.out or (beside if is_here else Path()) / RESULTS
    write_results(out, content)
    print(f"wrote {out}")
    return content


def _answer(task: ChoiceFile, subject: Subject) -> dict[str, Any]:
    """The accuracies of one task file."""
    found = dict(run_one(task, subject).more)
    print(
        f"{task.name}: accuracy {found['accuracy']:.4f} ± {found['accuracy_stderr']:.4f}, per token "
        f"{found['accuracy_per_token']:.4f}, per byte {found['accuracy_per_byte']:.4f} over {found['items']} items"
    )
    return found


def _measure(
    args: argparse.Namespace, data: Measured, model: GPT, config: dict[str, Any], checkpoint: Path
) -> dict[str, Any]:
    """The loss on ``--data``, in total and per source. Token shards need no tokenizer."""
    longest = model.config.block_size
    seq_len = default_seq_len(config, longest) if args.seq_len is None else args.seq_len
    if not 1 <= seq_len <= longest:
        raise ConfigError(f"--seq_len {seq_len} must be 1 to {longest}, the longest sequence that the model accepts")
    tokenizer: RunTokenizer | None = None
    try:
        tokenizer = tokenizer_of_run(config, args.tokenizer, checkpoint)
    except ConfigError:
        if args.tokenizer is not None or any(source.split is None for source in data.sources):
            raise
    batches = [
        held_out(source, model, config, tokenizer, seq_len, args.batch_tokens, args.text_key) for source in data.sources
    ]  # open all sources first, so that an error in the last one is reported before the first is measured
    results = [measure(model, of_source) for of_source in batches]
    if not data.several:
        return {**_report_one(data.sources[0], results[0], seq_len), "seq_len": seq_len}
    whole = total([result.sums for result in results]).result()
    _report_all(data, results, whole, seq_len)
    by_source = {
        source.name: {"path": source.path, "split": source.split, **result.fields()}
        for source, result in zip(data.sources, results, strict=True)
    }
    return {"seq_len": seq_len, **whole.fields(), "sources": by_source, "left_out": list(data.left_out)}


def _report_one(source: DataSource, result: ValResult, seq_len: int) -> dict[str, Any]:
    """Print the loss on one source, and return it."""
    found = result.fields()
    bits = "" if "bits_per_byte" not in found else f", {found['bits_per_byte']:.4f} bits per byte"
    what = "" if source.split is None else f" ({source.split} split)"
    print(
        f"{source.path}{what}: loss {found['loss']:.4f} nats per token, perplexity {found['perplexity']:.4f}{bits} over "
        f"{found['tokens']:,} tokens in samples of {seq_len}"
    )
    return {"path": source.path, "split": source.split, **found}


def _report_all(data: Measured, results: Sequence[ValResult], whole: ValResult, seq_len: int) -> None:
    """Print a table with one row per source, and a row for the total."""

    def row(name: str, split: str, fields: Mapping[str, Any]) -> tuple[str, ...]:
        bits = fields.get("bits_per_byte")
        numbers = (f"{fields[key]:.4f}" for key in ("loss", "perplexity"))
        return name, split, f"{fields['tokens']:,}", *numbers, "-" if bits is None else f"{bits:.4f}"

    rows = [
        ("source", "split", "tokens", "loss", "perplexity", "bits per byte"),
        *(row(s.name, s.split or "-", r.fields()) for s, r in zip(data.sources, results, strict=True)),
        row("total", "", whole.fields()),
    ]
    print("\n".join(table(rows, right=range(2, 6))))
    print(f"loss in nats per token, in samples of {seq_len} tokens; every token has the same weight in the total")
    for name in data.left_out:
        print(f"{name} has no validation shards and is left out, as in the validation of a training run")


def main(argv: Sequence[str], prog: str = "tinytron evaluate") -> None:
    """Score the tasks and measure the data that ``argv`` names, and write the results. Raises: TinytronError; OSError."""
    run(parse_strictly(_parser(prog), argv))
