"""Identity of a run: its configuration against the defaults, the mesh on its hosts, versions, clocks, files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dist_gpt.config import yaml_io
from dist_gpt.config.schema import Config
from dist_gpt.events import TRAIN
from dist_gpt.report.analysis.clocks import Clocks
from dist_gpt.report.read.load import RankLog, Run


def flat(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of a configuration."""
    found: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {f"{prefix}{name}": value}
    return found


def defaults(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: default} of a configuration; PydanticUndefined where a value is required."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= defaults(kind, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field.default
    return found


def identity(run: Run, clocks: Clocks, steps: list[int]) -> dict[str, Any]:
    """Return the `identity` section of a report."""
    usual = defaults()
    changed = [
        {"key": key, "value": _text(value), "default": _text(usual[key])}
        for key, value in flat(run.config).items()
        if value != usual[key]
    ]
    first = next(iter(run.ranks.values())).header
    ranks = []
    for rank in range(run.layout.world):
        header = run.ranks[rank].header if rank in run.ranks else {}
        host, device, pid = (header.get(name) for name in ("host", "device", "pid"))
        ranks.append({"rank": rank, **asdict(run.layout.coords(rank)), "host": host, "device": device, "pid": pid})
    return {
        "world": run.layout.world,
        "layout": asdict(run.layout),
        "changed": changed,
        "ranks": ranks,
        "versions": first.get("versions") or {},
        "environment": first.get("environment") or {},
        "backend": first.get("backend"),
        "single_copy": bool(first.get("single_copy")),
        "clocks": clocks.table,
        "attempts": max(log.attempts for log in run.ranks.values()),
        "window": first.get("window"),
        "steps_profiled": len(steps),
        "steps_total": max(map(_trained, run.ranks.values()), default=0),
    }


def _text(value: Any) -> str:
    if value is PydanticUndefined:
        return "(required)"
    return "auto" if value is None else str(value)


def accounting(run: Run) -> dict[str, Any]:
    """Return the `accounting` section of a report: calls that ranks issued but had not declared, or the reverse."""
    found = [{"rank": rank, **row} for rank, log in run.ranks.items() for row in log.differences]
    lines = [f"rank {rank}: {line}" for rank, log in run.ranks.items() if log.end for line in log.end["differences"]]
    ended = all(log.end is not None for log in run.ranks.values()) and len(run.ranks) == run.layout.world
    return {"exact": not lines and not found if ended else None, "differences": found, "lines": lines[:50]}


def files(run: Run) -> list[str]:
    """Return the names and sizes of the run directory's own files, the first 40 of them."""
    found = []
    for path in sorted(run.folder.iterdir()):
        if path.is_file() and not path.name.startswith("report."):
            found.append(f"{path.name} ({path.stat().st_size / 1000:.0f} kB)")
    return found if len(found) <= 40 else [*found[:40], f"... and {len(found) - 40} more"]


def definitions() -> list[list[str]]:
    """Return the [word, meaning] pairs of the appendix."""
    words, _ = yaml_io.read(Path(__file__).with_name("definitions.yaml"))
    return [[str(word), str(meaning)] for word, meaning in words.items()]


def _trained(log: RankLog) -> int:
    """Return the number of training steps in the last attempt; their numbering continues where it resumed."""
    return len({fact["step"] for fact in log.steps if fact["phase"] == TRAIN})
