"""Training in threads as ranks, with checkpoints, stopped and resumed: what a process does, without starting one."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_gpt.checkpoint.state import tensors_of
from dist_gpt.checkpoint.store import Checkpoints
from dist_gpt.comm.mesh import Backends
from dist_gpt.comm.rendezvous import RankEnv
from dist_gpt.config.load import resolve
from dist_gpt.config.problems import problems
from dist_gpt.config.schema import Config
from dist_gpt.data.loader import Batches
from dist_gpt.data.tokens import prepare
from dist_gpt.profile.recorder import Recorder, attempts_in
from dist_gpt.replica import Rank
from dist_gpt.skips import Skips
from dist_gpt.train.metrics import Tracker
from dist_gpt.train.startup import agree_on_attempt
from dist_gpt.train.trainer import Trainer, begin
from tests.ranks.runs import rows
from tests.ranks.threads import on_gloo

CPU = torch.device("cpu")
STEPS = 6


def config_of(cache: Path, **sections: dict[str, Any]) -> Config:
    """A tiny model with dropout. Dropout inside attention uses torch's generator, which threads share."""
    sizes = {"num_layers": 2, "hidden_size": 8, "num_heads": 4, "seq_len": 8, "vocab_size": 32}
    tree: dict[str, Any] = {
        "model": {**sizes, "dropout": 0.1, "attention_dropout": 0.0},
        "train": {"steps": STEPS, "global_batch": 4, "dtype": "fp64", "eval_every": 2, "eval_batches": 1},
        "parallel": {"dp": 1},
        "optim": {"lr": 0.01, "warmup": 2},
        "data": {"source": "synthetic", "cache": str(cache)},
        "checkpoint": {"every": 2, "keep": 2},
        "launch": {"backend": "gloo"},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    config = resolve(Config.model_validate(tree))
    assert problems(config) == []
    return config


@dataclass
class Part:
    """What one rank has at the end."""

    finished: bool
    step: int
    accounting: list[str]
    tensors: dict[str, Tensor]
    lines: tuple[str, ...]
    skips: Skips


def env_of(rank: int, world: int, attempt: int = 0) -> RankEnv:
    return RankEnv(rank, world, rank, world, "127.0.0.1", 0, attempt, math.inf)


def train(
    config: Config,
    run_dir: Path,
    resume: str | None = None,
    stop: tuple[int, int] | None = None,
    spoil: Callable[[Rank, int], None] | None = None,
) -> list[Part]:
    """One attempt in `run_dir`; `stop` = (rank, step): that rank wants to stop from that step on. `spoil` may change a
    rank's gradients in a step."""
    run_dir.mkdir(exist_ok=True)
    data, store, world = prepare(config), dist.HashStore(), config.world_size

    def body(number: int, backends: Backends) -> Part:
        env = env_of(number, world)
        rank = Rank(config, number, backends, CPU)
        start = begin(rank, Checkpoints(config, run_dir, data.digest, store, env), resume)
        env = replace(env, attempt=agree_on_attempt(store, env, attempts_in(run_dir, number)))
        recorder = Recorder(config, rank, env, run_dir)
        with closing(rank), closing(recorder), Tracker(config, run_dir, number, start.after) as tracker:
            checkpoints = Checkpoints(config, run_dir, data.digest, store, env)
            trainer = Trainer(config, rank, Batches(data, config), tracker, recorder, checkpoints)
            trainer.resume(start)
            rank.optimizer.wants_stop = lambda: stop is not None and number == stop[0] and trainer.step + 1 >= stop[1]
            if spoil is not None:
                rank.optimizer.before_clip = lambda: spoil(rank, trainer.step + 1)
            finished = trainer.run()
            accounting = trainer.accounting()
            recorder.finish(accounting)
        tensors = {name: t.clone() for name, t in tensors_of(rank.buffers.tensors(), rank.optimizer).items()}
        return Part(finished, trainer.step, accounting, tensors, start.lines, trainer.skips)

    return on_gloo(world, body)


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    timed = ("step_s", "tokens_per_s")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows(run_dir / "metrics.jsonl")]


def same(a: list[Part], b: list[Part]) -> bool:
    """Whether every rank's tensors are equal to the last bit."""
    return all(
        x.tensors.keys() == y.tensors.keys() and all(torch.equal(x.tensors[n], y.tensors[n]) for n in x.tensors)
        for x, y in zip(a, b, strict=True)
    )
