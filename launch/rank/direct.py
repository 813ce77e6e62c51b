"""Find the rank, meeting place and run directory of a `train` that srun, mpirun, ... starts without dist-gpt launch.

    start = recognise(os.environ)       # rank and world, by the table in launch.rank.discover; changes nothing
    start.enter(os.environ)             # sets torchrun's variables, with the address at which the ranks meet
    folder = RunFolder(config, ...)     # run directory: checked at once, made by rank 0 once all ranks have met

Ranks started by mpirun agree on the address over MPI; on one node they can also derive it without MPI.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config
from dist_gpt.plan import api
from dist_gpt.protocol import ATTEMPT, MASTER, STORE_FD, TERMINAL
from dist_gpt.rundir import Resume
from launch import lock, run
from launch.net import port_of
from launch.rank.discover import MPI_NAMES, TABLE, Place, split_address, started_by
from launch.starters.mpi import library_for, meet

QUIET_S, SLURM_QUIET_S = 20.0, 5.0
"""Seconds that a rank waits for rank 0 to report an error that all ranks found. Meanwhile the program that started them
ends the rank; only srun waits for all ranks."""
LINGER_S = 5.0
"""Seconds that a rank exiting with an error code waits for rank 0, which would otherwise be killed."""
SLURM, FLUX, TORCHRUN = "Slurm step", "Flux", "torchrun"
ASKS_MPI = ("Open MPI", "MVAPICH", "MPICH (PMI)")
NAMED_BY_TORCH = ("dist-gpt launch", TORCHRUN, "RANK and WORLD_SIZE")
"""Launchers that set torchrun's variables themselves; missing ones are not guessed."""
ALONE = ("RANK and WORLD_SIZE", "single process")
"""Ways to start ranks one by one, each with its own terminal: every rank reports its errors."""
RANK_NAMES = {
    SLURM: "SLURM_PROCID",
    FLUX: "FLUX_TASK_RANK",
    **{who: names[0][0] for who, names in MPI_NAMES.items()},
}
"""Variable in which each launcher gives the rank; the others use RANK."""
SIGNS = (
    "PMIX_RANK", "PMI_RANK", "PALS_RANKID", "ALPS_APP_PE", "MPI_LOCALRANKID", "PMI_ID", "FLUX_TASK_RANK",
    "JSM_NAMESPACE_RANK", "MV2_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK",
)  # fmt: skip
"""Variables of launchers that start several processes; on their own, they do not say how many."""
STALE = (STORE_FD, ATTEMPT, "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT")
"""Variables of one start of the ranks; left over, they would turn this start into a restart or move its store."""
DAEMONS = ("prterun", "prted", "orterun", "orted", "mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy",
           "hydra_bstrap_proxy", "pmi_proxy", "mpirun_rsh", "mpispawn")  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Rank of this process, and the program that started it."""

    who: str
    """Name of that program in launch.rank.discover's table."""
    place: Place

    def enter(self, environ: MutableMapping[str, str]) -> None:
        """Put torchrun's variables of this rank into `environ`. Raise ConfigError if the ranks cannot meet."""
        if self.who != TORCHRUN:
            for name in STALE:
                environ.pop(name, None)
        if self.who == "single process":
            return
        place = self.place
        if place.world > 1 and place.master_addr is None:
            place = _with_meeting_place(self.who, place, environ)
        found = place.environ()
        if self.who not in NAMED_BY_TORCH:
            environ.update(found)
            environ.setdefault(TERMINAL, "")  # mpirun gives its ranks a terminal of their own, which is not the user's

    def linger(self, code: int) -> None:
        """Wait before exiting with an error `code`: mpirun, `srun -K` and Flux end the other ranks when one fails."""
        if code and self.place.rank and self.who in (*MPI_NAMES, SLURM, FLUX):
            time.sleep(LINGER_S)


def recognise(environ: Mapping[str, str]) -> Start:
    """Return the Start of this rank. Raise ConfigError if the variables contradict each other or say too little."""
    who = started_by(environ)
    if who == "single process":
        seen = [name for name in SIGNS if environ.get(name)]
        if seen:
            raise ConfigError([
                f"{seen[0]}={environ[seen[0]]} says that another program started this process as one of several, but "
                "not how many there are; start the ranks with dist-gpt launch, torchrun, srun or mpirun, or unset "
                f"{', '.join(seen)} to train in one process"
            ])  # fmt: skip
    reader = next(read for name, _, read in TABLE if name == who)
    return Start(who, reader(environ))


def rank_of(environ: Mapping[str, str]) -> int:
    """Return the rank that the environment names, without checking anything else; 0 where it names none."""
    value = environ.get(RANK_NAMES.get(started_by(environ), "RANK"), "")
    return int(value) if value.isascii() and value.isdigit() else 0


def is_restart(environ: Mapping[str, str]) -> bool:
    """Return whether torchrun has restarted its ranks after a failure."""
    restarts = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return started_by(environ) == TORCHRUN and restarts.isdecimal() and int(restarts) > 0


def speaks(environ: Mapping[str, str], shared: bool) -> bool:
    """Return whether this rank prints its error. Ranks other than 0 first wait, to give rank 0 time to print it.

    `shared`: every rank finds the same error. When rank 0 exits with an error code, most launchers end the other ranks
    during this wait. srun may not, so one rank of each node prints the error.
    """
    who = started_by(environ)
    if rank_of(environ) == 0 or who in ALONE:
        return True
    time.sleep(SLURM_QUIET_S if who == SLURM else QUIET_S)
    return not (shared and who == SLURM and environ.get("SLURM_LOCALID") != "0")


# --- where the ranks meet --------------------------------------------------------------------------------------------


def _with_meeting_place(who: str, place: Place, environ: MutableMapping[str, str]) -> Place:
    """Return `place` with an address that all ranks know, if they can find one."""
    if environ.get(MASTER):
        addr, port = split_address(environ[MASTER], MASTER)
        return replace(place, master_addr=addr, master_port=port)
    if who in ASKS_MPI:
        if _mpirun_is_there(who, environ) is False:
            raise ConfigError([
                f"this is rank {place.rank} of {place.world} according to the variables of {place.source}, but the "
                "mpirun that set them is gone; unset them (all of OMPI_*, PMIX_*, PMI_* and MV2_*), or start the ranks "
                "with mpirun"
            ])  # fmt: skip
        return _over_mpi(place, environ)
    return _on_one_node(place, environ) or place


def _over_mpi(place: Place, environ: MutableMapping[str, str]) -> Place:
    """Return the place agreed on with the other ranks over MPI; if that fails on one node, derive the address."""
    local = _on_one_node(place, environ)
    if local is not None and importlib.util.find_spec("mpi4py") is None:
        return local
    library = _library(environ)
    if library is not None:
        environ.setdefault("MPI4PY_LIBMPI", library)
    try:
        return meet(environ)
    except ConfigError:
        if local is None:
            raise
        return local


def _on_one_node(place: Place, environ: Mapping[str, str]) -> Place | None:
    """Return `place` with a loopback address derived from the name of this start; None if it has none or many nodes."""
    if place.nodes > 1:
        return None
    name = environ.get("PMIX_NAMESPACE") or environ.get("FLUX_JOB_ID") or _daemon_name()
    return replace(place, master_addr="127.0.0.1", master_port=port_of(name)) if name else None


def _daemon_name() -> str | None:
    """Return name and PID of the mpirun above this process on this host; None if there is none."""
    found = _daemon()
    return f"{found.name()} {found.pid}" if found is not None else None


def _daemon() -> psutil.Process | None:
    with suppress(psutil.Error):
        return next((above for above in psutil.Process().parents() if above.name() in DAEMONS), None)
    return None


def _library(environ: Mapping[str, str]) -> str | None:
    """Return the libmpi.so of the mpirun that started this rank; mpi4py's wheel would take the first one it finds."""
    told = Path(environ.get("OMPI_LIBDIR_LOC") or "/nowhere") / "libmpi.so.40"
    if told.is_file():
        return str(told)
    daemon, path = _daemon(), None
    with suppress(psutil.Error):
        path = daemon.exe() if daemon is not None else None
    path = path or shutil.which("mpirun", path=environ.get("PATH"))
    return library_for(path) if path else None


def _mpirun_is_there(who: str, environ: Mapping[str, str]) -> bool | None:
    """Return whether the mpirun that set these variables can be reached; None if there is nothing to check.

    MPI ends the process, or crashes, if its variables are left over from an mpirun that is gone.
    """
    if who == "Open MPI":
        uris = [value for name, value in environ.items() if name.startswith("PMIX_SERVER_URI")]
        return any(_listens(uri.rpartition("://")[2]) for uri in uris if "tcp" in uri) or any(
            "tcp" not in uri for uri in uris
        )
    if environ.get("PMI_FD"):
        with suppress(ValueError, OSError):
            return stat.S_ISSOCK(os.fstat(int(environ["PMI_FD"])).st_mode)
        return False
    return _listens(environ["PMI_PORT"]) if environ.get("PMI_PORT") else None


def _listens(address: str) -> bool:
    host, _, port = address.split(";")[0].rpartition(":")
    with suppress(OSError, ValueError), socket.create_connection((host.strip("[]"), int(port)), timeout=5.0):
        return True
    return False


# --- the run directory -----------------------------------------------------------------------------------------------


class RunFolder:
    """Run directory of a training run without dist-gpt launch. Only rank 0 may call its methods, except `restart`.

    It is made once all ranks have met and have their data, and is locked from then on: a start that fails earlier
    leaves nothing behind, and a second run in the folder is refused. The lock lasts as long as `held` is open.
    """

    def __init__(
        self, config: Config, resolve: Callable[[bool], Resume], resumes: bool, restarted: bool, held: ExitStack
    ) -> None:
        """Prepare without writing. `resumes`: --resume is given; `restarted`: torchrun has restarted the ranks.

        `resolve(restarted)` returns what --resume means.
        """
        self._config, self._resolve, self._resumes, self._restarted = config, resolve, resumes, restarted
        self._held, self._path = held, Path(str(config.run_dir))
        self._plan: dict[str, Any] = {}
        self._made = False

    def restart(self) -> None:
        """Note that torchrun has restarted its ranks, which the agent of this node may not have counted."""
        self._restarted = True

    def check(self) -> None:
        """Raise ConfigError if the run directory cannot be made or continued; change nothing."""
        if self._resumes or self._restarted:  # then another run may be using it
            self._look()
        if not self._resolve(self._restarted).goes_on:
            run.refuse_existing(self._config)
        self._plan = api.plan_document(self._config, 0)

    def make(self, about_data: str) -> None:
        """Make the run directory or take over the existing one, and lock it. Raise ConfigError if it is in use."""
        print(f"data: {about_data}", flush=True)
        if self._restarted:
            self._look()
        there, asked = os.path.lexists(self._path), self._resolve(self._restarted)
        run.make_run_dir(self._config, asked.goes_on)
        try:
            self._held.enter_context(lock.hold(self._path))
        except ConfigError:
            if not there:
                with suppress(OSError):  # not empty: another run was faster and uses it
                    self._path.rmdir()
            raise
        self._made = not there
        try:
            run.fill_run_dir(self._config, self._plan, self._resolve(self._restarted) if there else asked)
        except BaseException:
            self.discard()
            raise
        print(f"run directory {self._path}, logs in {self._path / 'logs'}", flush=True)

    def discard(self) -> None:
        """Remove the run directory if this start made it; rename it first, so the next start finds all or nothing."""
        if self._made:
            self._made = False
            aside = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
            with suppress(OSError):
                self._path.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)

    def _look(self) -> None:
        """Raise ConfigError if another training run holds the folder.

        torchrun may have moved rank 0 to another host; then wait until the lock of its former process is stale.
        """
        until = time.monotonic() + (lock.STALE_S + lock.TOUCH_S if self._restarted else 0.0)
        while True:
            try:
                return lock.look(self._path)
            except ConfigError:
                if time.monotonic() > until:
                    raise
            time.sleep(1.0)
