"""Signals to real processes, by every way they may come, and a run that hangs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, Finished, descendants, finish, kill, losses, read_logs, run_well, start, train
from tinytron.training import Trainer

Pools = Callable[[int], Ranks]
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
LONG = (*TINY, "--max_steps", 10**6, "--log_dir", "log", "--log_every", 10, "--save_every_steps", 10**5)
# Printed if the step takes two seconds.
HEARD = "Ctrl-C: the run saves and ends after this step; press Ctrl-C again to end it at once\n"
HANG = """
import time
from tinytron.cli import entry
from tinytron.training import Trainer, build_config, parse_args


class Hanging(Trainer):
    def train_step(self, microbatches):
        if self.step == 2 and self.state.rank == 1:
            print("hanging", flush=True)
            time.sleep(600)
        super().train_step(microbatches)


if __name__ == "__main__":
    entry.run(lambda: Hanging(build_config(parse_args())).train())
"""


def _wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _reach(line: str, process: subprocess.Popen[str]) -> None:
    """Read what ``process`` prints up to ``line``."""
    assert process.stdout is not None
    while process.stdout.readline() != f"{line}\n":
        assert process.poll() is None


def _training(cwd: Path) -> bool:
    return any((cwd / "log").glob("tiny_*/log.txt"))


def _workers(process: subprocess.Popen[str]) -> list[int]:
    """The ranks below a launcher."""
    below = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return [pid for pid in below if b"pretrain_debug" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _stop(
    cwd: Path, number: signal.Signals, to: str, *flags: object, launcher: str = "tinytron.cli.launch"
) -> Finished:
    """Start two ranks, send ``number`` once they train, and wait for the end."""
    process = start(*LONG, *flags, cwd=cwd, processes=2, launcher=launcher)
    try:
        _wait_for(lambda: _training(cwd), process)
        everybody = [process.pid, *descendants(process.pid)]
        for pid in {"launcher": [process.pid], "one rank": _workers(process)[1:2], "everybody": everybody}[to]:
            os.kill(pid, number)
        return finish(process, timeout=60)
    finally:
        kill(process)


@pytest.mark.parametrize(
    ("number", "to", "flags"),
    [
        pytest.param(USR1, "launcher", (), id="usr1_launcher", marks=pytest.mark.slow),
        pytest.param(TERM, "everybody", ("--num_workers", 1), id="term_everybody"),
        pytest.param(TERM, "launcher", (), id="term_launcher", marks=pytest.mark.slow),
        pytest.param(USR1, "one rank", (), id="usr1_one_rank", marks=pytest.mark.slow),
        pytest.param(USR1, "everybody", ("--num_workers", 1), id="usr1_everybody", marks=pytest.mark.slow),
        pytest.param(INT, "launcher", ("--num_workers", 1), id="ctrl_c_launcher"),
        pytest.param(INT, "one rank", (), id="ctrl_c_one_rank", marks=pytest.mark.slow),
        pytest.param(INT, "everybody", ("--num_workers", 1), id="ctrl_c_everybody", marks=pytest.mark.slow),
    ],
)
@pytest.mark.sample(1)
def test_a_signal_saves_and_ends_in_one_line(
    tmp_path: Path, number: signal.Signals, to: str, flags: tuple[object, ...]
) -> None:
    finished = _stop(tmp_path, number, to, *flags)
    assert finished.code == (130 if number == INT else 0)
    assert finished.stderr in ("", HEARD if number == INT else "")
    folder = next((tmp_path / "log").glob("tiny_*"))
    last = list(losses(read_logs(folder)[0]))[-1]
    name = "Ctrl-C" if number == INT else number.name
    assert [re.sub(r" in [\d.]+ s$", "", line) for line in finished.stdout.splitlines()[-2:]] == [
        f"step {last} | saved {folder.relative_to(tmp_path)}/{last:05}_model.pt",
        f"step {last} | stopped by {name}: saved; run the same command again to resume",
    ]
    assert [p.name for p in folder.glob("*_meta.pt")] == [f"{last:05}_meta.pt"]


SLOW_STEP = """
import sys, time
from tinytron.cli import entry
from tinytron.training import Trainer, build_config, parse_args


class Slow(Trainer):
    def train_step(self, microbatches):
        if self.step == 2:
            print("slow", flush=True)
            time.sleep(4 if "finishes" in sys.argv[0] else 600)
        super().train_step(microbatches)


if __name__ == "__main__":
    entry.run(lambda: Slow(build_config(parse_args())).train())
"""


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path: Path, processes: int) -> None:
    (tmp_path / "slow.py").write_text(SLOW_STEP)
    process = start(*LONG, cwd=tmp_path, processes=processes, script=tmp_path / "slow.py")
    try:
        _reach("slow", process)
        process.send_signal(INT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(INT)
        finished = finish(process, timeout=20)
    finally:
        kill(process)
    assert finished.code == 130
    second = f"second {'SIGTERM' if processes else 'SIGINT'}: leaving at once"
    assert finished.stderr.replace(HEARD, "").strip() == second  # from one process, though all leave
    assert not list(tmp_path.glob("log/*/*_meta.pt"))


@pytest.mark.slow  # the step has to be longer than the run's patience
def test_ctrl_c_in_a_long_step_is_acknowledged(tmp_path: Path) -> None:
    (tmp_path / "finishes.py").write_text(SLOW_STEP)
    process = start(*LONG, cwd=tmp_path, script=tmp_path / "finishes.py")
    try:
        _reach("slow", process)
        process.send_signal(INT)
        finished = finish(process, timeout=60)
    finally:
        kill(process)
    assert finished.code == 130
    assert finished.stderr == HEARD
    assert "stopped by Ctrl-C: saved; run the same command again to resume" in finished.stdout


@pytest.mark.usefixtures("real_processes")
def test_ctrl_c_before_training_is_one_line_for_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import time\nfrom tinytron.cli import entry\nentry.run(lambda: print('up', flush=True) or time.sleep(60))\n"
    )
    process = start(cwd=tmp_path, processes=2, script=tmp_path / "script.py")
    try:
        _reach("up", process)
        _reach("up", process)
        time.sleep(0.5)
        process.send_signal(INT)
        finished = finish(process, timeout=30)
    finally:
        kill(process)
    assert (finished.code, finished.stderr) == (130, "interrupted\n")


THREADS = """
import os, signal, sys
from pathlib import Path
from tinytron.cli import entry
from tinytron.training import Trainer, build_config, parse_args


class Stopped(Trainer):
    def train_step(self, microbatches):
        super().train_step(microbatches)
        if "stopped" in sys.argv[0] and self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    entry.run(lambda: Stopped(build_config(parse_args())).train())
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    Path(f"threads{os.environ['RANK']}").write_text(str(sorted(set(names))))
"""


@pytest.mark.parametrize("name", ["ended", "stopped"])
@pytest.mark.sample(1)
@pytest.mark.slow
def test_threads_of_process_groups_end_before_the_interpreter(tmp_path: Path, name: str) -> None:
    """One that frees a tensor while the interpreter shuts down would abort the process."""
    (tmp_path / f"{name}.py").write_text(THREADS)
    run_well(*LONG, "--max_steps", 3, cwd=tmp_path, processes=2, script=tmp_path / f"{name}.py")
    left = [(tmp_path / f"threads{rank}").read_text() for rank in (0, 1)]
    assert not [text for text in left if "gloo" in text], left


@pytest.mark.slow
def test_the_same_command_goes_on(ranks: Pools, tmp_path: Path) -> None:
    """A stopped and resumed run logs what one that was left alone does."""
    flags = ("--max_steps", 150, "--save_every_steps", 0)
    stopped = _stop(tmp_path, TERM, "launcher", *flags)
    (meta,) = (tmp_path / "log").glob("tiny_*/*_meta.pt")
    assert 1 < int(meta.name[:5]) < 150, stopped
    resumed = run_well(*LONG, *flags, cwd=tmp_path, processes=2)
    assert f"resuming after step {int(meta.name[:5])} from" in resumed.stdout
    unbroken = ranks(2).run(train, Trainer, tmp_path / "unbroken", "--log_every", 10, *flags)[0]
    assert read_logs(meta.parent)[0] == unbroken.log


@pytest.mark.slow
def test_plain_torchrun_saves_too(tmp_path: Path) -> None:
    finished = _stop(tmp_path, TERM, "launcher", launcher="torch.distributed.run")
    assert finished.code == 1  # torchrun's own
    assert "stopped by SIGTERM: saved; run the same command again to resume" in finished.stdout
    assert any((tmp_path / "log").glob("tiny_*/*_meta.pt"))


@pytest.mark.slow  # tests/utils has its parts
def test_a_run_that_hangs_is_described_and_can_be_ended(tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    process = start(*LONG, "--step_timeout", 1, cwd=tmp_path, processes=2, script=tmp_path / "hang.py")
    try:
        _wait_for(lambda: _training(tmp_path), process)
        stacks = [path.parent / f"stacks_rank{rank}.txt" for path in tmp_path.glob("log/*/log.txt") for rank in (0, 1)]
        _wait_for(lambda: all(path.exists() and "train_step" in path.read_text() for path in stacks), process)
        time.sleep(1.5)  # it would speak again by now
        process.send_signal(TERM)
        time.sleep(0.3)
        process.send_signal(USR1)
        finished = finish(process, timeout=30)
    finally:
        kill(process)
    assert finished.code == 128 + USR1
    lines = sorted(line for line in finished.stderr.splitlines() if line.startswith("rank"))
    assert [line.split(":")[0] for line in lines] == ["rank 0", "rank 1"], finished.stderr
    assert "after step 2; waits in all_reduce, called at tinytron/distributed/collectives.py" in lines[0]
    assert "after step 2; is at tinytron/training/trainer.py" in lines[1]
    assert "hang.py" in stacks[1].read_text()


IGNORES_NOTHING = "import os, time; os.write(1, b'ready\\n'); time.sleep(60)"  # at once: two write to one pipe


@pytest.mark.slow
def test_a_script_that_does_not_train_is_ended(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(IGNORES_NOTHING)
    process = start(cwd=tmp_path, processes=2, script=tmp_path / "script.py")
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(USR1)
        finished = finish(process, timeout=30)
    finally:
        kill(process)
    assert (finished.code, finished.stderr) == (128 + USR1, "stopped by SIGUSR1\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent died")
def test_workers_of_a_killed_launcher_save_and_end(tmp_path: Path) -> None:
    process = start(*LONG, cwd=tmp_path, processes=2)
    _wait_for(lambda: _training(tmp_path), process)
    workers = _workers(process)
    assert len(workers) == 2
    process.kill()
    try:
        stdout, _ = process.communicate(timeout=60)  # until the workers, which have the same pipe, end
    finally:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert "stopped by SIGTERM: saved; run the same command again to resume" in stdout
    assert list(tmp_path.glob("log/*/*_meta.pt"))
