"""A SLURM cluster of one node, of this machine and this user, with no accounting."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from getpass import getuser
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,batch_sched_delay=1
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
KillWait=5
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory} State=UNKNOWN
PartitionName=tests Nodes={host} Default=YES MaxTime=10 State=UP
"""


def missing() -> list[str]:
    """The daemons that aren't installed."""
    return [name for name in DAEMONS if shutil.which(name, path=PATH) is None]


def version() -> str:
    """SLURM's."""
    said = subprocess.run(["slurmd", "-V"], env={"PATH": PATH}, capture_output=True, text=True)
    return said.stdout.split()[-1]


@contextmanager
def slurm_node(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and its like find the cluster, while it runs."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    megabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            user=getuser(),
            folder=folder,
            controller=_free_port(),
            node=_free_port(),
            cores=os.cpu_count(),
            memory=megabytes * 9 // 10,
        )
    )
    files = [f"--{kind}={folder}/munge.{kind[:-5]}" for kind in ("pid-file", "log-file")]
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", *files]
    munged += [f"--socket={folder}/munge.socket", f"--seed-file={folder}/munge.seed"]
    with ExitStack() as daemons:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            daemons.enter_context(_running(command, folder, os.environ | environment))
        _wait_until_idle(os.environ | environment)
        try:
            yield environment
        finally:  # a job whose daemons go first waits for them for ever
            subprocess.run(["scancel", "--me"], env=os.environ | environment)
            _wait_until_idle(os.environ | environment)


@contextmanager
def _running(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    with (folder / f"{command[0]}.out").open("w") as out:
        daemon = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            time.sleep(1)
            if daemon.poll() is not None:
                raise RuntimeError(f"{command[0]} ended: {Path(out.name).read_text()}")
            yield
        finally:
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _wait_until_idle(environment: dict[str, str]) -> None:
    said = ""
    for _ in range(60):
        asked = ["sinfo", "--noheader", "--format=%T"]
        said = subprocess.run(asked, env=environment, capture_output=True, text=True).stdout
        if said.strip() == "idle":
            return
        time.sleep(1)
    raise RuntimeError(f"the node isn't idle but {said!r}")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
