"""``tinytron repl``: a Jupyter notebook on a host, with its chips and the code, reached through a tunnel."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tinytron.cli.submit import add_choice, add_hardware, environment_of, request_of, rule_of
from tinytron.dispatch.hosts import Host, State, host_of
from tinytron.dispatch.reading import read_settings
from tinytron.dispatch.record import Submission
from tinytron.dispatch.script import TOKEN
from tinytron.dispatch.ship import pack
from tinytron.dispatch.submit import Order, submit_all
from tinytron.dispatch.work import Work
from tinytron.errors import ConfigError, HostError
from tinytron.utils.flags import Parser, parse_strictly

_DESCRIPTION = """Open a Jupyter notebook on a host of your settings. Ctrl-C ends it.

%(prog)s --chip h100 -n 1
"""
_LOOK_SECONDS = 2.0
_REOPEN_SECONDS = 5.0
_ANSWER_SECONDS = 60.0


def main(argv: Sequence[str], prog: str = "tinytron repl") -> None:
    """Start Jupyter on a host and stay until Ctrl-C. Raises: TinytronError."""
    common = ("chip", "n_chips", "target", "env", "dirty", "port", "startup_timeout", "dispatch")
    parser = Parser(prog=prog, description=_DESCRIPTION, common=common)
    add_hardware(parser, default="1")
    add_choice(parser)
    parser.add_argument("--port", type=int, default=8888, help="port of this machine (default: 8888)")
    parser.add_argument(
        "--startup_timeout",
        type=float,
        default=3600,
        metavar="SECONDS",
        help="longest wait for the host, its queue and its environment (default: 3600)",
    )
    args = parse_strictly(parser, argv)
    if not 1 <= args.port < 2**16:
        raise ConfigError(f"--port {args.port} must be in 1..65535; use 8888")
    _check_free(args.port)
    token = secrets.token_urlsafe(24)
    order = Order(request_of(args, 1, None), rule_of(args), environment_of(args.env), {TOKEN: token})
    settings, shipment = read_settings(args.dispatch), pack(Path.cwd(), args.dirty)
    (submission,) = submit_all([Work("repl", (), notebook=True)], settings, order, shipment, os.environ)
    host = host_of(submission)
    try:
        state = _started(host, submission, args.startup_timeout)
        _stay(host, submission, state, args.port, token)
    finally:
        host.cancel(submission)
        print(f"stopped Jupyter on {submission.host}", flush=True)


def _check_free(port: int) -> None:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"--port {port} is in use on this machine; use another one, such as {port + 1}"
            ) from error


def _started(host: Host, submission: Submission, seconds: float) -> State:
    """The state once Jupyter runs. Raises: HostError if it does not within ``seconds``."""
    end, said = time.monotonic() + seconds, ""
    while True:
        (state,) = host.states([submission])
        if state.state == "running" and state.port is not None:
            return state
        if state.state in ("failed", "lost", "finished", "cancelled"):
            raise HostError(f"Jupyter did not start on {host.name}; see tinytron logs {submission.place}")
        if time.monotonic() > end:
            raise HostError(
                f"Jupyter did not start on {host.name} within {seconds:g} s ({state.state}); use a longer --startup_timeout"
            )
        if state.state != said:
            print(f"{host.name}: {state.state}", flush=True)
            said = state.state
        time.sleep(_LOOK_SECONDS)


def _stay(host: Host, submission: Submission, state: State, port: int, token: str) -> None:
    """Keep a tunnel open, also after this machine was asleep, until Jupyter ends."""
    assert state.port is not None, "it has started"
    local = host.shell.ssh is None
    # A job of a scheduler may be on any node; a plain host's Jupyter listens there only.
    node = state.node if host.queues else "127.0.0.1"
    at = f"{node}:{state.port}" if local else f"127.0.0.1:{port}"
    address, there = at.rsplit(":", 1)
    said = False
    while True:
        process = None if local else host.shell.tunnel(port, node, state.port)
        try:
            if not said and _answers(address, int(there), process):
                print(f"Jupyter: http://{at}/lab?token={token} (Ctrl-C ends it)", flush=True)
                said = True
            _wait(process)
        finally:
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait()
        with contextlib.suppress(HostError):  # no connection: try again
            if host.states([submission])[0].state != "running":
                print("Jupyter has ended", flush=True)
                return


def _answers(address: str, port: int, tunnel: subprocess.Popen[bytes] | None) -> bool:
    """Wait until ``port`` takes connections. False if the tunnel closes before, or after ``_ANSWER_SECONDS``."""
    end = time.monotonic() + _ANSWER_SECONDS
    while time.monotonic() < end and (tunnel is None or tunnel.poll() is None):
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
            return True
        time.sleep(0.2)
    return False


def _wait(process: subprocess.Popen[bytes] | None) -> None:
    """Wait until the tunnel closes, and for some seconds, after which a new one may be opened."""
    if process is not None:
        process.wait()
    time.sleep(_REOPEN_SECONDS)
