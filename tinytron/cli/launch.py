"""``tinytron launch [torchrun options] script.py [arguments]``: torchrun, without its traceback.

Takes the same options, and uses the same agents and environment, as ``torchrun``. A worker that fails has already printed
why, so only its exit status is passed on. A worker that a signal killed could not, so the launcher says so. SIGTERM,
SIGUSR1 and Ctrl-C are forwarded to the workers, which save and exit by themselves, however long that takes; torchrun would
kill them after 30 seconds. A second Ctrl-C reaches them as SIGTERM, which also ends workers that hang before training.
"""

from __future__ import annotations

from tinytron.cli import quiet_torch  # noqa: F401  # isort: skip  # before torch

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server import local_elastic_agent
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from tinytron.cli import entry
from tinytron.cli.elastic import is_elastic, make_elastic, numbers_of_nodes
from tinytron.errors import ConfigError, first_line
from tinytron.utils.flags import Parser
from tinytron.utils.launcher import ELASTIC, LAUNCHER, check_meeting_place
from tinytron.utils.signals import SAME_SIGNAL_SECONDS, heard

# Time from SIGTERM to SIGKILL for the workers that remain when one has failed: without that one they cannot save anyway.
_FAILED_GRACE_SECONDS = "10"
_LEAVE_SECONDS = 10.0  # maximum wait of the first node for the others to leave the store that it hosts
_NETWORK_BACKENDS = ("c10d", "etcd", "etcd-v2", "static")  # others may give --rdzv_endpoint another meaning
_DESCRIPTION = """Start a script on several processes: torchrun, which takes the same flags.

%(prog)s --standalone --nproc_per_node 8 -m tinytron pretrain --preset gpt2
%(prog)s --nnodes 2 --node_rank 0 --master_addr host0 --master_port 29500 \\
    --nproc_per_node 8 pretrain_debug.py --preset 1b
"""
_COMMON = (
    *("training_script", "training_script_args", "standalone", "nproc_per_node", "nnodes", "node_rank", "master_addr"),
    *("master_port", "module", "max_restarts"),
)


class _Forwarder:
    """Starts torchrun's workers, and then forwards stop signals to them instead of ending the agent."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._starting = False
        self._workers: PContext | None = None
        self._start = local_elastic_agent.start_processes
        self._numbers = heard()
        for number in self._numbers:
            signal.signal(number, self._forward)

    def workers(self) -> PContext | None:
        """The workers that were started last."""
        return self._workers

    def start_processes(self, *args: Any, **kwargs: Any) -> PContext:
        """The agent's call that starts its workers, and restarts them. It comes from the main thread, and has to: workers
        are told when the thread that started them ends (``stop_with_launcher``)."""
        assert threading.current_thread() is threading.main_thread(), "other threads may end before the launcher"
        self.stop_if_asked()
        self._starting = True  # an exception now would leave workers behind that no process stops
        self._workers = self._start(*args, **kwargs)
        self._starting = False
        for number in self._numbers:  # again: torchrun has just installed its own handlers
            signal.signal(number, self._forward)
        if self.received is not None:
            self._send(self.received)
        return self._workers

    def _forward(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            if time.monotonic() - self._received_at < SAME_SIGNAL_SECONDS[signal.SIGINT]:
                return
            number = signal.SIGTERM
        else:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
        if self._starting:
            return
        if self._workers is None:
            self.stop_if_asked()
            return
        self._send(number)

    def _send(self, number: int) -> None:
        assert self._workers is not None, "workers must be running"
        for pid in self._workers.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop_if_asked(self) -> None:
        """Raises: SignalException if a stop signal has come."""
        if self.received is not None:
            raise SignalException(f"got {self.received.name}", self.received)


def keep_the_store(wait_for_all: Callable[[SimpleElasticAgent], None]) -> Callable[[SimpleElasticAgent], None]:
    """torchrun's barrier at the end, after which the first node also waits until the others have left it.

    The first node's agent hosts the store in which the agents meet. Without the wait it can exit while another agent is
    still reading that the barrier is passed; that agent then prints a traceback after a run without errors.
    """

    def wait_and_leave(agent: SimpleElasticAgent) -> None:
        wait_for_all(agent)
        group, store = agent._worker_group, agent._store
        assert store is not None, "the barrier has used it"
        with contextlib.suppress(RuntimeError):  # the store is gone: no agent is left to wait for
            left = store.add("tinytron/left", 1)
            end = time.monotonic() + _LEAVE_SECONDS
            while group.group_rank == 0 and left < group.group_world_size and time.monotonic() < end:
                time.sleep(0.02)
                left = store.add("tinytron/left", 0)

    return wait_and_leave


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Launch the workers and exit with the status of the first that fails. Raises: ConfigError for bad torchrun options."""
    args = _parse(sys.argv[1:] if argv is None else argv, prog)
    if not {"-h", "--help", "--help-all"}.isdisjoint(args.training_script_args):
        args.standalone, args.nproc_per_node, args.nnodes = True, "1", "1"  # the script's help, once
    _check_meeting_place(args)
    elastic = is_elastic(args)
    if not (args.module or args.no_python or Path(args.training_script).exists()):
        raise ConfigError(
            f"{args.training_script} does not exist; give a script, or -m and a module such as -m tinytron"
        )
    # torchrun would set this to 1, with a warning, for more than one worker.
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads_per_worker(args)))
    # A new store for restarted workers: in the shared one, gloo finds the addresses of their predecessors (torch 2.13).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # torch sets the level of each by itself
            logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="torch.distributed")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _FAILED_GRACE_SECONDS)
    os.environ[LAUNCHER] = str(os.getpid())
    forwarder = _Forwarder()
    local_elastic_agent.start_processes = forwarder.start_processes
    if elastic:
        os.environ[ELASTIC] = "1"
        make_elastic(forwarder.workers, forwarder.stop_if_asked, entry.USER_ERROR)
    SimpleElasticAgent._exit_barrier = keep_the_store(SimpleElasticAgent._exit_barrier)  # type: ignore[method-assign]
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        _exit_failed(error, forwarder.received)
    except SignalException as stop:
        _exit_stopped_by(stop.sigval)
    except (DistError, RendezvousError) as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"--master_port {args.master_port} (MASTER_PORT) is in use by another program; use another number, or on "
                "one node --standalone, which finds a free port"
            ) from error
        _exit_alone(error, args, started=forwarder.workers() is not None)
    except ValueError as error:  # an invalid option
        raise ConfigError(f"{error}; see --help") from error


def _exit_failed(error: ChildFailedError, received: signal.Signals | None) -> NoReturn:
    """End as the worker that failed first; ``received`` is the signal that stopped this launcher."""
    rank, failure = error.get_first_failure()
    if received is not None and failure.exitcode == -received:
        _exit_stopped_by(received)  # the worker had not begun to train
    if received == signal.SIGINT:
        sys.exit(128 + signal.SIGINT)
    if failure.exitcode >= 0:
        sys.exit(failure.exitcode)
    name = signal.Signals(-failure.exitcode).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    print(f"error: process {rank} was killed by {name}{hint}", file=sys.stderr, flush=True)
    sys.exit(128 - failure.exitcode)


def _exit_alone(error: Exception, args: argparse.Namespace, *, started: bool) -> NoReturn:
    """End because the launchers cannot meet (again); ``started``: this one has had workers."""
    place = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}"
    again = "start the same command on all nodes again"
    if not isinstance(error, RendezvousConnectionError):
        text = f"the launchers did not meet at {place} ({first_line(error)}); {again}"
    elif started:
        text = f"the node {place} where the launchers meet is gone; {again}"
    else:
        text = f"the node {place} where the launchers meet does not answer, or is gone; {again}"
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(1)


def _parse(argv: Sequence[str], prog: str | None) -> argparse.Namespace:
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--flag value ...] SCRIPT [ARGUMENT ...]",
        description=_DESCRIPTION,
        common=_COMMON,
        parents=[torchrun.get_args_parser()],
        conflict_handler="resolve",  # both have --help
        allow_abbrev=True,  # as torchrun does
    )
    return parser.parse_args(argv)


def _check_meeting_place(args: argparse.Namespace) -> None:
    """Raises: ConfigError for an address, a port or a number of nodes with which torchrun would wait forever."""
    several = numbers_of_nodes(str(args.nnodes))[1] > 1
    if args.standalone and several:
        raise ConfigError(
            f"--standalone starts the processes of one node, but --nnodes (PET_NNODES) is {args.nnodes}; use --nnodes 1, "
            "or leave --standalone out"
        )
    if args.standalone:
        return
    if args.rdzv_endpoint:
        if args.rdzv_backend in _NETWORK_BACKENDS and "store_type=file" not in args.rdzv_conf:
            try:
                host, _ = parse_rendezvous_endpoint(args.rdzv_endpoint, default_port=0)
            except ValueError as error:
                raise ConfigError(
                    f"--rdzv_endpoint {args.rdzv_endpoint} must be HOST:PORT; use the name of a node that stays, such as "
                    "--rdzv_endpoint node0:29400"
                ) from error
            check_meeting_place(host, None, several=several, flag="--rdzv_endpoint")
    elif args.rdzv_backend == "static":
        check_meeting_place(args.master_addr, args.master_port, several=several)


def _exit_stopped_by(number: signal.Signals) -> NoReturn:
    print(f"stopped by {number.name}", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def _threads_per_worker(args: argparse.Namespace) -> int:
    workers = int(args.nproc_per_node) if str(args.nproc_per_node).isdecimal() else 1
    affinity = getattr(os, "sched_getaffinity", None)  # does not exist on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // workers)


if __name__ == "__main__":
    entry.run(main)
