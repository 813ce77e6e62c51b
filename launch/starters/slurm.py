"""Run a job under Slurm: the text of its batch script, the srun that starts its ranks, the meaning of Slurm's states.

`sbatch_text(job)` and `srun_argv(spec, ...)` are pure. A value of the configuration is never run as code: it is quoted
for bash or for sbatch (sbatch has its own rules and reads line by line, so a line break is refused there).
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.launch_problems import SLURM_OPTION, SLURM_OURS, VARIABLE, has_control
from dist_gpt.config.schema import Config, SlurmConfig
from launch.net import port_of
from launch.nodelist import expand
from launch.spec import JobSpec
from launch.starters.job_states import code_of, state_in_words
from launch.starters.torchrun import node_argv

__all__ = [
    "SlurmJob", "address_of", "code_of", "end_steps", "hosts", "is_warning", "job_of", "port_of", "requeue",
    "sbatch_text", "srun_argv", "state_in_words",
]  # fmt: skip
STEPS_GONE_S = 15.0
TOOL_S = 60.0
"""Seconds that a Slurm tool may take to answer."""


@dataclass(frozen=True)
class SlurmJob:
    """Input of sbatch as plain data."""

    name: str
    run_dir: Path
    cwd: Path
    python: str
    nodes: int
    ranks_per_node: int
    argv: tuple[str, ...]
    """Arguments of `python` on the first node; this command starts the ranks on all nodes."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    modules: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    grace_s: float = 120.0
    array: str | None = None
    """Indices of a job array, as sbatch's --array takes them."""

    @property
    def log_pattern(self) -> str:
        """Path of the log, with Slurm's %j (%A_%a in an array) in its name."""
        return f"{self.run_dir}/logs/slurm-{'%A_%a' if self.array else '%j'}.out"


def job_of(config: Config, spec: JobSpec, cwd: Path, python: str) -> SlurmJob:
    """Return the job that launches the run of `spec` again in the allocation, with --resume auto (a check: --check)."""
    run_dir = spec.log_dir.parent if spec.log_dir.is_absolute() else cwd / spec.log_dir.parent
    how = ("--check",) if spec.check else ("--resume", "auto")
    argv = ("-m", "dist_gpt", "launch", str(run_dir / "config.yaml"), "--via", "slurm", *how)
    launch = config.launch
    return SlurmJob(
        spec.name, run_dir, cwd, python, spec.nodes, spec.ranks_per_node, argv, launch.slurm, tuple(launch.modules),
        dict(spec.env), spec.grace_s,
    )  # fmt: skip


# --- the batch script ------------------------------------------------------------------------------------------------


def sbatch_text(job: SlurmJob) -> str:
    """Return the batch script. Raise ConfigError for a value that would be more than a value in it."""
    lines = ["#!/bin/bash"]
    lines += [_directive(key, option, value) for key, option, value in _options(job)]
    lines += ["", "# Written by dist-gpt launch. Submitting this file with sbatch repeats that launch.", "set -e"]
    if job.modules:
        lines.append("type module >/dev/null 2>&1 || . /etc/profile  # a batch shell is not a login shell")
    lines += [f"module load {_quoted('launch.modules', module)}" for module in job.modules]
    if job.modules:
        lines.append("# After `module load`: its scripts use variables that are not set.")
    lines.append("set -u")
    for name, value in job.env.items():
        if not re.fullmatch(VARIABLE, name):
            raise ConfigError([f"launch.env: {name!r} is not a variable name"])
        lines.append(f"export {name}={_quoted(f'launch.env.{name}', value, lines_too=True)}")
    lines.append("export PYTHONUNBUFFERED=1")
    if job.slurm.starter == "srun" and job.slurm.gpus_per_node and "SLURM_GPU_BIND" not in job.env:
        # Every rank sees all GPUs of its node and takes the one of its local rank. If Slurm bound one to each task,
        # NCCL could not use the links between them.
        lines.append("export SLURM_GPU_BIND=none")
    cpus = _cpus_per_task(job)
    if cpus is not None:
        # Since 22.05 srun does not inherit --cpus-per-task from sbatch: without this a rank would get one core.
        per_node = cpus * job.ranks_per_node if job.slurm.starter == "mpi" else cpus
        lines.append(f"export SRUN_CPUS_PER_TASK={per_node}")
    words = " ".join(_quoted("the command", word, lines_too=True) for word in (job.python, *job.argv))
    lines += ["# exec: Slurm sends its warning (--signal=B:) to this shell's process, so Python replaces the shell.",
              f"exec {words}", ""]  # fmt: skip
    return "\n".join(lines)


def _cpus_per_task(job: SlurmJob) -> int | None:
    each = job.slurm.cpus_per_rank
    return each * job.ranks_per_node if each and job.slurm.starter == "torchrun" else each


def _options(job: SlurmJob) -> list[tuple[str, str, str]]:
    """Return (name of the value in the configuration, option of sbatch, value) of each option."""
    s, found = job.slurm, [("name", "job-name", job.name), ("the working directory", "chdir", str(job.cwd))]
    run_dir = str(job.run_dir)
    if "\\" in run_dir:
        raise ConfigError([f"run_dir: {run_dir!r} contains a backslash, which disables Slurm's %j in the log's name"])
    log = job.log_pattern.removeprefix(run_dir)
    found.append(("run_dir", "output", run_dir.replace("%", "%%") + log))
    found.append(("launch", "open-mode", "append"))  # a requeued job continues in the same log
    found.append(("launch.slurm.requeue", "requeue" if s.requeue else "no-requeue", ""))
    found.append(("launch.grace_s", "signal", f"B:USR1@{math.ceil(job.grace_s)}"))
    found.append(("launch.nodes", "nodes", str(job.nodes)))
    tasks = 1 if s.starter == "torchrun" else job.ranks_per_node
    found.append(("launch.ranks_per_node", "ntasks-per-node", str(tasks)))
    cpus = _cpus_per_task(job)
    if cpus is not None:
        found.append(("launch.slurm.cpus_per_rank", "cpus-per-task", str(cpus)))
    if s.gpus_per_node:
        found.append(("launch.slurm.gpus_per_node", "gpus-per-node", str(s.gpus_per_node)))
    for key in ("partition", "account", "qos", "constraint", "time"):
        value = getattr(s, key)
        if value is not None:
            found.append((f"launch.slurm.{key}", key, value))
    if job.array is not None:
        found.append(("the study's array", "array", job.array))
    for option, value in s.options.items():
        if option in SLURM_OURS:
            raise ConfigError([f"launch.slurm.options: {option} is set by dist-gpt itself: {SLURM_OURS[option]}"])
        found.append((f"launch.slurm.options.{option}", option, value))
    return found


def _directive(key: str, option: str, value: str) -> str:
    """Return a line for sbatch, which knows only double quotes and a backslash before the next character."""
    if not re.fullmatch(SLURM_OPTION, option):
        raise ConfigError([f"{key}: {option!r} is not a long sbatch option; use a long name, such as mail-type"])
    if has_control(value):
        raise ConfigError([f"{key}: {value!r} contains a line break or another control character, which sbatch "
                           "would take as the end of the option; remove it"])  # fmt: skip
    if not value:
        return f"#SBATCH --{option}"
    plain = re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", value)
    quoted = value if plain else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{option}={quoted}"


def _quoted(key: str, value: str, lines_too: bool = False) -> str:
    """Return `value` quoted for bash, which takes a line break inside quotes like any character, but never a NUL."""
    if "\0" in value or (not lines_too and has_control(value)):
        raise ConfigError([f"{key}: {value!r} contains a control character; remove it"])
    return shlex.quote(value)


# --- inside the allocation -------------------------------------------------------------------------------------------


def srun_argv(
    spec: JobSpec, via: str = "srun", address: str = "", port: int = 0, cpus_per_rank: int | None = None, *,
    nodes: Sequence[str] = (), step: str = "",
) -> tuple[str, ...]:  # fmt: skip
    """Return the srun command that starts every rank (via `srun`) or one torchrun a node (via `torchrun`).

    Its step runs on `nodes` and has the name `step`, if they are given.
    """
    per_node = 1 if via == "torchrun" else spec.ranks_per_node
    argv = [
        "srun", f"--nodes={spec.nodes}", f"--ntasks={spec.nodes * per_node}", f"--ntasks-per-node={per_node}",
        "--distribution=block",  # ranks of a node are consecutive: the mesh's inner axes stay inside nodes
        "--kill-on-bad-exit=0", "--wait=0",  # the supervisor ends the step itself, after it has found the culprit
        "--mpi=none", "--export=ALL", "--unbuffered",
        "--overlap",  # beside an salloc shell's own step, and beside the last attempt's while it ends
    ]  # fmt: skip
    argv += [f"--nodelist={','.join(nodes)}"] if nodes else []  # the first of them is where the ranks meet
    argv += [f"--job-name={step}"] if step else []
    if cpus_per_rank is not None:
        argv.append(f"--cpus-per-task={cpus_per_rank * (spec.ranks_per_node if via == 'torchrun' else 1)}")
    return (*argv, *(node_argv(spec, address, port) if via == "torchrun" else spec.argv))


def in_allocation(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is in a Slurm allocation (a batch script or salloc)."""
    return "SLURM_JOB_ID" in environ and "SLURM_JOB_NODELIST" in environ


def hosts(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the allocation's nodes, in Slurm's order. Raise ConfigError outside of one."""
    text = environ.get("SLURM_JOB_NODELIST", "")
    if not text:
        raise ConfigError(["SLURM_JOB_NODELIST is not set, so this is not a Slurm allocation; use sbatch or salloc"])
    return expand(text)


Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]


def run_tool(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's tools and return its output as text; code 127 if it is missing, 124 if it does not answer.

    It runs in its own session: Ctrl-C must not reach it, least of all the scancel that Ctrl-C asks for.
    """
    try:
        return subprocess.run(list(argv), capture_output=True, text=True, errors="replace", timeout=TOOL_S,
                              stdin=subprocess.DEVNULL, start_new_session=True, check=False)  # fmt: skip
    except FileNotFoundError:
        return subprocess.CompletedProcess(list(argv), 127, "", f"{argv[0]}: not found")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(list(argv), 124, "", f"{argv[0]} did not answer within {TOOL_S:.0f} s")


def resolve(name: str) -> str | None:
    """Return an IPv4 address of a name from this host's resolver; None if it knows none."""
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def is_here(host: str) -> bool:
    """Return whether the node `host` is this machine (an salloc shell on the login node is on none of the job's)."""
    return host in (os.environ.get("SLURMD_NODENAME"), socket.gethostname().split(".")[0])


def address_of(
    host: str, interface: str | None = None, run: Run = run_tool, lookup: Callable[[str], str | None] = resolve
) -> str:
    """Return the address at which the other nodes reach `host`. Raise ConfigError, naming the node, if there is none.

    It is that of `interface` if it is given and `host` is this machine, else that of its name, else Slurm's own.
    """
    if interface is not None and is_here(host):
        return interface_address(interface)
    found = lookup(host)
    if found is not None and not ipaddress.ip_address(found).is_loopback:
        return found
    match = re.search(r"\bNodeAddr=(\S+)", run(("scontrol", "show", "node", host)).stdout)
    other = lookup(match[1]) if match else None
    if other is not None and not ipaddress.ip_address(other).is_loopback:
        return other
    given = f"resolves to {found}, which is loopback on every node" if found else "does not resolve here"
    raise ConfigError([
        f"node {host}: its name {given}, and Slurm's NodeAddr ({match[1] if match else 'not known'}) does not help; "
        f"have it added to DNS or /etc/hosts, or set the interface between nodes: --set launch.interface=NAME"
    ])  # fmt: skip


def interface_address(interface: str) -> str:
    """Return this machine's IPv4 address on `interface`. Raise ConfigError, listing those it has, if there is none."""
    have = {
        name: [a.address for a in addresses if a.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    if have.get(interface):
        return str(have[interface][0])
    listed = ", ".join(f"{name} ({' '.join(found)})" for name, found in have.items() if found)
    raise ConfigError([f"launch.interface: {interface!r} has no IPv4 address on {socket.gethostname()}, only {listed}"])


def is_warning(number: int) -> bool:
    """Return whether a signal is Slurm's warning that the job's time is nearly over (--signal=B:USR1@...)."""
    return number == signal.SIGUSR1


def requeue(job_id: str, run: Run = run_tool) -> str:
    """Send the job back to the queue; return an empty text, or what Slurm said if it refuses and what to do then."""
    answer = run(("scontrol", "requeue", job_id))
    if answer.returncode == 0:
        return ""
    said = " ".join(answer.stderr.split())
    return f"refused ({said}); continue with: scontrol requeue {job_id}, or dist-gpt launch ... --resume auto"


def steps(job_id: str, run: Run = run_tool) -> dict[str, str]:
    """Return the names of a job's steps by ID, without its batch script."""
    listed = run(("squeue", "--noheader", "--steps", "--jobs", job_id, "--format", "%i|%j")).stdout.splitlines()
    pairs = (line.strip().partition("|")[::2] for line in listed)
    return {step: name for step, name in pairs if re.fullmatch(r"[0-9_]+\.[0-9]+", step)}


def end_steps(
    job_id: str, ours: Callable[[str, str], bool], run: Run = run_tool, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Kill only the job's steps for which `ours(id, name)` is true; return when they are gone, or after a while."""
    deadline = time.monotonic() + STEPS_GONE_S
    while time.monotonic() < deadline:
        left = [step for step, name in steps(job_id, run).items() if ours(step, name)]
        if not left:
            return
        run(("scancel", "--signal=KILL", *left))
        sleep(0.5)
