"""The script of a job, run by bash: whatever a user writes arrives as it was written, and nothing else happens."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.dispatch.conftest import Place, code
from tinytron.dispatch.script import job_folder, job_script, packed, quote, quote_path
from tinytron.dispatch.settings import Cluster, Secret
from tinytron.dispatch.slurm import NODES
from tinytron.dispatch.work import SCRIPT, Request, Work
from tinytron.errors import ConfigError

RUN = "20260101-000000-abc123"
EVIL = [
    "$(touch pwned)",
    "`touch pwned`",
    "a b",
    "it's",
    'say "hi"',
    "line\nend; touch pwned",
    "$HOME",
    "\\",
    "\\1",
    "*",
    "~/x",
    "-n",
    "#no",
    "; touch pwned",
    "&& touch pwned",
    "${IFS}",
    "\u00e9\u4e2d",
    "!!",
    "%j",
    "PAYLOAD",
    "'; touch pwned; '",
    "\r",
]
TEXT = st.one_of(
    st.sampled_from(EVIL),
    st.lists(st.sampled_from(EVIL), min_size=2, max_size=3).map("".join),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20),
)


def put(place: Place, cluster: Cluster, work: Work, script: str, values: dict[str, str] | None = None) -> Path:
    """Lay the files of a job out as ``Host.send`` does. Returns the script."""
    share = Path(os.path.expanduser(cluster.folder("share")))
    (share / "code").mkdir(parents=True, exist_ok=True)
    (share / "code" / f"{code().tree}.tar.gz").write_bytes(code().code)
    here = Path(os.path.expanduser(job_folder(cluster, work, RUN)))
    here.mkdir(parents=True, exist_ok=True)
    for name, content in {SCRIPT: script.encode(), **work.stage_files()}.items():
        (here / name).write_bytes(content)
    for name, value in (values or {}).items():
        (here / f"secret.{name}").write_text(value)
    return here / SCRIPT


def run(path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(path)], env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False
    )


def metadata(cluster: Cluster, work: Work) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (Path(os.path.expanduser(cluster.folder("status"))) / str(work.place) / RUN / "metadata.json").read_text()
    )
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXT, TEXT, TEXT, TEXT, st.booleans())
@example("\\1", "v", "w", "r", True)  # tar reads backslashes in its arguments as escapes
@example("\\1", "v", "w", "r", False)
def test_hostile_texts_arrive_as_they_are(
    place: Place, folder: str, value: str, word: str, restore: str, home: bool
) -> None:
    """Folders, environment variables, options and checkpoints; in a job's own script and in a self-contained one."""
    name = folder.replace("/", "_").replace("\0", "")
    if name.strip(".") == "" or any(ord(c) < 32 or ord(c) == 127 for c in name) or len(name.encode()) > 200:
        name = "plain"
    begin = "~" if home else str(place.home)
    shutil.rmtree(place.home / "scratch", ignore_errors=True)
    cluster = place.cluster(root=f"{begin}/{name}/root", work=f"{begin}/scratch/{name}")
    work = Work("n", (b"job: x\n", b"job: y\n"), (f"a.b={word}",), restore=restore, load=(value,))
    self_contained = home
    files = {name: (content, 0o644) for name, content in work.stage_files().items()}
    payload = packed({**files, "code.tar.gz": (code().code, 0o644)}) if self_contained else None
    script = job_script(work, cluster, {"MINE": value}, Request(0), RUN, code().tree, payload=payload)
    path = place.home / "run it.sh"
    path.write_text(script)
    if not self_contained:
        path = put(place, cluster, work, script)
    done = run(path)
    assert done.returncode == 0, done.stderr
    here = os.path.expanduser(job_folder(cluster, work, RUN))
    root = os.path.expanduser(cluster.root)
    expected = ["-m", "tinytron", "run", "n", f"{here}/config.yaml", root, "-p", "general", "-g", "default"]
    expected += [f"--restore={restore}", f"--load={value}", f"a.b={word}", "-s", f"{here}/stage1.yaml"]
    assert place.called["argv"] == expected
    assert place.called["env"]["MINE"] == value
    assert place.called["cwd"] == os.path.expanduser(cluster.work)
    assert not list(place.home.rglob("pwned"))
    assert not list(Path.cwd().glob("pwned"))
    assert metadata(cluster, work)["state"] == "finished"


def test_quoting_is_one_word() -> None:
    for text in EVIL:
        assert subprocess.run(["bash", "-c", f"printf %s {quote(text)}"], capture_output=True).stdout == text.encode()
    shown = subprocess.run(["bash", "-c", f"printf %s {quote_path('~/a $b')}"], capture_output=True, text=True).stdout
    assert shown == f"{os.environ['HOME']}/a $b"


@pytest.mark.parametrize("name", ["a/b", "", "..", "a b", "a\nb", "$(touch pwned)", "-x", "a" * 101])
def test_a_name_that_cannot_be_a_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"and \(not first\) '-', at most 100, such as my-run"):
        Work(name, (b"",))


def test_the_script_is_clean_for_shellcheck(place: Place, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    mount = {"mount": "redis://:pw@h/1", "cache_size": "1G", "cache_dir": "/c", "all_squash": "1:1", "data": "~/d d"}
    for number, (cluster, payload) in enumerate(
        [
            (place.cluster(wandb=Secret(env="W"), hf_token=Secret(file="~/t"), **mount), None),
            (place.cluster(python=None, uv_dir="~/uv", wandb_entity="me"), b"payload"),
        ]
    ):
        work = Work("n", (b"", b""), ("a=b c",))
        script = job_script(
            *(work, cluster, {"A": "it's"}, Request(2), RUN, "t"),
            **{"log": "~/l", "nodes": NODES, "lock_gpus": True, "per_node": 2, "rank_logs": True},
            uv_groups=("cuda12",),
            payload=payload,
        )
        (tmp_path / f"{number}.sh").write_text(script)
    done = subprocess.run(["shellcheck", *map(str, tmp_path.glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_environment_order_secrets_and_state(place: Place) -> None:
    """The script gets secrets from files, and removes them when the job is over."""
    key = place.home / "hf key"
    key.write_text("hf-token\n")
    cluster = place.cluster(wandb=Secret(env="ANY"), hf_token=Secret(file="~/hf key"), wandb_project="p", uv_dir="~/uv")
    work = Work("n", (b"",))
    script = job_script(work, cluster, {"A": "1", "NUM_GPUS": "3"}, Request(8), RUN, code().tree, per_node=8)
    path = put(place, cluster, work, script, {"WANDB_API_KEY": "w-token"})
    done = run(path, ACT="7")
    assert done.returncode == 7
    assert "token" not in script + done.stdout + done.stderr
    env = place.called["env"]
    assert (env["WANDB_API_KEY"], env["HF_TOKEN"], env["WANDB_PROJECT"]) == ("w-token", "hf-token", "p")
    assert env["UV_CACHE_DIR"] == f"{place.home}/uv"
    assert (env["A"], env["NUM_GPUS"]) == ("1", "3")  # the user's number of GPUs counts
    assert env["PYTHONPATH"].split(":")[0].endswith("/scratch/code/a1b2")
    told = metadata(cluster, work)
    assert (told["state"], told["exit_status"], told["name"], told["run_id"]) == ("failed", 7, "n", RUN)
    assert len(list(path.parent.glob("secret.*"))) == 1  # a failed job may be queued again
    assert run(path, ACT="0").returncode == 0
    assert not list(path.parent.glob("secret.*"))
    assert "the secret WANDB_API_KEY cannot be read" in run(path).stderr


@pytest.mark.parametrize(("name", "number"), [("TERM", signal.SIGTERM), ("USR1", signal.SIGUSR1)])
def test_a_signal_is_passed_on_once_and_the_state_is_preempted(place: Place, name: str, number: int) -> None:
    cluster, work = place.cluster(), Work("n", (b"",))
    path = put(place, cluster, work, job_script(work, cluster, {"ACT": "wait"}, Request(0), RUN, code().tree))
    with subprocess.Popen(["bash", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "the job speaks\n"
        assert metadata(cluster, work)["state"] == "running"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert (place.home / "signals").read_text() == f"SIG{name}\n"
    assert metadata(cluster, work)["state"] == "preempted"
    assert f"got {name}" in err


def test_the_heartbeat_goes_on_while_the_job_runs_and_ends_with_it(place: Place) -> None:
    cluster, work = place.cluster(), Work("n", (b"",))
    script = job_script(work, cluster, {"ACT": "wait"}, Request(0), RUN, code().tree)
    path = put(place, cluster, work, script.replace("heartbeat_seconds=30", "heartbeat_seconds=0.2"))
    with subprocess.Popen(["bash", str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        file = Path(cluster.folder("status")) / "general/default/n" / RUN / "metadata.json"
        first = file.stat().st_mtime
        time.sleep(1.0)
        assert file.stat().st_mtime > first
        job = _pid_of(str(place.python))
        process.kill()  # the script, not the job
        process.wait()
        time.sleep(0.6)
        last = file.stat().st_mtime
        time.sleep(0.6)
        assert file.stat().st_mtime == last
        assert job is not None
        assert _pid_of(str(place.python)) is None
        assert (place.home / "signals").read_text() == "SIGTERM\n"  # a run without its script saves and stops


def _pid_of(word: str) -> int | None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_text():
                return int(path.parent.name)
        except OSError:
            continue
    return None


def test_a_pod_that_was_asked_to_stop_is_started_again(place: Place) -> None:
    """Kubernetes takes 0 for the end of the job."""
    cluster, work = place.cluster(), Work("n", (b"",))
    path = put(place, cluster, work, job_script(work, cluster, {"ACT": "wait"}, Request(0), RUN, code().tree))
    env = {**os.environ, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    with subprocess.Popen(["bash", str(path)], stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(timeout=30) == 75
    assert metadata(cluster, work)["state"] == "preempted"


@pytest.mark.parametrize(("status", "state"), [(0, "finished"), (3, "failed"), (75, "preempted")])
def test_the_state_at_the_end(place: Place, status: int, state: str) -> None:
    """75: the processes of another node were asked to stop, and this node's ended with them."""
    cluster, work = place.cluster(), Work("n", (b"",))
    script = job_script(work, cluster, {"ACT": str(status)}, Request(0), RUN, code().tree)
    assert run(put(place, cluster, work, script)).returncode == status
    assert metadata(cluster, work)["state"] == state
    assert (Path(job_folder(cluster, work, RUN)) / "failed").exists() == (state == "failed")


def test_a_job_without_its_secret_says_that_it_failed(place: Place) -> None:
    cluster, work = place.cluster(wandb=Secret(file="~/missing")), Work("n", (b"",))
    done = run(put(place, cluster, work, job_script(work, cluster, {}, Request(0), RUN, code().tree)))
    assert "the secret WANDB_API_KEY cannot be read" in done.stderr
    assert metadata(cluster, work)["state"] == "failed"


@pytest.mark.parametrize("waits", ["for packages", "for a lock"])
def test_a_job_that_still_prepares_stops_at_once(place: Place, waits: str) -> None:
    """The programs that it started stop, too: pip would run for minutes more."""
    place.tool("uv", f"#!/bin/sh\n{sys.executable} -c 'import time; time.sleep(60)' the-packages & wait\n")
    cluster, work = place.cluster(python=None), Work("n", (b"",))
    sent = {"requirements.txt": (b"x\n", 0o644)}
    path = put(place, cluster, work, job_script(work, cluster, {}, Request(0), RUN, code().tree))
    (place.home / f"scratch/code/{code().tree}.tar.gz").write_bytes(packed(sent))
    lock = place.home / f"scratch/code/{code().tree}.lock"
    with contextlib.ExitStack() as stack:
        if waits == "for a lock":
            holder = subprocess.Popen(["flock", str(lock), "sh", "-c", "echo held; sleep 60"], stdout=subprocess.PIPE)
            stack.callback(holder.wait)
            stack.callback(holder.kill)
            assert holder.stdout is not None
            holder.stdout.readline()
        process = subprocess.Popen(["bash", str(path)], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 30
        while time.monotonic() < end and not (_pid_of("the-packages") if waits == "for packages" else lock.exists()):
            time.sleep(0.1)
        time.sleep(0.3)
        began = time.monotonic()
        process.terminate()
        process.wait(timeout=30)
        assert time.monotonic() - began < 10
    assert _pid_of("the-packages") is None
    assert metadata(cluster, work)["state"] == "preempted"


def test_a_package_in_src_comes_from_the_code_that_was_sent(place: Place) -> None:
    cluster, work = place.cluster(), Work("n", (b"",))
    path = put(place, cluster, work, job_script(work, cluster, {}, Request(0), RUN, code().tree))
    (place.home / f"scratch/code/{code().tree}.tar.gz").write_bytes(packed({"src/mine.py": (b"", 0o644)}))
    assert run(path, PYTHONPATH="").returncode == 0
    folder = place.home / "scratch/code" / code().tree
    assert place.called["env"]["PYTHONPATH"] == f"{folder}:{folder}/src"
    assert time.time() - path.parent.joinpath("config.yaml").stat().st_mtime < 600
    assert time.time() - (folder / "src/mine.py").stat().st_mtime < 600  # sites remove old files from scratch folders


def test_variables_reach_the_job_and_leave_the_script_alone(place: Place) -> None:
    """Names that the script uses itself, that bash sets, and that a tool reads."""
    names = (
        "root",
        "status",
        "here",
        "code",
        "work",
        "target",
        "before",
        "command",
        "signals",
        "variables",
        "UID",
        "IFS",
    )
    mine = {name: f"my {name}" for name in (*names, "BASHOPTS", "HTTPS_PROXY", "PYTHONPATH")}
    cluster, work = place.cluster(), Work("n", (b"",))
    done = run(put(place, cluster, work, job_script(work, cluster, mine, Request(0), RUN, code().tree)))
    assert done.returncode == 0, done.stderr
    assert place.called["argv"][5] == str(place.home / "root")
    assert metadata(cluster, work)["state"] == "finished"
    path = mine.pop("PYTHONPATH")
    assert {name: place.called["env"][name] for name in mine} == mine
    assert place.called["env"]["PYTHONPATH"] == f"{place.home}/scratch/code/{code().tree}:{path}"


def test_the_code_that_was_sent_runs_whatever_the_working_directory_has(place: Place) -> None:
    cluster, work = place.cluster(), Work("n", (b"",))
    old = place.home / "scratch/tinytron"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text("raise SystemExit('the wrong code')\n")
    path = put(place, cluster, work, job_script(work, cluster, {}, Request(0), RUN, code().tree))
    sent = {"tinytron/__init__.py": (b"", 0o644), "tinytron/__main__.py": (b"print('the right code')\n", 0o644)}
    (place.home / f"scratch/code/{code().tree}.tar.gz").write_bytes(packed(sent))
    text = path.read_text()
    if sys.version_info >= (3, 11):
        path.write_text(text.replace(f"python='{place.python}'", f"python={sys.executable}"))
        done = run(path)
        assert (done.returncode, done.stdout) == (0, "the right code\n"), done.stderr
    place.python.write_text("#!/bin/sh\nexit 1\n")  # as an older Python says
    path.write_text(text)
    assert "Python would import" in run(path).stderr


def test_links_lead_to_the_clusters_folders(place: Place) -> None:
    cluster, work = place.cluster(data="~/the data"), Work("n", (b"",))
    path = put(place, cluster, work, job_script(work, cluster, {}, Request(0), RUN, code().tree))
    assert run(path).returncode == 0
    assert (place.home / "root" / "data").resolve() == place.home / "the data"
    assert run(path).returncode == 0
    (place.home / "root" / "data").unlink()
    (place.home / "root" / "data").mkdir()
    done = run(path)
    assert done.returncode == 2
    assert "root/data exists and is not" in done.stderr


UV = '#!/bin/sh\nprintf "%s\\n" "uv $*" >>"$HOME/tools"\nexit 0\n'
PYTHON3 = """#!/bin/bash
printf '%s\\n' "python3 $*" >>"$HOME/tools"
mkdir -p "$3/bin" && cp "$HOME/bin/recording python" "$3/bin/python"
"""


@pytest.mark.parametrize(
    ("files", "uv", "commands"),
    [
        (["uv.lock", "pyproject.toml"], True, ["uv sync --frozen --no-install-project --group=cuda12"]),
        (["requirements.txt", "constraints.txt"], False, ["python3 -m venv ENV"]),
        ([], False, []),
    ],
)
def test_the_environment_is_made_once_per_list_of_packages(
    place: Place, files: list[str], uv: bool, commands: list[str]
) -> None:
    if uv:
        place.tool("uv", UV.replace("exit 0", 'mkdir -p "$UV_PROJECT_ENVIRONMENT/bin"; cp "$HOME/bin/recording python" '
                                    '"$UV_PROJECT_ENVIRONMENT/bin/python"'))  # fmt: skip
    place.tool("python3", PYTHON3)
    cluster, work = place.cluster(python=None), Work("n", (b"",))
    script = job_script(work, cluster, {}, Request(0), RUN, "other", uv_groups=("cuda12",))
    path = put(place, cluster, work, script)
    archive = packed(dict.fromkeys(["code.py", *files], (b"x", 0o644)))
    (place.home / "scratch/code/other.tar.gz").write_bytes(archive)
    done = run(path)
    if not files:
        assert done.returncode == 2
        assert "the code has none of uv.lock, requirements.txt, pyproject.toml and setup.py" in done.stderr
        assert metadata(cluster, work)["state"] == "failed"
        return
    assert done.returncode == 0, done.stderr
    (environment,) = (place.home / "scratch/env").glob("*/complete")
    said = (place.home / "tools").read_text().replace(str(environment.parent), "ENV").splitlines()
    assert said == commands
    assert run(path).returncode == 0
    assert len((place.home / "tools").read_text().splitlines()) == len(commands)
