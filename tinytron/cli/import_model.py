"""``tinytron import``: turn a Hugging Face model into a folder for ``--init_from``."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

from tinytron.interop.importing import import_model
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.model import count_parameters
from tinytron.utils.paths import user_path
from tinytron.utils.training import DTYPES


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Convert a Hugging Face model to a folder for --init_from.")
    parser.add_argument("model", metavar="MODEL", help="folder, or name on the hub, such as openai-community/gpt2")
    parser.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="new folder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="data type of the weights")
    return parser


def main(argv: Sequence[str], prog: str = "tinytron import") -> None:
    """Convert the model that ``argv`` names. Raises: TinytronError; OSError."""
    args = parse_strictly(_parser(prog), argv)
    model = import_model(args.model, args.out, DTYPES[args.dtype], say=functools.partial(print, file=sys.stderr))
    print(f"wrote {args.out}: {count_parameters(model.config).total:,} parameters; use --init_from {args.out}")
