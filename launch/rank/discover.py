"""Find this process's rank and world from the variables of the launcher that started it; the first match wins:

    launcher          recognised by
    dist-gpt launch   DIST_GPT_LAUNCHER, or DIST_GPT_ERROR_FILE beside RANK: our local launcher set torchrun's names
    torchrun          TORCHELASTIC_RUN_ID (also under srun: the step's task is then torchrun itself, not the rank)
    Slurm step        SLURM_PROCID, SLURM_STEP_NUM_TASKS and a SLURM_STEP_ID that is a step's number (a batch script and
                      an interactive shell have SLURM_PROCID too), unless an mpirun is nearer
    Open MPI          OMPI_COMM_WORLD_SIZE: only mpirun sets it (srun --mpi=pmix does not); also jsrun's Spectrum MPI
    MVAPICH           MV2_COMM_WORLD_SIZE
    MPICH, Intel MPI  PMI_SIZE; also PALS (aprun, Cray's mpiexec)
    jsrun             JSM_NAMESPACE_SIZE
    Flux              FLUX_TASK_RANK and FLUX_JOB_SIZE
    another program   RANK or WORLD_SIZE; both are needed
    none of these     a single process

An mpirun is nearer to a rank than a Slurm step: in an allocation mpirun starts its daemons (orted, prted, Hydra's
proxies) with srun, so a rank on another node sees SLURM_PROCID and the like of the daemon's step, one task per node,
and a rank on mpirun's own node those of the batch script. So if OMPI_COMM_WORLD_SIZE is set, or Hydra's MPI_LOCALNRANKS
(Slurm's own pmi2 plugin sets PMI_RANK and PMI_SIZE in a true step, but not this one), the step is the daemon's. A step
of dist-gpt launch has DIST_GPT_STARTER=srun, which takes precedence (dist-gpt launch inside an mpirun).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dist_gpt.config.errors import ConfigError
from dist_gpt.protocol import ERROR_FILE, LAUNCHER, MASTER, STARTER
from dist_gpt.wording import counted
from launch.net import port_of
from launch.nodelist import counts, expand

FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Step numbers from here on are not steps but batch script, extern or interactive shell (slurm.h)."""


@dataclass(frozen=True)
class Place:
    """Position of a rank in its job. The ranks of a node are consecutive."""

    source: str
    """Origin of the values: `torchrun`, `Slurm step 12.0`, ..."""
    rank: int
    world: int
    local_rank: int
    local_world: int
    node: int
    nodes: int
    master_addr: str | None
    """None: not known, or not needed because the world is 1."""
    master_port: int | None

    def __post_init__(self) -> None:
        for what, value, end in (
            ("rank", self.rank, self.world),
            ("local rank", self.local_rank, self.local_world),
            ("node", self.node, self.nodes),
            ("ranks of a node", self.local_world - 1, self.world),
        ):
            if not 0 <= value < end:
                shown = value if what != "ranks of a node" else value + 1
                raise ConfigError([
                    f"the variables of {self.source} contradict each other: {what} {shown} of {end} (rank {self.rank}, "
                    f"world {self.world}, local rank {self.local_rank}, {counted(self.local_world, 'rank')} on the "
                    f"node, node {self.node} of {self.nodes}); unset those that an earlier job left behind"
                ])  # fmt: skip

    def environ(self) -> dict[str, str]:
        """Return torchrun's variables. Raise ConfigError if there are several ranks and no address to meet at."""
        if self.world > 1 and (self.master_addr is None or self.master_port is None):
            raise ConfigError([
                f"this is rank {self.rank} of {self.world} (started by: {self.source}), but the address at which "
                f"the ranks meet is not known; set {MASTER}=HOST:PORT (or MASTER_ADDR and MASTER_PORT) for all ranks, "
                "start them with dist-gpt launch, or unset the variables that an earlier job left behind"
            ])  # fmt: skip
        found = {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "GROUP_RANK": str(self.node),
            "GROUP_WORLD_SIZE": str(self.nodes),
        }
        if self.master_addr is not None and self.master_port is not None:
            found |= {"MASTER_ADDR": self.master_addr, "MASTER_PORT": str(self.master_port)}
        return found

    def sentence(self) -> str:
        """Return `rank 5/8 node 1/2 local 1/4 (Slurm step 12.0)`, all counted from 0."""
        return (
            f"rank {self.rank}/{self.world} node {self.node}/{self.nodes} "
            f"local {self.local_rank}/{self.local_world} ({self.source})"
        )


Reader = Callable[[Mapping[str, str]], Place]


@dataclass(frozen=True)
class Variables:
    """Reader of the environment; its errors name the variable and the launcher that should have set it."""

    environ: Mapping[str, str]
    source: str

    def text(self, name: str) -> str:
        """Return the value of variable `name`. Raise ConfigError if it is unset or empty."""
        value = self.environ.get(name, "")
        if not value:
            raise ConfigError([
                f"{name} is not set, so this process cannot tell its rank or where the ranks meet (started by: "
                f"{self.source}); set it, or unset the variables that an earlier job left behind"
            ])  # fmt: skip
        return value

    def number(self, name: str, default: int | None = None) -> int:
        """Return variable `name` as a whole number, or `default` if it is unset. Raise ConfigError without either."""
        if default is not None and not self.environ.get(name):
            return default
        value = self.text(name)
        if not (value.isascii() and value.isdigit() and len(value) < 12):
            raise ConfigError([f"{name}={value!r}, set by {self.source}, must be a whole number, 0 or more"])
        return int(value)

    def master(self) -> tuple[str | None, int | None]:
        """Return address and port at which the ranks meet, by MASTER first: it is set for exactly this job."""
        if self.environ.get(MASTER):
            return split_address(self.environ[MASTER], MASTER)
        if not self.environ.get("MASTER_ADDR") and not self.environ.get("MASTER_PORT"):
            return None, None
        port = self.number("MASTER_PORT")
        if not 0 < port < 65536:
            raise ConfigError([f"MASTER_PORT={port}, set by {self.source}, is not a port: expected 1 to 65535"])
        return self.text("MASTER_ADDR"), port


def split_address(text: str, name: str) -> tuple[str, int]:
    """Split `host:port` or `[::1]:port`. Raise ConfigError, which calls the text `name`, if it is neither."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise ConfigError([f"{name}={text!r} is not HOST:PORT, for example node1:29500"])
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_slurm_step(environ: Mapping[str, str]) -> bool:
    """Return whether this is a task of a Slurm step (a batch script, an salloc shell and an mpirun's rank are not)."""
    step = environ.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return False
    if not (step.isascii() and step.isdigit()) or int(step) >= FIRST_SPECIAL_STEP:
        return False
    mpirun_is_nearer = "OMPI_COMM_WORLD_SIZE" in environ or ("PMI_SIZE" in environ and "MPI_LOCALNRANKS" in environ)
    return environ.get(STARTER) == "srun" or not mpirun_is_nearer


def _ours(environ: Mapping[str, str]) -> Place:
    return _torch_names(Variables(environ, f"dist-gpt launch, {environ.get(LAUNCHER) or 'local'}"))


def _torchrun(environ: Mapping[str, str]) -> Place:
    return _torch_names(Variables(environ, "torchrun"))


def _plain(environ: Mapping[str, str]) -> Place:
    return _torch_names(Variables(environ, "RANK and WORLD_SIZE"))


def _torch_names(seen: Variables) -> Place:
    rank, world = seen.number("RANK"), seen.number("WORLD_SIZE")
    # Without local variables (a hand-written environment), all ranks are assumed to be on one node.
    local_world = seen.number("LOCAL_WORLD_SIZE", max(1, world))
    local = seen.number("LOCAL_RANK", rank % max(1, local_world))
    node = seen.number("GROUP_RANK", rank // max(1, local_world))
    nodes = seen.number("GROUP_WORLD_SIZE", max(node + 1, -(-world // max(1, local_world))))
    addr, port = seen.master()
    return Place(seen.source, rank, world, local, local_world, node, nodes, addr, port)


def _slurm(environ: Mapping[str, str]) -> Place:
    job = environ.get("SLURM_JOB_ID", "?")
    seen = Variables(environ, f"Slurm step {job}.{environ['SLURM_STEP_ID']}")
    rank, world, node = (seen.number(f"SLURM_{name}") for name in ("PROCID", "STEP_NUM_TASKS", "NODEID"))
    tasks = counts(seen.text("SLURM_STEP_TASKS_PER_NODE"))
    if sum(tasks) != world or node >= len(tasks):
        raise ConfigError([
            f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']}, set by {seen.source}, does not fit "
            f"SLURM_STEP_NUM_TASKS={world} and SLURM_NODEID={node}; unset SLURM variables left over from another step"
        ])  # fmt: skip
    local = seen.number("SLURM_LOCALID")
    if sum(tasks[:node]) + local != rank:
        raise ConfigError([
            f"{seen.source} put rank {rank} (SLURM_PROCID) on node {node} as its task {local} (SLURM_LOCALID): ranks "
            "of a node must be consecutive; start the step with srun --distribution=block"
        ])  # fmt: skip
    if environ.get(MASTER):
        addr, port = split_address(environ[MASTER], MASTER)
    else:
        hosts = expand(seen.text("SLURM_STEP_NODELIST"))
        # A step on one node stays on loopback, whatever its host name resolves to.
        addr = hosts[0] if len(tasks) > 1 else "127.0.0.1"
        port = port_of(job, environ["SLURM_STEP_ID"])
    return Place(seen.source, rank, world, local, tasks[node], node, len(tasks), addr, port)


MPI_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "Open MPI": tuple((f"OMPI_COMM_WORLD_{name}",) for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH": tuple((f"MV2_COMM_WORLD_{name}",) for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MPICH (PMI)": (
        ("PMI_RANK",),
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
    ),
    "jsrun": tuple((f"JSM_NAMESPACE_{name}",) for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
}
"""Variables that may hold the rank, world, local rank and local world; the first one that is set is read."""


def _mpi_reader(who: str) -> Reader:
    def read(environ: Mapping[str, str]) -> Place:
        seen = Variables(environ, who)
        set_ones = [next((name for name in names if environ.get(name)), names[0]) for names in MPI_NAMES[who]]
        return _mpi(seen, *(seen.number(name) for name in set_ones))

    return read


def _flux(environ: Mapping[str, str]) -> Place:
    """Read Flux's variables. They give the number of nodes, not of tasks on this one: assume evenly filled nodes."""
    seen = Variables(environ, "Flux")
    rank, world, nodes = seen.number("FLUX_TASK_RANK"), seen.number("FLUX_JOB_SIZE"), seen.number("FLUX_JOB_NNODES")
    if nodes < 1 or world % nodes:
        raise ConfigError([
            f"FLUX_JOB_SIZE={world} is not a multiple of FLUX_JOB_NNODES={nodes}, but every node must run the same "
            "number of tasks; start them with flux run --tasks-per-node=N"
        ])  # fmt: skip
    return _mpi(seen, rank, world, seen.number("FLUX_TASK_LOCAL_ID"), world // nodes)


def _mpi(seen: Variables, rank: int, world: int, local: int, local_world: int) -> Place:
    """Return the place on evenly filled nodes, in order: MPI names no node. starters.mpi.meet asks the ranks."""
    each = max(1, local_world)
    if rank % each != local:
        raise ConfigError([
            f"{seen.source} gave rank {rank} the local rank {local} of {local_world}: every node must hold the same "
            f"number of consecutive ranks; with Open MPI, use --map-by ppr:{local_world}:node"
        ])  # fmt: skip
    addr, port = seen.master()
    return Place(seen.source, rank, world, local, local_world, rank // each, -(-world // each), addr, port)


def _single(environ: Mapping[str, str]) -> Place:
    return Place("single process", 0, 1, 0, 1, 0, 1, None, None)


TABLE: tuple[tuple[str, Callable[[Mapping[str, str]], bool], Reader], ...] = (
    ("dist-gpt launch", lambda e: bool(e.get(LAUNCHER)) or (ERROR_FILE in e and "RANK" in e), _ours),
    ("torchrun", lambda e: "TORCHELASTIC_RUN_ID" in e, _torchrun),
    ("Slurm step", is_slurm_step, _slurm),
    ("Open MPI", lambda e: "OMPI_COMM_WORLD_SIZE" in e, _mpi_reader("Open MPI")),
    ("MVAPICH", lambda e: "MV2_COMM_WORLD_SIZE" in e, _mpi_reader("MVAPICH")),
    ("MPICH (PMI)", lambda e: "PMI_SIZE" in e, _mpi_reader("MPICH (PMI)")),
    ("jsrun", lambda e: "JSM_NAMESPACE_SIZE" in e, _mpi_reader("jsrun")),
    ("Flux", lambda e: "FLUX_TASK_RANK" in e and "FLUX_JOB_SIZE" in e, _flux),
    ("RANK and WORLD_SIZE", lambda e: "RANK" in e or "WORLD_SIZE" in e, _plain),
    ("single process", lambda e: True, _single),
)
"""Launcher, test that recognises it, reader of its variables; see the top of this file."""


def started_by(environ: Mapping[str, str]) -> str:
    """Return the table's name for the program that started this process, or `single process`."""
    return next(who for who, recognised, _ in TABLE if recognised(environ))


def discover(environ: Mapping[str, str]) -> Place:
    """Return the place of this process. Raise ConfigError naming a variable that is missing or contradicts another."""
    return next(read(environ) for _, recognised, read in TABLE if recognised(environ))
