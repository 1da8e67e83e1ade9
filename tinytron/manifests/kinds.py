"""The kinds of manifests. A new kind is a function here and its name in ``KINDS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from tinytron.errors import ConfigError
from tinytron.manifests import pods
from tinytron.manifests.job import ContainerJob
from tinytron.manifests.pods import NO_TPU_BACKEND, Manifest
from tinytron.utils.flags import nearest
from tinytron.utils.optional import require_package


def jobset(job: ContainerJob) -> Manifest:
    """A JobSet (jobset.x-k8s.io): one indexed Job; the controller makes the headless service. A failed pod restarts all."""
    group = "node"
    host = f"{job.name}-{group}-0-0.{job.name}"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    rank = [{"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}}]
    inner = {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": 0,
        "template": pods.pod(job, host, rank, pods.arguments(job)),
    }
    spec = {
        "ttlSecondsAfterFinished": job.ttl_seconds,
        "failurePolicy": {"maxRestarts": job.max_restarts},
        "network": {"enableDNSHostnames": True, "subdomain": job.name},
        "replicatedJobs": [{"name": group, "replicas": 1, "template": {"spec": inner}}],
    }
    metadata = _metadata(job)
    if job.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def trainjob(job: ContainerJob) -> Manifest:
    """A TrainJob of Kubeflow Trainer with its runtime ``torch-distributed``, which sets torchrun's variables. How often a
    pod restarts, and how long the job is kept, are the runtime's; it cannot take a priority class."""
    if job.priority_class is not None:
        raise ConfigError(f"priority_class {job.priority_class}: a TrainJob takes the one of its runtime; leave it out")
    trainer: Manifest = {
        "image": job.image,
        **pods.program(job, pods.arguments(job)),
        "env": pods.variables(job),
        "numNodes": job.nodes,
        "numProcPerNode": job.per_node,
    }
    if found := pods.resources(job):
        trainer["resourcesPerNode"] = found
    inside, mounts = pods.volumes(job)
    container: Manifest = {"name": "node", "volumeMounts": mounts}
    if job.rdma:
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    inner = {"spec": {**pods.placement(job), "containers": [container], "volumes": inside}}
    jobs = [{"name": "node", "template": {"spec": {"template": inner}}}]
    patch = {"manager": "tinytron", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}}}
    spec = {"runtimeRef": {"name": "torch-distributed"}, "trainer": trainer, "runtimePatches": [patch]}
    metadata = _metadata(job)
    if job.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": metadata, "spec": spec}


def volcano(job: ContainerJob) -> Manifest:
    """A Volcano job: all pods are scheduled together. The plugin ``svc`` makes the headless service, and ``env`` tells a
    pod's number. A failed or evicted pod restarts all."""
    task = "node"
    template = pods.pod(job, f"{job.name}-{task}-0.{job.name}", [], _ranked(pods.arguments(job)))
    spec: Manifest = {
        "schedulerName": "volcano",
        "minAvailable": job.nodes,
        "maxRetry": job.max_restarts,
        "ttlSecondsAfterFinished": job.ttl_seconds,
        "plugins": {"svc": [], "env": []},
        "policies": [{"event": event, "action": "RestartJob"} for event in ("PodFailed", "PodEvicted")],
        "tasks": [{"name": task, "replicas": job.nodes, "template": template}],
    }
    if job.queue is not None:
        spec["queue"] = job.queue
    return {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "metadata": _metadata(job), "spec": spec}


KINDS: Mapping[str, Callable[[ContainerJob], Manifest]] = MappingProxyType(
    {"jobset": jobset, "trainjob": trainjob, "volcano": volcano}
)


def as_yaml(kind: str, job: ContainerJob) -> str:
    """The manifest as YAML for ``kubectl apply``. Raises: ConfigError for an unknown kind."""
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind}{nearest(kind, KINDS)}; use one of {', '.join(KINDS)}")
    text: str = require_package("yaml", "config").safe_dump(KINDS[kind](job), sort_keys=False, allow_unicode=True)
    return text


def _metadata(job: ContainerJob) -> Manifest:
    found: Manifest = {"name": job.name, "namespace": job.namespace}
    if job.tpu is not None:
        found["annotations"] = {"tinytron/note": NO_TPU_BACKEND}
    return found


def _ranked(args: list[str]) -> list[str]:
    """The arguments with the pod's number, which Kubernetes puts in place of the variable's name."""
    return [args[0], "--node_rank", "$(VC_TASK_INDEX)", *args[1:]]
