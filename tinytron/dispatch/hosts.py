"""The operations of all hosts, and the table of kinds. A new kind is a file with a class, and a line in ``KINDS``."""

from __future__ import annotations

import importlib
import json
import tarfile
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from tinytron.dispatch.record import Submission
from tinytron.dispatch.script import inner_folder, job_folder, packed, quote, quote_all, quote_path, status_folder
from tinytron.dispatch.settings import HOST_TYPES, Cluster, Settings
from tinytron.dispatch.shell import NoAnswerError, Shell
from tinytron.dispatch.work import Prepared, Request, Work
from tinytron.errors import ConfigError, HostError

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "plain": "tinytron.dispatch.plain:PlainHost",
        "slurm": "tinytron.dispatch.slurm:SlurmHost",
        "kubernetes": "tinytron.dispatch.kubernetes:KubernetesHost",
        "volcano": "tinytron.dispatch.kubernetes:VolcanoHost",
    }
)
UPLOAD_SECONDS = 3600.0
PULLED_NOT = (".lock", "done.json", "latest", "final")  # they are about checkpoints, which stay on the host
UNCONFIRMED = "unconfirmed"
ENDED = ("finished", "cancelled")  # nothing changes these
PULLED = ".pulled"  # in a folder that was pulled: it may be replaced


@dataclass(frozen=True)
class Files:
    """Files to send: the code as a tar.gz, named by its ``tree``."""

    tree: str
    code: bytes


@dataclass(frozen=True)
class State:
    """The state of a submission: ``queued``, ``preparing``, ``waiting``, ``running``, ``preempted``, ``finished``,
    ``failed``, ``cancelled``, ``lost``, or ``unconfirmed`` if the host did not say that it started; seconds since the last
    heartbeat; the exit status at the end; and the node and port of a notebook."""

    state: str
    heartbeat: int | None = None
    exit_status: int | None = None
    node: str = ""
    port: int | None = None
    why: str = ""  # it is queued

    def __str__(self) -> str:
        status = "" if self.exit_status is None else f" ({self.exit_status})"
        return f"{self.state}{status}" + (f" ({self.why})" if self.why not in ("", "None") else "")

    @property
    def active(self) -> bool:
        """True if the submission runs, or will."""
        return self.state in ("queued", "preparing", "waiting", "running", "preempted, queued")


class Host(ABC):
    """A host by its name. Submitting needs its ``settings`` in the ``whole`` file; the rest does not."""

    kind: ClassVar[str]
    queues: ClassVar[bool] = False  # True if it keeps jobs that do not fit yet
    together: ClassVar[bool] = False  # True if an error means that none of several jobs has started
    tools: ClassVar[tuple[str, ...]] = ("bash", "tar", "flock", "base64", "sha256sum")

    def __init__(self, name: str, shell: Shell, settings: Any = None, whole: Settings | None = None) -> None:
        self.name, self.shell, self.settings = name, shell, settings
        self._whole = whole

    @classmethod
    def of_settings(cls, name: str, own: Any, whole: Settings) -> Host:
        """The host of the settings ``own``."""
        return cls(name, Shell(own.ssh, whole.proxy), own, whole)

    @classmethod
    def of_submission(cls, submission: Submission) -> Host:
        """The host that ``submission`` went to."""
        return cls(submission.host, Shell(submission.ssh, submission.proxy))

    @property
    def control(self) -> Shell:
        """The shell in which the scheduler is asked; ``shell`` sees the files."""
        return self.shell

    @property
    def options(self) -> dict[str, str]:
        """More that a submission has to remember, for ``of_submission``."""
        return {}

    @property
    def whole(self) -> Settings:
        """The settings file."""
        assert self._whole is not None, "the host of a submission has no settings"
        return self._whole

    @property
    def cluster(self) -> Cluster:
        """The host's cluster."""
        return self.whole.cluster_of(self.name)

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Environment variables of a job: those of the cluster, the host, and ``more``; the last one wins."""
        return {**(self.cluster.env or {}), **(self.settings.env or {}), **more}

    @abstractmethod
    def has(self, request: Request) -> bool:
        """True if the host has the chips that ``request`` asks for, free or not. Raises: HostError."""

    @abstractmethod
    def free(self, request: Request) -> int:
        """The number of free chips of the kind that ``request`` names. Raises: HostError."""

    def chips_seen(self) -> str:
        """The host's chips, for ``tinytron dispatch check``. Raises: HostError."""
        return f"{self.free(Request())} chips free"

    @abstractmethod
    def prepare(
        self, work: Work, request: Request, run_id: str, tree: str, env: Mapping[str, str], values: Mapping[str, str]
    ) -> Prepared:
        """One submission; ``values`` are secrets by variable. Raises: ConfigError if the host cannot run it."""

    def prepared(self, work: Work, run_id: str, script: str, values: Mapping[str, str]) -> Prepared:
        """The submission ``run_id`` of ``work`` with its folders here."""
        here, status = job_folder(self.cluster, work, run_id), status_folder(self.cluster, work, run_id)
        return Prepared(work, run_id, here, status, script, values)

    def log_of(self, work: Work, run_id: str) -> str:
        """The log of a submission, where no scheduler names it."""
        return f"{self.cluster.folder('log').rstrip('/')}/{work.project}_{work.group}_{work.name}_{run_id}.log"

    @abstractmethod
    def starting(self, jobs: Sequence[Prepared], request: Request, name: str) -> str:
        """The script that starts ``jobs``, whose files are there, together called ``name``. It prints the id and the log
        of each, with a tab in between."""

    @abstractmethod
    def alive(self, submissions: Sequence[Submission]) -> str:
        """A script that prints one line for each submission: ``queued`` and why, ``alive``, ``gone``, or ``failed`` and the
        exit status. It fails if the scheduler does not answer."""

    @abstractmethod
    def stopping(self, submission: Submission) -> str:
        """A script that asks the submission to stop."""

    def start(self, jobs: Sequence[Prepared], request: Request, name: str) -> list[tuple[str, str]]:
        """Start ``jobs``. Returns the id and the log of each. Raises: HostError."""
        lines = self.control.run(self.starting(jobs, request, name)).splitlines()
        found = [tuple(line.split("\t")) for line in lines]
        if len(found) != len(jobs) or any(len(one) != 2 for one in found):
            raise NoAnswerError(f"{self.name} printed {' '.join(lines)!r} when it started {name}")
        return [(one[0], one[1]) for one in found]

    def send(self, jobs: Sequence[Prepared], files: Files, more: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Send the files of ``jobs``, and ``more`` into the folder of the first. The code is sent only if the host does not
        have it yet. Raises: HostError."""
        cluster = self.cluster
        share = cluster.folder("share").rstrip("/")
        archive = quote_path(f"{share}/code/{files.tree}.tar.gz")
        has_code = self.shell.run(f"if [ -e {archive} ]; then echo yes; fi").strip() == "yes"
        members: dict[str, tuple[bytes, int]] = {}
        for job in jobs:
            inner = inner_folder(job.work, job.run_id)
            members |= {f"{inner}/{name}": (content, 0o644) for name, content in job.files().items()}
            members |= {f"{inner}/secret.{name}": (value.encode(), 0o600) for name, value in job.values.items()}
            if job is jobs[0]:
                members |= {f"{inner}/{name}": (content, 0o644) for name, content in more.items()}
        folders = " ".join(quote_path(job.here) for job in jobs)
        share = quote_path(share)
        script = f"mkdir -p {share}/code\n(umask 077; mkdir -p {folders})\ncd {share}\n"
        if has_code:
            script += "tar -xz --no-same-owner"
        else:  # under another name until it is whole, so that no job takes a part of it for the code
            part = f"code/{files.tree}.{jobs[0].run_id}.part"
            members[part] = (files.code, 0o644)
            script += f"trap 'rm -f {part}' EXIT\ntar -xz --no-same-owner\nmv -f {part} {archive}"
        self.shell.run(script, packed(members), UPLOAD_SECONDS)

    def states(self, submissions: Sequence[Submission]) -> list[State]:
        """The state of each submission. Raises: HostError."""
        if not submissions:
            return []
        looks = [
            f"file={quote_path(one.status)}/metadata.json\n"
            f"told=; if [ -e {quote_path(one.here)}/cancelled ]; then told=cancelled; fi\n"
            'if [ -e "$file" ]; then echo "$(($(date +%s) - $(stat -c %Y "$file"))) $told"; head -n 1 "$file"\n'
            'else echo " $told"; echo; fi'
            for one in submissions
        ]
        started = [one for one in submissions if one.id]
        alive = self.alive(started) if started else ":"
        count, look = len(started), "\n".join(looks)
        if self.control is self.shell:
            lines = self._lines(self.shell, f"{alive}\n{look}", count + len(looks) * 2)
        else:
            lines = [*self._lines(self.control, alive, count), *self._lines(self.shell, look, len(looks) * 2)]
        said, rest = iter(lines[:count]), lines[count:]
        return [
            _state(next(said) if one.id else UNCONFIRMED, rest[2 * i], rest[2 * i + 1])
            for i, one in enumerate(submissions)
        ]

    def _lines(self, shell: Shell, script: str, count: int) -> list[str]:
        """The ``count`` lines that ``script`` prints. Raises: HostError if it prints another number of them."""
        lines = shell.run(script).split("\n")[:-1]
        if len(lines) != count:
            raise HostError(f"{self.name} gave {len(lines)} lines instead of {count}; see what {shell.place} prints")
        return lines

    def log(self, submission: Submission, *, follow: bool) -> int:
        """Print the log, with ``follow`` also what is added. Returns an exit status."""
        log = quote_path(submission.log)
        if follow:
            return self.shell.follow(f"exec tail -n +1 -F -- {log} 2>/dev/null")
        missing = quote(f"there is no log yet: {submission.log}")
        return self.shell.follow(f"if [ -e {log} ]; then cat -- {log}; else echo {missing} >&2; exit 1; fi")

    def remove(self, jobs: Sequence[Prepared]) -> None:
        """Remove the folders of submissions that did not start, which have secrets. Raises: HostError."""
        self.shell.run("rm -rf -- " + " ".join(quote_path(job.here) for job in jobs))

    def group_files(self, jobs: Sequence[Prepared], request: Request, name: str) -> dict[str, bytes]:
        """Files for all of ``jobs``, in the folder of the first one."""
        return {}

    def known_id(self, job: Prepared) -> str:
        """The id of a submission before it starts; empty if only the host can tell."""
        return ""

    def cancel(self, submission: Submission) -> None:
        """Stop the submission, and remove its secrets; a run saves first, and one that has not begun never does. Raises:
        HostError."""
        if not submission.id:  # its own words may tell; without them it has not begun
            text = self.shell.run(f"cat {quote_path(submission.status)}/metadata.json 2>/dev/null || true")
            told = _content(text)
            submission = replace(submission, id=str(told.get("slurm_job") or told.get("pid") or ""))
        here = quote_path(submission.here)
        marking = f"{{ : >{here}/cancelled; }} 2>/dev/null || true\nrm -f {here}/secret.*"
        stopping = self.stopping(submission) if submission.id else ":"
        if self.control is self.shell:
            self.shell.run(f"{marking}\n{stopping}")
            return
        try:
            self.shell.run(marking)
        finally:  # whether its files can be reached or not
            self.control.run(stopping)

    def pull(self, submission: Submission, out: Path) -> list[str]:
        """Copy the run's folder, without checkpoints, and the log to ``out``. Returns the names that it left out, because
        they lead out of the folder or are not files. Raises: HostError; ConfigError if ``out`` has a run of that name that
        was not pulled."""
        folder = out / "checkpoints" / submission.place
        if folder.is_dir() and any(folder.iterdir()) and not (folder / PULLED).exists():
            raise ConfigError(f"{folder} has a run of this machine; pull to another folder, such as pulled")
        base = f"checkpoints/{submission.place}"
        words = ["--anchored", "--wildcards-match-slash", f"--exclude={base}/*.pt", f"--exclude={base}/*.part"]
        words += ["--no-wildcards-match-slash", f"--exclude={base}/*/[0-9]*_opt"]
        words += [f"--exclude={base}/{inner}{name}" for name in PULLED_NOT for inner in ("", "*/")]
        script = (
            f"root={quote_path(submission.root)}\nlog={quote_path(submission.log)}\n"
            f"folder={quote(base)}\n"
            '[ -d "$root/$folder" ] || { echo "$root/$folder does not exist yet; there is nothing to pull" >&2; exit 1; }\n'
            # tar reads backslashes in its arguments as escapes, but not in a list of names that end with a zero.
            # Its status 1 says that a file changed meanwhile, as those of a run do.
            f'pack() {{ cd "$1"; printf "%s\\0" "$2" | tar -cz {quote_all(words)} --null -T - || [ $? = 1 ]; }}\n'
            '(pack "$root" "$folder")\n'
            'if [ -e "$log" ]; then (pack "$(dirname -- "$log")" "./$(basename -- "$log")"); fi'
        )
        with tempfile.TemporaryFile() as file:
            self.shell.run_into(file, script, seconds=UPLOAD_SECONDS)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PULLED).touch()
            # Two archives in a row: zeros between them are not the end.
            left = []
            with tarfile.open(fileobj=file, ignore_zeros=True) as tar:
                for member in tar:
                    try:
                        tar.extract(member, out, filter="data")
                    except tarfile.FilterError:
                        left.append(member.name)
        return left


def _state(alive: str, age: str, text: str) -> State:
    """The state from what the scheduler says and what the job wrote itself."""
    content = _content(text)
    told, status = content.get("state"), content.get("exit_status")
    alive, _, code = alive.partition(" ")  # or why it waits
    age, _, cancelled = age.partition(" ")
    heartbeat = int(age) if age.lstrip("-").isdecimal() else None
    if alive == UNCONFIRMED:
        if told not in ("preparing", "waiting", "running"):
            told = cancelled or told or UNCONFIRMED
        return State(told, heartbeat, status, content.get("host", ""), content.get("port"))
    if alive == "queued":
        return State("preempted, queued" if told == "preempted" else "queued", why=code)
    if alive == "alive":
        state = told if told in ("preparing", "waiting", "running") else "preparing"
        return State(state, heartbeat, None, content.get("host", ""), content.get("port"))
    if alive == "failed":
        return State("failed", heartbeat, int(code))
    if told in ("finished", "failed", "cancelled", "preempted"):
        return State(told, heartbeat, status)
    return State(cancelled or "lost", heartbeat, status)


def _content(text: str) -> dict[str, Any]:
    """The state file that a job wrote; empty if there is none, or only a part of it."""
    try:
        content = json.loads(text) if text else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _class_of(kind: str) -> type[Host]:
    module, _, name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def hosts_of(settings: Settings) -> list[Host]:
    """The hosts of the settings that this version can submit to, in the order in which they are tried."""
    found = []
    for name in settings.in_order():
        own = settings.hosts[name]
        kind = next(kind for kind, cls in HOST_TYPES.items() if cls is type(own))
        if kind in KINDS:
            found.append(_class_of(kind).of_settings(name, own, settings))
    return found


def host_of(submission: Submission) -> Host:
    """The host that ``submission`` went to."""
    return _class_of(submission.kind).of_submission(submission)
