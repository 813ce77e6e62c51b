"""What each rank of `test_deepspeed_memory` runs: a few steps under DeepSpeed, every tensor's storage followed.

    python -m tests.ranks.deepspeed_memory CONFIG CELLS.json OUT.json

CELLS.json: [[KEY=VALUE, ...], ...]. Rank R writes [{rest, peak, where, plan}, ...] to OUT.json.R: bytes of the storages
that live between two steps and at the fullest moment of a step, the operation at which that was, and what the plan
counts for this rank.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_gpt.comm.rendezvous import RankEnv, Store, connect_store, rank_env, scoped
from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.plan.api import plan_document
from dist_gpt.replica import make_rank
from dist_gpt.verify import verify_samples

FIRST, MOST = 2, 12
"""The first step makes the optimizer's state, the second completes DeepSpeed's trace of modules. From then on steps are
measured until the lowest peak has been seen twice: gloo's thread may hold what a collective read a little longer."""


class LiveBytes(TorchDispatchMode):
    """Track the storage of every tensor that an operation returns, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.where = ""
        self.followed: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        if self.live > self.peak:
            self.peak, self.where = self.live, str(func)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.followed or storage.device.type == "meta":
            return
        self.followed.add(key)
        self.live += size
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.followed.discard(key)
        self.live -= size

    def again(self) -> None:
        """Look for the peak from here on."""
        self.peak = self.live


def all_agree(rank: Any, yes: bool) -> bool:
    """Return whether every rank says `yes`."""
    votes = torch.tensor(float(yes))
    rank.mesh.world.all_reduce(votes).wait()
    return votes.item() == rank.mesh.world.size


def measure(config: Config, env: RankEnv, store: Store) -> dict[str, Any]:
    """Return what one rank holds in a step.

    Python's collector runs before each step only: which reference cycles it has freed by the fullest moment would
    otherwise depend on what the process allocated before.
    """
    gc.disable()
    peaks: list[int] = []
    with LiveBytes() as held:
        rank = make_rank(config, env, store, torch.device("cpu"))
        try:
            rank.initialise()
            for step in range(MOST):
                gc.collect()
                held.again()
                rest = held.live
                rank.train_step(step, verify_samples(config, step))
                if step >= FIRST:
                    peaks.append(held.peak)
                if all_agree(rank, len(peaks) > 1 and peaks.count(min(peaks)) > 1):
                    break
        finally:
            rank.close()
    plan = plan_document(config, env.rank)["rank_memory_bytes"]
    return {"rest": rest, "peak": min(peaks), "where": held.where, "plan": plan}


def main(path: str, cells: str, out: str) -> None:
    torch.set_num_threads(1)
    env = rank_env(100.0)
    store = connect_store(env)
    found = [
        measure(load(path, sets, world=env.world), env, scoped(store, str(number)))
        for number, sets in enumerate(json.loads(Path(cells).read_text()))
    ]
    Path(f"{out}.{env.rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
