"""Describe a job for any launcher: the command and environment of a rank, the number of ranks, the place of their logs.

spec = JobSpec(argv=train_argv("runs/demo/config.yaml"), ranks=8, log_dir=Path("runs/demo/logs"))
spec.rank_env(rank=3, master_addr="127.0.0.1", master_port=29500)     # torchrun's variables for rank 3
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dist_gpt.layout import Layout
from dist_gpt.protocol import ERROR_FILE

WORKER = ("-m", "launch.rank.worker")
"""Beginning of a rank's command, after the interpreter."""


def train_argv(config_path: str | Path, *more: str) -> tuple[str, ...]:
    """Return the command that every rank of a training job runs."""
    return (sys.executable, *WORKER, "dist_gpt", "train", str(config_path), *more)


@dataclass(frozen=True)
class JobSpec:
    """Job as plain data."""

    argv: tuple[str, ...]
    """Command of one rank, the same for all."""
    ranks: int
    """World size."""
    log_dir: Path
    """Folder of rank{r}.log, appended to."""
    nodes: int = 1
    """Number of nodes; ranks are spread evenly, in order."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables added to the launcher's own environment, the same for all ranks."""
    layout: Layout | None = None
    """Coordinates of ranks, for messages."""
    live_on_stderr: bool = False
    """Show rank 0's output on stderr; stdout is then free for one JSON document."""
    name: str = "dist_gpt"
    """Name of the job, in queues and messages."""
    saves: bool = False
    """Ranks save and exit with code 75 when they are asked to stop (a training job does)."""
    watched: bool = False
    """Ranks are dist_gpt's: they say hello to the watch, pass preflight before they start, and send heartbeats."""
    interface: str | None = None
    """Key of the section `launch`, as the five fields below."""
    silence_s: float = 30.0
    timeout_s: float = 300.0
    grace_s: float = 120.0
    max_restarts: int = 0
    preflight: str = "off"
    """strict, warn or off."""
    check: bool = False
    """The ranks only run checks and do not train."""
    preload: tuple[str, ...] = ()
    """Modules that every rank will import; a process that forks the ranks of a machine imports them before."""

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks per node."""
        return self.ranks // self.nodes

    def log_path(self, rank: int) -> Path:
        """Return the path of the log with standard output and error of `rank`."""
        return self.log_dir / f"rank{rank}.log"

    def error_path(self, rank: int) -> Path:
        """Return the path of the error file of `rank`; see ERROR_FILE."""
        return self.log_dir / f"rank{rank}.error.json"

    def rank_name(self, rank: int) -> str:
        """Return `rank 3 (pp 0, dp 1, cp 0, tp 1)`."""
        return f"rank {rank} ({self.layout.coords(rank)})" if self.layout is not None else f"rank {rank}"

    def rank_env(self, rank: int, master_addr: str, master_port: int) -> dict[str, str]:
        """Return the variables that torchrun sets for `rank`, and ours.

        Names as in docs.pytorch.org/docs/stable/elastic/run.html#environment-variables.
        """
        node, local = divmod(rank, self.ranks_per_node)
        return {
            **self.env,
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "GROUP_RANK": str(node),
            "MASTER_ADDR": master_addr,
            "MASTER_PORT": str(master_port),
            ERROR_FILE: str(self.error_path(rank)),
        }
