"""A SLURM cluster: an sbatch file with one task per node, which saves and requeues itself before the time limit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tinytron.dispatch.credentials import secrets_of
from tinytron.dispatch.hosts import Host
from tinytron.dispatch.record import Submission
from tinytron.dispatch.script import job_script, quote, quote_path
from tinytron.dispatch.settings import Partition
from tinytron.dispatch.work import SCRIPT, Prepared, Request, Work
from tinytron.errors import ConfigError, HostError

BATCH = """
# One task per node runs each job's script, which starts the processes of its node. SLURM's signals reach this shell only.
jobs=({jobs})
job="${{jobs[${{SLURM_ARRAY_TASK_ID:-0}}]}}"
export MASTER_ADDR="${{MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}}"
export MASTER_PORT="${{MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}}"
export TINYTRON_LOG={log}"${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}.out"
stop="" signals=0
rm -f "$job/exit_status" "$job/failed"
# shellcheck disable=SC2317  # called by the traps
pass_on() {{
    stop="$1" signals=$((signals + 1))
    kill -s "$1" "$step"
}}
srun --kill-on-bad-exit=1 --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \\
    ${{SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}} bash "$job/{script}" &
step=$!
trap 'pass_on USR1' USR1 # the time limit is near
trap 'pass_on TERM' TERM # scancel, or preemption
while :; do # a signal ends `wait` early, and the step's own status is in a later one
    before=$signals code=0
    wait "$step" || code=$?
    if [ "$signals" = "$before" ]; then break; fi
done
again=0 tries=0 ended="$stop" why="stopped before the time limit"
if [ -z "$ended" ]; then
    why="the processes of one node were asked to stop"
    if [ -e "$job/failed" ] || [ -e "$job/cancelled" ]; then ended=1; fi # then SLURM stopped the other nodes with SIGTERM
fi
case "$ended:$code" in
USR1:0 | USR1:75) again=1 ;; # saved
USR1:138 | USR1:143 | :75 | :143) # training had not begun, or only the processes of one node were asked to stop
    tries=$(($(cat "$job/tries" 2>/dev/null || echo 0) + 1))
    again=$((tries <= {tries}))
    ;;
esac
echo "$tries" >"$job/tries"
if [ "$again" = 0 ] && [ "$stop" != TERM ]; then echo "$code" >"$job/exit_status"; fi
if [ "$again" = 1 ]; then
    echo "tinytron: $why; this job is queued again"
    scontrol requeue "$SLURM_JOB_ID" || echo "$code" >"$job/exit_status"
fi
exit "$code"
"""
BATCH_FILE = "job.sbatch"
_SINFO = "sinfo -h -N -O NodeList:100,StateCompact:30,Gres:200,GresUsed:200"
_PLACE = "MASTER_ADDR MASTER_PORT NUM_NODES NODE_RANK NUM_GPUS"
# Restarts in a row of a job that meets its time limit before it trains (its environment may have taken all the time), or
# loses the processes of a node while the job itself continues, as when SLURM clears up a node that was lost and is back. A
# checkpoint before the time limit begins a new row.
_TRIES = 3
NODES = 'NUM_NODES="$SLURM_NNODES" NODE_RANK="$SLURM_NODEID"'
_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED")
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "SPECIAL_EXIT")


def sbatch_option(name: str, value: str | None = None) -> str:
    """A line with an option of sbatch, which reads these lines itself: a value in double quotes, with backslashes before
    quotes and backslashes. Raises: ConfigError for control characters, which would end the line or hide in it."""
    for text in (name, value or ""):
        if any(ord(c) < 32 or ord(c) == 127 for c in text):
            raise ConfigError(f"the sbatch option {name!r} must not have line ends or control characters; remove them")
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) is None:
        raise ConfigError(f"the sbatch option {name!r} must be letters and -, such as comment; see man sbatch")
    if value is None:
        return f"#SBATCH --{name}"
    if re.fullmatch(r"[\w@%+:,./-]+", value, re.ASCII):
        return f"#SBATCH --{name}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{name}="{escaped}"'


class SlurmHost(Host):
    """A SLURM cluster."""

    kind = "slurm"
    queues = together = True
    tools = (*Host.tools, "sbatch", "squeue", "sinfo", "scancel", "scontrol")

    def _gres(self, chip: str | None) -> str:
        return "gpu" if chip is None else self.whole.gres_mapping.get(chip, f"gpu:{chip}")

    def _per_node(self, request: Request) -> int:
        chips = self.settings.chips or {}
        most = chips.get(request.chip) if request.chip is not None else max(chips.values(), default=None)
        return request.per_node(most, self.name)

    def has(self, request: Request) -> bool:
        if request.chips == 0:
            return True
        chips = self.settings.chips
        return request.chip is None or chips is None or chips.get(request.chip, 0) > 0

    def free(self, request: Request) -> int:
        return 0 if request.chips == 0 else free_chips(self.shell.run(_SINFO), self._gres(request.chip))

    def chips_seen(self) -> str:
        text = self.shell.run(_SINFO)
        kinds = sorted({found for line in text.splitlines() for found in re.findall(r"gpu(?::[\w.-]+?)?(?=:\d)", line)})
        return ", ".join(f"{kind}: {free_chips(text, kind)} free" for kind in kinds) or "no GPU"

    def prepare(
        self, work: Work, request: Request, run_id: str, tree: str, env: Mapping[str, str], values: Mapping[str, str]
    ) -> Prepared:
        script = job_script(
            *(work, self.cluster, self.environment(env), request, run_id, tree),
            nodes=NODES,
            per_node=self._per_node(request),
            uv_groups=self.settings.uv_groups or (),
            rank_logs=self.settings.rank_logs,
        )
        return self.prepared(work, run_id, script, values)

    def _log(self, name: str) -> str:
        """The path of a log up to the job's number."""
        return f"{self.cluster.folder('log').rstrip('/')}/{name}-"

    def batch_script(self, jobs: Sequence[Prepared], request: Request, name: str) -> str:
        """The sbatch file for ``jobs``, together called ``name``. Raises: ConfigError."""
        log = self._log(name).replace("%", "%%")  # sbatch has patterns
        log += "%j.out" if len(jobs) == 1 else "%A_%a.out"
        own = self.settings
        per_node = self._per_node(request)
        nodes = max(1, request.chips // per_node) if per_node else 1
        partition = _chosen(own.partitions if request.chips else own.cpu_partitions)
        options: dict[str, str | None] = {
            "job-name": name,
            "output": log,
            "open-mode": "append",  # a requeued job continues its log
            "nodes": str(nodes),
            "ntasks-per-node": "1",
            "gres": f"{self._gres(request.chip)}:{per_node}" if per_node else "",
            "cpus-per-task": str(request.cpu or own.cpus or ""),
            "mem": request.mem or own.mem,
            "time": own.time or "",
            "partition": partition.name if partition else "",
            "constraint": (partition.constraint if partition else None) or "",
            "account": own.account or "",
            "qos": own.qos or "",
            "exclude": ",".join(own.exclude or ()),
            "signal": f"B:USR1@{own.signal_seconds}",
            "array": f"0-{len(jobs) - 1}" if len(jobs) > 1 else "",
        }
        options |= own.annotations or {}
        # An annotation `exclusive: true` is an option without a value.
        lines = [sbatch_option(key, None if value == "true" else value) for key, value in options.items() if value]
        # The environment is needed here too: for MASTER_ADDR, and for srun. What the submitting shell had is not.
        exported = [f"export {key}={quote(value)}" for key, value in self.environment({}).items()]
        body = BATCH.format(
            log=quote(self._log(name)), jobs=" ".join(quote_path(job.here) for job in jobs), script=SCRIPT, tries=_TRIES
        )
        return (
            "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", f"unset {_PLACE}", *exported])
            + "\n"
            + body.lstrip("\n")
        )

    def group_files(self, jobs: Sequence[Prepared], request: Request, name: str) -> dict[str, bytes]:
        return {BATCH_FILE: self.batch_script(jobs, request, name).encode()}

    def starting(self, jobs: Sequence[Prepared], request: Request, name: str) -> str:
        log = self._log(name)
        first = quote_path(jobs[0].here)
        # sbatch hands the whole environment to the job, and SLURM keeps it.
        secret = {name for variable, one in secrets_of(self.cluster).items() for name in (variable, one.env) if name}
        lines = [
            f"mkdir -p {quote_path(self.cluster.folder('log'))}",
            f"cd {first}",
            f"id=$(env {' '.join(f'-u {quote(name)}' for name in sorted(secret))} sbatch --parsable {BATCH_FILE})",
            'id="${id%%;*}"',
        ]
        if len(jobs) == 1:
            return "\n".join([*lines, f'printf \'%s\\t%s%s.out\\n\' "$id" {quote(log)} "$id"'])
        names = " ".join(str(n) for n in range(len(jobs)))
        lines.append(f'for n in {names}; do printf \'%s\\t%s%s.out\\n\' "${{id}}_$n" {quote(log)} "${{id}}_$n"; done')
        return "\n".join(lines)

    def alive(self, submissions: Sequence[Submission]) -> str:
        running, waiting = "|".join(_RUNNING), "|".join(_WAITING)
        lines = [
            # Its warnings are not a state, so its errors are asked for separately.
            'look() { if ! state=$(squeue -h -j "$1" -o "%T %r" 2>/dev/null); then',
            'said=$(squeue -h -j "$1" -o %T 2>&1 >/dev/null || true)',
            'case "$said" in *"Invalid job id"*) ;;',
            "*) echo \"squeue: ${said##*$'\\n'}\" >&2; exit 1 ;; esac; fi",
            'why="${state#* }" state="${state%%[[:space:]]*}"',
            f'case "$state" in {running}) echo alive ;; {waiting}) echo "queued ${{why%%[[:cntrl:]]*}}" ;;',
            '*) code=$(cat "$2/exit_status" 2>/dev/null || echo 0)',
            'if [ "$code" = 0 ]; then echo gone; else echo "failed $code"; fi ;; esac; }',
        ]
        return "\n".join([*lines, *(f"look {quote(one.id)} {quote_path(one.here)}" for one in submissions)])

    def stopping(self, submission: Submission) -> str:
        return f"scancel {quote(submission.id)}"


def free_chips(text: str, gres: str) -> int:
    """The free chips ``gres`` (``gpu`` or ``gpu:h100``) in sinfo's columns node, state, gres and gres in use. A node that
    is in several partitions counts once."""
    nodes: dict[str, int] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) != 4:
            raise HostError(f"sinfo says {line.strip()!r}; expected node, state, gres and used gres")
        node, state, there, used = words
        if state.rstrip("*~#!%$@^-+") in ("idle", "mix", "alloc"):
            nodes[node] = max(0, _count(there, gres) - _count(used, gres))
    return sum(nodes.values())


def _count(text: str, gres: str) -> int:
    """The number of ``gres`` in ``gpu:h100:8(S:0-1),gpu:a100:2(IDX:0,1)``."""
    found = re.findall(r"([\w.:-]+?):(\d+)(?:\([^)]*\))?(?:,|$)", text)
    return sum(int(number) for name, number in found if name == gres or name.startswith(f"{gres}:"))


def _chosen(partitions: Sequence[Partition] | None) -> Partition | None:
    """The partition that is marked as default, or else the first one."""
    named = list(partitions or ())
    return next((one for one in named if one.default), named[0] if named else None)
