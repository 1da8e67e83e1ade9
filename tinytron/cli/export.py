"""``tinytron export``: write a checkpoint as a folder that transformers opens, or as a GGUF file for llama.cpp."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace

from tinytron.data.manifest import TOKENIZER
from tinytron.errors import ConfigError
from tinytron.interop.adapters import export_adapters
from tinytron.interop.export import export
from tinytron.interop.gguf import KINDS, export_gguf
from tinytron.interop.open import CHECKPOINT_HELP
from tinytron.interop.tokenizer import TokenizerFiles
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.paths import expanded, user_path
from tinytron.utils.texts import counted, next_generation
from tinytron.utils.training import DTYPES

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SHARD = "5GB"


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description="""Write a checkpoint as a folder that transformers opens, or (--gguf) as a file for llama.cpp.

%(prog)s --checkpoint log/my_run --out my_model
%(prog)s --checkpoint log/my_run --out my_model.gguf --gguf f16
""",
    )
    parser.add_argument(
        "--checkpoint",
        type=expanded,
        required=True,
        metavar="MODEL",
        help=CHECKPOINT_HELP,
    )
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="PATH", help="new folder; with --gguf a new file"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="data type of the weights; default: as stored")
    parser.add_argument(
        "--tokenizer",
        type=user_path,
        metavar="PATH",
        help="tokenizer.json, or a folder with a tokenizer; default: the one of the run, its training data or the model",
    )
    parser.add_argument("--max_shard_size", type=byte_count, metavar="SIZE", help=f"largest file; default: {_SHARD}")
    parser.add_argument("--ema", action="store_true", help="write the averaged weights of a run with --ema_decay")
    parser.add_argument(
        "--gguf", choices=KINDS, help="write one GGUF file for llama.cpp, with weights of this data type"
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="write the LoRA adapters alone, for the peft package, not the merged model",
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="with --adapters: the model to load them on; default: the run's --init_from"
    )
    return parser


def byte_count(text: str) -> int:
    """Bytes of ``5GB``, ``300MB``, ``2GiB``, or a plain number. Raises: argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"invalid size: {text!r}; use 5GB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def main(argv: Sequence[str], prog: str = "tinytron export") -> None:
    """Write the checkpoint that ``argv`` names. Raises: TinytronError; OSError."""
    args = parse_strictly(_parser(prog), argv)
    if args.gguf is not None:
        _main_gguf(args)
        return
    if args.adapters or args.base is not None:
        _main_adapters(args)
        return
    made = export(
        args.checkpoint,
        args.out,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        tokenizer=args.tokenizer,
        max_shard_size=byte_count(_SHARD) if args.max_shard_size is None else args.max_shard_size,
        say=print,
        averaged=args.ema,
        progress=True,
    )
    files = counted(made.files, "file")
    print(f"wrote {args.out}: {made.architecture}, {made.tensors} tensors, {made.bytes:,} bytes in {files}")
    for line in (about_tokens(made.tokenizer), *made.changes):
        print(line)
    if any(path.name == TOKENIZER for path in made.tokenizer.files):  # the only form that generate reads
        print(next_generation(args.out))


def _main_gguf(args: argparse.Namespace) -> None:
    if args.ema:
        raise ConfigError(
            f"--ema writes folders, and --gguf {args.gguf} a file; export a folder with --ema, and then that folder with "
            "--gguf"
        )
    for flag in ("dtype", "max_shard_size"):
        if getattr(args, flag) is not None:
            raise ConfigError(
                f"--{flag} applies to folders, but --gguf {args.gguf} writes one file; drop one of the two"
            )
    made = export_gguf(args.checkpoint, args.out, args.gguf, tokenizer=args.tokenizer, say=print)
    print(f"wrote {args.out}: {made.architecture}, {made.tensors} tensors in {args.gguf}, {made.bytes:,} bytes")
    left_out = f"; {made.left_out:,} rows without a token are left out" if made.left_out else ""
    print(about_tokens(replace(made.tokenizer, unused=())) + left_out)


def _main_adapters(args: argparse.Namespace) -> None:
    if not args.adapters:
        raise ConfigError(f"--base {args.base} is the model below adapters; add --adapters, or drop it")
    for flag in ("dtype", "max_shard_size", "tokenizer"):
        if getattr(args, flag) is not None:
            raise ConfigError(
                f"--{flag} applies to whole models, but --adapters writes adapters alone; drop one of the two"
            )
    made = export_adapters(args.checkpoint, args.out, base=args.base, say=print)
    print(
        f"wrote {args.out}: {counted(made.adapters, 'adapter')} of {made.base}, {made.bytes:,} bytes; open it with peft"
    )


def about_tokens(tokenizer: TokenizerFiles) -> str:
    """A line about the token that ends a document, and about embedding rows that no token uses."""
    end, unused = tokenizer.facts.end, len(tokenizer.unused)
    if end is None:
        ends = "no end-of-text token is known, so generation does not stop by itself; --tokenizer can provide one"
    else:
        name = end if tokenizer.end_token is None else f"{tokenizer.end_token} ({end})"
        ends = f"generation stops at {name}"
    return ends + (f"; {unused:,} ids have no token and are suppressed (generation_config.json)" if unused else "")
