"""The bash script that runs a job on a host: settings, all of them quoted, followed by ``job.sh``, which never changes."""

from __future__ import annotations

import base64
import io
import json
import shlex
import tarfile
import textwrap
import time
from collections.abc import Mapping
from importlib import resources

from tinytron.dispatch.checks import mebibytes
from tinytron.dispatch.credentials import secrets_of, without_password
from tinytron.dispatch.settings import Cluster, Secret
from tinytron.dispatch.work import Request, Work

HEARTBEAT_SECONDS = 30
TOKEN = "JUPYTER_TOKEN"  # read by Jupyter
LINKED = ("data", "checkpoints", "results")  # folders of the cluster that links in its root lead to


def quote(text: str) -> str:
    """``text`` as one word of a shell script, whatever it contains. Everything from a user passes through here."""
    assert "\0" not in text, "settings and names are checked for it"
    return shlex.quote(text)


def quote_path(path: str) -> str:
    """Like ``quote``, but a leading ``~/`` is the home folder on the machine where the script runs."""
    return f'"$HOME"/{quote(path[2:])}' if path.startswith("~/") else quote(path)


def quote_all(words: list[str]) -> str:
    """``words`` as the content of a bash array."""
    return " ".join(map(quote, words))


def job_folder(cluster: Cluster, work: Work, run_id: str) -> str:
    """The folder of one submission on the host."""
    return f"{cluster.folder('share').rstrip('/')}/{inner_folder(work, run_id)}"


def inner_folder(work: Work, run_id: str) -> str:
    """``job_folder`` inside the cluster's ``share``."""
    return f"jobs/{work.place}/{run_id}"


def status_folder(cluster: Cluster, work: Work, run_id: str) -> str:
    """The folder with the state of one submission."""
    return f"{cluster.folder('status').rstrip('/')}/{work.place}/{run_id}"


def job_script(
    work: Work,
    cluster: Cluster,
    env: Mapping[str, str],
    request: Request,
    run_id: str,
    tree: str,
    *,
    log: str = "",
    nodes: str = "",
    lock_gpus: bool = False,
    gpu_kind: str = "",
    per_node: int | None = None,
    uv_groups: tuple[str, ...] = (),
    rank_logs: bool = False,
    payload: bytes | None = None,
) -> str:
    """The whole script. ``env`` are its environment variables; ``tree`` names the code; ``per_node`` is the number of GPUs
    of each node (``None``: all that there are), and ``lock_gpus`` takes free ones, of the ``gpu_kind``; ``nodes`` are
    assignments of ``NUM_NODES`` and ``NODE_RANK`` from the scheduler's variables; ``payload``, a tar.gz of the job's
    folder, makes it self-contained."""
    described = {"name": work.name, "project": work.project, "group": work.group, "run_id": run_id}
    paths = [f'--load="$code"/{quote(file)}' for file in work.loaded_files()]
    paths += [f'-s "$here"/stage{number}.yaml' for number in range(1, len(work.files))]
    mount = without_password(cluster.mount)[0] if cluster.mount else ""
    secrets = secrets_of(cluster) | ({TOKEN: Secret()} if work.notebook else {})
    lines = [
        "#!/usr/bin/env bash",
        f"# Runs {work.place} (submission {run_id}). Written by Tinytron; safe to repeat: the run continues.",
        "set -euo pipefail",
        "",
        f"name={quote(work.name)}",
        f"described={quote(json.dumps(described)[1:-1])}",
        *_folders(cluster, work, run_id, fixed=payload is None),
        f"log={quote_path(log)}" if log else 'log=""',
        f'code="$share"/code/{quote(tree)}',
        'archive="$here"/code.tar.gz' if payload is not None else f'archive="$share"/code/{quote(tree)}.tar.gz',
        f"python={quote_path(cluster.python)}" if cluster.python else 'python=""',
        f"uv_groups=({quote_all(list(uv_groups))})",
        f"arguments=({' '.join([quote_all(work.flags()), *paths])})",
        f"mount={quote(mount)}",
        f"mount_options=({' '.join(_mount_options(cluster))})",
        f"lock_gpus={request.chips if lock_gpus else 0}",
        f"gpu_kind=({quote_all(gpu_kind.split())})",
        f"notebook={int(work.notebook)}",
        f"heartbeat_seconds={HEARTBEAT_SECONDS}",
        "",
        "# Files with secrets by environment variable; without a file, the variable has to be set.",
        f"secrets=({' '.join(_secret(name, s, payload is None) for name, s in secrets.items())})",
        "",
        *_environment(cluster, env, request, per_node, nodes=nodes, rank_logs=rank_logs),
    ]
    if payload is not None:
        lines += _payload(payload)
    body = resources.files("tinytron.dispatch").joinpath("job.sh").read_text(encoding="utf-8")
    return "\n".join(lines) + "\n" + body


def _folders(cluster: Cluster, work: Work, run_id: str, *, fixed: bool) -> list[str]:
    """Assignments of the folders. Unless they are ``fixed``, variables such as TINYTRON_ROOT change them where it runs."""
    given = {
        "root": quote_path(cluster.root),
        "work": quote_path(cluster.work),
        "share": quote_path(cluster.share) if cluster.share else '"$work"',
        "status": quote_path(cluster.status) if cluster.status else '"$share"/status',
        **{part: quote_path(path) if (path := getattr(cluster, part)) else '""' for part in LINKED},
    }
    lines = []
    for name, value in given.items():
        lines.append(f"{name}={value}")
        if not fixed:
            lines.append(f'{name}="${{TINYTRON_{name.upper()}:-${name}}}"')
    return [
        *lines,
        f'here="$share"/{quote(inner_folder(work, run_id))}',
        f"status+=/{quote(f'{work.place}/{run_id}')}",
    ]


def _mount_options(cluster: Cluster) -> list[str]:
    """The flags of ``juicefs mount``, quoted. Its sizes are in MiB."""
    options = []
    if cluster.cache_size is not None:
        options += ["--cache-size", str(mebibytes(cluster.cache_size, "cache_size"))]
    if cluster.cache_dir is not None:
        options += ["--cache-dir", quote_path(cluster.cache_dir)]
    if cluster.all_squash is not None:
        options += ["--all-squash", quote(cluster.all_squash)]
    return options


def _secret(name: str, secret: Secret, sent: bool) -> str:
    if secret.file is not None:
        return f"{name}:{quote_path(secret.file)}"
    return f'{name}:"$here"/secret.{name}' if sent else f"{name}:"


def _environment(
    cluster: Cluster, env: Mapping[str, str], request: Request, per_node: int | None, *, nodes: str, rank_logs: bool
) -> list[str]:
    lines = ["# Environment of the job: our own, the cluster's, the host's, and --env; the last one wins."]
    if nodes:
        lines.append(f"export {nodes}")
    if request.chips == 0 or per_node is not None:
        lines.append(f"export NUM_GPUS={per_node if request.chips else 0}")
    if rank_logs:
        lines.append(f'export PET_TEE=3 PET_LOG_DIR={quote_path(cluster.folder("log"))}/ranks-"${{SLURM_JOB_ID:-$$}}"')
    known = {"UV_CACHE_DIR": cluster.uv_dir, "WANDB_ENTITY": cluster.wandb_entity}
    known["WANDB_PROJECT"] = cluster.wandb_project
    lines += [f"export {name}={quote_path(value)}" for name, value in known.items() if value]
    return [*lines, f"variables=({quote_all([f'{name}={value}' for name, value in env.items()])})"]


def _payload(payload: bytes) -> list[str]:
    text = "\n".join(textwrap.wrap(base64.b64encode(payload).decode(), 120))
    return [
        "",
        "# The options and the code.",
        'mkdir -p "$(dirname -- "$here")"',
        'part="$(mktemp -d -p "$(dirname -- "$here")")"',
        "base64 -d <<'PAYLOAD' | (cd \"$part\" && tar -xz --no-same-owner)",
        text,
        "PAYLOAD",
        'mv -T "$part" "$here" 2>/dev/null || rm -rf "$part" # another node, or an earlier start, may have been first',
        'if [ -n "$log" ]; then',
        '    if [ "${NODE_RANK:-0}" != 0 ]; then log+=".node$NODE_RANK"; fi',
        '    mkdir -p "$(dirname -- "$log")"',
        '    exec > >(tee -ai -- "$log") 2>&1',
        "fi",
    ]


def packed(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    """A tar.gz of ``files``: content and mode by path. Folders are private."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, (content, mode) in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(content), mode, time.time()  # sites remove old files
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
