"""The processes of the pool: each takes cells as JSON lines from a pipe and answers on another.

Importing torch takes seconds, so it is imported once, by the process that forks the ranks; they live as long as the
test session, and every cell gets a fresh scope of the store and fresh groups. No thread may start before the fork:
nothing is computed here, only imported.

    python -m tests.ranks.worker STORE_FD IN,OUT IN,OUT ...
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what the dry run would import at its first use

import tests.ranks.plants_sharding  # noqa: F401  its plants are listed
from dist_gpt.comm.mesh import GlooBackends
from dist_gpt.comm.rendezvous import Store, connect_store, rank_env, scoped
from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.plan.steps import RankPlan, layout_of
from dist_gpt.protocol import STORE_FD
from dist_gpt.schedule.action import parse_grid
from dist_gpt.schedule.check import check
from dist_gpt.schedule.expand import Step
from dist_gpt.schedule.lower import add_communication, add_reduce_and_step
from dist_gpt.schedule.orders import placement
from dist_gpt.verify import certify
from tests.ranks.plants import planted

TIMEOUT_S = 20.0


def main(arguments: list[str]) -> None:
    """Fork one process per pair of pipe ends and wait for them all."""
    store_fd, *pipes = arguments
    ends = [tuple(map(int, pair.split(","))) for pair in pipes]
    torch.set_num_threads(1)
    children = []
    for rank, (reading, writing) in enumerate(ends):
        child = os.fork()
        if child == 0:
            for other in ends[:rank] + ends[rank + 1 :]:  # else a rank would not see the end of its own pipe
                for fd in other:
                    os.close(fd)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), **({STORE_FD: store_fd} if rank == 0 else {}))
            serve(reading, writing)
            os._exit(0)
        children.append(child)
    for fd in [int(store_fd), *(fd for pair in ends for fd in pair)]:
        os.close(fd)
    for child in children:
        os.waitpid(child, 0)


def serve(reading: int, writing: int) -> None:
    """Answer cells until the pipe ends."""
    env = rank_env(600.0)
    store = connect_store(env)
    with os.fdopen(reading) as cells, os.fdopen(writing, "w") as answers:
        for line in cells:
            try:
                answer = run_cell(json.loads(line), env.rank, store)
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


def run_cell(cell: dict[str, Any], rank: int, store: Store) -> dict[str, Any]:
    """The certificate of one cell, with its planted bug and its hand-written orders if it has any."""
    config = load(cell["config"], world=cell["world"])
    scope = scoped(store, cell["id"])
    scope.set_timeout(timedelta(seconds=TIMEOUT_S * 3))
    with hand_written(cell["grid"], config), planted(cell["plant"]) as hits:
        reads = config.launch.reads_memory
        backends = lambda s: GlooBackends(s, "127.0.0.1", TIMEOUT_S, single_copy=reads)  # noqa: E731
        result = certify(config, rank, scope, backends, Path(cell["folder"]), runs_dry(cell, config, rank))
    return {"result": result, "hits": len(hits)}


def runs_dry(cell: dict[str, Any], config: Config, rank: int) -> bool:
    """Return whether `rank` also makes a dry run, which takes as long as everything else.

    Copies of the data axis have the same step lists, and those of the tensor axis differ in how they are cut alone, the
    first from the last: outside of `make test-all` the pipeline of one copy does it for all of them, in every cell
    another one. A planted bug may be on any rank.
    """
    if cell["dry_everywhere"] or cell["plant"] is not None:
        return True
    layout = layout_of(config)
    copy, last = cell["number"] % layout.dp, cell["number"] // layout.dp % 2
    cut = last * (layout.tp - 1)
    return (layout.coords(rank).dp, layout.coords(rank).tp) == (copy, cut)


@contextmanager
def hand_written(grid: str | None, config: Config) -> Iterator[None]:
    """Run `grid` (compute actions, one line per pipeline rank) in place of the configured schedule's orders.

    It is lowered and checked as a schedule's own orders are. Plans with another pp, as of the one process it is
    compared with, keep theirs.
    """
    if grid is None:
        yield
        return
    p = config.parallel
    holders = placement(p.schedule, p.pp, p.virtual_stages)
    orders = add_reduce_and_step(add_communication(parse_grid(grid), holders))
    check(orders, holders, config.micro_batches)
    original = RankPlan.__dict__["steps"]

    def steps(plan: RankPlan) -> list[Step]:
        if plan.config.parallel.pp != p.pp:
            return original.func(plan)
        return plan.expand(orders)

    replacement = cached_property(steps)
    replacement.__set_name__(RankPlan, "steps")
    RankPlan.steps = replacement  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        RankPlan.steps = original  # type: ignore[method-assign]


if __name__ == "__main__":
    main(sys.argv[1:])
