"""torchrun, without its traceback: ``python -m tinytron.cli.launch [torchrun options] script.py [arguments]``.

The same options, agents and environment as ``torchrun``; a worker that fails has said why, so only its exit status is
passed on.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str] | None = None) -> None:
    """Launch the workers and exit with the first failed one's status."""
    args = torchrun.parse_args(sys.argv[1:] if argv is None else argv)
    # What torchrun would set to 1, with a warning, for more than one worker.
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads_per_worker(args)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="torch.distributed")
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


def _threads_per_worker(args: argparse.Namespace) -> int:
    workers = int(args.nproc_per_node) if str(args.nproc_per_node).isdecimal() else 1
    return max(1, len(os.sched_getaffinity(0)) // workers)


if __name__ == "__main__":
    main()
