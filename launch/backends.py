"""Choose the way to start a job: on this machine, by torchrun, under Slurm or by MPI.

`way_of("slurm", config)` returns a Way, which tells what would be started (`document`) and starts it (`run`). Inside a
Slurm allocation every way but `local` starts ranks on the allocation's nodes; outside, `slurm` submits a job that comes
back here from inside.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config
from dist_gpt.protocol import MASTER, PREEMPTED, STARTER
from dist_gpt.rundir import CHECKPOINTS, branch_of, committed, step_of
from dist_gpt.wording import counted
from launch.monitor.supervisor import say, supervise
from launch.net import free_port
from launch.rank.node_info import address_towards
from launch.run_files import go_on, to_change
from launch.spec import JobSpec
from launch.starter import NotStartedError
from launch.starters import mpi, slurm, slurm_submit, torchrun
from launch.starters.command import CommandRanks
from launch.starters.local import HOST, launch_local

BAD_INPUT = 2
LEAST_STEPS = 2
"""Fewest steps that ranks must make, before they save and exit, for the job to be requeued."""
WAYS = ("local", "torchrun", "slurm", "mpi")


class Way(Protocol):
    """Way to start a job."""

    @property
    def sentence(self) -> str:
        """Place where the ranks will run, in words for users."""

    def document(self, spec: JobSpec) -> dict[str, Any]:
        """Return exactly what would be run: `commands` (lists of arguments), and `script` if one is submitted."""

    def run(self, spec: JobSpec) -> int:
        """Start the job and return its exit code."""


def way_of(via: str, config: Config, detach: bool = False, check: bool = False) -> Way:
    """Return the way that `--via` means here. Raise ConfigError if it is not possible."""
    nodes, inside = config.launch.nodes, slurm.in_allocation()
    if via not in WAYS:
        raise ConfigError([f"--via {via}: unknown launcher; choose {', '.join(WAYS)}"])
    if check and detach:
        raise ConfigError(["--check --detach: a check reports its result only if it is followed to its end; omit "
                           "--detach"])  # fmt: skip
    starter = via if via != "slurm" else config.launch.slurm.starter
    if starter == "mpi" and (inside or via == "mpi" or not config.launch.modules):  # a module may bring it into the job
        mpi.require_mpi4py()
    if via == "local":
        if nodes != 1:
            raise ConfigError([f"launch.nodes: got {nodes}, but --via local starts every rank on this machine; "
                               "use --nodes 1, or --via slurm, torchrun or mpi"])  # fmt: skip
        return Local()
    if inside:
        return Allocation.here(starter, config)
    if via == "slurm":
        return Submitted(config, detach)
    if nodes != 1:
        raise ConfigError([
            f"launch.nodes: got {nodes}, but this is not a Slurm allocation, so --via {via} knows no other hosts; "
            "start it inside one (sbatch, salloc), or run torchrun on every node yourself: see docs/cluster.md"
        ])  # fmt: skip
    return OneHost(via)


class Local:
    """Way to start the ranks as processes of this machine."""

    sentence = "this machine"

    def document(self, spec: JobSpec) -> dict[str, Any]:
        """Return the command of every rank."""
        return {"commands": [list(spec.argv)] * spec.ranks}

    def run(self, spec: JobSpec) -> int:
        """Run the ranks to their end, say how to continue if they fail, and return the exit code."""
        return told_how_to_go_on(launch_local(spec), spec, "local")


class OneHost:
    """Way to start the ranks by torchrun or mpirun on this machine."""

    def __init__(self, via: str) -> None:
        self.via = via
        self.sentence = f"this machine, by {via if via == 'torchrun' else 'mpirun'}"

    def document(self, spec: JobSpec) -> dict[str, Any]:
        """Return the command of torchrun or mpirun, whose port is chosen at the start."""
        return {"commands": [self._argv(spec, 0)]}

    def _argv(self, spec: JobSpec, port: int) -> list[str]:
        if self.via == "torchrun":
            return list(torchrun.torchrun_argv(spec, 0, HOST, port))
        return list(mpi.command(spec, hosts=(), names=tuple(spec.env)))

    def run(self, spec: JobSpec) -> int:
        """Run the ranks to their end, say how to continue if they fail, and return the exit code."""
        with not_started():
            # The port is free until rank 0 listens, seconds later: another launch must choose another one.
            port = port_on(HOST, f"{spec.log_dir.resolve()} {os.getpid()}")
            argv = self._argv(spec, port)
        env = {STARTER: self.via, MASTER: f"{HOST}:{port}", **torchrun.environment(spec)}
        code = supervise(spec, CommandRanks(argv, env, spec.log_dir / f"{self.via}.log"), HOST)
        return told_how_to_go_on(code, spec, self.via)


@dataclass(frozen=True)
class Allocation:
    """Way to start the ranks on the nodes of the Slurm allocation that this process is in."""

    via: str
    """srun, torchrun or mpi."""
    job_id: str
    hosts: tuple[str, ...]
    cpus_per_rank: int | None
    requeue: bool
    sentence: str

    @staticmethod
    def here(via: str, config: Config) -> Allocation:
        """Return the allocation of this process. Raise ConfigError if it has too few nodes for `config`."""
        hosts = tuple(slurm.hosts(os.environ))
        if len(hosts) < config.launch.nodes:
            raise ConfigError([f"launch.nodes: got {config.launch.nodes}, but the allocation has {len(hosts)}: "
                               f"{', '.join(hosts)}"])  # fmt: skip
        job = os.environ["SLURM_JOB_ID"]
        s = config.launch.slurm
        sentence = f"Slurm job {job}, nodes {', '.join(hosts[: config.launch.nodes])}, by {via}"
        return Allocation(via, job, hosts[: config.launch.nodes], s.cpus_per_rank, s.requeue, sentence)

    def document(self, spec: JobSpec) -> dict[str, Any]:
        """Return the command of srun or mpirun."""
        return {"commands": [self._argv(spec, self.hosts[0], slurm.port_of(self.job_id))]}

    def _argv(self, spec: JobSpec, address: str, port: int, step: str = "") -> list[str]:
        if self.via == "mpi":
            names = (*spec.env, STARTER)
            return list(mpi.command(spec, hosts=self.hosts, names=names))
        return list(slurm.srun_argv(spec, self.via, address, port, self.cpus_per_rank, nodes=self.hosts, step=step))

    def addresses(self, spec: JobSpec) -> tuple[str, str]:
        """Return the address where the watch listens and the one where the ranks meet, always on the first node.

        They differ if this process is on another: an salloc shell on the login node. Raise ConfigError without a route.
        """
        alone = len(self.hosts) == 1
        if alone and slurm.is_here(self.hosts[0]):
            return HOST, HOST
        first = slurm.address_of(self.hosts[0], spec.interface)
        if slurm.is_here(self.hosts[0]):
            return first, first
        own = address_towards(f"{first}:{slurm.port_of(self.job_id)}")
        if not own:
            raise ConfigError([
                f"there is no route from {socket.gethostname()} to {self.hosts[0]} ({first}), the job's first node; "
                "start on a node of the job: sbatch, or srun --pty in the allocation"
            ])  # fmt: skip
        return own, HOST if alone else first

    def run(self, spec: JobSpec) -> int:
        """Run the ranks to their end, requeue the job or say how to continue, and return the exit code."""
        step = f"dist-gpt-{secrets.token_hex(4)}"
        with not_started():
            own, address = self.addresses(spec)
            # Only a process there can try whether the port is free: preflight's first rank does.
            port = port_on(address, self.job_id) if own == address else slurm.port_of(self.job_id)
            argv = self._argv(spec, address, port, step)
        env = {STARTER: self.via, MASTER: f"{address}:{port}", **torchrun.environment(spec)}
        ours = self._ours(step)
        starter = CommandRanks(argv, env, spec.log_dir / f"{self.via}.log", lambda: slurm.end_steps(self.job_id, ours))
        say(f"{self.sentence}; master {address}:{port}" + (f", launcher {own}" if own != address else ""))
        before = newest_step(spec.log_dir.parent)
        return supervise(spec, starter, own, lambda code, stops: self._requeue(code, stops, spec, before))

    def _ours(self, step: str) -> Callable[[str, str], bool]:
        """Return a test for the steps (id, name) that this launch starts; others may belong to the user."""
        if self.via != "mpi":
            return lambda number, name: name == step
        before = frozenset(slurm.steps(self.job_id))  # mpirun calls srun itself, and names its steps after its daemons
        return lambda number, name: name in mpi.DAEMONS and number not in before

    def _requeue(self, code: int, stops: list[int], spec: JobSpec, before: int) -> int:
        """Requeue the job if Slurm warned before the end of its time and it made progress; return its exit code.

        Progress: the ranks saved and exited after LEAST_STEPS steps at least, or, if they did not come to that, there
        is a checkpoint newer than step `before`. Else the job would come to the same point again and again.
        """
        run_dir = spec.log_dir.parent
        warned = bool(stops) and slurm.is_warning(stops[0])
        alone = warned and all(slurm.is_warning(number) for number in stops)  # no other signal asked for an end
        after = newest_step(run_dir)
        saved = code == PREEMPTED and warned
        if not self.requeue or to_change(run_dir) or not (saved or (code not in (0, BAD_INPUT) and alone)):
            return told_how_to_go_on(code, spec, "slurm")
        made = after - max(before, 0)
        if made >= (LEAST_STEPS if saved else 1):
            refused = slurm.requeue(self.job_id)
            say(f"job {self.job_id} was not requeued: {refused}" if refused else f"job {self.job_id} is back in the "
                "queue")  # fmt: skip
            return code
        say(f"job {self.job_id} is not requeued: between its start and Slurm's warning it saved "
            f"{counted(max(made, 0), 'step')} of progress and would end at the same point again; request more time "
            "(launch.slurm.time, --time) than startup, grace_s and several steps take")  # fmt: skip
        return told_how_to_go_on(code, spec, "slurm")


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint, or of the one that the run branches from; -1 if there is none."""
    branch = branch_of(run_dir)
    others = [] if branch is None else [branch, *committed(branch / CHECKPOINTS)]
    found = [*committed(run_dir / CHECKPOINTS), *others]
    return next((step for path in found if (step := step_of(path)) >= 0), -1)


def told_how_to_go_on(code: int, spec: JobSpec, via: str) -> int:
    """Return `code`; if the job failed or was stopped, first print what is saved and the command that continues."""
    if code not in (0, BAD_INPUT) and spec.saves:
        say(go_on(spec.log_dir.parent, via))
    return code


@contextmanager
def not_started() -> Iterator[None]:
    """Turn a ConfigError in the block into NotStartedError: nothing is started yet."""
    try:
        yield
    except ConfigError as error:
        raise NotStartedError(error.problems) from None


class Submitted:
    """Way to submit the run as a Slurm job of its own."""

    def __init__(self, config: Config, detach: bool) -> None:
        self.config, self.detach = config, detach
        nodes = config.launch.nodes
        self.sentence = f"a Slurm job on {counted(nodes, 'node')}"

    def _script(self, spec: JobSpec) -> str:
        return slurm.sbatch_text(slurm.job_of(self.config, spec, Path.cwd(), sys.executable))

    def document(self, spec: JobSpec) -> dict[str, Any]:
        """Return the command of sbatch and the script."""
        script = spec.log_dir.parent / "job.sbatch"
        return {"commands": [["sbatch", "--parsable", str(script)]], "script": self._script(spec)}

    def run(self, spec: JobSpec) -> int:
        """Submit the script and, unless detached, follow the job to its end; return the exit code."""
        script = spec.log_dir.parent / "job.sbatch"
        script.write_text(self._script(spec))
        if self.detach:
            say(f"submitted: job {slurm_submit.submit(script)}, script {script}")
            return 0
        last = go_on if spec.saves else None
        log = spec.log_dir / "slurm-%j.out"
        return slurm_submit.run_job(script, log, spec.log_dir.parent, spec.live_on_stderr, last)


def port_on(host: str, seed: str) -> int:
    """Return a free port of `host`, the same for the same `seed` unless it is taken. Raise ConfigError if none is."""
    try:
        return free_port(host, seed)
    except OSError as error:
        raise ConfigError([
            f"cannot listen on {host} ({error.strerror}); check that it is an address of this host "
            f"({socket.gethostname()}), start on the job's first node, or set the interface between nodes: "
            "--set launch.interface=NAME"
        ]) from error  # fmt: skip
