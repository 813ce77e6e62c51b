"""Interface between the supervisor and the ways to start ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from dist_gpt.config.errors import ConfigError


class NotStartedError(ConfigError):
    """Failure before anything was submitted or started, for sure: what was made for it may be removed."""


@dataclass(frozen=True)
class Failure:
    """Rank that its starter saw fail."""

    rank: int
    code: int
    how: str
    """`exit code 3` or `killed by SIGKILL`."""
    at: float
    """Time of the failure, in seconds since 1970."""


class Starter(Protocol):
    """Way to start all ranks of an attempt and to end them."""

    wake: SimpleQueue[object]
    """Anything put here wakes the supervisor: a rank has ended, a signal came."""
    live: bool
    """True if it shows rank 0's output itself."""

    def start(self, env: Mapping[str, str]) -> None:
        """Start the ranks with `env` added to their environment."""

    def running(self) -> bool:
        """Return whether anything that was started still runs."""

    def failures(self) -> list[Failure]:
        """Return the ranks known to have failed, in order; empty if only the end of the whole is known."""

    def code(self) -> int:
        """Return the exit code of the whole once nothing runs; 0 if all went well."""

    def where(self) -> str:
        """Return the path of its own output, for messages; empty if it has none."""

    def end(self, hurried: Callable[[], bool] = lambda: False) -> None:
        """End all that runs, if anything, on all nodes; return when it is gone. Wait no longer once `hurried()`."""
