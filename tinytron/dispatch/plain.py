"""A machine without a scheduler: jobs are detached processes, and locks keep two jobs from sharing a GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tinytron.dispatch.hosts import Host
from tinytron.dispatch.record import Submission
from tinytron.dispatch.script import job_script, quote, quote_path
from tinytron.dispatch.work import SCRIPT, Prepared, Request, Work
from tinytron.errors import ConfigError, HostError

_USED_MIB = 1024  # a GPU with more than this is in use


class PlainHost(Host):
    """A machine behind SSH, or this one."""

    kind = "plain"

    def has(self, request: Request) -> bool:
        if request.chips == 0:
            return True
        if self.settings.chips is not None:
            chips = self.settings.chips
            there = sum(chips.values()) if request.chip is None else chips.get(request.chip, 0)
            return there >= request.chips
        return len(self._gpus(request)) >= request.chips

    def free(self, request: Request) -> int:
        return sum(used <= _USED_MIB for used in self._gpus(request))

    def _kind(self, request: Request) -> str:
        """The words that nvidia-smi's names of the GPUs must have (``NVIDIA H100 80GB HBM3``, ``NVIDIA A100-SXM4-80GB``);
        empty if any GPU will do, as when the settings name a single kind."""
        known = self.settings.chips is not None and set(self.settings.chips) == {request.chip}
        return "" if request.chip is None or known else re.sub("[-_]", " ", request.chip.lower())

    def _gpus(self, request: Request) -> list[int]:
        """The memory in use, in MiB, of each GPU of the kind that ``request`` names."""
        kind = set(self._kind(request).split())
        return [used for used, name in self._seen() if kind <= _words(name)]

    def chips_seen(self) -> str:
        kinds: dict[str, list[bool]] = {}
        for used, name in self._seen():
            kinds.setdefault(name, []).append(used <= _USED_MIB)
        return ", ".join(f"{len(free)} x {name} ({sum(free)} free)" for name, free in kinds.items()) or "no GPU"

    def _seen(self) -> list[tuple[int, str]]:
        """The memory in use, in MiB, and the name of each GPU. Raises: HostError."""
        text = self.shell.run(
            "command -v nvidia-smi >/dev/null || exit 0\n"
            "nvidia-smi --query-gpu=memory.used,name --format=csv,noheader,nounits"
        )
        found = []
        for line in text.splitlines():
            used, _, name = line.partition(",")
            if not used.strip().isdecimal():
                raise HostError(f"{self.name}: nvidia-smi says {line.strip()!r}; see nvidia-smi on {self.shell.place}")
            found.append((int(used), name.strip()))
        return found

    def prepare(
        self, work: Work, request: Request, run_id: str, tree: str, env: Mapping[str, str], values: Mapping[str, str]
    ) -> Prepared:
        if request.mem is not None or request.cpu is not None:
            raise ConfigError(
                f"--mem and --cpu are for schedulers, but {self.name} is a plain host; leave them out, or use --target"
            )
        script = job_script(
            *(work, self.cluster, self.environment(env), request, run_id, tree),
            log=self.log_of(work, run_id),
            lock_gpus=request.chips > 0,
            gpu_kind=self._kind(request),
            per_node=request.chips,
            uv_groups=self.settings.uv_groups or (),
        )
        return self.prepared(work, run_id, script, values)

    def starting(self, jobs: Sequence[Prepared], request: Request, name: str) -> str:
        lines = [f"mkdir -p {quote_path(self.cluster.folder('log'))}"]
        for job in jobs:
            log = self.log_of(job.work, job.run_id)
            # In a session of its own, without our terminal: it outlives the connection.
            lines += [
                f"setsid nohup bash {quote_path(job.here)}/{SCRIPT} </dev/null >>{quote_path(log)} 2>&1 &",
                # A process has no command line for a moment while it becomes another program: a look at that moment would
                # call the job lost. So wait until it has run setsid and nohup, and is the script.
                f"while kill -0 $! 2>/dev/null && ! {_runs_script('$!', job.here)}; do sleep 0.02; done",
                f"printf '%s\\t%s\\n' $! {quote(log)}",
            ]
        return "\n".join(lines)

    def alive(self, submissions: Sequence[Submission]) -> str:
        return "\n".join(f"if {_is_its_process(one)}; then echo alive; else echo gone; fi" for one in submissions)

    def stopping(self, submission: Submission) -> str:
        return f"if {_is_its_process(submission)}; then kill -TERM {quote(submission.id)}; fi"


def _words(name: str) -> set[str]:
    """The words of a GPU's name; ``rtx4090`` and ``4090`` are words of RTX 4090. As in job.sh."""
    name = name.lower().replace("-", " ")
    return {*name.split(), *re.sub("([a-z]) ([0-9])", r"\1\2", name).split()}


def _is_its_process(submission: Submission) -> str:
    """A condition: the process of that number is still the submission's, and not one that came later."""
    return _runs_script(quote(submission.id), submission.here)


def _runs_script(pid: str, here: str) -> str:
    return f"[ \"$(tr '\\0' ' ' </proc/{pid}/cmdline 2>/dev/null)\" = 'bash '{quote_path(here)}/{SCRIPT}' ' ]"
