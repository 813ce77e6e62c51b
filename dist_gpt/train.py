"""The training loop of one rank, and what surrounds it: meeting the others, the run directory, the accounting."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from dist_gpt.comm.clock import read_clock
from dist_gpt.comm.rendezvous import (
    RankEnv,
    RendezvousError,
    choose_device,
    connect_store,
    make_backends,
    rank_env,
)  # fmt: skip
from dist_gpt.config.schema import Config
from dist_gpt.data.loader import Batches
from dist_gpt.events import EVAL, TRAIN, Counts
from dist_gpt.heap import Heap, keep_freed_memory
from dist_gpt.meeting import meet, settle
from dist_gpt.optim.lr import learning_rate
from dist_gpt.plan.count import count_comm
from dist_gpt.plan.steps import Call
from dist_gpt.profile.recorder import Recorder
from dist_gpt.rank import Rank
from dist_gpt.track import Tracker, record_failure

MAX_SKIPPED = 10


class Trainer:
    """Trains `rank`'s part of the model for `train.steps` steps."""

    def __init__(self, config: Config, rank: Rank, batches: Batches, tracker: Tracker, recorder: Recorder) -> None:
        self.config, self.rank, self.batches = config, rank, batches
        self.tracker, self.recorder = tracker, recorder
        self.evaluations = self.skipped = 0

    def run(self) -> None:
        """The loop. Steps are counted from 1 in everything that is shown; step 0 is before training."""
        t = self.config.train
        self.validate(0)
        for step in range(1, t.steps + 1):
            with self.recorder.step(step) as taken:
                self.rank.train_step(step - 1, partial(self.batches.sample, step - 1))
                loss, norm = self.rank.optimizer.statistics.tolist()
            self.record(step, loss, norm, taken.seconds)
            if step == t.steps or (t.eval_every and step % t.eval_every == 0):
                self.validate(step)

    def record(self, step: int, loss: float, norm: float, elapsed: float) -> None:
        """Log one step; give up after MAX_SKIPPED steps in a row without finite loss and gradients."""
        tokens = self.config.train.global_batch * self.config.model.seq_len
        self.tracker.step(
            {
                "step": step,
                "loss": loss,
                "grad_norm": norm,
                "lr": learning_rate(self.config, step - 1),
                "tokens_per_s": tokens / elapsed,
                "step_s": elapsed,
            }
        )
        self.skipped = 0 if math.isfinite(loss) and math.isfinite(norm) else self.skipped + 1
        if self.skipped == MAX_SKIPPED:
            raise RuntimeError(
                f"{MAX_SKIPPED} steps in a row, up to step {step}, had a loss ({loss}) or gradient norm ({norm}) that "
                "is not finite; they changed no weight. Lower optim.lr, lengthen optim.warmup or lower optim.clip"
            )

    def validate(self, step: int) -> None:
        """Mean loss over the validation batches, the same ones every time."""
        count = self.config.train.eval_batches
        if not count:
            return
        started, before = time.perf_counter(), self.rank.mesh.ledger.counts(EVAL).copy()
        loss = self.rank.evaluate([partial(self.batches.validation, b) for b in range(count)])
        self.evaluations += 1
        self.tracker.validation(step, loss.item())
        elapsed = time.perf_counter() - started
        self.recorder.evaluation(step, EVAL, elapsed, self.rank.mesh.ledger.counts(EVAL).since(before))

    def accounting(self) -> list[str]:
        """What this rank issued against steps x train + evaluations x eval; empty when exact."""
        plan, ledger, config = self.rank.plan, self.rank.mesh.ledger, self.config
        train, evaluation = Counts(), Counts()
        train.merge(count_comm(plan, plan.steps), config.train.steps)
        batches = self.evaluations * config.train.eval_batches
        evaluation.merge(count_comm(plan, plan.eval_steps), batches)
        evaluation.merge(_count_calls(plan.eval_calls(), plan.layout.world), batches)
        return [
            *ledger.differences,
            *(f"no gradient was written for a parameter of shape {tuple(p.shape)}" for p in self.rank.sink.unwritten()),
            *(f"train: {line}" for line in ledger.counts(TRAIN).differences(train)),
            *(f"eval: {line}" for line in ledger.counts(EVAL).differences(evaluation)),
        ]


def _count_calls(calls: tuple[Call, ...], size: int) -> Counts:
    counts = Counts()
    for call in calls:
        counts.add(call.axis, call.op, call.calls, call.payload, size)
    return counts


def main(config: Config) -> int:
    """Train as the rank that torchrun's variables name. Returns the exit code: 1 when the accounting differs."""
    env = rank_env(config.launch.timeout_s)
    if env.world != config.world_size:
        raise RendezvousError(
            f"{env.world} ranks were started, but the layout pp {config.parallel.pp} x dp {config.parallel.dp} x "
            f"cp {config.parallel.cp} x tp {config.parallel.tp} has {config.world_size}"
        )
    torch.manual_seed(config.train.seed)
    run_dir = Path(str(config.run_dir))
    with ExitStack() as parts:  # each is closed, the last one first, also when closing another fails
        try:
            store = connect_store(env)  # it goes after all parts, with this function's frame
            device = choose_device(env, config.launch.backend)
            if device.type == "cpu":
                keep_freed_memory()
            data, env = meet(config, store, env)
            baseline = Heap().bytes_in_use()
            rank = Rank(config, env.rank, make_backends(store, env, device, config.launch.timeout_s), device)
            parts.callback(rank.close)
            tracker = Tracker(config, run_dir, env.rank)
            parts.callback(tracker.close)
            tracker.message(greeting(env, rank))
            recorder = Recorder(config, rank, env, run_dir, baseline)
            parts.callback(recorder.close)
            recorder.clock(read_clock(store, env, "start"))
            rank.initialise()
            trainer = Trainer(config, rank, Batches(data, config), tracker, recorder)
            trainer.run()
            recorder.clock(read_clock(store, env, "end"))
            differences = trainer.accounting()
            recorder.finish(differences)
            return settle(store, env, differences, tracker)
        except BaseException as error:
            record_failure(error)  # before the connections close, which makes other ranks fail
            raise


def greeting(env: RankEnv, rank: Rank) -> str:
    """Which rank this is and where it computes."""
    device = rank.device
    where = f"{torch.cuda.get_device_name(device)} ({device}), NCCL" if device.type == "cuda" else "CPU, gloo"
    return f"rank {env.rank}/{env.world} local {env.local_rank}/{env.local_world} ({rank.mesh.coords}) on {where}"
