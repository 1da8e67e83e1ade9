"""``tinytron dispatch check``: read the settings of hosts and clusters, and look at each host."""

from __future__ import annotations

from collections.abc import Sequence

from tinytron.dispatch.hosts import Host, hosts_of
from tinytron.dispatch.reading import read_settings
from tinytron.dispatch.script import quote, quote_path
from tinytron.dispatch.settings import FILE
from tinytron.errors import HostError
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.texts import counted

_OPTIONAL = ("uv", "python3", "nvidia-smi")


def main(argv: Sequence[str], prog: str = "tinytron dispatch") -> int:
    """Check the settings. Returns 1 if a host cannot run jobs. Raises: ConfigError."""
    parser = Parser(prog=prog, description="Check the settings of hosts and clusters, and what each host has.")
    parser.add_argument("action", choices=["check"], help="read the settings, and look at each host")
    parser.add_argument("--dispatch", default=FILE, metavar="FILE", help=f"the settings (default: {FILE})")
    args = parse_strictly(parser, argv)
    settings = read_settings(args.dispatch)
    hosts = hosts_of(settings)
    counts = f"{counted(len(settings.clusters), 'cluster')}, {counted(len(settings.hosts), 'host')}"
    print(f"{settings.file} is valid: {counts}")
    wrong = 0
    for host in hosts:
        try:
            found, missing = looked_at(host)
        except HostError as error:
            found, missing = f"error: {str(error).removeprefix(f'{host.name}: ')}", []
            wrong += 1
        wrong += bool(missing)
        print(f"{host.name}: {found}" + (f"; missing: {', '.join(missing)}" if missing else ""))
    for name in settings.in_order():
        if name not in {host.name for host in hosts}:
            kind = type(settings.hosts[name]).__name__.lower()
            print(
                f"{name}: valid; {kind} is a type that nothing is submitted to; see tinytron bootstrap --target {name}"
            )
    return 1 if wrong else 0


def looked_at(host: Host) -> tuple[str, list[str]]:
    """The tools and chips that ``host`` has, and what it lacks to run jobs. Raises: HostError if it cannot be reached."""
    needed = [*host.tools, *(["juicefs", "mountpoint"] if host.cluster.mount else [])]
    words = " ".join(map(quote, [*needed, *_OPTIONAL]))
    share = quote_path(host.cluster.folder("share"))
    there = host.shell.run(
        f'for tool in {words}; do if command -v "$tool" >/dev/null; then echo "$tool"; fi; done\n'
        f"if mkdir -p {share} && [ -w {share} ]; then echo :share; fi"
    ).split()
    missing = [tool for tool in needed if tool not in there]
    if ":share" not in there:
        missing.append(f"write access to {host.cluster.folder('share')}")
    if not host.cluster.python and not {"uv", "python3"} & set(there):
        missing.append("uv or python3, which make environments")
    if missing:
        return "reached", missing
    extra = [tool for tool in _OPTIONAL if tool in there]
    return f"reached; {host.chips_seen()}; has {', '.join(extra) or 'no optional tools'}", []
