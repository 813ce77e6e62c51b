"""Mistakes planted on one of two nodes: each is named, with node and remedy, before a rank trains, within 30 s.

They are planted from outside: a file system mounted in the node's ranks only, a wrapper of srun in PATH, a clock that
sitecustomize shifts, links, interfaces and ports. Nothing of dist_gpt is replaced.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from tests.cluster import network
from tests.cluster.jobs import Jobs
from tests.cluster.virtual import VirtualCluster
from tests.ranks.runs import ROOT

NAMED_S = 30.0
"""From the start of the ranks to the message."""
ENDED = {"FAILED", "COMPLETED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}
STARTED = "; master "
REFUSED = "refused before training started"


class Plant:
    """A job of 2 nodes x `per_node` ranks, and what is wrong with it."""

    def __init__(self, cluster: VirtualCluster, folder: Path) -> None:
        self.jobs, self.cluster, self.folder = Jobs(cluster, folder), cluster, folder
        self.bin, self.site = folder / "bin", folder / "site"
        self.bin.mkdir()
        self.site.mkdir()
        self.per_node = 1
        self.mesh = 2
        self.nodes = 2
        self.sets: dict[str, object] = {}
        self.options: tuple[str, ...] = ("--check",)

    def program(self, name: str, text: str) -> None:
        """A shell script that stands before the true `name` in everybody's PATH."""
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def srun(self, before: str = "", options: str = '"${opts[@]}"', prefix: str = "") -> None:
        """Stand before srun: shell commands before it, other options, words before a rank's command."""
        true = shutil.which("srun")
        split = 'opts=(); while [[ $1 == -* ]]; do opts+=("$1"); shift; done'
        self.program("srun", f'{split}\n{before}\nexec {true} {options} {prefix} "$@"')

    def on_node2(self, commands: str) -> None:
        """Run shell commands before each rank of node2, in a mount namespace of its own."""
        script = self.bin / "wrapped"
        script.write_text(
            "#!/bin/bash\nif [[ $(hostname) == node2 ]]; then\n  exec unshare --mount bash -e -c "
            f'\'{commands}\nexec "$@"\' rank "$@"\nfi\nexec "$@"\n'
        )
        script.chmod(0o755)
        self.srun(prefix=str(script))

    def python_on_node2(self, text: str) -> None:
        """Run before every rank's own Python on node2."""
        lines = ["import socket", "if socket.gethostname() == 'node2':", *("    " + one for one in text.splitlines())]
        (self.site / "sitecustomize.py").write_text("\n".join(lines) + "\n")

    def run(self) -> tuple[float, str]:
        """Until it ends, which it must with code 2; seconds from the start of its ranks to the message (0 where it
        came before them), and all that was said."""
        sets = {"parallel.dp": self.mesh, "parallel.tp": 1, "parallel.pp": 1, "launch.nodes": self.nodes,
                "launch.ranks_per_node": self.per_node, **self.sets}  # fmt: skip
        argv = self.jobs.argv("run", "slurm", *self.options, sets=sets)
        words = [f"export PATH={self.bin}:$PATH PYTHONPATH={self.site}", "exec " + " ".join(f"'{w}'" for w in argv)]
        job = self.cluster.sbatch("--nodes=2", f"--ntasks-per-node={self.per_node}", f"--output={self.jobs.out('run')}",
                                  script="\n".join(words), cwd=self.folder)  # fmt: skip
        began, named, deadline, asked = None, None, time.monotonic() + 90, 0.0
        while True:
            now, said = time.monotonic(), self.jobs.said("run")
            began = now if began is None and STARTED in said else began
            named = now if named is None and REFUSED in said else named
            if now - asked > 0.5:
                asked, state = now, self.cluster.job(job)
                if state["JobState"] in ENDED:
                    break
            assert now < deadline, said
            time.sleep(0.02)
        said = self.jobs.said("run")
        assert state["ExitCode"] == "2:0", f"{state['ExitCode']}\n{said}"
        assert not list(self.folder.glob("run*/metrics.jsonl")), said
        if began is None:
            return 0.0, said
        assert REFUSED in said, said
        return (named or time.monotonic()) - began, said


@pytest.fixture
def plant(cluster: VirtualCluster, tmp_path: Path) -> Plant:
    return Plant(cluster, tmp_path)


def clock(p: Plant) -> None:
    p.python_on_node2("import time\ntrue = time.time\ntime.time = lambda: true() + 60")


def torch_version(p: Plant) -> None:
    found = next(file for file in metadata.files("torch") or [] if str(file).endswith(".dist-info/METADATA"))
    path = Path(str(found.locate()))
    other = p.folder / "METADATA"
    other.write_text(re.sub(r"(?m)^Version: .*$", "Version: 2.1.0", path.read_text(), count=1))
    p.on_node2(f'mount --bind "{other}" "{path}"')


def source(p: Plant) -> None:
    path = ROOT / "launch" / "rank" / "lifeline.py"
    (p.folder / "lifeline.py").write_text(path.read_text() + "# another version\n")
    p.on_node2(f'mount --bind "{p.folder}/lifeline.py" "{path}"')


def cores(p: Plant) -> None:
    p.per_node, p.mesh = 2, 4
    p.on_node2("taskset -cp 0 $$ >/dev/null")


def gpus(p: Plant) -> None:
    p.per_node, p.mesh = 2, 4
    p.program("nvidia-smi", 'echo "GPU 0: H100 (UUID: GPU-$(hostname)-a)"\n'
              '[[ $(hostname) == node2 ]] || echo "GPU 1: H100 (UUID: GPU-$(hostname)-b)"')  # fmt: skip


def shared_gpu(p: Plant) -> None:
    p.per_node, p.mesh = 2, 4
    p.program("nvidia-smi", 'for i in 0 1; do echo "GPU $i: H100 (UUID: GPU-$(hostname)-$i)"; done')
    p.on_node2("export CUDA_VISIBLE_DEVICES=$((0 * SLURM_LOCALID))")


def hidden(p: Plant) -> None:
    empty = p.folder / "empty"
    empty.mkdir()
    p.on_node2(f'd="$(dirname "$DIST_GPT_RUN_DIR")"\ncd /\nmount --bind "{empty}" "$d"')


def read_only(p: Plant) -> None:
    p.on_node2('d="$DIST_GPT_RUN_DIR"\nmount --bind "$d" "$d"\nmount -o remount,bind,ro "$d"')


def other_config(p: Plant) -> None:
    (p.folder / "other.yaml").write_text("name: other\n")
    p.on_node2(f'mount --bind "{p.folder}/other.yaml" "$DIST_GPT_RUN_DIR/config.yaml"')


def busy_port(p: Plant) -> None:
    listen = ("import os, socket, time; h, p = os.environ['DIST_GPT_MASTER'].split(':'); "
              "s = socket.create_server((h, int(p))); print('listens', flush=True); time.sleep(60)")  # fmt: skip
    python = Path(sys.executable).resolve()  # not the project's: it is no process of ours
    p.srun(before=f'coproc L {{ exec {python} -S -c "{listen}"; }}\nread -r -u "${{L[0]}}" word')


def loopback(p: Plant) -> None:
    p.srun(before="export DIST_GPT_MASTER=localhost:29511")


def hosts_file(p: Plant) -> None:
    """The name of the first node is on node2's own 127.* line, as some installers write it."""
    (p.folder / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 node1\n")
    p.on_node2(f'export DIST_GPT_MASTER=node1:29511\nmount --bind "{p.folder}/hosts" /etc/hosts')


def no_interface(p: Plant) -> None:
    p.sets["launch.interface"] = "nosuch0"


def one_sided_interface(p: Plant) -> None:
    space = network.netns(1).name
    for words in ("link add ib0 type veth peer name ib1", f"addr add {network.SUBNET}.101/32 dev ib0",
                  "link set ib0 up", "link set ib1 up"):  # fmt: skip
        network.command(["ip", "-n", space, *words.split()])
    p.sets["launch.interface"] = "ib0"


def fewer_tasks(p: Plant) -> None:
    p.srun(options="--nodes=1 --ntasks=1 --mpi=none --export=ALL --overlap --kill-on-bad-exit=0 --wait=0")


def never_comes(p: Plant) -> None:
    p.on_node2("sleep 100")


def twice(p: Plant) -> None:
    p.on_node2("export SLURM_PROCID=0 SLURM_NODEID=0")


def unreachable(p: Plant) -> None:
    p.cluster.blackhole(1, 2, True)


def no_way_to_launcher(p: Plant) -> None:
    """node2's ranks run, but have no way to the launcher: the ranks' network is another one."""
    p.on_node2('set -- unshare --net "$@"')


def too_few_nodes(p: Plant) -> None:
    p.nodes, p.mesh = 3, 3
    p.sets["train.global_batch"] = 9


def mesh(p: Plant) -> None:
    p.mesh = 4


def trains(p: Plant) -> None:
    """The same without --check."""
    p.options = ()
    clock(p)


NODE1, NODE2 = r"preflight error: node1 .*", r"preflight error: node2 .*"
PLANTED: dict[str, tuple[Callable[[Plant], None], str, str]] = {
    # name: (how, who and what, the remedy)
    "clock": (clock, NODE2 + "60 s ahead of", "chronyc makestep"),
    "clock, without --check": (trains, NODE2 + "60 s ahead of", "chronyc makestep"),
    "torch": (torch_version, NODE2 + "has torch 2.1.0, and rank 0 on node1", "Install the same on all nodes"),
    "source files": (source, NODE2 + "different source files", "one checkout"),
    "cores": (cores, NODE2 + "2 ranks may run on 1 of", "launch.slurm.cpus_per_rank"),
    "GPUs": (gpus, NODE2 + "sees 1 GPU for 2 ranks", "launch.slurm.gpus_per_node"),
    "one GPU for two": (shared_gpu, NODE2 + "sees 1 GPU for 2 ranks", "start fewer ranks"),
    "run directory hidden": (hidden, NODE2 + "does not see the run directory", "all nodes share"),
    "run directory read-only": (read_only, NODE2 + "cannot write to the run directory", "Mount it writable"),
    "config": (other_config, NODE2 + "reads a different config.yaml", "all nodes share"),
    "busy port": (busy_port, NODE1 + "another program listens on", "Choose another port"),
    "loopback": (loopback, NODE2 + "resolves localhost, where the ranks meet, to 127.0.0.1", "Set MASTER_ADDR"),
    "hosts file": (hosts_file, NODE2 + "resolves node1, where the ranks meet, to 127.0.1.1", "/etc/hosts"),
    "no interface": (no_interface, "launch.interface: 'nosuch0' has no IPv4 address on node1", "only lo .*eth0"),
    "interface on one node": (one_sided_interface, NODE2 + "has no interface ib0 that is up", "Set launch.interface"),
    "fewer tasks": (fewer_tasks, r"preflight error: node2 \(rank 1\): no rank", "Check .*rank1.log"),
    "a rank never comes": (never_comes, r"preflight error: node2 \(rank 1\): no rank", "that the node is up"),
    "a rank twice": (twice, r"preflight error: node[12] .*claims rank 0, which a process on node", "its own rank"),
    "link blackholed": (unreachable, r"preflight error: node2 \(rank 1\): no rank", "reaches the launcher"),
    "launcher not reached": (no_way_to_launcher, "rank 1 on node2 cannot reach the launcher", "launch.interface"),
    "nodes": (too_few_nodes, "launch.nodes: got 3, but the allocation has 2: node1, node2", ""),
    "mesh": (mesh, r"world 2 \(launch.nodes 2 x launch.ranks_per_node 1\) is not", "set parallel.dp to 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name: str, plant: Plant) -> None:
    how, what, remedy = PLANTED[name]
    if how in (cores,) and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: nothing could be taken away")
    how(plant)
    try:
        took, said = plant.run()
    finally:
        if how is one_sided_interface:
            network.command(["ip", "-n", network.netns(1).name, "link", "del", "ib0"], check=False)
    print(f"{name}: named after {took:.1f} s on {socket.gethostname()}\n{said}")
    assert took < NAMED_S, said
    line = next((line for line in said.splitlines() if re.search(what, line)), None)
    assert line is not None, said
    assert re.search(remedy, line), said
    assert plant.jobs.nothing_runs()
