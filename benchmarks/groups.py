"""`groups`: measure how long rank 0 of 3,072 takes to create its groups, on torch's fake process group."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from benchmarks.result import Result, Row
from benchmarks.settings import Settings
from dist_gpt.layout import Layout
from dist_gpt.schedule.orders import placement

NAME = "groups"
TARGET_S = 1.0
RUNS = 5
LAYOUT = Layout(pp=12, dp=32, cp=1, tp=8)


def run(settings: Settings, say: Callable[[str], None]) -> Result:
    """Create the groups several times. The first creation, which includes imports, is held to the target."""
    from dist_gpt.comm.mesh import FakeBackends, build_mesh

    holders = placement("1f1b", LAYOUT.pp, 1)
    times, count = [], 0
    for _ in range(settings.pairs or RUNS):
        started = time.perf_counter()
        mesh = build_mesh(LAYOUT, 0, holders, FakeBackends())
        times.append(time.perf_counter() - started)
        count = sum(group.backend is not None for group in [*mesh.groups.values(), *mesh.edges.values()])
        mesh.close()
    say(f"{count} groups: {times[0]:.4f} s")
    what = f"groups of rank 0 of {LAYOUT.world:,} (pp {LAYOUT.pp} x dp {LAYOUT.dp} x tp {LAYOUT.tp}), fake backend"
    rows = [
        Row("groups created", count),
        Row("first creation", times[0], "s", target=TARGET_S, at_least=False),
        Row("median", statistics.median(times), "s"),
    ]
    return Result(NAME, what, settings.document(), rows, {"times_s": times})
