"""torchrun, without its traceback: ``python -m tinytron.cli.launch [torchrun options] script.py [arguments]``.

The same options, agents and environment as ``torchrun``. A worker that fails has said why, so only its exit status is
passed on; one that a signal killed could not, so that is said here.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str] | None = None) -> None:
    """Launch the workers and exit with the first failed one's status."""
    args = torchrun.parse_args(sys.argv[1:] if argv is None else argv)
    # What torchrun would set to 1, with a warning, for more than one worker.
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads_per_worker(args)))
    # A store of their own for restarted workers: in the shared one gloo finds the addresses of those before (torch 2.13).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="torch.distributed")
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        print(f"error: process {rank} was killed by {name}{hint}", file=sys.stderr, flush=True)
        sys.exit(128 - failure.exitcode)
    except SignalException as stop:
        print(f"stopped by {stop.sigval.name}", file=sys.stderr, flush=True)
        sys.exit(128 + stop.sigval.value)


def _threads_per_worker(args: argparse.Namespace) -> int:
    workers = int(args.nproc_per_node) if str(args.nproc_per_node).isdecimal() else 1
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // workers)


if __name__ == "__main__":
    main()
