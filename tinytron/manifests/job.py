"""``ContainerJob``: a training job on a Kubernetes cluster, described once for all kinds of manifests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tinytron.errors import ConfigError

_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")  # RFC 1123, beginning with a letter
_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([\w.-]*[A-Za-z0-9])?)?")
SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY)$", re.IGNORECASE)
_MOST = 63  # characters of a label
_LONGEST_NAME = 40  # the controllers append the names of their parts


class SecretKey(NamedTuple):
    """A key of a Kubernetes secret. Its value is in the cluster, and in no manifest."""

    name: str
    key: str


class Toleration(NamedTuple):
    """A taint of nodes that the pods tolerate: without ``value`` any value, and without ``effect`` any effect."""

    key: str
    value: str | None = None
    effect: str | None = None


class Tpu(NamedTuple):
    """A slice of TPUs on GKE, such as ``Tpu("tpu-v5-lite-podslice", "4x4", 4)``. **Untested**, and Tinytron has no TPU
    backend: such a pod trains on the CPUs of the TPU's host."""

    accelerator: str
    topology: str
    chips_per_node: int


@dataclass(frozen=True, kw_only=True)
class ContainerJob:
    """A job of ``nodes`` pods, each with ``processes`` training processes that run ``command``: what follows ``tinytron
    launch``, such as ``("-m", "tinytron", "pretrain", "--preset", "1b")``. With an ``entry``, a program of the image and
    its arguments, the pods run that instead.

    ``gpus`` and ``rdma`` count the devices of a pod, and ``volumes`` are claims (PVC) by the path where they are mounted;
    one of them has the ``--log_dir``, unless that is a URL. ``secrets`` are variables whose value a secret of the cluster
    has. Raises: ConfigError for anything that Kubernetes would refuse, and for a secret by value.
    """

    name: str
    image: str
    command: tuple[str, ...] = ()
    entry: tuple[str, ...] = ()
    nodes: int = 1
    gpus: int = 8
    processes: int | None = None  # per pod; None: one per GPU
    namespace: str = "default"
    cpu: str | None = None
    memory: str | None = None
    gpu_resource: str = "nvidia.com/gpu"
    rdma: Mapping[str, int] = field(default_factory=dict)  # such as {"rdma/hca_shared_devices_a": 1}
    tpu: Tpu | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, SecretKey] = field(default_factory=dict)
    volumes: Mapping[str, str] = field(default_factory=dict)
    shm: str = "16Gi"
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    queue: str | None = None
    priority_class: str | None = None
    service_account: str | None = None
    max_restarts: int = 10
    ttl_seconds: int = 86_400  # the cluster forgets the job this long after its end
    grace_seconds: int = 120  # from SIGTERM to SIGKILL: time for a step and a checkpoint
    port: int = 29_500

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()
        for name in (*self.env, *self.secrets):
            _matches(_VARIABLE, "variable", name, "NCCL_DEBUG")
        for name in self.env:
            if SECRET_NAME.search(name):
                raise ConfigError(
                    f"env {name} would put a secret into the manifest; give it in secrets, as a secret's key"
                )
            if name in self.secrets:
                raise ConfigError(f"{name} is in env and in secrets; leave one out")
        for path, claim in self.volumes.items():
            if not path.startswith("/") or ":" in path or "\0" in path or path == "/dev/shm":
                raise ConfigError(
                    f"volumes {path!r} must be an absolute path without ':', other than /dev/shm; use /data"
                )
            _matches(_LABEL, "claim", claim, "my-data")
        for key, value in self.node_selector.items():
            _matches(_KEY, "node_selector", key, "cloud.google.com/gke-accelerator")
            _matches(_VALUE, f"node_selector {key}", value, "nvidia-h100-80gb", _MOST)
        for one in self.tolerations:
            _matches(_KEY, "toleration", one.key, "nvidia.com/gpu")
            _matches(_VALUE, f"toleration {one.key}", one.value or "", "present", _MOST)
            if one.effect not in (None, "NoSchedule", "PreferNoSchedule", "NoExecute"):
                rule = "must be NoSchedule, PreferNoSchedule or NoExecute"
                raise ConfigError(f"toleration {one.key}: the effect {one.effect!r} {rule}")

    def _check_names(self) -> None:
        _matches(_LABEL, "name", self.name, "my-run", _LONGEST_NAME)
        _matches(_LABEL, "namespace", self.namespace, "default", _MOST)
        optional = {"queue": self.queue, "priority_class": self.priority_class, "service_account": self.service_account}
        for what, text in optional.items():
            if text is not None:
                _matches(_DOMAIN, what, text, "research", _MOST)
        if not re.fullmatch(r"[A-Za-z0-9][\w.:/@-]*", self.image):
            raise ConfigError(
                f"image {self.image!r} must be the name of an image, such as registry.example/tinytron:0.1"
            )
        words = (*self.command, *self.entry)
        if not words or any("\0" in word for word in words):
            raise ConfigError("command must have words without NUL, such as -m tinytron pretrain --preset 1b")
        for variable, secret in self.secrets.items():
            _matches(_DOMAIN, f"secrets {variable}", secret.name, "hugging-face")
            if not re.fullmatch(r"[\w.-]+", secret.key):
                rule = "must be letters, digits, '_', '-' and '.', such as token"
                raise ConfigError(f"secrets {variable}: the key {secret.key!r} {rule}")
        if self.tpu is not None:
            _matches(_VALUE, "tpu accelerator", self.tpu.accelerator, "tpu-v5-lite-podslice", _MOST)
            if not re.fullmatch(r"\d+(x\d+)+", self.tpu.topology):
                raise ConfigError(
                    f"tpu topology {self.tpu.topology!r} must be numbers with x between them, such as 4x4"
                )

    def _check_numbers(self) -> None:
        least = {"nodes": 1, "gpus": 0, "max_restarts": 0, "ttl_seconds": 0, "grace_seconds": 1, "port": 1}
        for what, bound in least.items():
            if getattr(self, what) < bound:
                raise ConfigError(f"{what} {getattr(self, what)} must be at least {bound}")
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"processes {self.processes} must be at least 1")
        for what, text in {"cpu": self.cpu, "memory": self.memory, "shm": self.shm}.items():
            if text is not None:
                _matches(_QUANTITY, what, text, "16Gi" if what != "cpu" else "32")
        devices = {**self.rdma, self.gpu_resource: self.gpus} | ({"tpu": self.tpu.chips_per_node} if self.tpu else {})
        for name, count in devices.items():
            _matches(_KEY, "resource", name, "rdma/hca_shared_devices_a")
            if count < 0:
                raise ConfigError(f"{name} {count} must be at least 0")

    @property
    def per_node(self) -> int:
        """Training processes of a pod: as ``processes`` says, or one per GPU."""
        return self.processes if self.processes is not None else max(1, self.gpus)


def _matches(rule: re.Pattern[str], what: str, text: str, works: str, longest: int = 253) -> None:
    if rule.fullmatch(text) is None or len(text) > longest:
        raise ConfigError(f"{what} {text!r} is not a name or value that Kubernetes takes; use one like {works}")
