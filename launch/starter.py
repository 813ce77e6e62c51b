"""What a way of starting ranks has to offer the supervisor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from dist_gpt.config.errors import ConfigError


class NotStartedError(ConfigError):
    """Nothing was submitted or started, for sure: what was made for it may be removed."""


@dataclass(frozen=True)
class Failure:
    """A rank that its starter saw fail."""

    rank: int
    code: int
    how: str
    """`exit code 3` or `killed by SIGKILL`."""
    at: float
    """When, in seconds since 1970."""


class Starter(Protocol):
    """Starts all ranks of an attempt, and ends them."""

    wake: SimpleQueue[object]
    """Anything put here wakes the supervisor: a rank has ended, a signal came."""
    live: bool
    """Whether it shows rank 0's output itself."""

    def start(self, env: Mapping[str, str]) -> None:
        """Start them with `env` added to their environment."""

    def running(self) -> bool:
        """Whether any of it still runs."""

    def failures(self) -> list[Failure]:
        """Ranks that are known to have failed, in the order of their ranks; empty where only the whole is known."""

    def code(self) -> int:
        """Exit code of the whole, once nothing runs: 0 when all went well."""

    def where(self) -> str:
        """Where its own words are to be found, for messages; empty where it has none."""

    def end(self, hurried: Callable[[], bool] = lambda: False) -> None:
        """End whatever runs, on all nodes; returns when it is gone. Nothing happens when nothing runs. When `hurried`
        says so, nothing is waited for any longer."""
