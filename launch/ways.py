"""The ways of starting a job, and which of them applies where: this machine, torchrun, Slurm, MPI.

`way_of("slurm", config)` is a Way: it says what would be started (`document`) and does it (`run`). Inside a Slurm
allocation every way but `local` starts ranks on the allocation's nodes; outside, `slurm` submits a job that comes back
here from inside.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config
from launch import mpi, slurm, submit, torchrun
from launch.command import CommandRanks
from launch.local import HOST, launch_local
from launch.ports import free_port
from launch.spec import MASTER, JobSpec
from launch.supervise import PREEMPTED, say, supervise

WAYS = ("local", "torchrun", "slurm", "mpi")


class Way(Protocol):
    """How a job is started."""

    @property
    def sentence(self) -> str:
        """For people: where the ranks will run."""

    def document(self, spec: JobSpec) -> dict[str, Any]:
        """What would be run, exactly: `commands` (lists of arguments), and `script` where one is submitted."""

    def run(self, spec: JobSpec) -> int:
        """Do it; the job's exit code."""


def in_allocation(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is in a Slurm allocation of its own (a batch script or salloc), not in one of its tasks."""
    return "SLURM_JOB_ID" in environ and "SLURM_JOB_NODELIST" in environ


def way_of(via: str, config: Config, detach: bool = False) -> Way:
    """The way that `--via` means here. Raises ConfigError where it cannot be gone."""
    nodes, inside = config.launch.nodes, in_allocation()
    if via not in WAYS:
        raise ConfigError([f"--via {via}: no such way; choose {', '.join(WAYS)}"])
    if via == "local":
        if nodes != 1:
            raise ConfigError([f"launch.nodes: got {nodes}, but --via local starts every rank on this machine: "
                               "--nodes 1, or --via slurm, torchrun or mpi"])  # fmt: skip
        return Local()
    if inside:
        return Allocation.here(via if via != "slurm" else config.launch.slurm.starter, config)
    if via == "slurm":
        return Submitted(config, detach)
    if nodes != 1:
        raise ConfigError([
            f"launch.nodes: got {nodes}, but this is no Slurm allocation, so --via {via} knows no other hosts; start "
            "it inside one (sbatch, salloc), or run torchrun on every node yourself: see docs/cluster.md"
        ])  # fmt: skip
    return OneHost(via)


class Local:
    """Processes of this machine."""

    sentence = "this machine"

    def document(self, spec: JobSpec) -> dict[str, Any]:
        return {"commands": [list(spec.argv)] * spec.ranks}

    def run(self, spec: JobSpec) -> int:
        return launch_local(spec)


class OneHost:
    """torchrun or mpirun on this machine."""

    def __init__(self, via: str) -> None:
        self.via = via
        self.sentence = f"this machine, by {via if via == 'torchrun' else 'mpirun'}"

    def document(self, spec: JobSpec) -> dict[str, Any]:
        return {"commands": [self._argv(spec, 0)]}

    def _argv(self, spec: JobSpec, port: int) -> list[str]:
        if self.via == "torchrun":
            return list(torchrun.torchrun_argv(spec, 0, HOST, port))
        return list(mpi.command(spec, hosts=(), names=tuple(spec.env)))

    def run(self, spec: JobSpec) -> int:
        port = port_on(HOST, spec.name)
        argv = self._argv(spec, port)
        env = {"DIST_GPT_STARTER": self.via, MASTER: f"{HOST}:{port}", **torchrun.environment(spec)}
        return supervise(spec, CommandRanks(argv, env, spec.log_dir / f"{self.via}.log"), HOST)


@dataclass(frozen=True)
class Allocation:
    """The nodes of a Slurm allocation that this process is in."""

    via: str
    """srun, torchrun or mpi."""
    job_id: str
    hosts: tuple[str, ...]
    cpus_per_rank: int | None
    requeue: bool
    sentence: str

    @staticmethod
    def here(via: str, config: Config) -> Allocation:
        hosts = tuple(slurm.hosts(os.environ))
        if len(hosts) < config.launch.nodes:
            raise ConfigError([f"launch.nodes: got {config.launch.nodes}, but the allocation has {len(hosts)}: "
                               f"{', '.join(hosts)}"])  # fmt: skip
        job = os.environ["SLURM_JOB_ID"]
        s = config.launch.slurm
        sentence = f"Slurm job {job}, nodes {', '.join(hosts[: config.launch.nodes])}, by {via}"
        return Allocation(via, job, hosts[: config.launch.nodes], s.cpus_per_rank, s.requeue, sentence)

    def _master(self, spec: JobSpec) -> str:
        """The address of the first node that the others reach."""
        if len(self.hosts) == 1:
            return HOST
        return slurm.address_of(self.hosts[0], spec.interface)

    def document(self, spec: JobSpec) -> dict[str, Any]:
        return {"commands": [self._argv(spec, self.hosts[0], slurm.port_of(self.job_id))]}

    def _argv(self, spec: JobSpec, address: str, port: int) -> list[str]:
        if self.via == "mpi":
            names = (*spec.env, "DIST_GPT_STARTER")
            return list(mpi.command(spec, hosts=self.hosts, names=names))
        return list(slurm.srun_argv(spec, self.via, address, port, self.cpus_per_rank))

    def run(self, spec: JobSpec) -> int:
        address = self._master(spec)
        port = port_on(address, self.job_id)
        env = {"DIST_GPT_STARTER": self.via, MASTER: f"{address}:{port}", **torchrun.environment(spec)}
        starter = CommandRanks(
            self._argv(spec, address, port), env, spec.log_dir / f"{self.via}.log", lambda: slurm.end_steps(self.job_id)
        )
        say(f"{self.sentence}; master {address}:{port}")
        return supervise(spec, starter, address, self._requeue)

    def _requeue(self, code: int, stops: list[int]) -> int:
        """Back to the queue where Slurm's warning before the end of the time was followed by a save."""
        warned = any(slurm.is_warning(number) for number in stops)
        if code == PREEMPTED and warned and self.requeue:
            say(f"job {self.job_id} goes back to the queue: {slurm.requeue(self.job_id)}")
        return code


class Submitted:
    """A Slurm job of its own."""

    def __init__(self, config: Config, detach: bool) -> None:
        self.config, self.detach = config, detach
        self.sentence = f"a Slurm job on {config.launch.nodes} nodes"

    def _script(self, spec: JobSpec) -> str:
        return slurm.sbatch_text(slurm.job_of(self.config, spec, Path.cwd(), sys.executable))

    def document(self, spec: JobSpec) -> dict[str, Any]:
        script = spec.log_dir.parent / "job.sbatch"
        return {"commands": [["sbatch", "--parsable", str(script)]], "script": self._script(spec)}

    def run(self, spec: JobSpec) -> int:
        script = spec.log_dir.parent / "job.sbatch"
        script.write_text(self._script(spec))
        job = submit.submit(script)
        say(f"submitted: job {job}, script {script}")
        if self.detach:
            return 0
        return submit.follow_to_end(job, spec.log_dir / f"slurm-{job}.out", spec.log_dir.parent, spec.live_on_stderr)


def port_on(host: str, seed: str) -> int:
    """A free port of `host`, the same one for the same `seed` unless somebody has it. Raises ConfigError."""
    try:
        return free_port(host, seed)
    except OSError as error:
        raise ConfigError([
            f"cannot listen on {host} ({error.strerror}); is it an address of this host ({socket.gethostname()})? "
            "Start on the job's first node, or name the interface between nodes: --set launch.interface=NAME"
        ]) from error  # fmt: skip
