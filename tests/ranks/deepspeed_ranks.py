"""What each rank of `test_deepspeed` runs: the same training by both engines, cell after cell.

    python -m tests.ranks.deepspeed_ranks CONFIG CELLS.json OUT.json

CELLS.json: [[KEY=VALUE, ...], ...]. Rank 0 writes [{native, deepspeed}, ...] to OUT.json, each {losses, norms,
evaluations, differences, traffic, listening}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from dist_gpt.comm.rendezvous import RankEnv, Store, connect_store, rank_env, scoped
from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.replica import make_rank
from dist_gpt.verify import verify_samples

BATCHES = 4
"""Different ones: they come again, so that there is something to learn."""


def train(config: Config, env: RankEnv, store: Store) -> dict[str, Any]:
    """Train `config` and tell what was seen."""
    rank = make_rank(config, env, store, torch.device("cpu"))
    try:
        rank.initialise()
        held_out = verify_samples(config, BATCHES)
        evaluations = [rank.evaluate([held_out]).item()]
        losses, norms = [], []
        for step in range(config.train.steps):
            rank.train_step(step, verify_samples(config, step % BATCHES))
            loss, norm = rank.optimizer.statistics.tolist()
            losses.append(loss)
            norms.append(norm)
        evaluations.append(rank.evaluate([held_out]).item())
        return {
            "losses": losses, "norms": norms, "evaluations": evaluations,
            "differences": rank.mesh.ledger.differences, "engine": rank.engine_facts(),
            "listening": sorted({c.laddr.ip for c in psutil.Process().net_connections(kind="inet")
                                 if c.status == psutil.CONN_LISTEN}),
        }  # fmt: skip
    finally:
        rank.close()


def main(path: str, cells: str, out: str) -> None:
    torch.set_num_threads(1)
    env = rank_env(100.0)
    store = connect_store(env)
    found = []
    for number, sets in enumerate(json.loads(Path(cells).read_text())):
        cell = {}
        for engine in ("native", "deepspeed"):
            config = load(path, [*sets, f"optim.engine={engine}"], world=env.world)
            cell[engine] = train(config, env, scoped(store, f"{number}.{engine}"))
        found.append(cell)
    if env.rank == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
