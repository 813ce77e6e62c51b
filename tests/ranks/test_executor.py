"""The executor on a two-stage pipeline, both ranks as threads of this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch.multiprocessing.reductions import StorageWeakRef

from dist_gpt.comm.mesh import GlooBackends
from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.parallel.executor import Executor
from dist_gpt.replica import Rank
from dist_gpt.schedule.action import Action, Op
from dist_gpt.schedule.expand import REDUCE, UPDATE
from dist_gpt.verify import verify_samples
from tests.patience import PATIENCE_S


def pipeline(folder: Path, schedule: str) -> Config:
    """Two stages of two layers, four micro-batches."""
    path = folder / "config.yaml"
    model = {"num_layers": 4, "hidden_size": 16, "num_heads": 2, "seq_len": 8, "vocab_size": 32}
    train = {"steps": 2, "global_batch": 4, "micro_batch": 1, "dtype": "fp64"}
    parallel = {"pp": 2, "schedule": schedule}
    path.write_text(
        yaml.safe_dump({"model": model, "train": train, "parallel": parallel, "data": {"source": "synthetic"}})
    )
    return load(str(path), world=2)


def on_two_ranks(config: Config, work: Callable[[Rank], object]) -> list[object]:
    """`work(rank)` on both ranks at once, over gloo."""
    store = dist.HashStore()

    def run(index: int) -> object:
        rank = Rank(config, index, GlooBackends(store, "127.0.0.1", 30.0), torch.device("cpu"))
        try:
            rank.initialise()
            return work(rank)
        finally:
            rank.close()

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, range(2)))


def test_sent_activations_are_freed_before_their_backward(tmp_path: Path) -> None:
    config = pipeline(tmp_path, "gpipe")
    live_at_backward: list[int] = []

    def work(rank: Rank) -> None:
        sent: list[StorageWeakRef] = []
        executor = rank.executor
        send, backward = executor._send, executor._backward

        def note(action: Action) -> None:
            if action.op is Op.SEND_F:
                sent.append(StorageWeakRef(executor._activations[action.chunk, action.micro_batch].untyped_storage()))
            send(action)

        def look(step: object) -> None:
            # The message is gone, but the thread that notices may be late.
            deadline = time.monotonic() + PATIENCE_S
            while executor._sending and time.monotonic() < deadline:
                executor._free_sent()
            if sent:
                live_at_backward.append(sum(not ref.expired() for ref in sent))
            backward(step)  # type: ignore[arg-type]

        executor._send, executor._backward = note, look  # type: ignore[method-assign]
        rank.train_step(0, verify_samples(config, 0))

    on_two_ranks(config, work)
    # the first gradient comes back after the last activation has arrived: by then nothing of them is left
    assert len(live_at_backward) == 4 * 3  # micro-batches x blocks of stage 0
    assert set(live_at_backward) == {0}


def test_reductions_start_inside_the_last_backward(tmp_path: Path) -> None:
    config = pipeline(tmp_path, "1f1b")
    optim = config.optim.model_copy(update={"bucket_mb": 0.001})
    config = config.model_copy(update={"optim": optim})
    order: list[str] = []

    def work(rank: Rank) -> None:
        if rank.mesh.rank != 1:
            rank.train_step(0, verify_samples(config, 0))
            return
        dispatch = Executor._dispatch

        def note(step: object, *rest: object) -> None:
            order.append(step.kind)  # type: ignore[attr-defined]
            dispatch(rank.executor, step, *rest)  # type: ignore[arg-type]

        rank.executor._dispatch = note  # type: ignore[method-assign]
        rank.train_step(0, verify_samples(config, 0))

    on_two_ranks(config, work)
    first = order.index(REDUCE)
    assert "backward" in order[first:], "no backward is left to hide the first reduction under"
    assert order[-1] == UPDATE
    assert order.count(REDUCE) == 3  # the tied embedding, the head's norm with one layer, the other layer


def test_the_tape_is_empty_after_every_step(tmp_path: Path) -> None:
    config = pipeline(tmp_path, "1f1b")

    def work(rank: Rank) -> int:
        for step in range(2):
            rank.train_step(step, verify_samples(config, step))
        e = rank.executor
        return len(e._tape) + len(e._activations) + len(e._gradients) + len(e._sending) + len(e._micro_batches)

    assert on_two_ranks(config, work) == [0, 0]
