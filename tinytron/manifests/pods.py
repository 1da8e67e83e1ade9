"""The pods of a job: what all kinds of manifests have in common."""

from __future__ import annotations

from typing import Any

from tinytron.manifests.job import ContainerJob
from tinytron.utils.launcher import ELASTIC

Manifest = dict[str, Any]
NO_TPU_BACKEND = "Untested. Tinytron has no TPU backend: this trains on the CPUs of the TPU's host."
_PLACE = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_MASTER_ADDR", "PET_MASTER_PORT")


def literal(text: str) -> str:
    """``text`` in a manifest's argument or variable. Kubernetes replaces ``$(NAME)`` there, and reads ``$$`` as ``$``."""
    return text.replace("$", "$$")


def arguments(job: ContainerJob) -> list[str]:
    """The words after ``tinytron``."""
    return ["launch", *map(literal, job.command)]


def program(job: ContainerJob, args: list[str]) -> Manifest:
    """The program of the container: ``tinytron`` with ``args``, or the job's ``entry``."""
    if job.entry:
        return {"command": [*map(literal, job.entry)]}
    return {"command": ["tinytron"], "args": args}


def variables(job: ContainerJob) -> list[Manifest]:
    """The environment that the user gave, values and references to secrets, and what all pods need."""
    # A pod that was asked to stop has saved, but its run is not complete: it must not count as finished.
    found: list[Manifest] = [{"name": ELASTIC, "value": "1"}]
    found += [{"name": name, "value": literal(value)} for name, value in job.env.items()]
    for name, secret in job.secrets.items():
        found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret.name, "key": secret.key}}})
    return found


def meeting_place(job: ContainerJob, host: str) -> list[Manifest]:
    """torchrun's variables, which are the same in all pods. The first pod is ``host``."""
    values = (job.nodes, job.per_node, host, job.port)
    return [{"name": name, "value": str(value)} for name, value in zip(_PLACE, values, strict=True)]


def resources(job: ContainerJob) -> Manifest:
    """CPUs, memory and devices of a pod, all of them guaranteed."""
    found = {"cpu": job.cpu, "memory": job.memory}
    limits = {name: amount for name, amount in found.items() if amount is not None}
    devices = {**({job.gpu_resource: job.gpus} if job.gpus else {}), **job.rdma}
    if job.tpu is not None:
        devices["google.com/tpu"] = job.tpu.chips_per_node
    limits |= {name: str(count) for name, count in devices.items() if count}
    return {"limits": limits, "requests": dict(limits)} if limits else {}


def volumes(job: ContainerJob) -> tuple[list[Manifest], list[Manifest]]:
    """The volumes of a pod, and where its container has them: shared memory for data loaders and NCCL, and the claims."""
    found: list[Manifest] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shm}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    claims = {claim: f"claim-{number}" for number, claim in enumerate(dict.fromkeys(job.volumes.values()))}
    found += [{"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in claims.items()]
    mounts += [{"name": claims[claim], "mountPath": path} for path, claim in job.volumes.items()]
    return found, mounts


def placement(job: ContainerJob) -> Manifest:
    """Where pods may run, and how they end."""
    selector = dict(job.node_selector)
    if job.tpu is not None:
        selector["cloud.google.com/gke-tpu-accelerator"] = job.tpu.accelerator
        selector["cloud.google.com/gke-tpu-topology"] = job.tpu.topology
    found: Manifest = {"terminationGracePeriodSeconds": job.grace_seconds}
    if selector:
        found["nodeSelector"] = selector
    if job.tolerations:
        found["tolerations"] = [
            {"key": one.key, "operator": "Exists" if one.value is None else "Equal"}
            | ({} if one.value is None else {"value": one.value})
            | ({} if one.effect is None else {"effect": one.effect})
            for one in job.tolerations
        ]
    if job.service_account is not None:
        found["serviceAccountName"] = job.service_account
    return found


def pod(job: ContainerJob, host: str, rank: list[Manifest], args: list[str]) -> Manifest:
    """A pod's template. ``rank`` are variables that tell the pod's number."""
    inside, mounts = volumes(job)
    container: Manifest = {
        "name": "trainer",
        "image": job.image,
        **program(job, args),
        "env": [*meeting_place(job, host), *rank, *variables(job)],
        "ports": [{"containerPort": job.port}],
        "volumeMounts": mounts,
    }
    if job.rdma:
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}  # RDMA pins memory
    if found := resources(job):
        container["resources"] = found
    spec: Manifest = {"restartPolicy": "Never", **placement(job), "containers": [container], "volumes": inside}
    if job.priority_class is not None:
        spec["priorityClassName"] = job.priority_class
    template: Manifest = {"spec": spec}
    if job.tpu is not None:
        template["metadata"] = {"annotations": {"tinytron/note": NO_TPU_BACKEND}}
    return template
