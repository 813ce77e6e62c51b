"""Network namespaces on one bridge, their names in /etc/hosts, and how all of it goes away again. Needs root.

Names are fixed, so that what a killed session left behind is found without its help. Only what carries these names
is ever touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

BRIDGE = "dgpt0"
VETH = "dgptve"
NAMESPACE = "dgpt-node"
SUBNET = "10.77.0"
SEGMENT = 1448
"""What Ethernet's 1,500 bytes leave for data: IPv4 20, TCP 20 and its time stamps 12."""
HEAD, HEAD_ADDRESS = "head77", f"{SUBNET}.254"
NETNS = Path("/run/netns")
HOSTS = Path("/etc/hosts")
BEGIN, END = "# begin dist_gpt virtual cluster", "# end dist_gpt virtual cluster"


def command(argv: Sequence[str], check: bool = True) -> str:
    """Standard output of `argv`; RuntimeError with what it said on failure, unless `check` is off."""
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def name(node: int) -> str:
    return f"node{node}"


def address(node: int) -> str:
    return f"{SUBNET}.{node}"


def netns(node: int) -> Path:
    """File of the node's network namespace."""
    return NETNS / f"{NAMESPACE}{node}"


def resent_bytes(node: int) -> int:
    """Bytes that the node's TCP has sent once more so far, by its kernel's count of segments: a loaded machine drops
    packets even on a link that is none. Of short segments more than they held."""
    lines = command(["ip", "netns", "exec", netns(node).name, "cat", "/proc/net/snmp"]).splitlines()
    names, counts = (line.split() for line in lines if line.startswith("Tcp:"))
    return SEGMENT * int(counts[names.index("RetransSegs")])


def make(nodes: int) -> None:
    """Bridge, one namespace and veth pair per node (eth0 inside, VETH{node} on the bridge), and /etc/hosts."""
    command(["ip", "link", "add", BRIDGE, "type", "bridge"])
    command(["ip", "addr", "add", f"{HEAD_ADDRESS}/24", "dev", BRIDGE])
    command(["ip", "link", "set", BRIDGE, "up"])
    for node in range(1, nodes + 1):
        space, veth = netns(node).name, f"{VETH}{node}"
        command(["ip", "netns", "add", space])
        command(["ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", space])
        command(["ip", "link", "set", veth, "master", BRIDGE, "up"])
        for words in (f"addr add {address(node)}/24 dev eth0", "link set eth0 up", "link set lo up"):
            command(["ip", "-n", space, *words.split()])
        _keep_order(veth)
        _keep_order("eth0", ["ip", "netns", "exec", space])
    names = [f"{HEAD_ADDRESS} {HEAD}", *(f"{address(n)} {name(n)}" for n in range(1, nodes + 1))]
    text = _hosts_without()
    HOSTS.write_text("\n".join([*text.splitlines(), BEGIN, *names, END]) + "\n", encoding="utf-8")


def _keep_order(link: str, inside: Sequence[str] = ()) -> None:
    """One processor takes in whatever arrives by `link`. Otherwise it is the one that the sender ran on, and a sender
    that the scheduler moves overtakes its own packets: TCP takes the late ones for lost and sends them again, which a
    test that counts bytes sees as more than a hundredth of a run's traffic."""
    command([*inside, "sh", "-c", f"echo 1 > /sys/class/net/{link}/queues/rx-0/rps_cpus"])


def _hosts_without() -> str:
    """/etc/hosts without our lines."""
    kept, ours = [], False
    for line in HOSTS.read_text(encoding="utf-8").splitlines(keepends=True):
        ours = ours or line.strip() == BEGIN
        if not ours:
            kept.append(line)
        ours = ours and line.strip() != END
    return "".join(kept)


def _alive(wanted: Callable[[Path], bool]) -> list[int]:
    """Processes (without zombies, this one and its ancestors) for whose /proc folder `wanted` holds."""
    above, pid = set(), os.getpid()
    while pid > 1:
        above.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if int(folder.name) not in above and not zombie and wanted(folder):
                found.append(int(folder.name))
    return sorted(found)


def inside(spaces: Sequence[Path]) -> list[int]:
    """Ids of the processes in these network namespaces."""
    inodes = {path.stat().st_ino for path in spaces if path.exists()}
    return _alive(lambda folder: (folder / "ns/net").stat().st_ino in inodes)


def of_cluster(folder: Path) -> list[int]:
    """Ids of processes outside the namespaces that belong to the cluster in `folder`: SLURM_CONF points into it."""
    mark = b"SLURM_CONF=" + os.fsencode(folder) + b"/"
    return _alive(lambda proc: mark in (proc / "environ").read_bytes())


def spaces() -> list[Path]:
    """Namespaces of a cluster, now."""
    return sorted(NETNS.glob(f"{NAMESPACE}[0-9]*")) if NETNS.exists() else []


def end(find: Callable[[], list[int]], patience: float = 2.0) -> None:
    """SIGTERM to what `find` finds, SIGKILL to what it still finds after `patience` seconds; 0: SIGKILL at once."""
    until = time.monotonic() + patience
    for pid in find() if patience else ():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    while (left := find()) and time.monotonic() < until + 5:
        for pid in left if time.monotonic() > until else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def left_over() -> list[str]:
    """Whatever a cluster has on this machine outside its folder: links, namespaces, mounts, lines, processes."""
    links = [p.name for p in Path("/sys/class/net").iterdir() if p.name == BRIDGE or p.name.startswith(VETH)]
    mounts = [words[1] for words in map(str.split, Path("/proc/mounts").read_text().splitlines())
              if words[2] == "nsfs" and Path(words[1]).parent.name == "dgpt-uts"]  # fmt: skip
    lines = [BEGIN] if _hosts_without() != HOSTS.read_text(encoding="utf-8") else []
    return [*links, *map(str, spaces()), *mounts, *lines, *(f"process {pid}" for pid in inside(spaces()))]


def remove(folder: Path | None, keep_folder: bool = False) -> None:
    """Take everything down, whatever of it is there; `folder` is the cluster's, where known."""
    end(lambda: inside(spaces()), patience=0.0)
    if folder is not None:
        end(lambda: of_cluster(folder))
    for line in Path("/proc/mounts").read_text().splitlines():
        where = Path(line.split()[1])
        if line.split()[2] == "nsfs" and where.parent.name == "dgpt-uts":
            command(["umount", str(where)], check=False)
    for space in spaces():
        command(["ip", "netns", "del", space.name], check=False)  # its end of the pair goes, and the other with it
    for link in [p.name for p in Path("/sys/class/net").iterdir() if p.name == BRIDGE or p.name.startswith(VETH)]:
        command(["ip", "link", "del", link], check=False)
    if (text := _hosts_without()) != HOSTS.read_text(encoding="utf-8"):
        HOSTS.write_text(text, encoding="utf-8")
    if folder is not None and not keep_folder:
        shutil.rmtree(folder, ignore_errors=True)
