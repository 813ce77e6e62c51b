"""The virtual cluster is one: hosts, links, queue, preemption; and nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import network
from tests.cluster.virtual import VirtualCluster

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import socket, sys
with socket.create_server(("", 5000)) as server:
    print("listening", flush=True)
    peer, _ = server.accept()
    while peer.recv(1 << 20): pass
    peer.sendall(b"!")
"""
CLIENT = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5000), timeout=30) as peer:
    began = time.monotonic()
    peer.sendall(bytes(int(sys.argv[2])))
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
    print(time.monotonic() - began)
"""
REACH = """
import socket, sys
try: socket.create_connection((sys.argv[1], 5000), timeout=1)
except ConnectionRefusedError: print("reached")
except OSError as error: print("not reached:", error)
"""
SESSION = """
import time
from tests.cluster.virtual import VirtualCluster
cluster = VirtualCluster(nodes=2)
job = cluster.sbatch("-N2", script="srun --ntasks-per-node=1 sleep 600")
cluster.wait_state(job, {"RUNNING"}, 20)
print(cluster.folder, flush=True)
time.sleep(600)
"""


def transfer(cluster: VirtualCluster, size: int) -> float:
    """Seconds that `size` bytes took from node 1 to node 2, over one connection."""
    server = cluster.popen(2, [sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
    assert server.stdout is not None and server.stdout.readline() == "listening\n"
    took = float(cluster.run(1, [sys.executable, "-c", CLIENT, "node2", str(size)]).stdout)
    server.communicate(timeout=10)
    return took


def reach(cluster: VirtualCluster, here: int, there: str) -> str:
    return cluster.run(here, [sys.executable, "-c", REACH, there]).stdout.strip()


def test_hosts_differ(cluster: VirtualCluster) -> None:
    for node in (1, 2):
        assert cluster.run(node, ["hostname"]).stdout.strip() == f"node{node}"
        assert f"10.77.0.{node}/24" in cluster.run(node, ["ip", "-4", "addr", "show", "eth0"]).stdout
        for other in ("node1", "node2", "head77"):
            assert reach(cluster, node, other) == "reached"
    assert cluster.run(0, ["hostname"]).stdout.strip() == "head77"


def quiet(cluster: VirtualCluster) -> None:
    """Until what the job of an earlier test leaves behind is over: Slurm's daemons tell each other of its end."""
    deadline = time.monotonic() + 30
    while True:
        before = [cluster.nic(node) for node in (1, 2)]
        time.sleep(1)
        if all(cluster.nic(n).since(b).tx_bytes < 2000 for n, b in zip((1, 2), before, strict=True)):
            return
        assert time.monotonic() < deadline, "the nodes' links are never quiet"


def test_counters_count_a_transfer_and_shaping_slows_it(cluster: VirtualCluster) -> None:
    size = 10_000_000
    quiet(cluster)
    before, resent = [cluster.nic(node) for node in (1, 2)], network.resent_bytes(1)
    fast = transfer(cluster, size)
    sent, received = (cluster.nic(node).since(then) for node, then in zip((1, 2), before, strict=True))
    for payload in (sent.tx_bytes - 66 * sent.tx_packets, received.rx_bytes - 66 * received.rx_packets):
        # the handshakes' longer headers, names and Slurm's own messages are the rest
        assert 0 <= payload - size < 20_000 + network.resent_bytes(1) - resent
    cluster.shape(1, "200mbit")
    shaped = transfer(cluster, size)
    assert fast < 0.2 and 0.85 < (size * 8 / 200e6) / shaped < 1.03, (fast, shaped)
    cluster.shape(1, None)
    assert transfer(cluster, size) < 0.2


def test_a_pulled_cable(cluster: VirtualCluster) -> None:
    cluster.link(2, False)
    assert "not reached" in reach(cluster, 1, "10.77.0.2")
    cluster.link(2, True)
    assert reach(cluster, 1, "10.77.0.2") == "reached"


def test_two_nodes_of_which_one_cannot_reach_the_other(cluster: VirtualCluster) -> None:
    for how in ("refused", "silent"):
        cluster.blackhole(1, 2, True, how)
        assert "not reached" in reach(cluster, 1, "node2") and "not reached" in reach(cluster, 2, "node1")
        assert reach(cluster, 1, "head77") == reach(cluster, 2, "head77") == "reached"
        cluster.blackhole(1, 2, False, how)
        assert reach(cluster, 1, "node2") == reach(cluster, 2, "node1") == "reached"


def test_srun_starts_tasks_on_both_nodes(cluster: VirtualCluster) -> None:
    said = cluster.slurm("srun", "-N2", "--ntasks-per-node=4", "sh", "-c", "echo $(hostname) $SLURM_PROCID")
    assert sorted(said.splitlines()) == [f"node{1 + rank // 4} {rank}" for rank in range(8)]


def test_mpirun_starts_ranks_on_both_nodes(cluster: VirtualCluster) -> None:
    if not Path("/usr/bin/mpirun").exists():
        pytest.skip("needs Debian's openmpi-bin")
    script = """/usr/bin/mpirun --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 -N 2 \\
        sh -c 'echo $(hostname) $OMPI_COMM_WORLD_RANK'"""
    job = cluster.sbatch("-N2", "--ntasks-per-node=2", "--output=mpi.out", script=script)
    cluster.wait_state(job, {"COMPLETED"}, 60)
    said = (cluster.folder / "mpi.out").read_text().splitlines()
    assert sorted(said) == [f"node{1 + rank // 2} {rank}" for rank in range(4)]


def test_requeued_job_comes_back(cluster: VirtualCluster) -> None:
    script = """echo "start ${SLURM_RESTART_COUNT:-0}"
        if [ -z "$SLURM_RESTART_COUNT" ]; then scontrol requeue $SLURM_JOB_ID; sleep 60; fi"""
    job = cluster.sbatch("--output=requeue.out", "--open-mode=append", script=script)
    cluster.wait_restart(job, 1, 30)
    cluster.start_now(job)
    assert cluster.wait_state(job, {"COMPLETED"}, 30)["Restarts"] == "1"
    assert [line for line in (cluster.folder / "requeue.out").read_text().splitlines() if "start" in line] == [
        "start 0", "start 1"]  # fmt: skip


def test_urgent_job_preempts_with_a_warning(cluster: VirtualCluster) -> None:
    script = """trap 'echo warned; kill %1; scontrol requeue $SLURM_JOB_ID' USR1
        echo "start ${SLURM_RESTART_COUNT:-0}"
        sleep 600 & wait"""
    job = cluster.sbatch("--nodes=2", "--exclusive", "--signal=B:USR1@30", "--output=preempted.out",
                         "--open-mode=append", script=script)  # fmt: skip
    cluster.wait_state(job, {"RUNNING"}, 20)
    time.sleep(1)  # the trap
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", script="sleep 1")
    cluster.wait_state(urgent, {"COMPLETED"}, 60)
    cluster.start_now(job)
    cluster.wait_state(job, {"RUNNING"}, 30)
    out = cluster.folder / "preempted.out"
    while "start 1" not in (text := out.read_text()):
        time.sleep(0.1)
    assert text.index("start 0") < text.index("warned") < text.index("start 1")


def test_processes_of_a_node(cluster: VirtualCluster) -> None:
    started = cluster.popen(2, ["sleep", "601"])
    while cluster.processes(2, "sleep 601") != [started.pid]:  # it starts outside
        time.sleep(0.02)
    assert cluster.processes(1, "sleep 601") == []
    cluster.reset()
    assert started.wait(5) == -signal.SIGKILL and cluster.processes(2, "sleep 601") == []


def test_nothing_stays(cluster: VirtualCluster) -> None:
    """A session ends, and another is killed."""
    hosts = network.HOSTS.read_text()
    cluster.stop()
    cluster.stop()
    assert network.left_over() == [] and network.of_cluster(cluster.folder) == []
    assert not cluster.folder.exists() and "10.77.0" in hosts and "10.77.0" not in network.HOSTS.read_text()
    session = subprocess.Popen([sys.executable, "-c", SESSION], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert session.stdout is not None
    folder = Path(session.stdout.readline().strip())
    assert len([p for p in network.left_over() if p.startswith("process")]) > 4
    os.kill(session.pid, signal.SIGKILL)
    session.wait()
    until = time.monotonic() + 20
    while network.left_over() or network.of_cluster(folder) or folder.exists():
        assert time.monotonic() < until, (network.left_over(), network.of_cluster(folder))
        time.sleep(0.1)
