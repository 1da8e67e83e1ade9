"""The settings of hosts and clusters, ``~/.tinytron.yaml``: every key once, with its type, its help and a value that works.

A *cluster* is a set of folders that several hosts share. A *host* is a machine, or a scheduler, that runs jobs in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated

from tinytron.utils.flags import Flag

FILE = "~/.tinytron.yaml"
Texts = dict[str, str]
Numbers = dict[str, int]


@dataclass(frozen=True)
class Secret:
    """Where a secret is: in the environment variable ``env`` of the machine that submits, or in ``file`` on the host."""

    env: Annotated[str | None, Flag("environment variable of the machine that submits", works="WANDB_API_KEY")] = None
    file: Annotated[str | None, Flag("file on the host, which only you can read", works="~/.wandb_key")] = None


Secrets = dict[str, Secret]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Folders that the hosts of a cluster share, and what all of its jobs get."""

    root: Annotated[str, Flag("output folder of all jobs, as OUT of tinytron run", works="/data/tinytron")]
    work: Annotated[str, Flag("working directory of the jobs", works="/scratch/me/tinytron")]
    share: Annotated[
        str | None,
        Flag("folder for code, environments and job folders, which all nodes see; default: work", works="/home/me/tt"),
    ] = None
    log: Annotated[str | None, Flag("folder for logs; default: SHARE/logs", works="/home/me/logs")] = None
    status: Annotated[str | None, Flag("folder for states; default: SHARE/status", works="/home/me/status")] = None
    data: Annotated[str | None, Flag("folder that ROOT/data leads to", works="/datasets/tokens")] = None
    checkpoints: Annotated[str | None, Flag("folder that ROOT/checkpoints leads to", works="/ckpt/me")] = None
    results: Annotated[str | None, Flag("folder that ROOT/results leads to", works="/data/results")] = None
    python: Annotated[
        str | None, Flag("Python with all packages; default: an environment is made", works="/opt/py/bin/python")
    ] = None
    uv_dir: Annotated[str | None, Flag("cache of uv", works="/scratch/me/uv")] = None
    mount: Annotated[
        str | None, Flag("JuiceFS volume to mount at ROOT: its metadata engine", works="redis://10.0.0.1:6379/0")
    ] = None
    mount_password: Annotated[Secret | None, Flag("password of the metadata engine", works="{env: META_PASSWORD}")] = (
        None
    )
    cache_size: Annotated[str | None, Flag("size of JuiceFS's cache", works="100G")] = None
    cache_dir: Annotated[str | None, Flag("folder of JuiceFS's cache", works="/scratch/cache")] = None
    all_squash: Annotated[str | None, Flag("user and group that own all files of the mount", works="1000:1000")] = None
    env: Annotated[Texts | None, Flag("environment variables of the jobs", works="{NCCL_IB_HCA: mlx5}")] = None
    wandb: Annotated[Secret | None, Flag("key of Weights & Biases", works="{env: WANDB_API_KEY}")] = None
    wandb_entity: Annotated[str | None, Flag("entity of Weights & Biases", works="my-team")] = None
    wandb_project: Annotated[str | None, Flag("project of Weights & Biases", works="my-project")] = None
    hf_token: Annotated[Secret | None, Flag("token of the Hugging Face hub", works="{env: HF_TOKEN}")] = None
    secrets: Annotated[
        Secrets | None, Flag("further secrets by environment variable", works="{MY_KEY: {env: MY_KEY}}")
    ] = None

    def folder(self, name: str) -> str:
        """The folder ``share``, ``log`` or ``status``, or its default."""
        given = getattr(self, name)
        share = self.share or self.work
        return given or (share if name == "share" else f"{share.rstrip('/')}/{'logs' if name == 'log' else name}")


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A machine behind SSH (or this one, without ``ssh``)."""

    cluster: Annotated[str, Flag("name of its cluster", works="lab")]
    ssh: Annotated[str | None, Flag("where ssh connects to; default: this machine", works="me@box")] = None
    chips: Annotated[Numbers | None, Flag("its accelerators; default: as nvidia-smi says", works="{h100: 8}")] = None
    uv_groups: Annotated[tuple[str, ...] | None, Flag("dependency groups of uv sync", works="[cuda12]")] = None
    env: Annotated[Texts | None, Flag("environment variables, after the cluster's", works="{OMP_NUM_THREADS: 8}")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A SLURM partition."""

    name: Annotated[str, Flag("its name", works="gpu")]
    default: Annotated[bool, Flag("use this one", works=True)] = False
    constraint: Annotated[str | None, Flag("features its nodes must have", works="h100&ib")] = None


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A SLURM cluster, by its login node (or this machine, without ``ssh``)."""

    cluster: Annotated[str, Flag("name of its cluster", works="hpc")]
    ssh: Annotated[str | None, Flag("its login node; default: this machine", works="me@login.hpc.edu")] = None
    partitions: Annotated[
        tuple[Partition, ...] | None, Flag("partitions for jobs with accelerators", works="[{name: gpu}]")
    ] = None
    cpu_partitions: Annotated[tuple[Partition, ...] | None, Flag("partitions for -n 0", works="[{name: cpu}]")] = None
    account: Annotated[str | None, Flag("account that pays", works="my-lab")] = None
    qos: Annotated[str | None, Flag("quality of service", works="normal")] = None
    mem: Annotated[str, Flag("memory of each node", works="64G")] = "64G"
    cpus: Annotated[int | None, Flag("CPU cores of each node", works=16, at_least=1)] = None
    time: Annotated[str | None, Flag("time limit", works="24:00:00")] = None
    signal_seconds: Annotated[
        int, Flag("seconds before the time limit at which a job saves and requeues", works=300, at_least=1)
    ] = 300
    exclude: Annotated[tuple[str, ...] | None, Flag("nodes to avoid", works="[node07]")] = None
    chips: Annotated[Numbers | None, Flag("accelerators of each node, by kind", works="{h100: 8}")] = None
    annotations: Annotated[Texts | None, Flag("further options of sbatch", works="{comment: mine}")] = None
    rank_logs: Annotated[bool, Flag("also write one log per process", works=True)] = False
    uv_groups: Annotated[tuple[str, ...] | None, Flag("dependency groups of uv sync", works="[cuda12]")] = None
    env: Annotated[Texts | None, Flag("environment variables, after the cluster's", works="{NCCL_DEBUG: WARN}")] = None


@dataclass(frozen=True, kw_only=True)
class Tpu:
    """A TPU machine of Google Cloud. Untested, and the trainer has no TPU backend."""

    cluster: Annotated[str, Flag("name of its cluster", works="gcp")]
    zone: Annotated[str, Flag("zone", works="us-central2-b")]
    project: Annotated[str, Flag("project of Google Cloud", works="my-project")]
    accelerator_type: Annotated[str, Flag("type", works="v4-8")]
    version: Annotated[str, Flag("runtime version", works="tpu-ubuntu2204-base")] = "tpu-ubuntu2204-base"
    spot: Annotated[bool, Flag("spot machine", works=True)] = False
    preemptible: Annotated[bool, Flag("preemptible machine, the older kind of spot", works=False)] = False
    network: Annotated[str | None, Flag("network", works="default")] = None
    subnetwork: Annotated[str | None, Flag("subnetwork", works="default")] = None
    service_account: Annotated[str | None, Flag("service account", works="me@my-project.iam")] = None
    internal_ips: Annotated[bool, Flag("without external addresses", works=True)] = False
    uv_groups: Annotated[tuple[str, ...] | None, Flag("dependency groups of uv sync", works="[tpu]")] = None
    env: Annotated[Texts | None, Flag("environment variables, after the cluster's", works="{A: b}")] = None


@dataclass(frozen=True, kw_only=True)
class Kubernetes:
    """A Kubernetes namespace."""

    cluster: Annotated[str, Flag("name of its cluster, whose folders are paths in the containers", works="k8s")]
    image: Annotated[str, Flag("container image", works="ghcr.io/me/tinytron:latest")]
    namespace: Annotated[str, Flag("namespace", works="default")] = "default"
    context: Annotated[str | None, Flag("context of kubectl; default: the current one", works="my-cluster")] = None
    queue: Annotated[str | None, Flag("queue of the scheduler", works="default")] = None
    pvc_name: Annotated[
        str | None, Flag("persistent volume claim with the cluster's folders; needed", works="tinytron")
    ] = None
    pvc_mount_path: Annotated[str, Flag("where it is mounted", works="/data")] = "/data"
    num_nodes: Annotated[int, Flag("nodes that a job may use", works=2, at_least=1)] = 1
    gpus_per_node: Annotated[int, Flag("GPUs of each node", works=8, at_least=0)] = 8
    cpus: Annotated[int | None, Flag("CPU cores of each node", works=16, at_least=1)] = None
    mem: Annotated[str | None, Flag("memory of each node", works="64Gi")] = None
    rdma: Annotated[str | None, Flag("resource of the RDMA devices", works="rdma/hca")] = None
    shm_size: Annotated[str, Flag("size of /dev/shm", works="16Gi")] = "16Gi"
    node_selector: Annotated[Texts | None, Flag("labels of the nodes", works="{gpu: h100}")] = None
    tolerations: Annotated[tuple[Texts, ...] | None, Flag("tolerated taints", works="[{key: gpu}]")] = None
    chips: Annotated[Numbers | None, Flag("accelerators of each node, by kind", works="{h100: 8}")] = None
    env: Annotated[Texts | None, Flag("environment variables, after the cluster's", works="{A: b}")] = None


@dataclass(frozen=True, kw_only=True)
class Volcano(Kubernetes):
    """A Kubernetes namespace whose jobs Volcano schedules."""


AnyHost = Plain | Slurm | Tpu | Kubernetes
HOST_TYPES: Mapping[str, type[AnyHost]] = MappingProxyType(
    {"plain": Plain, "slurm": Slurm, "tpu": Tpu, "kubernetes": Kubernetes, "volcano": Volcano}
)
TOP: Mapping[str, str] = MappingProxyType(
    {
        "clusters": "{NAME: {...}}: folders that hosts share",
        "hosts": "{NAME: {type: ..., ...}}: what runs jobs",
        "priority": "[NAME, ...]: hosts in the order in which they are tried; the others follow in the order of the file",
        "gres_mapping": "{CHIP: GRES}: SLURM's name of a chip, such as {h100: gpu:h100}; default: gpu:CHIP",
        "mount": "JuiceFS volume of clusters that name none",
        "proxy": "SSH jump host on the way to all hosts",
    }
)


@dataclass(frozen=True)
class Settings:
    """A whole settings file; ``file`` is where it was read from."""

    file: str
    clusters: Mapping[str, Cluster]
    hosts: Mapping[str, AnyHost]
    priority: tuple[str, ...] = ()
    gres_mapping: Mapping[str, str] = field(default_factory=dict)
    proxy: str | None = None

    def cluster_of(self, host: str) -> Cluster:
        """The cluster of a host."""
        return self.clusters[self.hosts[host].cluster]

    def in_order(self) -> list[str]:
        """All hosts, in the order in which they are tried."""
        return [*self.priority, *(name for name in self.hosts if name not in self.priority)]
