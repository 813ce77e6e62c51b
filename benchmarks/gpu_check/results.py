"""Write the results of the sections: results.json and results.md. Standard library only."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
PASSED, FAILED, ERROR, TIMEOUT, SKIPPED = "passed", "failed", "error", "timeout", "skipped"
BAD = (FAILED, ERROR, TIMEOUT)
SHOWN = 40
"""Number of a section's figures in the table; results.json has all."""


@dataclass
class Outcome:
    """Outcome of a section. `failed`: the failed checks; `error`: why it did not finish or was skipped."""

    name: str
    status: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    error: str = ""


def commit_of(root: Path) -> str | None:
    """Return the git commit of `root`; None if git cannot tell."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def document(head: dict[str, Any], outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the content of results.json."""
    return {
        "schema": SCHEMA,
        **head,
        "passed": all(outcome.status not in BAD for outcome in outcomes),
        "sections": [asdict(outcome) for outcome in outcomes],
    }


def write(folder: Path, head: dict[str, Any], outcomes: list[Outcome]) -> None:
    """Write results.json and results.md, replacing each atomically."""
    text = {"results.json": json.dumps(document(head, outcomes), indent=1) + "\n", "results.md": table(head, outcomes)}
    for name, content in text.items():
        aside = folder / f"{name}.part"
        aside.write_text(content)
        aside.replace(folder / name)


def table(head: dict[str, Any], outcomes: list[Outcome]) -> str:
    """Return the content of results.md."""
    lines = ["# GPU check", "", *(f"- {key}: {value}" for key, value in head.items() if value), ""]
    lines += ["| section | status | seconds | |", "|---|---|---|---|"]
    for outcome in outcomes:
        why = "; ".join(outcome.failed) or outcome.error.strip().rpartition("\n")[2]
        lines.append(f"| {outcome.name} | {outcome.status} | {outcome.seconds:.1f} | {_cell(why)} |")
    for outcome in outcomes:
        rows = list(flat(outcome.figures))
        if rows:
            lines += ["", f"## {outcome.name}", "", "| figure | value |", "|---|---|"]
            lines += [f"| {_cell(key)} | {_cell(_shown(value))} |" for key, value in rows[:SHOWN]]
        if len(rows) > SHOWN:
            lines.append(f"| ... | {len(rows) - SHOWN} more in results.json |")
    return "\n".join(lines) + "\n"


def flat(tree: Any, path: str = "") -> Any:
    """Yield (dotted key, value) of every leaf."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and tree and isinstance(tree[0], (dict, list)):
        for index, value in enumerate(tree):
            yield from flat(value, f"{path}.{index}")
    else:
        yield path, tree


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:300]
