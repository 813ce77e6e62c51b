"""The one exception of the configuration: a list of problems, each a sentence with the change to make."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(Exception):
    """Error of a configuration that cannot run. `problems` holds every reason found, one plain line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__(*self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        lines = [f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1)]
        return "\n".join([f"{len(self.problems)} problems:", *lines])
