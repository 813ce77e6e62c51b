"""A worker process: trains one rank of ours, or the plain GPT, when a line on standard input asks for it.

    {"side": "ours" | "plain", "threads": n, "same_weights": bool, "config": {...}}    -> {"rss_bytes": n}
    {"do": "steps", "steps": k, "mode": "on" | "off" | "window"}                       -> {"started", "ended", "loss"}
    {"do": "memory"}                                                                   -> {"peak_bytes": n}

`rss_bytes` is the resident size right after `import torch`, before anything of ours: whatever a side imports, counts
as its memory. Each side is imported only in its own process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

TIMEOUT_S = 600.0
Step = Callable[[int, np.ndarray, str], float]
"""(step, token ids (global_batch, seq_len + 1), what is recorded) -> loss, a number on the host."""


class Silent:
    """A ledger that counts, times and compares nothing: what training costs without one."""

    number = tape = None

    def issue(self, *call: object) -> None: ...

    def issued(self, *call: object, **more: object) -> None: ...

    def step(self, *entry: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident size of this process now, or its largest so far (`VmHWM`)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError as error:
        raise RuntimeError(f"memory is read from /proc/self/status, which only Linux has ({error})") from error
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field + ":"))


def token_ids(config: dict[str, Any], step: int) -> np.ndarray:
    """Uniform random tokens of step `step`, the same on both sides."""
    generator = np.random.Generator(np.random.Philox(key=[config["data"]["seed"], step]))
    shape = (config["train"]["global_batch"], config["model"]["seq_len"] + 1)
    return generator.integers(0, config["model"]["vocab_size"], size=shape, dtype=np.int64)


def ours(tree: dict[str, Any], same_weights: bool) -> tuple[Step, Callable[[], None]]:
    """One rank, as the trainer makes it."""
    from dist_gpt.comm.mesh import GlooBackends
    from dist_gpt.comm.rendezvous import connect_store, rank_env
    from dist_gpt.comm.tape import HostTimer, Tape
    from dist_gpt.config.schema import Config
    from dist_gpt.events import EventFile
    from dist_gpt.heap import keep_freed_memory
    from dist_gpt.rank import Rank

    keep_freed_memory()
    env = rank_env(TIMEOUT_S)
    config = Config.model_validate_json(json.dumps(tree))
    store = connect_store(env)
    rank = Rank(config, env.rank, GlooBackends(store, "127.0.0.1", TIMEOUT_S), torch.device("cpu"))
    rank.initialise()

    ledger, silent, events = rank.mesh.ledger, Silent(), EventFile(Path(os.devnull), env.rank, {}, 0)
    tape = Tape(HostTimer(), events.base_ns)

    def step(number: int, ids: np.ndarray, mode: str) -> float:
        """One step; "on" is how everybody trains, "window" records every call and span as well."""
        chosen: Any = silent if mode == "off" else ledger
        rank.mesh.ledger = chosen
        for group in (*rank.mesh.groups.values(), *rank.mesh.edges.values()):
            group.ledger = chosen
        ledger.tape = tape if mode == "window" else None
        rank.train_step(number, lambda first, count: ids[first : first + count])
        loss, _ = rank.optimizer.statistics.tolist()
        if mode == "window":
            events.rows(tape.rows(number))
        return float(loss)

    def close() -> None:
        rank.close()
        store.set(f"left/{env.rank}", "")
        if env.rank == 0:  # it hosts the store: it leaves last
            store.wait([f"left/{other}" for other in range(env.world)])

    return step, close


def plain(tree: dict[str, Any], same_weights: bool) -> tuple[Step, Callable[[], None]]:
    """The independent plain-PyTorch GPT; `same_weights` gives it our first weights, so that losses can be compared."""
    from tests.reference.plain_gpt import PlainConfig, PlainGPT, make_optimizer, train_step

    optim, train = SimpleNamespace(**tree["optim"]), SimpleNamespace(**tree["train"])
    model = PlainGPT(PlainConfig.of(SimpleNamespace(**tree["model"])))
    model.to({"fp32": torch.float32, "fp64": torch.float64}[train.dtype])
    if same_weights:
        copy_our_weights(tree, model.named_weights())
    betas = (optim.betas[0], optim.betas[1])
    optimizer = make_optimizer(
        model, optim.name, optim.lr, betas, optim.eps, optim.momentum, weight_decay=optim.weight_decay
    )

    def step(number: int, ids: np.ndarray, mode: str) -> float:
        starts = range(0, train.global_batch, train.micro_batch)
        parts = [torch.from_numpy(ids[first : first + train.micro_batch]) for first in starts]
        loss, norm = train_step(model, optimizer, [(p[:, :-1], p[:, 1:]) for p in parts], optim.clip, optim.lr)
        norm.item()  # the trainer reads it too
        return loss.item()

    return step, lambda: None


def copy_our_weights(tree: dict[str, Any], named: dict[str, torch.Tensor]) -> None:
    """Our initial weights into tensors of the same names."""
    from dist_gpt.config.schema import Config
    from dist_gpt.model.init import initial_weight
    from dist_gpt.params import params_of_blocks

    config = Config.model_validate_json(json.dumps(tree))
    with torch.no_grad():
        for param in params_of_blocks(config, tuple(range(config.model.num_layers + 2))):
            named[param.name].copy_(initial_weight(param, config.train.seed))


def timed_steps(step: Step, tree: dict[str, Any], first: int, count: int, mode: str) -> dict[str, float]:
    """Steps first .. first + count - 1; tokens are drawn before the clock starts."""
    batches = [token_ids(tree, number) for number in range(first, first + count)]
    loss = 0.0
    started = time.perf_counter()
    for number, ids in enumerate(batches, start=first):
        loss = step(number, ids, mode)
    return {"started": started, "ended": time.perf_counter(), "loss": loss}


def main() -> None:
    """Answer until standard input ends."""
    at_start = resident_bytes()
    answers, sys.stdout = sys.stdout, sys.stderr  # a stray print must not spoil the answers
    order = json.loads(sys.stdin.readline() or "null")
    if order is None:
        return
    torch.set_num_threads(order["threads"])
    tree, done = order["config"], 0
    try:
        step, close = {"ours": ours, "plain": plain}[order["side"]](tree, order["same_weights"])
        print(json.dumps({"rss_bytes": at_start}), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            answer: dict[str, Any] = {"peak_bytes": resident_bytes("VmHWM")}
            if request["do"] == "steps":
                answer = dict(timed_steps(step, tree, done, request["steps"], request["mode"]))
                done += request["steps"]
            print(json.dumps(answer), file=answers, flush=True)
        close()
    except Exception:
        print(json.dumps({"error": traceback.format_exc()}), file=answers, flush=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
