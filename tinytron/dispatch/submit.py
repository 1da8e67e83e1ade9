"""Submitting: choose a host, send the code and the options, start the job, and remember it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tinytron.dispatch import record
from tinytron.dispatch.choose import Rule, choose
from tinytron.dispatch.credentials import secrets_of, without_password
from tinytron.dispatch.hosts import ENDED, Host, State, host_of, hosts_of
from tinytron.dispatch.record import Submission
from tinytron.dispatch.settings import Cluster, Settings
from tinytron.dispatch.shell import NoAnswerError
from tinytron.dispatch.ship import Shipment
from tinytron.dispatch.work import Prepared, Request, Work, new_run_id
from tinytron.errors import ConfigError, HostError


@dataclass(frozen=True)
class Order:
    """How works are submitted: the hardware of each, the hosts to consider, environment variables (``--env``), and further
    secrets by variable."""

    request: Request
    rule: Rule
    env: Mapping[str, str]
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


def submit_all(
    works: Sequence[Work],
    settings: Settings,
    order: Order,
    shipment: Shipment,
    environment: Mapping[str, str],
    say: Callable[[str], None] = print,
    *,
    name: str | None = None,
    dry_run: bool = False,
) -> list[Submission]:
    """Submit ``works`` to one host; in SLURM, several are one job array called ``name``. ``environment`` is where secrets
    come from. With ``dry_run`` every file and script is printed, and no host is reached: the first that is allowed is
    taken. Raises: ConfigError; HostError."""
    hosts = hosts_of(settings)
    host, why = _first(settings, hosts, order) if dry_run else choose(settings, hosts, order.request, order.rule)
    for note in shipment.notes:
        say(note)
    say(f"host: {host.name} ({why})")
    values = {**secret_values(host.cluster, environment), **order.secrets}
    jobs = []
    for work in works:
        run_id = new_run_id()
        jobs.append(host.prepare(work, order.request, run_id, shipment.files.tree, order.env, values))
    title = works[0].title if len(works) == 1 else f"{works[0].project}-{works[0].group}-{name or 'sweep'}"
    more = host.group_files(jobs, order.request, title)
    if dry_run:
        _show(host, jobs, more, host.starting(jobs, order.request, title), say)
        return []
    _check_none_runs(works, say)
    submissions = [_submission(host, job, shipment) for job in jobs]
    for one in submissions:  # before they start: if the connection breaks then, they can still be seen and cancelled
        record.write(one)
    begun = False
    try:
        host.send(jobs, shipment.files, more)
        begun = True
        started = host.start(jobs, order.request, title)
    except HostError as error:
        some = len(jobs) > 1 and not host.together and not all(one.id for one in submissions)
        if begun and (some or isinstance(error, NoAnswerError)):
            raise HostError(f"{error}; {title} may have started: see tinytron status {works[0].name}") from error
        with contextlib.suppress(HostError):
            if begun:
                for one in submissions:
                    host.cancel(one)
            host.remove(jobs)
        for one in submissions:
            record.remove(one)
        raise
    done = [replace(one, id=job_id, log=log) for one, (job_id, log) in zip(submissions, started, strict=True)]
    for one in done:
        record.write(one)
    return done


def _check_none_runs(works: Sequence[Work], say: Callable[[str], None]) -> None:
    """Raises: ConfigError if an earlier submission of one of ``works`` waits or runs: they would write to one folder, and
    commands that take its name mean the newest one only."""
    places = {str(work.place) for work in works}
    earlier = [one for one in record.newest(record.read_all()) if one.place in places]
    states = states_of(earlier)
    for one in earlier:
        state = states[one.run_id]
        if isinstance(state, HostError):
            say(f"it is unknown whether the submission of {one.place} to {one.host} still runs: {state}")
        elif state.active:
            raise ConfigError(
                f"{one.place} was submitted to {one.host} as {one.id} and is {state.state}; use another name, or first: "
                f"tinytron cancel {one.place}"
            )


def _first(settings: Settings, hosts: Sequence[Host], order: Order) -> tuple[Host, str]:
    """The first host that the rule allows, without asking any."""
    for host in hosts:
        host_only = Rule(order.rule.clusters, order.rule.excluded, host.name)
        if order.rule.target in (None, host.name, settings.hosts[host.name].cluster):
            try:
                found, _ = choose(settings, [host], order.request, host_only)
            except ConfigError:
                continue
            return found, "the first that is allowed; none was asked"
    return choose(settings, [], order.request, order.rule)  # raises the right error


def secret_values(cluster: Cluster, environment: Mapping[str, str]) -> dict[str, str]:
    """The secrets that travel: those of environment variables of this machine, and the password in ``mount``. Raises:
    ConfigError for a variable that is not set."""
    found = {}
    for name, secret in secrets_of(cluster).items():
        if secret.env is not None:
            if not environment.get(secret.env):
                raise ConfigError(
                    f"the environment variable {secret.env} is not set, but the cluster's settings take {name} from it; "
                    f"set it with: export {secret.env}=..."
                )
            found[name] = environment[secret.env]
        elif secret.file is None and cluster.mount is not None:
            password = without_password(cluster.mount)[1]
            assert password is not None, "a secret without a reference is the password of the mount"
            found[name] = password
    return found


def _submission(host: Host, job: Prepared, shipment: Shipment) -> Submission:
    """The submission ``job`` as far as it is known before it starts."""
    work, log = job.work, f"{job.status}/output.log"
    return Submission(
        *(job.run_id, work.name, work.project, work.group, host.name, host.kind, host.shell.ssh, host.shell.proxy),
        *(host.known_id(job), job.here, host.cluster.root, job.status, log, shipment.files.tree, host.options),
    )


def _show(
    host: Host, jobs: Sequence[Prepared], more: Mapping[str, bytes], starting: str, say: Callable[[str], None]
) -> None:
    for job in jobs:
        for name, content in {**job.files(), **(more if job is jobs[0] else {})}.items():
            say(f"\n# file {job.here}/{name}\n{content.decode('utf-8', 'replace')}")
        for name in job.values:
            say(f"\n# file {job.here}/secret.{name}, which only you can read: not shown")
    say(f"\n# script that starts it on {host.name} (its files are above)\n{starting}")


def states_of(submissions: Sequence[Submission]) -> dict[str, State | HostError]:
    """The state of each submission by run id; the error for those whose host cannot be asked. Each host is asked once."""
    found: dict[str, State | HostError] = {}
    by_host: dict[tuple[str, str | None], list[Submission]] = {}
    found |= {one.run_id: State(one.ended) for one in submissions if one.ended}
    for one in submissions:
        if one.ended:
            continue
        by_host.setdefault((one.host, one.ssh), []).append(one)
    for several in by_host.values():
        try:
            states = host_of(several[0]).states(several)
            found |= {one.run_id: state for one, state in zip(several, states, strict=True)}
            for one, state in zip(several, states, strict=True):
                if state.state in ENDED:
                    with contextlib.suppress(ConfigError):  # then it is asked again
                        record.write(replace(one, ended=str(state)))
        except HostError as error:
            found |= {one.run_id: error for one in several}
    return found
