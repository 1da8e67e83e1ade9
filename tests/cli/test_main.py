"""The ``tinytron`` command: what it lists, how it finds a subcommand, and the ways in which all of them end."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, TINY
from tinytron import __version__
from tinytron.cli import entry
from tinytron.cli.main import COMMANDS, main
from tinytron.errors import ConfigError

SHORT: tuple[object, ...] = (*TINY, "--max_steps", 2, "--debug")


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = said(capsys, *words)
    assert (status, err) == (0, "")
    listed = re.findall(r"^  (\S+)  ", out, flags=re.MULTILINE)
    assert listed == list(COMMANDS)


def test_every_module_of_the_package_is_a_command_or_named_here() -> None:
    modules = {path.stem for path in (ROOT / "tinytron" / "cli").glob("*.py")}
    assert modules - {command.module for command in COMMANDS.values()} == {
        "__init__",
        "chat",
        "child",
        "config_tables",
        "elastic",
        "entry",
        "front_end",
        "gpt2fun",
        "main",
        "nodes",
        "quiet_torch",
        "timl",
        "timl_translation",
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_under_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: tinytron {name} " in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version") == (0, f"tinytron {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("evalute",), "unknown command evalute; did you mean evaluate?; see tinytron --help"),
        (("--checkpoint", "x"), "unknown command --checkpoint; did you mean checkpoint?; see tinytron --help"),
        (("zzz",), "unknown command zzz; see tinytron --help"),
        (
            ("data", "verfy", "x"),
            "argument COMMAND: invalid choice: 'verfy' (choose from 'info', 'verify'); see --help",
        ),
        (("checkpoint", "inspect", "x", "--jsn"), "unknown argument --jsn; did you mean --json?; see --help"),
        (("pretrain", "--hiden_size", "3"), "unknown argument --hiden_size; did you mean --hidden_size?; see --help"),
        (
            ("export", "--out", "x", "--checkpont", "y"),
            "the following arguments are required: --checkpoint; see --help",
        ),
        (
            ("checkpoint", "prune", "x", "--keep_last", 1, "--dry"),
            "unknown argument --dry; did you mean --dry_run?; see --help",
        ),
        (
            ("launch", "--nproc_per_node", 2),
            "the following arguments are required: training_script, training_script_args; see --help",
        ),
    ],
)
def test_a_users_error_is_one_line_and_status_2(
    words: tuple[object, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, *words) == (2, "", f"error: {line}\n")


def test_training_starts_without_what_it_needs_later() -> None:
    """torch.distributed.checkpoint takes as long to import as half of torch."""
    code = (
        "import sys, tinytron.training, tinytron.cli.launch; late = ('torch.distributed.checkpoint', 'transformers', "
        "'torch._dynamo', 'matplotlib', 'datasets', 'wandb', 'tensorboard'); print([m for m in late if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help_imports_no_torch() -> None:
    """It answers at once."""
    code = (
        "import sys; from tinytron.cli.main import main; main(['--help']); main(['zzz']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.sample(3)
@pytest.mark.usefixtures("real_processes")
def test_a_command_alone_imports_what_it_uses(name: str) -> None:
    """In most tests its process has already imported much of Tinytron."""
    command = [sys.executable, "-m", "tinytron", name, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=_clean(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_plan_is_the_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    status, planned, _ = said(capsys, "plan", *TINY)
    assert status == 0
    assert "parameters" in planned
    assert said(capsys, "pretrain", *TINY, "--dry_run") == (0, planned, "")


@pytest.mark.slow
def test_two_processes_train_through_the_one_door(tmp_path: Path) -> None:
    logs = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "tinytron"]
        if processes > 1:
            command += ["launch", "--standalone", "--nproc_per_node", str(processes), "-m", "tinytron"]
        command += ["pretrain", *map(str, SHORT), "--log_dir", str(tmp_path / str(processes))]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**_clean(), "CUDA_VISIBLE_DEVICES": ""}
        )
        assert done.returncode == 0, done.stderr
        (log,) = (tmp_path / str(processes)).glob("*/log.txt")
        logs.append([float(line.split()[2]) for line in log.read_text().splitlines() if " train " in line])
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert len(logs[0]) == 2


# Ends.


def _raises(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("--x 1 must be 2"), 2, "error: --x 1 must be 2"),
        (ConfigError("Caught in a worker.\ntinytron.errors.ConfigError: --x 1 must be 2"), 2, "error: --x 1 must be 2"),
        (
            PermissionError(errno.EACCES, "Permission denied", "results.json"),
            2,
            "error: [Errno 13] Permission denied: 'results.json'",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_end_in_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.status_of(_raises(error)) == status
    assert capsys.readouterr() == ("", f"{line}\n")


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), ConnectionResetError("no file of the user's")])
def test_a_fault_of_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        entry.status_of(_raises(error))


def test_a_closed_pipe_ends_quietly_with_the_status_of_sigpipe() -> None:
    """As ``tinytron ... | head -1`` does; the status is what a shell shows of a tool that SIGPIPE ended."""
    code = (
        "from tinytron.cli import entry\nentry.run(lambda: [print('line', flush=True) for _ in range(10**5)] and None)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.stderr is not None
    assert (process.wait(timeout=60), process.stderr.read()) == (141, b"")
    process.stderr.close()


def test_ctrl_c_ends_in_one_line_and_status_130() -> None:
    code = "import time\nfrom tinytron.cli import entry\nprint('up', flush=True)\nentry.run(lambda: time.sleep(60))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)  # until it sleeps
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"interrupted\n")


def _clean() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_has_no_code_for_is_shown_as_an_escape(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generated text may have any character, and the name of a file any bytes."""
    text = "café 猫 d\udce9"
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))

    def command() -> None:
        print(text)
        print(text, file=sys.stderr)

    entry.run(command)
    sys.stderr.flush()
    expected = text.encode(encoding, "backslashreplace") + b"\n"
    assert sys.stdout.buffer.getvalue() == sys.stderr.buffer.getvalue() == expected  # type: ignore[attr-defined]
