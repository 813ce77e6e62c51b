"""Expand lists as Slurm shortens them: nodes `n[1-3,07-09],gpu-a[1-2]-x3` and tasks per node `4(x2),3`."""

from __future__ import annotations

import re
from itertools import product

from dist_gpt.config.errors import ConfigError

MOST = 100_000
"""Most entries of a list; a longer one is a mistake and would fill the memory."""


def expand(text: str) -> list[str]:
    """Return the names in a node list, in its order. Raise ConfigError if it is not one."""
    names: list[str] = []
    for item in _split(text, text):
        parts = re.split(r"\[([^\[\]]*)\]", item)
        if any(c in part for part in parts[::2] for c in "[]") or not item:
            raise _no_list(text)
        choices = [[part] if i % 2 == 0 else _ranges(part, text) for i, part in enumerate(parts)]
        for chosen in product(*choices):
            names.append("".join(chosen))
            if len(names) > MOST:
                raise _no_list(text)
    return names


def counts(text: str) -> list[int]:
    """Return the number of tasks of each node from `4(x2),3`. Raise ConfigError if it is not such a list."""
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", item.strip(), re.ASCII)
        if match is None or len(found) + int(match[2] or 1) > MOST:
            raise ConfigError([f"{text!r} is not a Slurm list of tasks per node, for example 4(x2),3"])
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _split(item: str, whole: str) -> list[str]:
    """Split a node list at the commas outside brackets; `whole` is the text for errors."""
    parts, depth = [""], 0
    for c in item:
        depth += (c == "[") - (c == "]")
        if depth not in (0, 1) or c.isspace():
            raise _no_list(whole)
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    if depth:
        raise _no_list(whole)
    return parts


def _ranges(text: str, whole: str) -> list[str]:
    """Expand `1-3,07-09` to 1 2 3 07 08 09: numbers keep the width of the first one."""
    found: list[str] = []
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", item, re.ASCII)
        if match is None:
            raise _no_list(whole)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MOST:
            raise _no_list(whole)
        found += [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
    return found


def _no_list(text: str) -> ConfigError:
    shown = text if len(text) <= 200 else text[:200] + "..."
    return ConfigError([f"{shown!r} is not a Slurm node list, for example n[1-3,07-09],gpu-a1"])
