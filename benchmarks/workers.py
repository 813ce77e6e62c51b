"""Worker process that trains one rank of ours, or of a peer, when a line on standard input asks for it.

    {"side": "ours" | "plain" | "share" | "fsdp" | "deepspeed", "threads": n, "same_weights": bool, "config": {...},
     "options": {...}}                                        -> {"rss_bytes", "imported_bytes"}
    {"do": "build", "config": {...}, "options": {...}}        -> {}: another model, from its first step
    {"do": "steps", "steps": k, "mode": "on" | "off" | "window"}    -> {"started", "ended", "loss", "cpu_s"}
    {"do": "memory"}                                          -> {"peak_bytes": n}
    {"do": "forget"}                                          -> {}: the peak counts from now
    {"do": "traffic"}                                         -> {"sent_bytes": {op: n}}: one step, its bytes counted

`rss_bytes` is the resident size right after `import torch`, before any import of ours: all that a side imports counts
as its memory. `imported_bytes` is the size after the imports. Each side is imported only in its own process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dist_gpt.cpu import kept

TIMEOUT_S = 600.0
Step = Callable[[int, np.ndarray, str], float]
"""(step, token ids (global_batch, seq_len + 1), mode of recording) -> loss, a number on the host."""
Count = Callable[[Callable[[], object]], dict[str, float]]
"""(work to do) -> bytes that left this rank meanwhile, by operation."""


@dataclass(frozen=True)
class Side:
    """A model that is ready to step. `close` frees it, but nothing that the next model in this process needs."""

    step: Step
    count: Count
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Order:
    """Order of the parent process: a resolved configuration, and further options of a side."""

    tree: dict[str, Any]
    same_weights: bool
    options: dict[str, Any]


Build = Callable[[Order], Side]


class Silent:
    """Ledger that counts, times and compares nothing, to measure training without one."""

    number = tape = None

    def issue(self, *call: object) -> None:
        """Ignore a collective."""

    def issued(self, *call: object, **more: object) -> None:
        """Ignore that the backend has a collective."""

    def step(self, *entry: object) -> contextlib.AbstractContextManager[None]:
        """Return a context that records nothing."""
        return contextlib.nullcontext()

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that times nothing."""
        return contextlib.nullcontext()


def resident_bytes(field: str = "VmRSS") -> int:
    """Return the bytes of this process's resident size, now (`VmRSS`) or the largest so far (`VmHWM`)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError as error:
        raise RuntimeError(f"memory is read from /proc/self/status, which only Linux has ({error})") from error
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field + ":"))


def token_ids(config: dict[str, Any], step: int) -> np.ndarray:
    """Return uniform random tokens (global_batch, seq_len + 1) of step `step`, the same on all sides."""
    generator = np.random.Generator(np.random.Philox(key=[config["data"]["seed"], step]))
    shape = (config["train"]["global_batch"], config["model"]["seq_len"] + 1)
    return generator.integers(0, config["model"]["vocab_size"], size=shape, dtype=np.int64)


def ours() -> tuple[Build, Callable[[], None]]:
    """Return how to build one rank, as the trainer does, and how to end it."""
    from dist_gpt.comm.rendezvous import connect_store, rank_env
    from dist_gpt.heap import prepare_heap

    prepare_heap()
    env = rank_env(TIMEOUT_S)
    store = connect_store(env)

    def leave() -> None:
        store.set(f"left/{env.rank}", "")
        if env.rank == 0:  # it hosts the store, so it exits last
            store.wait([f"left/{other}" for other in range(env.world)])

    return partial(_our_rank, env.rank, store, iter(range(1 << 30))), leave


def _our_rank(number: int, store: Any, built: Any, order: Order) -> Side:
    """Return rank `number` of the layout that `order` asks for. Each one built has its own part of the store."""
    from dist_gpt.comm.mesh import GlooBackends
    from dist_gpt.comm.trace_buffer import HostTimer, Tape
    from dist_gpt.config.schema import Config
    from dist_gpt.events import TRAIN, EventFile
    from dist_gpt.replica import Rank

    config = Config.model_validate_json(json.dumps(order.tree))
    part = torch.distributed.PrefixStore(f"built{next(built)}", store)
    backends = GlooBackends(part, "127.0.0.1", TIMEOUT_S, single_copy=config.launch.reads_memory)
    rank = Rank(config, number, backends, torch.device("cpu"))
    rank.initialise()
    ledger, silent, events = rank.mesh.ledger, Silent(), EventFile(Path(os.devnull), number, {}, 0)
    tape = Tape(HostTimer(), events.base_ns)

    def step(number: int, ids: np.ndarray, mode: str) -> float:
        """Train one step. Mode "on" is the default of training; "window" also records every call and span."""
        chosen: Any = silent if mode == "off" else ledger
        rank.mesh.ledger = chosen
        for group in (*rank.mesh.groups.values(), *rank.mesh.edges.values()):
            group.ledger = chosen
        ledger.tape = tape if mode == "window" else None
        if mode == "window":
            tape.begin()
        rank.train_step(number, lambda first, count: ids[first : first + count])
        loss, _ = rank.optimizer.statistics.tolist()
        if mode == "window":
            tape.finish()
            events.rows(tape.rows(number))
        return float(loss)

    def wire() -> dict[str, float]:
        found: dict[str, float] = {}
        for (_, op), tally in ledger.counts(TRAIN).tallies.items():
            found[op] = found.get(op, 0.0) + tally.wire_bytes
        return found

    def count(run: Callable[[], object]) -> dict[str, float]:
        before = wire()
        run()
        return {op: sent - before.get(op, 0.0) for op, sent in wire().items()}

    return Side(step, count, rank.close)


def plain() -> tuple[Build, Callable[[], None]]:
    """Return how to build the independent plain-PyTorch GPT with our C heap and matmuls, and how to end it.

    `same_weights` in the order gives it our initial weights, so that losses can be compared.
    """
    from benchmarks.products import stand_as_ours

    stand_as_ours()
    return _plain, lambda: None


def stock() -> tuple[Build, Callable[[], None]]:
    """Return the same as `plain`, with torch's own heap and matmuls."""
    return _plain, lambda: None


def _plain(order: Order) -> Side:
    from tests.reference.plain_gpt import PlainConfig, PlainGPT, make_optimizer, train_step

    tree = order.tree
    optim, train = SimpleNamespace(**tree["optim"]), SimpleNamespace(**tree["train"])
    model = PlainGPT(PlainConfig.of(SimpleNamespace(**tree["model"])))
    model.to({"fp32": torch.float32, "fp64": torch.float64}[train.dtype])
    if order.same_weights:
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

    return Side(step, nothing_sent)


def nothing_sent(run: Callable[[], object]) -> dict[str, float]:
    """Do `run` and return no traffic: the count of a single process."""
    run()
    return {}


def copy_our_weights(tree: dict[str, Any], named: dict[str, torch.Tensor]) -> None:
    """Copy our initial weights into the tensors of the same names."""
    from dist_gpt.config.schema import Config
    from dist_gpt.model.init import initial_weight
    from dist_gpt.params import params_of_blocks

    config = Config.model_validate_json(json.dumps(tree))
    with torch.no_grad():
        for param in params_of_blocks(config, tuple(range(config.model.num_layers + 2))):
            named[param.name].copy_(initial_weight(param, config.train.seed))


def timed_steps(step: Step, tree: dict[str, Any], first: int, count: int, mode: str) -> dict[str, float]:
    """Train and time steps first .. first + count - 1; tokens are drawn before the clock starts."""
    batches = [token_ids(tree, number) for number in range(first, first + count)]
    loss = 0.0
    started, cpu = time.perf_counter(), time.process_time()
    for number, ids in enumerate(batches, start=first):
        loss = step(number, ids, mode)
    return {"started": started, "ended": time.perf_counter(), "loss": loss, "cpu_s": time.process_time() - cpu}


SIDES = {
    "ours": ("dist_gpt.replica", "benchmarks.workers:ours"),
    "plain": ("tests.reference.plain_gpt", "benchmarks.workers:plain"),
    "stock": ("tests.reference.plain_gpt", "benchmarks.workers:stock"),
    "share": ("tests.reference.plain_gpt", "benchmarks.peers:share"),
    "fsdp": ("torch.distributed.fsdp", "benchmarks.peers:fully_sharded"),
    "deepspeed": ("deepspeed", "benchmarks.peers:deepspeed"),
}
"""Name -> (module to import first, function that returns how to build and end it)."""


def forget_peak() -> None:
    """Reset `VmHWM` to the current size, after free memory is returned to the system."""
    from dist_gpt.heap import give_back

    give_back()
    Path("/proc/self/clear_refs").write_text("5")


class Session:
    """The model of this process, which answers requests one after the other."""

    def __init__(self, build: Build, order: Order) -> None:
        self.build, self.order = build, order
        self.side, self.done = build(order), 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what `request["do"]` names and return the answer."""
        do = request["do"]
        if do == "build":
            self.side.close()
            del self.side  # before the next one is built, so that two never exist at once
            gc.collect()
            self.order = Order(request["config"], self.order.same_weights, request["options"])
            self.side, self.done = self.build(self.order), 0
        elif do == "forget":
            forget_peak()
        elif do == "memory":
            return {"peak_bytes": resident_bytes("VmHWM")}
        elif do == "traffic":
            return {"sent_bytes": self.side.count(lambda: self._steps(1, "on"))}
        else:
            return dict(self._steps(request["steps"], request["mode"]))
        return {}

    def _steps(self, count: int, mode: str) -> dict[str, float]:
        first, self.done = self.done, self.done + count
        return timed_steps(self.side.step, self.order.tree, first, count, mode)


def own_standard_output() -> Any:
    """Return a stream for answers; redirect standard output to standard error, so that stray prints do not mix in."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = sys.stderr
    return answers


def main() -> None:
    """Answer requests until standard input ends."""
    at_start = resident_bytes()
    answers = own_standard_output()
    order = json.loads(sys.stdin.readline() or "null")
    if order is None:
        return
    torch.set_num_threads(order["threads"])
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    imports, maker = SIDES[order["side"]]
    module, _, name = maker.partition(":")
    try:
        importlib.import_module(imports)
        with kept(rank, ranks, order["threads"]):  # CPU pinning as in ranks that the launcher starts
            build, leave = getattr(importlib.import_module(module), name)()
            imported = resident_bytes()
            session = Session(build, Order(order["config"], order["same_weights"], order.get("options", {})))
            print(json.dumps({"rss_bytes": at_start, "imported_bytes": imported}), file=answers, flush=True)
            for line in sys.stdin:
                print(json.dumps(session.answer(json.loads(line))), file=answers, flush=True)
            session.side.close()
            leave()
    except Exception:
        print(json.dumps({"error": traceback.format_exc()}), file=answers, flush=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
