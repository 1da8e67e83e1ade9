"""Which host runs a job: the first by priority with enough free chips, or else the first that queues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinytron.dispatch.hosts import Host
from tinytron.dispatch.settings import Settings, Tpu
from tinytron.dispatch.work import Request
from tinytron.errors import ConfigError, HostError
from tinytron.utils.flags import nearest


@dataclass(frozen=True)
class Rule:
    """Which hosts to consider: those of ``clusters`` (empty: all), not those of ``excluded`` clusters, and if ``target`` is
    given, only that host, or the hosts of that cluster."""

    clusters: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    target: str | None = None


def choose(settings: Settings, hosts: Sequence[Host], request: Request, rule: Rule) -> tuple[Host, str]:
    """The host for ``request``, and why. A host that is named as the target is not asked. Raises: ConfigError for unknown
    names, and if no host can run it, saying what each of them has or why it was not reached."""
    _check(settings, rule)
    allowed = [host for host in hosts if _allows(settings, host.name, rule)]
    if len(allowed) == 1 and rule.target == allowed[0].name:
        return allowed[0], "as --target says"
    if not allowed and isinstance(settings.hosts.get(rule.target or ""), Tpu):
        raise ConfigError(
            f"--target {rule.target} is a TPU machine, and the trainer has no TPU backend, so nothing is submitted there; "
            f"write scripts for it with: tinytron bootstrap --target {rule.target}"
        )
    if not allowed:
        raise ConfigError(
            "no host is left to submit to; let --cluster, --exclude_cluster and --target allow a host of the type plain, "
            f"slurm, kubernetes or volcano in {settings.file}"
        )
    said, queues = [], []
    for host in allowed:
        try:
            if request.chips == 0:
                host.control.run(":")  # is it there?
                return host, "a CPU job"
            if not host.has(request):
                said.append(f"{host.name} does not have {request}")
                continue
            free = host.free(request)
        except HostError as error:
            said.append(str(error))
            continue
        if free >= request.chips:
            return host, f"{free} free"
        said.append(f"{host.name} has {free} free")
        if host.queues:
            queues.append(host)
    if queues:
        return queues[0], f"{'; '.join(said)}; queued"
    raise ConfigError(
        f"no host can run {request} now: {'; '.join(said)}; ask for less, or wait for one with --target HOST"
    )


def _allows(settings: Settings, name: str, rule: Rule) -> bool:
    cluster = settings.hosts[name].cluster
    wanted = not rule.clusters or cluster in rule.clusters
    return wanted and cluster not in rule.excluded and rule.target in (None, name, cluster)


def _check(settings: Settings, rule: Rule) -> None:
    for flag, names in (("--cluster", rule.clusters), ("--exclude_cluster", rule.excluded)):
        for name in names:
            if name not in settings.clusters:
                known = ", ".join(settings.clusters)
                raise ConfigError(
                    f"{flag} {name} is not a cluster{nearest(name, settings.clusters)}; use one of {known}"
                )
    places = [*settings.hosts, *settings.clusters]
    if rule.target is not None and rule.target not in places:
        raise ConfigError(
            f"--target {rule.target} is not a host or cluster of {settings.file}{nearest(rule.target, places)}; use one "
            f"of {', '.join(dict.fromkeys(places))}"
        )
