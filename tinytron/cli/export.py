"""``tinytron export``: a checkpoint as a folder that transformers opens."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from tinytron.interop.export import export
from tinytron.interop.tokenizer import TokenizerFiles
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.paths import user_path
from tinytron.utils.training import DTYPES

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Write a checkpoint as a folder that transformers opens.")
    parser.add_argument(
        "--checkpoint",
        type=user_path,
        required=True,
        metavar="PATH",
        help="run folder (its newest checkpoint), <step>_model.pt, or <step>_consolidated.pt",
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="new folder")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as they are")
    parser.add_argument(
        "--tokenizer",
        type=user_path,
        metavar="PATH",
        help="tokenizer.json, or a folder with a tokenizer; default: that of the training data, if it is there",
    )
    parser.add_argument(
        "--max_shard_size", type=byte_count, default=byte_count("5GB"), metavar="SIZE", help="of one file; default: 5GB"
    )
    return parser


def byte_count(text: str) -> int:
    """``5GB``, ``300MB``, ``2GiB``, or plain bytes. Raises: argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"invalid size: {text!r}; use 5GB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def main(argv: Sequence[str], prog: str = "tinytron export") -> None:
    """Write the checkpoint that ``argv`` names. Raises: TinytronError; OSError."""
    args = parse_strictly(_parser(prog), argv)
    made = export(
        args.checkpoint,
        args.out,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        tokenizer=args.tokenizer,
        max_shard_size=args.max_shard_size,
    )
    files = f"{made.files} file{'s' if made.files > 1 else ''}"
    print(f"wrote {args.out}: {made.family.architecture}, {made.tensors} tensors, {made.bytes:,} bytes in {files}")
    for line in (about_tokens(made.tokenizer), *made.changes):
        print(line)


def about_tokens(tokenizer: TokenizerFiles) -> str:
    """A line on the token that ends a document, and on rows of the model that no token has."""
    end, unused = tokenizer.facts.end, len(tokenizer.unused)
    if end is None:
        ends = "no end-of-text token is known: generation does not stop by itself; --tokenizer may tell it"
    else:
        name = end if tokenizer.end_token is None else f"{tokenizer.end_token} ({end})"
        ends = f"generation stops at {name}"
    return ends + (f"; {unused:,} ids have no token and are suppressed (generation_config.json)" if unused else "")
