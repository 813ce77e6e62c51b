"""Start ranks by torchrun: its command line, and `python -m launch.starters.torchrun`, the task of a node under srun.

The task reads the number of its node (SLURM_NODEID) and becomes torchrun by exec: no shell and no process in between.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from dist_gpt.config.errors import ConfigError
from dist_gpt.protocol import LAUNCHER_PID
from launch.net import free_port
from launch.spec import JobSpec

LOOPBACK = "127.0.0.1"
STOP_S = 30.0
"""Seconds after a request to stop at which torchrun by default kills its ranks; ours may need grace_s."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""Without SIGUSR1 among these, torchrun dies of it and leaves its ranks running as orphans (seen with 2.13)."""


def environment(spec: JobSpec) -> dict[str, str]:
    """Return torchrun's variable with the seconds that ranks get to exit after a signal (torch 2.11 has no option)."""
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(max(STOP_S, spec.grace_s)))}


def torchrun_argv(spec: JobSpec, node: int, master_addr: str, master_port: int) -> tuple[str, ...]:
    """Return the torchrun command of one node, which never restarts ranks.

    The supervisor does, with a new store (gloo ranks that torchrun restarts read the addresses of the dead ones).
    """
    return _argv(spec.argv, spec.nodes, spec.ranks_per_node, node, master_addr, master_port)


def _argv(command: Sequence[str], nodes: int, ranks_per_node: int, node: int, addr: str, port: int) -> tuple[str, ...]:
    own = ("--local-addr", LOOPBACK) if nodes == 1 and addr == LOOPBACK else ()
    return (
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes", str(nodes), "--nproc-per-node", str(ranks_per_node), "--node-rank", str(node),
        "--rdzv-backend", "static", "--master-addr", addr, "--master-port", str(port), *own,
        "--max-restarts", "0", "--signals-to-handle", SIGNALS,
        *_script(command),
    )  # fmt: skip


def _script(command: Sequence[str]) -> tuple[str, ...]:
    """Return a rank's command as torchrun takes it: `-m MODULE ...` of the same Python, or a program."""
    if len(command) > 2 and command[0] == sys.executable and command[1] == "-m":
        return tuple(command[1:])
    return ("--no-python", *command)


def node_argv(spec: JobSpec, master_addr: str, master_port: int) -> tuple[str, ...]:
    """Return the command of one node's task under srun, the same on all nodes."""
    return (
        sys.executable, "-m", "launch.starters.torchrun", "--nodes", str(spec.nodes),
        "--ranks-per-node", str(spec.ranks_per_node), "--master-addr", master_addr, "--master-port", str(master_port),
        "--", *spec.argv,
    )  # fmt: skip


def node_rank(nodes: int, environ: Mapping[str, str]) -> int:
    """Return the number of this node. Raise ConfigError if SLURM_NODEID is missing or not below `nodes`."""
    if nodes == 1:
        return 0
    text = environ.get("SLURM_NODEID", "")
    if not text.isdigit() or int(text) >= nodes:
        raise ConfigError([
            f"SLURM_NODEID={text or '(not set)'} is not one of {nodes} nodes; start one "
            f"`python -m launch.starters.torchrun` per node with srun --nodes={nodes} --ntasks-per-node=1"
        ])  # fmt: skip
    return int(text)


def main(argv: Sequence[str]) -> None:
    """Become torchrun for the arguments of one node's task."""
    parser = argparse.ArgumentParser(prog="python -m launch.starters.torchrun", description=__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--master-addr", default=LOOPBACK)
    parser.add_argument("--master-port", type=int, default=0, help="0: a free one, on one node")
    parser.add_argument("command", nargs="+", help="command of a rank")
    asked = parser.parse_args(argv)
    try:
        node = node_rank(asked.nodes, os.environ)
    except ConfigError as error:
        sys.exit(f"dist-gpt: {socket.gethostname()}: {error}")
    if os.environ.get(LAUNCHER_PID) == "parent":
        from launch.rank.worker import tie_to_parent

        tie_to_parent(os.getppid())  # holds across exec: torchrun dies with the launcher, and its ranks with torchrun
    port = asked.master_port or free_port(asked.master_addr, str(os.getpid()))
    line = _argv(asked.command, asked.nodes, asked.ranks_per_node, node, asked.master_addr, port)
    os.execvpe(line[0], line, os.environ)


if __name__ == "__main__":
    main(sys.argv[1:])
