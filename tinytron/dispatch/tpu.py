"""Scripts for a TPU machine of Google Cloud. **Untested**, and the trainer has no TPU backend: it trains on the CPUs there.

``tinytron bootstrap --target HOST`` writes them; nothing submits to such a host.
"""

from __future__ import annotations

from tinytron.dispatch.credentials import secrets_of
from tinytron.dispatch.script import quote, quote_all
from tinytron.dispatch.settings import Cluster, Tpu

NOTE = "untested, and the trainer has no TPU backend: it trains on the CPUs of the TPU's host"
# Each machine of the slice runs this. Google's metadata server knows its number, and the addresses of all.
_WORKER = """\
about=http://metadata.google.internal/computeMetadata/v1/instance/attributes
NODE_RANK="$(curl -sf -H "Metadata-Flavor: Google" "$about/agent-worker-number")"
endpoints="$(curl -sf -H "Metadata-Flavor: Google" "$about/worker-network-endpoints")"
NUM_NODES="$(tr , "\\n" <<<"$endpoints" | wc -l)"
MASTER_ADDR="$(cut -d, -f1 <<<"$endpoints" | cut -d: -f3)"
export NODE_RANK NUM_NODES MASTER_ADDR
rm "$0" # it may have secrets
setsid nohup bash tinytron.sh </dev/null >>tinytron.log 2>&1 &
"""
_BODY = f"""\
tpu() {{ gcloud compute tpus tpu-vm "$1" "${{@:2}}" "${{place[@]}}"; }}
if [ "${{1:-}}" = delete ]; then
    tpu delete "$machine" --quiet
    exit
fi
begin="$(mktemp)" # a file that only you can read
trap 'rm -f "$begin"' EXIT
for variable in "${{secrets[@]}}"; do
    [ -n "${{!variable:-}}" ] || {{ echo "the environment variable $variable is not set; set it first" >&2 && exit 2; }}
    printf 'export %s=%q\\n' "$variable" "${{!variable}}" >>"$begin"
done
cat >>"$begin" <<'END'
{_WORKER}END
tpu describe "$machine" >/dev/null 2>&1 || tpu create "$machine" "${{options[@]}}"
tpu scp "$script" "$machine":tinytron.sh --worker=all
tpu scp "$begin" "$machine":tinytron.begin.sh --worker=all
tpu ssh "$machine" --worker=all --command='bash tinytron.begin.sh'
echo "its log: gcloud compute tpus tpu-vm ssh $machine ${{place[*]@Q}} --command='tail -f tinytron.log'"
"""


def machine_script(own: Tpu, cluster: Cluster, name: str, script: str) -> str:
    """A bash script that makes the machine ``name`` and starts the job's ``script``, a file next to it, on each of its
    workers. With the argument ``delete`` it deletes the machine."""
    given = {
        "--accelerator-type": own.accelerator_type,
        "--version": own.version,
        "--network": own.network,
        "--subnetwork": own.subnetwork,
        "--service-account": own.service_account,
    }
    switches = {"--spot": own.spot, "--preemptible": own.preemptible, "--internal-ips": own.internal_ips}
    options = [f"{flag}={value}" for flag, value in given.items() if value is not None]
    options += [flag for flag, wanted in switches.items() if wanted]
    lines = [
        "#!/usr/bin/env bash",
        "# Makes a TPU machine and starts a job on it; with the argument delete it deletes the machine.",
        f"# {NOTE[0].upper()}{NOTE[1:]}.",
        "set -euo pipefail",
        "",
        f"machine={quote(name)}",
        f'script="$(realpath -- "$(dirname -- "${{BASH_SOURCE[0]}}")")"/{quote(script)}',
        f"place=({quote_all([f'--zone={own.zone}', f'--project={own.project}'])})",
        f"options=({quote_all(options)})",
        f"secrets=({quote_all([variable for variable, one in secrets_of(cluster).items() if one.file is None])})",
        "",
    ]
    return "\n".join(lines) + "\n" + _BODY
