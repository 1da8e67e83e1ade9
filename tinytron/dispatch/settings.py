"""The settings of hosts and clusters, ``~/.tinytron.yaml``: every key once, with its type, its help and a value that works.

A *cluster* is a set of folders that several hosts share. A *host* is a machine, or a scheduler, that runs jobs in them.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from tinytron.config import converted
from tinytron.errors import ConfigError, first_line
from tinytron.utils.flags import FieldInfo, Flag, config_fields, nearest
from tinytron.utils.optional import require_package

FILE = "~/.tinytron.yaml"
T = TypeVar("T")
Texts = dict[str, str]
Numbers = dict[str, int]


@dataclass(frozen=True)
class Secret:
    """Where a secret is: in the environment variable ``env`` of the machine that submits, or in ``file`` on the host."""

    env: Annotated[str | None, Flag("environment variable of the machine that submits", works="WANDB_API_KEY")] = None
    file: Annotated[str | None, Flag("file on the host, which only you can read", works="~/.wandb_key")] = None


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
    preemptible: Annotated[bool, Flag("preemptible machine", works=True)] = False
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
    pvc_name: Annotated[str | None, Flag("persistent volume claim to mount", works="tinytron")] = None
    pvc_mount_path: Annotated[str, Flag("where it is mounted", works="/data")] = "/data"
    num_nodes: Annotated[int, Flag("number of nodes", works=2, at_least=1)] = 1
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


def read_settings(file: str = FILE) -> Settings:
    """The settings in ``file``. Raises: ConfigError, which names the key, the rule, and a value that works."""
    yaml = require_package("yaml", "cli")
    try:
        content = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{file} does not exist; copy examples/dispatch.yaml to {FILE} and edit it, or name a file with --dispatch"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({first_line(error)}); make it a text file that you can read"
        ) from error
    except yaml.YAMLError as error:  # without its text, which repeats lines of the file, and these may have secrets
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"{file} is not valid YAML{line}; compare with examples/dispatch.yaml") from None
    try:
        return settings_of(content, file)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def settings_of(content: Any, file: str = FILE) -> Settings:
    """The settings in the parsed file ``content``. Raises: ConfigError."""
    top = _mapping(content, "the file", "clusters: {...} and hosts: {...}")
    for key in top:
        if key not in TOP:
            raise ConfigError(f"{key} is not a setting{nearest(str(key), TOP)}; use one of {', '.join(TOP)}")
    mount = None if top.get("mount") is None else _text(top["mount"], "mount", "redis://10.0.0.1:6379/0")
    clusters = {}
    for name, one in _mapping(top.get("clusters"), "clusters", "lab: {root: /data/out, work: /data/work}").items():
        given = _mapping(one, f"clusters.{name}", "{root: /data/out, work: /data/work}")
        clusters[str(name)] = read_section(Cluster, {"mount": mount, **given}, f"clusters.{name}")
        check_cluster(clusters[str(name)], f"clusters.{name}")
    hosts: dict[str, AnyHost] = {}
    for name, one in _mapping(top.get("hosts"), "hosts", "box: {type: plain, ssh: me@box, cluster: lab}").items():
        hosts[str(name)] = _host(one, f"hosts.{name}", clusters)
    priority = converted("priority", top.get("priority") or [], tuple[str, ...])
    for name in priority:
        if name not in hosts:
            raise ConfigError(f"priority: there is no host {name}{nearest(name, hosts)}; name hosts of this file")
    mapping = _texts(top.get("gres_mapping") or {}, "gres_mapping", "{h100: gpu:h100}")
    proxy = None if top.get("proxy") is None else _address(top["proxy"], "proxy")
    return Settings(file, clusters, hosts, tuple(dict.fromkeys(priority)), mapping, proxy)


def read_section(cls: type[T], content: Any, where: str) -> T:
    """An instance of ``cls`` with the values of ``content``, which is at ``where``. Raises: ConfigError."""
    infos = {info.name: info for info in config_fields(cls)}
    required = [f"{name}: {i.flag.works}" for name, i in infos.items() if i.default is MISSING]
    given = _mapping(content, where, "{" + ", ".join(required) + "}")
    for key in given:
        if key not in infos:
            raise ConfigError(
                f"{where}.{key} is not a setting{nearest(str(key), infos)}; use one of {', '.join(infos)}"
            )
    values = {}
    for name, info in infos.items():
        if given.get(name) is not None:
            values[name] = _value(given[name], f"{where}.{name}", info)
        elif info.default is MISSING:
            raise ConfigError(f"{where}.{name} is required: {info.flag.help}; write {name}: {info.flag.works}")
    return cls(**values)


def _host(content: Any, where: str, clusters: Mapping[str, Cluster]) -> AnyHost:
    given = dict(_mapping(content, where, "{type: plain, ssh: me@box, cluster: lab}"))
    kind = given.pop("type", None)
    if kind not in HOST_TYPES:
        raise ConfigError(f"{where}.type {kind} must be one of {', '.join(HOST_TYPES)}{nearest(str(kind), HOST_TYPES)}")
    host = read_section(HOST_TYPES[kind], given, where)
    if host.cluster not in clusters:
        raise ConfigError(
            f"{where}.cluster {host.cluster} is not in clusters{nearest(host.cluster, clusters)}; use one of "
            f"{', '.join(clusters)}"
        )
    if isinstance(host, (Plain, Slurm)) and host.ssh is not None:
        _address(host.ssh, f"{where}.ssh")
    if isinstance(host, Slurm):
        _check_slurm(host, clusters[host.cluster], where)
    return host


def check_cluster(cluster: Cluster, where: str) -> None:
    """Raises: ConfigError for folders that are not absolute, and for sizes and users that are not written as such."""
    for name in ("root", "work", "share", "log", "status", "data", "checkpoints", "results", "cache_dir", "uv_dir"):
        path = getattr(cluster, name)
        if path is not None and not path.startswith(("/", "~/")):
            raise ConfigError(f"{where}.{name} {path} must be an absolute path or begin with ~/, as /data/{name}")
    if cluster.all_squash is not None and not all(part.isdecimal() for part in cluster.all_squash.split(":")):
        raise ConfigError(f"{where}.all_squash {cluster.all_squash} must be UID:GID, as 1000:1000")
    if cluster.cache_size is not None:
        mebibytes(cluster.cache_size, f"{where}.cache_size")


def _check_slurm(host: Slurm, cluster: Cluster, where: str) -> None:
    """sbatch expands no ``~`` in its options, and patterns with a backslash not at all."""
    log = cluster.folder("log")
    if log.startswith("~") or "\\" in log:
        raise ConfigError(
            f"clusters.{host.cluster}: the log folder {log} must be an absolute path without a backslash for the SLURM "
            f"host at {where}; write log: /home/me/logs"
        )


def mebibytes(text: str, where: str) -> int:
    """A size such as ``100G`` in MiB. Raises: ConfigError."""
    number, unit = text[:-1], text[-1:].upper()
    if text.isdecimal():
        number, unit = text, "M"
    if not number.isdecimal() or unit not in ("M", "G", "T"):
        raise ConfigError(f"{where} {text} must be a number with M, G or T; use 100G")
    return int(number) * {"M": 1, "G": 1024, "T": 1024 * 1024}[unit]


def _mapping(value: Any, where: str, works: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping of settings; write {works}")
    return value


def _value(value: Any, where: str, info: FieldInfo) -> Any:
    kind, works = info.type, info.flag.works
    if kind is Secret:
        return _secret(value, where, str(works))
    if kind == Texts:
        return _texts(value, where, works)
    if kind == Numbers:
        counts = {str(k): _converted(v, f"{where}.{k}", int, 8) for k, v in _mapping(value, where, str(works)).items()}
        for name, count in counts.items():
            if count < 0:
                raise ConfigError(f"{where}.{name} {count} must be at least 0; use 8")
        return counts
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list; write {works}")
        if item is Partition:
            named = [{"name": one} if isinstance(one, str) else one for one in value]
            return tuple(read_section(Partition, one, f"{where}[{i}]") for i, one in enumerate(named))
        if item == Texts:
            return tuple(_texts(one, f"{where}[{i}]", works) for i, one in enumerate(value))
        return tuple(_text(one, f"{where}[{i}]", works) for i, one in enumerate(value))
    if kind is str:
        return _text(value, where, works)
    number = _converted(value, where, kind, works)
    if not info.flag.allows(number):
        raise ConfigError(f"{where} {number} must be {info.flag.bounds}; use {works}")
    return number


def _converted(value: Any, where: str, kind: Any, works: object) -> Any:
    try:
        return converted(where, value, kind)
    except ConfigError as error:
        raise ConfigError(f"{error}; use {works}") from None


def _text(value: Any, where: str, works: object) -> str:
    text: str = _converted(value, where, str, works)
    if not text or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ConfigError(f"{where} {text!r} must not be empty or have control characters; use {works}")
    return text


def _texts(value: Any, where: str, works: object) -> Texts:
    """A mapping of names to texts. A value may have line ends, but not the character 0, which ends a variable."""
    found = {}
    for name, one in _mapping(value, where, str(works)).items():
        if isinstance(one, bool):
            one = str(one).lower()
        found[str(name)] = text = _converted(one, f"{where}.{name}", str, works)
        if "\0" in text:
            raise ConfigError(f"{where}.{name} must not have the character 0; use {works}")
        if where.endswith(".env"):
            check_variable(str(name), where)
    return found


def check_variable(name: str, where: str) -> None:
    """Raises: ConfigError if no environment variable can have that name."""
    if not (name.isascii() and name.isidentifier()):
        raise ConfigError(f"{where}: {name!r} must be letters, digits and _; use a name such as NCCL_DEBUG")


def _secret(value: Any, where: str, works: str) -> Secret:
    """A reference to a secret. The error does not repeat the value, which may be the secret itself."""
    given = value if isinstance(value, Mapping) else {}
    names = [name for name in ("env", "file") if isinstance(given.get(name), str) and given[name]]
    if len(names) != 1 or len(given) != 1:
        raise ConfigError(f"{where} must say where the secret is, not be the secret; write {works} or {{file: ~/.key}}")
    if names == ["env"] and not (given["env"].isascii() and given["env"].isidentifier()):
        raise ConfigError(f"{where}.env must be the name of an environment variable; write {works}")
    if names == ["file"]:
        _text(given["file"], f"{where}.file", "~/.key")
    return Secret(**given)


def _address(value: Any, where: str) -> str:
    text = _text(value, where, "me@box")
    if text.startswith("-") or any(c.isspace() for c in text):  # ssh would read an option
        raise ConfigError(
            f"{where} {text!r} must be a host as ssh takes it, without spaces and a leading -; use me@box"
        )
    return text
