"""Models out and in: ``python -m tinytron.interop export|import``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tinytron.interop.export import DTYPES, export
from tinytron.interop.importing import import_model
from tinytron.utils.flags import Parser
from tinytron.utils.model import count_parameters
from tinytron.utils.tools import run_tool

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def build_parser() -> argparse.ArgumentParser:
    """One subcommand per direction; ``args.tool`` runs it."""
    parser = Parser(prog="python -m tinytron.interop", description="Models to and from Hugging Face's formats.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "write a checkpoint as a folder that transformers opens"
    command = commands.add_parser("export", help=text, description=text)
    command.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="PATH",
        help="run folder (its newest checkpoint), <step>_model.pt, or <step>_consolidated.pt",
    )
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder")
    command.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as they are")
    command.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer.json, or a folder with a tokenizer; default: that of the training data, if it is there",
    )
    command.add_argument(
        "--max_shard_size", type=byte_count, default=byte_count("5GB"), metavar="SIZE", help="of one file; default: 5GB"
    )
    command.set_defaults(tool=_export)

    text = "write a Hugging Face model as a folder for --init_from"
    command = commands.add_parser("import", help=text, description=text)
    command.add_argument("model", metavar="MODEL", help="folder, or name on the hub such as openai-community/gpt2")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder")
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of the weights; default: fp32")
    command.set_defaults(tool=_import)
    return parser


def byte_count(text: str) -> int:
    """``5GB``, ``300MB``, ``2GiB``, or plain bytes. Raises: argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"invalid size: {text!r}; use 5GB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _export(args: argparse.Namespace) -> None:
    made = export(
        args.checkpoint,
        args.out,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        tokenizer=args.tokenizer,
        max_shard_size=args.max_shard_size,
    )
    files = f"{made.files} file{'s' if made.files > 1 else ''}"
    print(f"wrote {args.out}: {made.family.architecture}, {made.tensors} tensors, {made.bytes:,} bytes in {files}")


def _import(args: argparse.Namespace) -> None:
    model = import_model(args.model, args.out, DTYPES[args.dtype])
    print(f"wrote {args.out}: {count_parameters(model.config).total:,} parameters; use --init_from {args.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (default: the command line) name; returns the exit status: 0, or 2 after an error,
    which is one line."""
    return run_tool(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
