"""A real Slurm on this machine for tests: slurmctld and several slurmd in a network namespace; needs root."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter")
PACKAGES = "slurm-wlm munge iproute2"
BASE_PORT = 17000


def missing() -> str | None:
    """Return why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    if absent := [name for name in NEEDED if shutil.which(name) is None]:
        return f"{', '.join(absent)} not found; on Debian: apt-get install {PACKAGES}"
    probe = f"rlprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return f"no network namespace can be made here: {made.stderr.strip()}" if made.returncode else None


def open_files(pid: int) -> set[Path]:
    """Return the files that a process has open; empty if it has ended."""
    with contextlib.suppress(OSError):
        return {entry.readlink() for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return set()


def environment_of(pid: int) -> list[bytes]:
    """Return the environment of a process; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


class Cluster:
    """A context manager for a cluster whose nodes node1, node2, ... are all this machine."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.count = folder, nodes
        self.namespace = f"rl{os.getpid()}"
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "GLOO_SOCKET_IFNAME": "lo"}

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool", "log", "run", "munge"):
            (self.folder / name).mkdir(parents=True)
        self._host(["ip", "netns", "add", self.namespace])
        try:
            self._host(["ip", "-n", self.namespace, "link", "set", "lo", "up"])
            # The resolver takes no address for reachable while only 127.0.0.1 is there.
            self._host(["ip", "-n", self.namespace, "addr", "add", "192.0.2.77/32", "dev", "lo"])
            self._configure()
            self._munge()
            self.run(["slurmctld", "-c"])
            for number in range(1, self.count + 1):
                self.start_node(f"node{number}")
            self._wait(lambda: len(self.nodes("idle")) == self.count, 30, "nodes idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if (self.folder / "slurm.conf").exists():
            self.run(["scancel", "--user=root"], check=False)
            deadline = time.monotonic() + 20
            while self.run(["squeue", "-h"], check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for pid_file in [*self.folder.glob("run/*.pid"), self.folder / "munge" / "pid"]:
            self._kill(pid_file, signal.SIGTERM)
        for pid in self.processes("slurmstepd"):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.3)
        subprocess.run(["ip", "netns", "del", self.namespace], check=False, capture_output=True)

    def run(
        self, command: list[str], *, check: bool = True, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        """Run a command inside the namespace and return its output."""
        inside = ["nsenter", f"--net=/var/run/netns/{self.namespace}", *command]
        environment = {**self.environment, **(env or {})}
        done = subprocess.run(inside, env=environment, cwd=cwd, capture_output=True, text=True, timeout=180)
        if check and done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout + ("" if check else done.stderr)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self.run(["slurmd", "-N", name])

    def kill_slurmd(self, name: str) -> None:
        """Kill the slurmd of a node; its child processes continue."""
        self._kill(self.folder / "run" / f"slurmd-{name}.pid", signal.SIGKILL)

    def kill_node(self, name: str) -> None:
        """Kill the slurmd of a node and all its child processes, like a machine failure."""
        self.kill_slurmd(name)
        log = self.folder / "log" / f"slurmd-{name}.log"
        daemons = [pid for pid in self.processes("slurmstepd") if log in open_files(pid)]
        tasks = [pid for pid in self.processes("") if f"SLURMD_NODENAME={name}".encode() in environment_of(pid)]
        for pid in [*daemons, *tasks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def nodes(self, state: str) -> set[str]:
        """Return the names of the nodes in a state."""
        return set(self.run(["sinfo", "-h", "-N", "-t", state, "-o", "%N"], check=False).split())

    def job(self, number: str) -> dict[str, str]:
        """Return Slurm's record of a job (of the leader of a heterogeneous job)."""
        output = self.run(["scontrol", "show", "job", number, "--oneliner"]).splitlines()[0]
        return dict(word.split("=", 1) for word in output.split() if "=" in word)

    def wait_for(self, number: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        self._wait(lambda: self.job(number)["JobState"] in states, seconds, f"job {number} to be {' or '.join(states)}")
        return self.job(number)

    def start_now(self, number: str) -> None:
        """Start a requeued job without the two minutes for which Slurm delays each component."""

        def started() -> bool:
            lines = self.run(["squeue", "-h", "-t", "PENDING", "-o", "%i %r"]).splitlines()
            held = [line.split()[0] for line in lines if line.endswith(" BeginTime")]
            if held:
                time.sleep(2)  # credentials are revoked by whole seconds: a job of the same second would be refused
            for part in held:
                self.run(["scontrol", "update", f"jobid={part}", "StartTime=now"], check=False)
            return self.job(number)["JobState"] != "PENDING"

        self._wait(started, 60, f"job {number} to start")

    def processes(self, text: str) -> list[int]:
        """Return the processes of the namespace whose command line contains a text."""
        namespace = os.stat(f"/var/run/netns/{self.namespace}").st_ino
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                same = os.stat(entry / "ns" / "net").st_ino == namespace
                if same and text in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def _wait(self, done, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds} s for {what}; {self.run(['squeue'], check=False)}")
            time.sleep(0.25)

    def _kill(self, pid_file: Path, number: signal.Signals) -> None:
        try:
            os.kill(int(pid_file.read_text()), number)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return

    def _host(self, command: list[str]) -> None:
        subprocess.run(command, check=True, capture_output=True)

    def _munge(self) -> None:
        folder = self.folder / "munge"
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        names = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.run(["munged", "--force", *(f"--{option}={folder / name}" for option, name in names.items())])

    def _configure(self) -> None:
        host, at = socket.gethostname().split(".")[0], self.folder
        lines = [
            "ClusterName=loop",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={BASE_PORT}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={at}/munge/sock",
            "CredType=cred/munge",
            f"StateSaveLocation={at}/state",
            f"SlurmdSpoolDir={at}/spool/%n",
            f"SlurmctldPidFile={at}/run/slurmctld.pid",
            f"SlurmdPidFile={at}/run/slurmd-%n.pid",
            f"SlurmctldLogFile={at}/log/slurmctld.log",
            f"SlurmdLogFile={at}/log/slurmd-%n.log",
            # Listen on the loopback addresses alone.
            "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
            "MpiDefault=none",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "GresTypes=gpu",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0",
            "SlurmdParameters=config_overrides",
            "ReturnToService=2",
            "SlurmdTimeout=10",
            "SlurmctldTimeout=10",
            "KillWait=5",
            "MinJobAge=300",
            "JobRequeue=1",
            f"SrunPortRange={BASE_PORT + 100}-{BASE_PORT + 399}",
        ]
        gpus = [at / f"gpu{number}" for number in range(4)]
        for gpu in gpus:
            gpu.touch()
        (at / "gres.conf").write_text(f"Name=gpu File={at}/gpu[0-3]\n")
        lines += [
            f"NodeName=node{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={BASE_PORT + n} CPUs=16 Gres=gpu:4"
            for n in range(1, self.count + 1)
        ]
        lines.append(f"PartitionName=main Nodes=node[1-{self.count}] Default=YES MaxTime=INFINITE State=UP")
        (at / "slurm.conf").write_text("\n".join(lines) + "\n")
