"""Shapes of the objects in an event file, and a check of values against them. A value that fits needs no other check.

A shape is a type (`float` means any finite number), `Each(shape)` (an object with any keys), `[shape]` (a list),
`(shape, shape)` (a list of that length), or a dict from keys to shapes. A key that ends in `?` may be missing or null;
keys that are not in the dict are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LIMIT = 1 << 60
"""Integers must be smaller in size, so that sums of a few of them fit into int64."""


@dataclass(frozen=True)
class Each:
    """Shape of an object with any keys and values of one shape."""

    shape: Any


_COMM = Each(Each({"calls": int, "payload_bytes": int, "wire_bytes": int}))
HEADER = {
    "schema": int, "rank": int, "attempt": int, "base_ns": int,
    "channels": [{"axis": str, "ranks?": [int], "direction?": str}],
    "coords?": Each(int), "world?": int, "host?": str, "pid?": int, "device?": str, "backend?": str, "unix_s?": float,
    "start_s?": float, "cores?": int, "threads?": int, "versions?": dict, "environment?": dict, "window?": (int, int),
}  # fmt: skip
FACTS: dict[str, Any] = {
    "clock": {"at_ns": int, "offset_ns": int, "error_ns": int},
    "memory": {"step?": int, "parts": Each(int), "peak_bytes?": int, "source?": str, "rss_bytes?": int},
    "kernel": {"name": str, "shape": [int], "batch": int, "flops": int, "bytes": int, "seconds": float},
    "ceiling": {"flops_per_s": float, "bytes_per_s": float, "dtype": str},
    "sample": {"at_ns": int, "sm_clock_hz?": float, "power_w?": float, "temperature_c?": float},
    "torch_trace": {"file": str, "anchors": [(int, int)]},
    "difference": {
        "step?": int, "phase": str, "action": str, "axis": str, "op": str, "payload_bytes": int, "calls": int,
    },
    "engine": {"name": str, "version": str, "steps": int, "traffic": Each(_COMM)},
    "end": {"differences": [str], "dropped": int, "record_ns": float, "records_per_step": float, "wall_s": float},
}  # fmt: skip
"""Key of a fact -> the shape of its value."""
STEP = {
    "step": int, "phase": str, "step_s": float, "start_ns?": int, "comm": _COMM, "blocked_s?": Each(float),
    "data_s?": float, "between_cpu_s?": float,
}  # fmt: skip


def fits(value: Any, shape: Any) -> bool:
    """Return whether `value`, as parsed from JSON, has `shape`."""
    if isinstance(shape, Each):
        return isinstance(value, dict) and all(fits(inner, shape.shape) for inner in value.values())
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(inner, shape[0]) for inner in value)
    if isinstance(shape, tuple):
        return isinstance(value, list) and len(value) == len(shape) and all(map(fits, value, shape))
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_has(value, key, inner) for key, inner in shape.items())
    if shape is int:
        return type(value) is int and abs(value) < _LIMIT
    if shape is float:
        return type(value) in (int, float) and abs(value) < 1e30
    return isinstance(value, shape)


def _has(value: dict[str, Any], key: str, shape: Any) -> bool:
    if key.endswith("?"):
        found = value.get(key[:-1])
        return found is None or fits(found, shape)
    return key in value and fits(value[key], shape)


def complete(value: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """Add to `value`, in place, the keys of `shape` that it lacks, {} for objects and else None; return it."""
    for key, inner in shape.items():
        name = key.removesuffix("?")
        if value.get(name) is None:
            value[name] = {} if inner is dict else None
    return value
