"""A real SLURM of two nodes on this machine's loopback: its own folder, ports and munge, no systemd, no accounting.

    python tests/benchmarks/slurm_cluster.py FOLDER      # until Ctrl-C; elsewhere: SLURM_CONF=FOLDER/slurm.conf sinfo

Needs slurmctld, slurmd, munged and the clients (Debian: ``slurmctld slurmd slurm-client munge``). The daemons run as
whoever starts them.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
NODES = ("one", "two")
PATIENCE = 60.0
CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={control}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=20
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs that are not installed; slurmctld and the like often lie in /usr/sbin, outside of a user's PATH."""
    return [name for name in PROGRAMS if found(name) is None]


def found(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


class SlurmCluster:
    """``with SlurmCluster(folder) as cluster``: daemons up and both nodes idle; ``SLURM_CONF`` is set meanwhile."""

    def __init__(self, folder: Path):
        self.folder = Path(folder).resolve()
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._before = os.environ.get("SLURM_CONF")

    def __enter__(self) -> "SlurmCluster":
        folder = self.folder
        for part in ("state", *(f"spool-{name}" for name in NODES)):
            (folder / part).mkdir(parents=True, exist_ok=True)
        control, *ports = free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"
                          for name, port in zip(NODES, ports, strict=True))  # fmt: skip
        (folder / "slurm.conf").write_text(CONFIG.format(
            host=host, user=getpass.getuser(), control=control, folder=folder, nodes=nodes, names=",".join(NODES)
        ))  # fmt: skip
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        folder = self.folder
        if not (folder / "munge.key").exists():
            subprocess.run([found("mungekey"), "--create", f"--keyfile={folder / 'munge.key'}"], check=True)
        # --force: folders for tests may lie below ones that others can write to.
        own = ("key-file=munge.key", "socket=munge.socket", "pid-file=munge.pid", "log-file=munge.log",
               "seed-file=munge.seed")  # fmt: skip
        files = [f"--{option}={folder / name}" for option, _, name in (one.partition("=") for one in own)]
        self._start("munged", ["--foreground", "--force", *files])
        self._wait((folder / "munge.socket").exists, "munged")
        self._start("slurmctld", ["-D"])
        for name in NODES:
            self.start_node(name)
        self._wait(lambda: self.states() == dict.fromkeys(NODES, "idle"), "the nodes")

    def _start(self, program: str, options: list[str], name: str | None = None) -> None:
        with open(self.folder / f"{name or program}.out", "ab") as output:
            self.daemons[name or program] = subprocess.Popen(
                [str(found(program)), *options], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def _wait(self, condition, what: str) -> None:
        until = time.monotonic() + PATIENCE
        while not condition():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > until:
                told = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.out"))
                raise RuntimeError(f"SLURM: {what} did not come up (ended: {dead})\n{told}")
            time.sleep(0.1)

    def states(self) -> dict[str, str]:
        made = subprocess.run(["sinfo", "--noheader", "-N", "-o", "%N %t"], capture_output=True, text=True)
        return dict(line.split() for line in made.stdout.splitlines())

    def start_node(self, name: str) -> None:
        self._start("slurmd", ["-D", "-N", name], f"slurmd-{name}")

    def kill_node(self, name: str) -> None:
        """As when the power goes: the daemon, the keepers of its jobs, and everything that those started."""
        daemon = self.daemons.pop(f"slurmd-{name}")
        daemon.kill()
        daemon.wait()
        work = on_node(name)
        for pid in {parent for pid in work if (parent := keeper(pid))} | set(work):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def __exit__(self, *error: object) -> None:
        for name in list(self.daemons):
            daemon = self.daemons.pop(name)
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if self._before is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = self._before


def on_node(name: str) -> list[int]:
    """Processes of jobs that run on a node of a cluster of ours."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        ours = f"SLURM_CONF={os.environ['SLURM_CONF']}".encode()
        if ours in variables and f"SLURMD_NODENAME={name}".encode() in variables:
            pids.append(int(path.parent.name))
    return pids


def keeper(pid: int) -> int | None:
    """The slurmstepd above a process: it would report the end of its job, which a machine without power does not."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return parent if "slurmstepd" in Path(f"/proc/{parent}/comm").read_text() else None
    except OSError:
        return None


if __name__ == "__main__":
    with SlurmCluster(Path(sys.argv[1])) as running:
        print(f"SLURM_CONF={os.environ['SLURM_CONF']}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("stopping")
