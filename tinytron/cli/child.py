"""A command of ours that runs as a child process of another one."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

from tinytron.utils.signals import heard


def run_child(command: Sequence[str]) -> tuple[int, list[int]]:
    """Run ``command`` and wait for it. Stop signals are forwarded to it, so that it can save. Returns its exit status
    (negative: the signal that killed it), and the signals received (it may still have finished)."""
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: object) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    old = {number: signal.signal(number, forward) for number in heard()}
    try:
        process = subprocess.Popen(command)
        for number in received:  # signals that arrived while the process was being started
            process.send_signal(number)
        return process.wait(), received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
