"""A Slurm cluster on this machine: real daemons, hostnames, addresses and links; the nodes are namespaces.

with VirtualCluster(nodes=2, cpus=8) as cluster:
    job = cluster.sbatch("--nodes=2", script="srun hostname")
    cluster.wait_state(job, {"COMPLETED"}, timeout=30)

Needs root and Debian's slurm-wlm, munge and iproute2. One cluster at a time; everything lies in one folder.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from tests.cluster import network
from tests.cluster.network import HEAD, HEAD_ADDRESS, command

LOCK = Path("/run/lock/dist_gpt-virtual-cluster")
"""Locked while a cluster is there; holds the name of its folder."""
LOCK_S, START_S = 30.0, 60.0
PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "nsenter", "unshare", "ip", "tc")
DAEMONS = ("slurmd", "slurmstepd")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}

# cred_expire: how long a requeued job waits before it starts again (Slurm's own 120 s otherwise).
# preempt_send_user_signal: a preempted job with --signal gets that signal, another SIGTERM, GraceTime before its end.
CONF = """\
ClusterName=dgpt
SlurmctldHost={head}({head_address})
SlurmctldPort=26817
SlurmdPort=26818
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={requeue_s}
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/logs/slurmctld.log
SlurmdLogFile={folder}/logs/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait={kill_wait}
MinJobAge=3600
SlurmdTimeout=600
NodeName=DEFAULT CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 State=UNKNOWN
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""


class Counters(NamedTuple):
    """What has crossed a node's link since it was made: whole frames, 14 bytes of Ethernet header counted."""

    tx_bytes: int
    """Left the node."""
    tx_packets: int
    rx_bytes: int
    """Reached the node."""
    rx_packets: int

    def since(self, before: Counters) -> Counters:
        return Counters(*(now - then for now, then in zip(self, before, strict=True)))


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    if gone := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"needs Debian's slurm-wlm, munge and iproute2: no {', '.join(gone)}"
    tried = subprocess.run(["unshare", "--net", "--uts", "ip", "link", "add", "x0", "type", "veth", "peer", "x1"],
                           check=False, capture_output=True, text=True)  # fmt: skip
    return f"no network namespaces: {tried.stderr.strip()}" if tried.returncode else None


class VirtualCluster:
    """Started when made. Nodes are 1..nodes here, node1.. as hosts; 0 is the head."""

    def __init__(self, nodes: int = 2, cpus: int = 8, grace_s: int = 30, kill_wait_s: int = 30) -> None:
        self.nodes, self.cpus = nodes, cpus
        self.keep_folder = False
        self.stopped = False
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.lock = self._locked()
        former = self.lock.read().strip()
        network.remove(Path(former) if former else None)
        self.folder = Path(tempfile.mkdtemp(prefix="dist_gpt-cluster-"))
        self.folder.chmod(0o755)
        self.lock.seek(0)
        self.lock.truncate()
        self.lock.write(str(self.folder))
        self.lock.flush()
        self.conf = self.folder / "slurm.conf"
        self.guard = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.guard", str(self.folder)], stdin=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2], pass_fds=[self.lock.fileno()], start_new_session=True)  # fmt: skip
        atexit.register(self.stop)
        try:
            self._start(grace_s, kill_wait_s)
        except BaseException as error:
            text = self.log_tails()
            self.keep_folder = True
            self.stop()
            if isinstance(error, Exception):
                raise RuntimeError(f"the cluster did not start: {error}\n{text}\n(kept: {self.folder})") from error
            raise

    def __enter__(self) -> VirtualCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- start and end

    @staticmethod
    def _locked() -> IO[str]:
        """The lock file, locked; RuntimeError when another session keeps it."""
        LOCK.parent.mkdir(parents=True, exist_ok=True)
        lock = LOCK.open("a+", encoding="utf-8")
        lock.seek(0)
        until = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    lock.close()
                    raise RuntimeError(f"another session has a virtual cluster (lock {LOCK})") from None
                time.sleep(0.1)
            else:
                return lock

    def _start(self, grace_s: int, kill_wait_s: int) -> None:
        for part in ("logs", "state", "munge", "dgpt-uts"):
            (self.folder / part).mkdir(mode=0o755)
        nodes = range(1, self.nodes + 1)
        lines = [f"NodeName={network.name(n)} NodeAddr={network.address(n)} NodeHostname={network.name(n)}"
                 for n in nodes]  # fmt: skip
        self.conf.write_text(CONF.format(
            head=HEAD, head_address=HEAD_ADDRESS, folder=self.folder, cpus=self.cpus, grace=grace_s,
            kill_wait=kill_wait_s, requeue_s=10, nodes="\n".join(lines)))  # fmt: skip
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        network.make(self.nodes)
        for node in range(self.nodes + 1):
            self._uts(node).touch()
            command(["unshare", f"--uts={self._uts(node)}", "hostname", network.name(node) if node else HEAD])
        munge = self.folder / "munge"
        command(["mungekey", f"--keyfile={munge}/key"])
        self._daemon("munged", ["munged", "--foreground", f"--socket={munge}/socket", f"--key-file={munge}/key",
                                f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", "--num-threads=2",
                                f"--log-file={munge}/log"])  # fmt: skip
        self._until("munged answers", (munge / "socket").exists, START_S)
        self._daemon("slurmctld", [*self.enter(0), "slurmctld", "-D", "-f", str(self.conf)])
        for node in nodes:
            self.start_slurmd(node)
        self._until("all nodes are idle", lambda: self.node_states() == ["idle"] * self.nodes, START_S)

    def start_slurmd(self, node: int) -> None:
        self._daemon(f"slurmd-{network.name(node)}",
                     [*self.enter(node), "slurmd", "-D", "-N", network.name(node), "-f", str(self.conf)])  # fmt: skip

    def _daemon(self, name: str, argv: Sequence[str]) -> None:
        with (self.folder / "logs" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                                  env=self.env(), start_new_session=True)  # fmt: skip

    def _until(self, what: str, holds: Any, timeout: float) -> None:
        until = time.monotonic() + timeout
        while not holds():
            if dead := [name for name, daemon in self.daemons.items() if daemon.poll() is not None]:
                raise RuntimeError(f"{', '.join(dead)} ended before {what}")
            if time.monotonic() > until:
                raise TimeoutError(f"{what}: not in {timeout:g} s")
            time.sleep(0.1)

    def stop(self) -> None:
        """Take everything down; nothing happens the second time."""
        if self.stopped:
            return
        self.stopped = True
        network.remove(self.folder, self.keep_folder)
        for daemon in self.daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        with suppress(OSError):
            self.guard.communicate("done", timeout=10)
        self.lock.seek(0)
        self.lock.truncate()
        self.lock.close()
        atexit.unregister(self.stop)

    def reset(self) -> None:
        """Between tests: no jobs, no processes, links up and unshaped, nothing blackholed, all nodes idle."""
        for node in range(1, self.nodes + 1):
            self.link(node, True)
            self.shape(node, None)
            for other in range(1, self.nodes + 1):
                if other != node:
                    self.blackhole(node, other, False)
        self.slurm("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        self.slurm("scancel", "--user=root", check=False)
        keep = {daemon.pid for daemon in self.daemons.values()}
        network.end(lambda: [pid for node in range(1, self.nodes + 1) for pid in self.processes(node)
                             if pid not in keep and "slurmstepd" not in self._comm(pid)], patience=0.0)  # fmt: skip
        for node in range(1, self.nodes + 1):
            if self.daemons[f"slurmd-{network.name(node)}"].poll() is not None:
                self.start_slurmd(node)
        if any(state.startswith(("down", "drain")) for state in self.node_states()):
            for node in range(1, self.nodes + 1):
                self.scontrol("update", f"nodename={network.name(node)}", "state=resume", check=False)
        self._until("no job is left", lambda: not self.squeue("--noheader"), 60)
        self._until("all nodes are idle", lambda: self.node_states() == ["idle"] * self.nodes, 60)

    # ---- commands

    def env(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Environment of commands and jobs: SLURM_CONF set, no other job's variables, Open MPI may run as root."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "PYTEST_"))}
        mpi = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return {**kept, **mpi, "SLURM_CONF": str(self.conf), "OMP_NUM_THREADS": "1", **(more or {})}

    def enter(self, node: int) -> list[str]:
        """What to put before a command so that it runs on `node`."""
        net = [f"--net={network.netns(node)}"] if node else []
        return ["nsenter", *net, f"--uts={self._uts(node)}", "--"]

    def run(self, node: int, argv: Sequence[str], check: bool = True, timeout: float = 60,
            env: Mapping[str, str] | None = None, **more: Any) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run on `node` (0: the head) to its end; RuntimeError when it fails and `check` is on."""
        done = subprocess.run([*self.enter(node), *map(str, argv)], check=False, capture_output=True, text=True,
                              timeout=timeout, env=self.env(env), **more)  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, argv))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def popen(self, node: int, argv: Sequence[str], env: Mapping[str, str] | None = None,
              **more: Any) -> subprocess.Popen[str]:  # fmt: skip
        """Start on `node`, in its own session."""
        return subprocess.Popen([*self.enter(node), *map(str, argv)], text=True, env=self.env(env),
                                start_new_session=True, **more)  # fmt: skip

    def slurm(self, *argv: str, check: bool = True, timeout: float = 60, env: Mapping[str, str] | None = None) -> str:
        """Standard output of a Slurm command on the head, stripped."""
        return self.run(0, argv, check=check, timeout=timeout, env=env).stdout.strip()

    def scontrol(self, *argv: str, check: bool = True) -> str:
        return self.slurm("scontrol", *argv, check=check)

    def squeue(self, *argv: str) -> str:
        return self.slurm("squeue", *argv)

    def scancel(self, *argv: object) -> None:
        self.slurm("scancel", *map(str, argv))

    def sbatch(self, *options: str, script: str | Path, cwd: Path | None = None,
               env: Mapping[str, str] | None = None) -> int:  # fmt: skip
        """Submit `script` (a Path, or shell text without its first line); returns the job's id."""
        if isinstance(script, str):
            text, number = script, len(list(self.folder.glob("job-*.sh")))
            script = self.folder / f"job-{number}.sh"
            script.write_text(f"#!/bin/bash\n{text}\n")
        argv = ["sbatch", "--parsable", *options, str(script)]
        return int(self.run(0, argv, env=env, cwd=cwd or self.folder).stdout.split(";")[0])

    # ---- looking

    def _uts(self, node: int) -> Path:
        return self.folder / "dgpt-uts" / (network.name(node) if node else HEAD)

    @staticmethod
    def _comm(pid: int) -> str:
        with suppress(OSError):
            return Path(f"/proc/{pid}/comm").read_text().strip()
        return ""

    def node_states(self) -> list[str]:
        """As sinfo shows them, per node; empty while slurmctld does not answer."""
        return self.slurm("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False).split()

    def job(self, job: int) -> dict[str, str]:
        """All that `scontrol show job` says: JobState, Restarts, ExitCode, BatchHost, NodeList, ..."""
        words = self.scontrol("show", "job", "--oneliner", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_state(self, job: int, states: Collection[str], timeout: float) -> dict[str, str]:
        """`job(job)` once its state is one of `states`; fails at once when it has ended in another, or TimeoutError."""
        wanted = {states} if isinstance(states, str) else set(states)
        until = time.monotonic() + timeout
        while (found := self.job(job))["JobState"] not in wanted:
            state = found["JobState"]
            if state in ENDED - {"PREEMPTED"}:
                raise RuntimeError(f"job {job} is {state} ({found['ExitCode']}), not {sorted(wanted)}")
            if time.monotonic() > until:
                why = found["Reason"]
                raise TimeoutError(f"job {job} is {state} ({why}) after {timeout:g} s, not {sorted(wanted)}")
            time.sleep(0.2)
        return found

    def wait_restart(self, job: int, restarts: int, timeout: float) -> None:
        """Until the job has gone back to the queue for the `restarts`-th time, and nothing of it runs."""

        def back() -> bool:
            found = self.job(job)
            return found["Restarts"] == str(restarts) and found["JobState"] != "COMPLETING"

        self._until(f"job {job} is back in the queue", back, timeout)

    def start_now(self, job: int) -> None:
        """Take away the wait of a requeued job; nothing is done to one that has started.

        slurmd counts in seconds: a job that starts in the one in which its former attempt was revoked is refused.
        """
        time.sleep(1.1)
        until = time.monotonic() + 15
        while self.job(job)["JobState"] in ("PENDING", "COMPLETING"):
            done = self.run(0, ["scontrol", "update", f"jobid={job}", "StartTime=now"], check=False)
            if done.returncode == 0:
                return
            if time.monotonic() > until:
                raise RuntimeError(f"job {job} cannot be started: {done.stderr}")
            time.sleep(0.2)  # refused while the former attempt is still being cleaned up

    def processes(self, node: int, pattern: str = "") -> list[int]:
        """Processes alive on `node` whose command line contains `pattern`."""
        found = []
        for pid in network.inside([network.netns(node)]):
            with suppress(OSError):
                if pattern in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(pid)
        return found

    def log_tails(self, lines: int = 15) -> str:
        """The last lines of every daemon's log."""
        logs = [*sorted((self.folder / "logs").glob("*")), self.folder / "munge" / "log"]
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
                         for log in logs if log.exists() and log.stat().st_size)  # fmt: skip

    # ---- links

    def nic(self, node: int) -> Counters:
        """The link's counters, read on the bridge's side: what it received is what left the node."""
        folder = Path(f"/sys/class/net/{network.VETH}{node}/statistics")
        names = ("rx_bytes", "rx_packets", "tx_bytes", "tx_packets")
        return Counters(*(int((folder / name).read_text()) for name in names))

    def link(self, node: int, up: bool) -> None:
        """Plug or pull the node's cable."""
        command(["ip", "link", "set", f"{network.VETH}{node}", "up" if up else "down"])

    def shape(self, node: int, rate: str | None) -> None:
        """Speed of the node's link in both directions, as tc writes it (400mbit); None: as fast as it goes."""
        ends = ["tc", "-n", network.netns(node).name], ["tc"]
        for tc, device in zip(ends, ("eth0", f"{network.VETH}{node}"), strict=True):
            if rate is None:
                command([*tc, "qdisc", "del", "dev", device, "root"], check=False)
            else:
                tbf = f"root tbf rate {rate} burst 256kb latency 100ms".split()
                command([*tc, "qdisc", "replace", "dev", device, *tbf])

    def blackhole(self, a: int, b: int, on: bool, how: str = "refused") -> None:
        """Whether a and b cannot reach each other, while both reach everybody else.

        `refused` is a blackhole route: a new connection fails at once (EINVAL). `silent` is what a firewall that drops
        does: packets go to an address that no card has. An open connection falls silent either way.
        """
        for here, there in ((a, b), (b, a)):
            ip, to = ["ip", "-n", network.netns(here).name], network.address(there)
            if how == "silent":
                words = f"replace {to} lladdr 02:00:00:00:00:ff nud permanent" if on else f"del {to}"
                command([*ip, "neigh", *words.split(), "dev", "eth0"], check=on)
            else:
                command([*ip, "route", "replace" if on else "del", "blackhole", f"{to}/32"], check=on)
