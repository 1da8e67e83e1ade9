"""A SLURM of our own on loopback: munged, slurmctld and slurmd twice, as two virtual nodes with one made-up H100 each."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SBIN = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
NEEDED = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
KillWait=20
SlurmdTimeout=30
MinJobAge=300
SchedulerParameters=sched_min_interval=200000,bf_interval=1
MessageTimeout=30
RebootProgram=/bin/true
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 Gres=gpu:h100:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2 RealMemory=4000 Gres=gpu:h100:1
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """The daemons, and their files in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        folder.chmod(0o755)
        ports = _free_ports(4)
        host = socket.gethostname().split(".")[0]
        text = CONFIG.format(host=host, user=getpass.getuser(), folder=folder, ports=ports)
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text("AutoDetect=off\nNodeName=n[1-2] Name=gpu Type=h100 File=/dev/null\n")
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": SBIN}

    def start(self) -> None:
        """Start the daemons, and wait until both nodes are idle. Skips the test if they do not start here."""
        munge = self.folder / "munge"
        munge.mkdir(mode=0o700)
        self.run("mungekey", "--create", f"--keyfile={munge}/key")
        self.daemon(
            *("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={munge}/key"),
            *(f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={munge}/log"),
        )
        while not (self.folder / "munge.socket").exists():
            self._alive()
            time.sleep(0.1)
        self.daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self.daemon("slurmd", "-D", "-N", node)
        end = time.monotonic() + 60
        while self.run("sinfo", "-h", "-N", "-o", "%t", check=False).split() != ["idle", "idle"]:
            self._alive()
            if time.monotonic() > end:
                raise AssertionError(f"the nodes are not idle: {self.run('sinfo', '-R', check=False)}\n{self.logs()}")
            time.sleep(0.5)

    def daemon(self, name: str, *words: str) -> None:
        """Start a daemon in the foreground of a process of ours."""
        program = shutil.which(name, path=SBIN)
        assert program is not None, name
        with open(self.folder / f"{name}.out", "ab") as log:
            self._daemons.append(subprocess.Popen([program, *words], env=self.env, stdout=log, stderr=log))

    def lose(self, node: str) -> None:
        """Kill a node's daemon and everything that it runs, as if its power were cut."""
        (daemon,) = [one for one in self._daemons if isinstance(one.args, list) and one.args[-1] == node]
        self._daemons.remove(daemon)
        daemon.kill()
        daemon.wait()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = (path / "environ").read_bytes().split(b"\0")
                if f"SLURMD_NODENAME={node}".encode() in environment:
                    parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                    if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
                        os.kill(parent, signal.SIGKILL)
                    os.kill(int(path.name), signal.SIGKILL)

    def _alive(self) -> None:
        for process in self._daemons:
            if process.poll() is not None:
                pytest.skip(f"{process.args!r} does not start here:\n{self.logs()}")

    def logs(self) -> str:
        """The ends of all logs."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out"), *self.folder.glob("munge/log")]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in files)

    def run(self, *words: str, check: bool = True) -> str:
        """The output of a command of SLURM."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 or not check, f"{words}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def stop(self) -> None:
        """Stop everything."""
        if all(process.poll() is None for process in self._daemons):
            self.run("scancel", f"--user={getpass.getuser()}", check=False)
            end = time.monotonic() + 30
            while self.run("squeue", "-h", check=False).strip() and time.monotonic() < end:
                time.sleep(0.5)
        for process in reversed(self._daemons):
            process.terminate()
        for process in self._daemons:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    if missing := [name for name in NEEDED if shutil.which(name, path=SBIN) is None]:
        pytest.skip(f"{missing[0]} is not installed (Debian: apt-get install slurm-wlm munge)")
    import tempfile

    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:  # a socket's path is short
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
