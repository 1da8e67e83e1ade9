"""Training runs: on the live ranks, and as processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinytron.checkpoint.host_buffers import HostBuffers
from tinytron.checkpoint.snapshot import consolidated_weights
from tinytron.errors import TinytronError
from tinytron.training import Config, Trainer, build_config, parse_args

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "pretrain_debug.py"

# A model of 6,000 parameters and 4 steps of 8 samples of 12 tokens; exact enough to compare layouts.
TINY: tuple[object, ...] = (
    *("--exp_name", "tiny", "--use_mock_data", "--mock_data_num_samples", 32, "--precision", "fp32"),
    *("--total_batch_size", 96, "--batch_size", 2, "--seq_len", 12, "--block_size", 12, "--vocab_size", 61),
    *("--num_layer", 2, "--num_attention_heads", 4, "--num_key_value_heads", 2, "--hidden_size", 16),
    *("--intermediate_size", 24, "--init_std", 0.1, "--max_lr", 0.01, "--warmup_steps", 1),
)


_TIMED = ("tokens_per_second", "mfu", "phases", "peak_memory_gib", "slowest_rank", "slowest_excess", "hidden_exchange")


def config_of(*flags: object) -> Config:
    """The configuration that the command line ``flags`` gives."""
    return build_config(parse_args([str(flag) for flag in flags]))


@dataclass
class Run:
    """What a trainer left behind, as seen by one rank; the logs are read by the master."""

    folder: Path
    step: int
    log: str
    records: list[dict[str, Any]]
    extra: Any


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights of the model with all its experts, on the master; empty on other ranks. Collective."""
    trainer.optimizer.finish_gather()
    return consolidated_weights(trainer.raw_model, trainer.state, HostBuffers())


def train(cls: type[Trainer], log_dir: Path, *flags: object) -> Run:
    """Train ``cls`` with the TINY configuration and ``flags``. A job for the pool; ``extra`` is ``cls``'s own report."""
    trainer = cls(config_of(*TINY, "--log_dir", log_dir, *flags))
    trainer.train()
    report = getattr(trainer, "report", None)
    extra = report() if callable(report) else None
    if not trainer.master_process:
        return Run(trainer.log_dir, trainer.step, "", [], extra)
    log, records = read_logs(trainer.log_dir)
    return Run(trainer.log_dir, trainer.step, log, records, extra)


def read_logs(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """The text of log.txt and the records of log.jsonl."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return (folder / "log.txt").read_text(), records


def untimed(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records without the numbers that depend on the clock and the machine."""
    return [{name: value for name, value in record.items() if name not in _TIMED} for record in records]


def losses(log: str, stage: str = "train") -> dict[int, float]:
    """The losses of one stage by step. Raises: AssertionError if a step stands there twice."""
    lines = [line.split() for line in log.splitlines()]
    found = [(int(step), float(loss)) for step, what, loss in lines if what == stage]
    assert len(dict(found)) == len(found), f"a step is logged twice:\n{log}"
    return dict(found)


def user_error(cls: type[Trainer], log_dir: Path, *flags: object) -> str:
    """The TinytronError that ``train`` ends in, as ``Type: text``; empty if it does not. A job for the pool."""
    try:
        train(cls, log_dir, *flags)
    except TinytronError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@dataclass
class Finished:
    """How a process ended."""

    code: int
    stdout: str
    stderr: str


def start(
    *arguments: object,
    cwd: Path,
    processes: int = 0,
    script: Path = SCRIPT,
    launcher: str = "tinytron.cli.launch",
    launcher_flags: tuple[str, ...] = (),
    env: Mapping[str, str | None] | None = None,
) -> subprocess.Popen[str]:
    """Start ``script`` with plain python, or for ``processes`` under ``launcher``. ``env`` adds to the
    environment, or removes what is None."""
    prefix = ["-m", launcher, "--standalone", *launcher_flags, "--nproc_per_node", str(processes)] if processes else []
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables: dict[str, str | None] = {**os.environ, **fixed, **(env or {})}
    return subprocess.Popen(
        [sys.executable, *prefix, str(script), *(str(a) for a in arguments)],
        cwd=cwd,
        env={k: v for k, v in variables.items() if v is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 180) -> Finished:
    """Wait for the end. Raises: AssertionError if that takes more than ``timeout`` seconds; all is killed then."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        stdout, stderr = process.communicate()
        raise AssertionError(f"hang: no end after {timeout:g} s\n{stdout}\n{stderr}") from None
    return Finished(process.returncode, stdout, stderr)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process and all its descendants (the launcher gives workers sessions of their own)."""
    if process.poll() is not None:
        return  # its number may be somebody else's by now
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The process's children, their children, and so on."""
    children = [int(c) for path in Path(f"/proc/{pid}/task").glob("*/children") for c in path.read_text().split()]
    return [*children, *(d for child in children for d in descendants(child))]


def free_port() -> int:
    """A port of this machine that no program uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def run(*arguments: object, cwd: Path, processes: int = 0, timeout: float = 180, **options: Any) -> Finished:
    """``start`` and ``finish``."""
    return finish(start(*arguments, cwd=cwd, processes=processes, **options), timeout)


def run_ranks(*arguments: object, cwd: Path, world: int, env: Mapping[str, str | None] | None = None) -> Finished:
    """``run`` on ``world`` ranks without a launcher: the first one that fails ends the others. What all print is joined."""
    if world == 1:
        return run(*arguments, cwd=cwd, env=env)
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})} for rank in range(world)]
    started = [start(*arguments, cwd=cwd, env=own) for own in variables]
    deadline = time.monotonic() + 180
    while not any(codes := [process.poll() for process in started]) and None in codes and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in started:
        kill(process)
    outputs = [process.communicate() for process in started]
    stdout, stderr = ("".join(texts) for texts in zip(*outputs, strict=True))
    assert any(codes) or None not in codes, f"hang: no end of {world} ranks\n{stdout}\n{stderr}"
    return Finished(next((code for code in codes if code), 0), stdout, stderr)


def run_well(*arguments: object, cwd: Path, **options: Any) -> Finished:
    """``run``, and the process must succeed."""
    finished = run(*arguments, cwd=cwd, **options)
    assert finished.code == 0, f"exit status {finished.code}\n{finished.stdout}\n{finished.stderr}"
    return finished


def follow(printed: str) -> str:
    """The output of the command that ``printed`` ends with, as a user would type it."""
    last = printed.splitlines()[-1]
    assert last.startswith("next: ")
    done = subprocess.run(
        last.removeprefix("next: "), shell=True, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
