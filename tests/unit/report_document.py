"""Documents as the analysis makes them, for the tests of the page and the texts: made up, but in harmony with itself.

full()   8 ranks, dp 2 x tp 2 x pp 2; rank 5 computes slowly and its tensor-parallel partner waits for it
large()  1,024 ranks on 128 hosts: grouped traffic, a heat map of 1,024 x 20
poor()   a run without a profiling window: nearly every section is null or empty
"""

from __future__ import annotations

import random

from dist_gpt.layout import Layout
from tests.unit import report_parts as parts
from tests.unit.report_parts import Document


def full() -> Document:
    """8 ranks of the demo."""
    layout, noise = Layout(pp=2, dp=2, tp=2), random.Random(7)
    budgets = [parts.budget(rank, layout, noise) for rank in range(8)]
    return {
        **parts.head("demo", layout, ["n1"], noise),
        **parts.costs(budgets),
        **parts.traffic(layout),
        "timeline": {"step": 12, "ranks": [parts.timeline(rank, layout) for rank in range(8)]},
        "stragglers": parts.stragglers(list(range(8)), list(range(10, 21)), noise),
        "pipeline": parts.pipeline("1f1b", 2, 1, 4),
        "memory_bytes": [parts.memory(rank, layout) for rank in range(8)],
        **parts.tail(),
    }


def large() -> Document:
    """1,024 ranks; what is per rank is there for all of them."""
    layout, noise = Layout(pp=8, dp=16, tp=8), random.Random(11)
    ranks = list(range(1024))
    budgets = [parts.budget(rank, layout, noise) for rank in ranks]
    document = {
        **parts.head("study-1024", layout, [f"node{i:03d}" for i in range(128)], noise),
        **parts.costs(budgets),
        **parts.traffic(layout),
        "timeline": {"step": 12, "ranks": [parts.timeline(rank, layout, 8) for rank in ranks[:1024:64]]},
        "stragglers": parts.stragglers(ranks, list(range(10, 30)), noise),
        "pipeline": parts.pipeline("interleaved", 8, 2, 16),
        "memory_bytes": [parts.memory(rank, layout) for rank in ranks],
        **parts.tail(),
    }
    grouped = [f"{i * 16}–{i * 16 + 15}" for i in range(64)]
    near = [[3.1e9 / (1 + abs(i - j)) if abs(i - j) in (0, 1, 8) else 0.0 for j in range(64)] for i in range(64)]
    document["traffic"] = {"ranks": grouped, "wire_bytes": near, "grouped": True}
    return document


def poor() -> Document:
    """No window, one rank's file missing: what the always-on counters give, and nothing else."""
    document: Document = dict.fromkeys(full())
    lists = ("budget_by_rank", "waterfall", "collectives", "sizes", "free", "memory_bytes", "predicted", "definitions",
             "torch_kernels", "device_samples")  # fmt: skip
    document |= {key: [] for key in lists}
    return document | {
        "schema": 1,
        "name": "poor",
        "run_dir": "runs/poor",
        "generated": "2026-11-24T10:00:00Z",
        "verdict": {"line": "no profiling window: what bound the step is not known", "why": None, "next": None,
                    "bound_by": None, "share": None, "wait_share": None, "culprit": None, "profiling": None},
        "problems": ["the file of rank 3 is missing: events.rank3.jsonl"],
        "identity": {"world": 4, "layout": {"pp": 1, "dp": 4, "cp": 1, "tp": 1}, "changed": [], "ranks": [],
                     "versions": {}, "environment": {}, "backend": None, "single_copy": False,
                     "clocks": [], "attempts": 1, "window": None,
                     "steps_profiled": 0, "steps_total": 40},
        "headline": {"step_s_p50": 0.2, "step_s_p95": None, "tokens_per_s": 1e4, "mfu": None, "peak": None},
        "files": [],
    }  # fmt: skip


def hostile(name: str) -> Document:
    """The full document with `name` wherever a configuration, a path or a host can bring text in."""
    document = full()
    document |= {"name": name, "run_dir": f"runs/{name}", "problems": [name], "files": [name]}
    identity = document["identity"]
    identity["changed"].append({"key": name, "value": name, "default": name})
    identity["ranks"] = [row | {"host": name, "device": name} for row in identity["ranks"]]
    identity["versions"][name] = identity["environment"][name] = name
    document["verdict"] |= {"line": name, "why": name, "next": name}
    for key in ("axis", "op"):
        document["collectives"][0][key] = name
    document["sizes"][0]["axis"] = document["free"][0]["axis"] = document["overlap"]["axes"][0]["axis"] = name
    document["overlap"]["buckets"][0]["under"] = document["pipeline"]["advice"] = name
    document["timeline"]["ranks"][0]["lanes"][1]["lane"] = name
    document["timeline"]["ranks"][0]["lanes"][0]["spans"][0][3] = name
    document["timeline"]["ranks"][0]["lanes"][0]["spans"][1][2] = name
    document["pipeline"]["measured"][0][0][2] = document["waterfall"][1]["what"] = name
    document["budget_s"][name] = document["budget_by_rank"][0][name] = 0.01
    document["traffic"]["ranks"][0] = document["stragglers"]["ranks"][0] = name
    document["predicted"][0]["what"] = document["roofline"]["kernels"][0]["name"] = name
    document["critical_path"]["parts"][0]["what"] = document["torch_kernels"][0]["name"] = name
    document["accounting"] |= {"exact": False, "lines": [name]}
    document["definitions"] = [[name, name]]
    return document


def comparison() -> Document:
    """The same configuration again, one setting apart."""
    return {
        "other": {"name": "demo-zero3", "run_dir": "runs/demo-zero3"},
        "rows": [
            {"what": "step time p50", "unit": "s", "this": 0.3391, "other": 0.3377, "change": 0.004, "noise": 0.02,
             "verdict": "same"},
            {"what": "tokens per second", "unit": "tokens/s", "this": 6039.0, "other": 6064.0, "change": -0.004,
             "noise": 0.02, "verdict": "same"},
            {"what": "data exposed", "unit": "s", "this": 0.0061, "other": 0.0187, "change": -0.67, "noise": 0.1,
             "verdict": "better"},
            {"what": "peak memory", "unit": "B", "this": 41.2e6, "other": 30.8e6, "change": 0.34, "noise": 0.0,
             "verdict": "worse"},
            {"what": "MFU", "unit": "share", "this": 0.41, "other": None, "change": None, "noise": None,
             "verdict": "unknown"},
        ],
        "verdict": "same speed within the noise; 34 % more memory",
        "config_changes": [{"key": "optim.sharding", "this": "zero1", "other": "zero3"}],
    }  # fmt: skip
