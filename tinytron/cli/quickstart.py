"""``tinytron quickstart``: the whole pipeline in one command, as scripts/quickstart/pretrain.sh runs it.

Text -> tokenizer -> token shards -> a trained GPT -> samples and a loss curve. Without --data the text is the source code
of Python's standard library, which every machine has. Further flags go to the training (--max_steps 500). After an
interruption the same command continues.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tinytron.cli.child import run_child
from tinytron.cli.run import processes
from tinytron.training import build_config, parse_args
from tinytron.utils.flags import Parser, whole_number
from tinytron.utils.optional import require_package
from tinytron.utils.signals import INTERRUPTED

EXTRA = "quickstart"


def main(argv: Sequence[str], prog: str = "tinytron quickstart") -> int:
    """Prepare, train, report. Returns the exit status. Raises: TinytronError."""
    parser = Parser(prog=prog, usage="%(prog)s [--data PATH] [--flag value ...]", description=__doc__)
    parser.add_argument("--data", help="text file or folder; default: Python's standard library")
    parser.add_argument("--out", type=Path, default=Path("data/quickstart"), help="where the token shards go")
    parser.add_argument("--vocab_size", type=whole_number, default=4096, help="size of the tokenizer's vocabulary")
    args, own = parser.parse_known_args(argv)
    for package in ("tokenizers", "matplotlib"):  # not after minutes of training
        require_package(package, EXTRA)
    from tinytron.quickstart.prepare import training_flags
    from tinytron.quickstart.report import report

    workers = _workers(processes())
    flags = ["--log_dir", "log/quickstart", *training_flags(args.data, args.out, args.vocab_size, workers), *own]
    config = build_config(parse_args(flags, prog=prog))
    launched = ["launch", "--standalone", "--nproc_per_node", str(workers), "-m", "tinytron", "pretrain", *flags]
    status, received = run_child([sys.executable, "-m", "tinytron", *launched])
    if status < 0:
        return 128 - status
    if status == 0 and signal.SIGINT in received:
        return INTERRUPTED
    if status == 0 and not received:
        report(config)
    return status


def _workers(most: int) -> int:
    """The largest power of two up to ``most``, so that it divides the batch."""
    return 1 << (most.bit_length() - 1)
