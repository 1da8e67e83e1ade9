"""Kubernetes: jobs are JobSets or Volcano jobs, and files lie on a persistent volume claim.

Scripts that need files run in a short-lived pod that mounts the claim. ``kubectl`` runs on this machine.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tinytron.dispatch.hosts import Host
from tinytron.dispatch.record import Submission
from tinytron.dispatch.script import job_script, quote, quote_all
from tinytron.dispatch.settings import Kubernetes, Settings
from tinytron.dispatch.shell import Shell
from tinytron.dispatch.work import SCRIPT, Prepared, Request, Work, name_of
from tinytron.errors import ConfigError
from tinytron.manifests.job import ContainerJob, Toleration
from tinytron.manifests.kinds import as_yaml

# The place of a pod among the nodes, from the variables of JobSet and Volcano.
NODES = (
    'NUM_NODES="$PET_NNODES" NODE_RANK="${VC_TASK_INDEX:-${PET_NODE_RANK:-0}}"'
    ' MASTER_ADDR="$PET_MASTER_ADDR" MASTER_PORT="$PET_MASTER_PORT"'
)
# The first pod writes the job's log, and each other one a log of its own.
ENTRY = """rank="${VC_TASK_INDEX:-${PET_NODE_RANK:-0}}"
mkdir -p "$(dirname -- "$1")"
if [ "$rank" != 0 ]; then set -- "$1.node$rank"; fi
exec bash "$0" >>"$1" 2>&1"""


@dataclass(frozen=True)
class PodShell(Shell):
    """Bash in a pod that ends with the script. The pod has the claim that ``options`` name."""

    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return f"a pod in the namespace {self.options['namespace']}"

    def command(self, *options: str) -> list[str]:
        name = f"tinytron-{secrets.token_hex(5)}"
        claim = {"name": "claim", "persistentVolumeClaim": {"claimName": self.options["pvc_name"]}}
        container = {
            "name": name,
            "image": self.options["image"],
            "command": ["bash", "-s"],
            "stdin": True,
            "stdinOnce": True,
            "volumeMounts": [{"name": "claim", "mountPath": self.options["pvc_mount_path"]}],
        }
        spec = {"spec": {"containers": [container], "volumes": [claim]}}
        words = ["run", name, f"--image={self.options['image']}", "--restart=Never", "--rm", "-i", "--quiet"]
        return [*kubectl(self.options), *words, f"--overrides={json.dumps(spec)}"]


def kubectl(options: Mapping[str, str]) -> list[str]:
    """``kubectl`` for the context and namespace of ``options``."""
    context = [f"--context={options['context']}"] if options.get("context") else []
    return ["kubectl", *context, f"--namespace={options['namespace']}"]


class KubernetesHost(Host):
    """A namespace, whose jobs are JobSets."""

    kind = "kubernetes"
    queues = True
    manifest: ClassVar[str] = "jobset"
    resource: ClassVar[str] = "jobsets.jobset.x-k8s.io"
    label: ClassVar[str] = "jobset.sigs.k8s.io/jobset-name"

    @classmethod
    def of_settings(cls, name: str, own: Kubernetes, whole: Settings) -> Host:
        wanted = ("namespace", "context", "image", "pvc_name", "pvc_mount_path")
        options = {key: value for key in wanted if (value := getattr(own, key)) is not None}
        return cls(name, PodShell(options=options), own, whole)

    @classmethod
    def of_submission(cls, submission: Submission) -> Host:
        return cls(submission.host, PodShell(options=submission.options))

    @property
    def options(self) -> dict[str, str]:
        assert isinstance(self.shell, PodShell), "of_settings and of_submission make one"
        return dict(self.shell.options)

    @property
    def control(self) -> Shell:
        return Shell()

    @property
    def _kubectl(self) -> str:
        return quote_all(kubectl(self.options))

    def _per_node(self, request: Request) -> int:
        """Chips of each pod. Raises: ConfigError if the job cannot be divided among whole nodes, or needs too many."""
        own = self.settings
        most = own.gpus_per_node if request.chip is None or own.chips is None else own.chips.get(request.chip, 0)
        per_node = request.per_node(most, self.name)
        if per_node and request.chips > per_node * own.num_nodes:
            raise ConfigError(
                f"-n {request.chips} on {self.name} takes {request.chips // per_node} nodes, but its num_nodes is "
                f"{own.num_nodes}; use -n {per_node * own.num_nodes}, or raise num_nodes"
            )
        return per_node

    def has(self, request: Request) -> bool:
        chips = self.settings.chips
        known = request.chip is None or chips is None or chips.get(request.chip, 0) > 0
        return known and request.chips <= self.settings.num_nodes * max(
            self.settings.gpus_per_node, *(chips or {"": 0}).values()
        )

    def free(self, request: Request) -> int:
        return 0  # only the cluster's scheduler knows: it queues the job

    def chips_seen(self) -> str:
        return f"up to {self.settings.num_nodes} x {self.settings.gpus_per_node} GPUs, as its settings say"

    def prepare(
        self, work: Work, request: Request, run_id: str, tree: str, env: Mapping[str, str], values: Mapping[str, str]
    ) -> Prepared:
        if work.notebook:
            raise ConfigError(
                f"{self.name} is a Kubernetes namespace, which runs no notebooks; use --target with another"
            )
        script = job_script(
            *(work, self.cluster, self.environment(env), request, run_id, tree),
            log=self.log_of(work, run_id),
            nodes=NODES,
            per_node=self._per_node(request),
        )
        return self.prepared(work, run_id, script, values)

    def job(self, prepared: Prepared, request: Request) -> ContainerJob:
        """The job that runs the script of ``prepared``. Raises: ConfigError for what Kubernetes would refuse."""
        own, per_node = self.settings, self._per_node(request)
        script, log = f"{prepared.here}/{SCRIPT}", self.log_of(prepared.work, prepared.run_id)
        tolerations = [
            Toleration(one.get("key", ""), one.get("value"), one.get("effect")) for one in own.tolerations or ()
        ]
        return ContainerJob(
            name=name_of(prepared.work, prepared.run_id),
            image=own.image,
            entry=("bash", "-c", ENTRY, script, log),
            nodes=max(1, request.chips // per_node) if per_node else 1,
            gpus=per_node,
            namespace=own.namespace,
            cpu=str(request.cpu or own.cpus) if request.cpu or own.cpus else None,
            memory=request.mem or own.mem,
            rdma={own.rdma: max(1, per_node)} if own.rdma else {},
            volumes={own.pvc_mount_path: own.pvc_name or ""},
            shm=own.shm_size,
            node_selector=own.node_selector or {},
            tolerations=tuple(tolerations),
            queue=own.queue,
        )

    def starting(self, jobs: Sequence[Prepared], request: Request, name: str) -> str:
        lines = []
        for one in jobs:
            job = self.job(one, request)
            manifest = as_yaml(self.manifest, job)
            lines += [
                f"printf '%s' {quote(manifest)} | {self._kubectl} apply -f - >&2",
                f"printf '%s\\t%s\\n' {quote(job.name)} {quote(self.log_of(one.work, one.run_id))}",
            ]
        return "\n".join(lines)

    def known_id(self, job: Prepared) -> str:
        return name_of(job.work, job.run_id)

    def alive(self, submissions: Sequence[Submission]) -> str:
        names = quote_all([one.id for one in submissions])
        phases = f"{self._kubectl} get pods -l {self.label}=\"$name\" -o 'jsonpath={{.items[*].status.phase}}'"
        return (
            f"for name in {names}; do\n"
            f"  phases=$({phases})\n"
            '  case "$phases" in *Running*) echo alive; continue ;; *Pending*) echo queued; continue ;; esac\n'
            f'  found=$({self._kubectl} get {self.resource} "$name" --ignore-not-found -o name)\n'
            '  if [ -n "$found" ] && [ -z "$phases" ]; then echo queued; else echo gone; fi\n'
            "done"
        )

    def stopping(self, submission: Submission) -> str:
        return f"{self._kubectl} delete {self.resource} {quote(submission.id)} --ignore-not-found --wait=false >&2"


class VolcanoHost(KubernetesHost):
    """A namespace whose jobs Volcano schedules."""

    kind = "volcano"
    manifest = "volcano"
    resource = "jobs.batch.volcano.sh"
    label = "volcano.sh/job-name"
