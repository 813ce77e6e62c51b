"""One process of the pool: takes cells as JSON lines on standard input, answers on standard output.

Importing torch takes seconds, so the processes live as long as the test session and every cell gets a fresh scope of
the store and fresh groups.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch

from dist_gpt.comm.mesh import GlooBackends
from dist_gpt.comm.rendezvous import connect_store, rank_env, scoped
from dist_gpt.config.load import load
from dist_gpt.verify import certify
from tests.ranks.plants import planted

TIMEOUT_S = 20.0


def main() -> None:
    torch.set_num_threads(1)
    env = rank_env(600.0)
    store = connect_store(env)
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        cell = json.loads(line)
        try:
            config = load(cell["config"], world=cell["world"])
            scope = scoped(store, cell["id"])
            scope.set_timeout(_seconds(TIMEOUT_S * 3))
            with planted(cell.get("plant"), env.rank):
                result = certify(
                    config, env.rank, scope, lambda s: GlooBackends(s, "127.0.0.1", TIMEOUT_S), Path(cell["folder"])
                )
            answer = {"result": result}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def _seconds(seconds: float):  # type: ignore[no-untyped-def]
    from datetime import timedelta

    return timedelta(seconds=seconds)


if __name__ == "__main__":
    main()
