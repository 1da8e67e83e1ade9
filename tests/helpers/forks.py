"""Python programs as forks of one process that has imported torch and tinytron, which would take each of them 5 s or more.

After ``install``, ``subprocess.Popen`` asks a server for every ``python script.py`` and ``python -m tinytron ...``. The
server forks a process that becomes the program: with its arguments, variables, folder, streams and signals, and an end that
is the interpreter's own. It is a child of the process that asked, so pids, signals, exit statuses and /proc are as ever.
A ``-m`` program has a server of its own, for the workers that a launcher starts.

Everything else starts as before: ``-c``, other executables and options, modules of another folder, and variables that
matter while Python or torch starts. So does everything inside ``real_processes()`` or with TINYTRON_TESTS_FORK=0.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import ctypes
import fcntl
import gc
import importlib
import inspect
import io
import json
import multiprocessing.process
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[2])
# Python, torch and the libraries below them read these before a program's first line.
_AT_START = (
    *("PYTHON", "LANG", "LC_", "LD_", "MALLOC_", "GLIBC_", "TZ", "TMPDIR", "LOGLEVEL", "OMP_", "GOMP_", "KMP_"),
    *("MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "ATEN_", "NPY_", "NUMPY_"),
    *("TORCH", "PYTORCH_", "TRITON_", "KINETO_", "FX_", "COMPILE_"),
)
# Except these, which the launcher sets for its workers: torch reads them where it uses them.
_LATER = ("PYTHONPATH", "TORCHELASTIC_", "TORCH_ELASTIC_", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_NCCL_")
_SET_CHILD_SUBREAPER = 36  # prctl
_ROOM = 8192  # for the arguments of programs in /proc/PID/cmdline
_HIGH = 200  # file descriptors that no program counts on


@dataclass(frozen=True)
class Program:
    """One program as ``subprocess`` starts it."""

    argv: list[str]  # as in sys.orig_argv
    cwd: str
    env: dict[str, str]
    new_session: bool
    ignored: list[int]  # signals

    @property
    def unbuffered(self) -> bool:
        return self.argv[1:2] == ["-u"]

    @property
    def words(self) -> list[str]:
        """``script.py ...`` or ``-m module ...``."""
        return self.argv[2 if self.unbuffered else 1 :]

    @property
    def module(self) -> str:
        return self.words[1] if self.words[:1] == ["-m"] and len(self.words) > 1 else ""

    def is_ours(self) -> bool:
        """True for what a server can become: a script, or a module of tinytron or torch's launcher."""
        if self.module:
            return self.module.split(".")[0] == "tinytron" or self.module == "torch.distributed.run"
        return bool(self.words) and self.words[0].endswith(".py") and os.path.isfile(self.script())

    def script(self) -> str:
        return os.path.join(self.cwd, self.words[0])

    def path(self) -> list[str]:
        """The folders that Python puts before its own in sys.path."""
        first = self.cwd if self.module else os.path.dirname(os.path.realpath(self.script()))
        listed = self.env.get("PYTHONPATH")
        folders = listed.split(":") if listed else []
        return [first, *(os.path.normpath(os.path.join(self.cwd, folder)) for folder in folders)]


def program_of(options: Mapping[str, Any]) -> Program | None:
    """The program that ``Popen._execute_child`` is to start with ``options``; None if a server cannot be it."""
    words, env = options["args"], options["env"]
    if isinstance(words, (str, bytes, os.PathLike)) or options["shell"] or not options["close_fds"]:
        return None
    argv = [os.fsdecode(word) for word in words]
    unusual = ("preexec_fn", "pass_fds", "gid", "gids", "uid")
    if any(options[name] for name in unusual) or options["umask"] != -1 or options.get("process_group", -1) != -1:
        return None
    if argv[:1] != [sys.executable] or options["executable"] not in (None, argv[0]):
        return None
    variables = {os.fsdecode(k): os.fsdecode(v) for k, v in (os.environ if env is None else env).items()}
    here = os.getcwd()
    cwd = here if options["cwd"] is None else os.path.join(here, os.fsdecode(options["cwd"]))
    ignored = [int(s) for s in signal.valid_signals() if signal.getsignal(s) == signal.SIG_IGN]
    program = Program(argv, cwd, variables, options["start_new_session"], ignored)
    return program if program.is_ours() and os.path.isdir(cwd) else None


class Server:
    """The other end of a socket: a process that forks. Used by the process that made it, not by forks of that."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env, self._owner, self._lock = env, os.getpid(), threading.Lock()
        self._socket: socket.socket | None = None
        self._pid = 0
        self._libc = ctypes.CDLL(None)

    def fork(self, program: Program, streams: list[int]) -> int:
        """The pid of ``program``, a child of this process, with ``streams`` as 0, 1 and 2; 0: the server cannot be it."""
        if os.getpid() != self._owner:
            return 0
        with self._lock:
            if self._socket is None and self._pid == 0:
                self._start()
            if self._socket is None:
                return 0
            try:
                self._libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
                return _ask(self._socket, program, streams)
            except BaseException:  # a signal handler's: the next answer could be this one's
                self._socket = None
                raise
            finally:  # other orphans are not ours to wait for
                self._libc.prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            end = theirs.fileno()
            command = [sys.executable, __file__, str(end), " " * _ROOM]
            null = subprocess.DEVNULL
            process = subprocess.Popen(command, pass_fds=[end], env=self._env, cwd=ROOT, stdin=null, stdout=null)
        process.returncode = 0  # nothing polls it: close() waits
        self.use(ours, process.pid)

    def use(self, connection: socket.socket, pid: int) -> None:
        """Ask ``pid`` through ``connection`` from now on."""
        # Out of the way of the numbers that a program's own files get.
        self._socket = socket.socket(fileno=fcntl.fcntl(connection.fileno(), fcntl.F_DUPFD_CLOEXEC, _HIGH))
        connection.close()
        self._pid = pid

    def close(self) -> None:
        """End the server and wait for it: not every machine's process 1 waits for orphans."""
        if self._socket is not None and os.getpid() == self._owner:
            self._socket.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
            self._socket = None


def _ask(connection: socket.socket, program: Program, streams: list[int]) -> int:
    text = json.dumps(asdict(program)).encode()
    socket.send_fds(connection, [struct.pack("I", len(text))], streams)
    connection.sendall(text)
    answer = connection.recv(4, socket.MSG_WAITALL)
    if len(answer) < 4:
        raise RuntimeError("the server of forks has ended; TINYTRON_TESTS_FORK=0 does without it")
    pid: int = struct.unpack("i", answer)[0]
    return pid


_real = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_parameters = inspect.signature(_real)
_paused = 0


def install(server: Server) -> None:
    """Let every ``subprocess.Popen`` of this process ask ``server`` first."""
    atexit.register(server.close)

    def execute(self: subprocess.Popen[Any], *args: Any, **kwargs: Any) -> None:
        options = _parameters.bind(self, *args, **kwargs).arguments
        program = None if _paused else program_of(options)
        pipes = [options[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        streams = [own if own != -1 else number for number, own in enumerate(pipes[0::2][:1] + pipes[3::2])]
        if program is not None and (pid := server.fork(program, streams)):
            self.pid, self._child_created = pid, True  # type: ignore[attr-defined]
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        else:
            _real(self, *args, **kwargs)

    subprocess.Popen._execute_child = execute  # type: ignore[attr-defined]


def installed() -> bool:
    """True if programs can be forks here."""
    return subprocess.Popen._execute_child is not _real  # type: ignore[attr-defined]


@contextlib.contextmanager
def real_processes() -> Iterator[None]:
    """Nothing that is started here is a fork."""
    global _paused
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1


# The server's side. It has one thread, blocks all signals, and imports only what every program here does.


def main(connection: socket.socket) -> Program:
    """Serve. Returns in the forks, ready to be the program that they are for."""
    while True:
        program, streams = _serve(connection)
        connection.close()
        if not program.module:
            break
        ours, theirs = socket.socketpair()
        if pid := os.fork():
            theirs.close()
            server = Server({})
            server.use(ours, pid)
            install(server)
            break
        ours.close()
        for stream in streams:
            os.close(stream)
        connection = theirs
    _take_streams(streams, program.unbuffered or sys.stdout.write_through)
    _begin(program)
    return program


def _serve(connection: socket.socket) -> tuple[Program, list[int]]:
    """Fork a process for every request. Returns in these."""
    while True:
        head, streams, *_ = socket.recv_fds(connection, 4, 3)
        if len(head) < 4:
            os._exit(0)  # the process that asks has ended
        text = connection.recv(struct.unpack("I", head)[0], socket.MSG_WAITALL)
        program = Program(**json.loads(text))
        pid = _fork() if _suits(program) else 0
        if pid is None:
            return program, streams
        for stream in streams:
            os.close(stream)
        connection.sendall(struct.pack("i", pid))


def _suits(program: Program) -> bool:
    """True if the program would begin as this process did."""
    names = {k for k in {*program.env, *_before} if k.startswith(_AT_START) and not k.startswith(_LATER)}
    # The imports set some, here as in the process that asks.
    if any(program.env.get(name) not in (_before.get(name), os.environ.get(name)) for name in names):
        return False
    folders = program.path()
    if next((f for f in folders if os.path.isdir(os.path.join(f, "tinytron"))), "") != ROOT:
        return False
    others = {f for f in folders if f != ROOT and os.path.isdir(f)}
    files = [name for folder in others for name in os.listdir(folder)]
    modules = {name.removesuffix(".py") for name in files}  # a package is a folder
    return not modules & ({name.split(".")[0] for name in sys.modules} | {"sitecustomize", "usercustomize"})


def _fork() -> int | None:
    """The pid of an orphan, which the process that asks adopts; 0 if there cannot be one. None in the orphan itself."""
    read, write = os.pipe()
    if between := os.fork():
        os.close(write)
        answer = os.read(read, 4)
        os.waitpid(between, 0)  # from then on it is an orphan
        os.close(read)
        return int(struct.unpack("i", answer)[0]) if answer else 0
    between = os.getpid()
    try:
        if pid := os.fork():
            os.write(write, struct.pack("i", pid))
            os._exit(0)
    except BaseException:
        os._exit(1)
    while os.getppid() == between:
        time.sleep(0.0005)
    os.close(read)
    os.close(write)
    return None


def _take_streams(streams: list[int], unbuffered: bool) -> None:
    """Make ``streams`` the files 0, 1 and 2, as Python opens these, and close all others."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, _HIGH)
    for name, number, mode in (("stdin", 0, "rb"), ("stdout", 1, "wb"), ("stderr", 2, "wb")):
        before = getattr(sys, name)
        raw: Any = open(number, mode, buffering=0, closefd=False)  # noqa: SIM115
        raw.name = f"<{name}>"
        buffered = io.BufferedReader(raw) if number == 0 else raw if unbuffered else io.BufferedWriter(raw)
        text: Any = io.TextIOWrapper(
            buffered,
            encoding=before.encoding,
            errors=before.errors,
            newline="\n" if number else None,
            line_buffering=not unbuffered and (number == 2 or os.isatty(number)),
            write_through=unbuffered,
        )
        text.mode = mode[0]
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def _begin(program: Program) -> None:
    """Put this process where a new interpreter is when it starts to run ``program``."""
    if program.new_session:
        os.setsid()
    os.chdir(program.cwd)
    multiprocessing.process.ORIGINAL_DIR = program.cwd  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(program.env)
    tempfile.tempdir = None
    numpy.random.seed()  # random has done so by itself
    torch.default_generator.seed()
    sys.orig_argv, sys.argv = program.argv, program.words[1:] if program.module else program.words
    if program.module:
        sys.argv[0] = "-m"
    first, *folders = program.path()
    sys.path[:] = [first, *dict.fromkeys([*folders, *_base_path])]
    importlib.invalidate_caches()
    _show_command_line(program.argv)
    for number in program.ignored:
        signal.signal(number, signal.SIG_IGN)
    if signal.SIGINT not in program.ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _show_command_line(argv: list[str]) -> None:
    """Write ``argv`` over this process's arguments, where /proc/PID/cmdline is read from; what is too long is cut."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    first, end = int(fields[45]), int(fields[46])  # arg_start and arg_end are the fields 48 and 49
    text = b"".join(os.fsencode(word) + b"\0" for word in argv)[: end - first - 1]
    ctypes.memmove(first, text.ljust(end - first, b"\0"), end - first)


def _run(program: Program) -> None:
    """Run ``program`` as Python does; errors and SystemExit are left to the interpreter."""
    run_as = types.ModuleType("__main__")
    run_as.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = run_as
    if program.module:
        sys.modules.pop(program.module, None)  # runpy would warn of a second one
        runpy._run_module_as_main(program.module)  # type: ignore[attr-defined]
        return
    file = program.script()
    loader = SourceFileLoader("__main__", file)
    run_as.__dict__.update(__file__=file, __loader__=loader, __cached__=None)
    exec(compile(loader.get_data(file), file, "exec", dont_inherit=True), run_as.__dict__)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    _before = dict(os.environ)
    _listed = {os.path.abspath(folder) for folder in _before.get("PYTHONPATH", "").split(":")}
    _base_path = [folder for folder in sys.path[1:] if folder not in _listed]
    sys.path[:] = [ROOT, *_base_path]
    import numpy.random
    import torch._dynamo  # the first optimizer of a program imports it
    import torch.distributed.checkpoint  # the first save
    import torch.distributed.run

    import tinytron.cli.launch
    import tinytron.cli.main
    import tinytron.cli.pretrain  # noqa: F401

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    gc.collect()
    gc.freeze()  # or the first collection of every fork would copy all pages
    _run(main(socket.socket(fileno=int(sys.argv[1]))))
