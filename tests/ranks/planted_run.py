"""One rank of a real run with a planted truth: `python -m launch.rank.worker tests/ranks/planted_run.py PLANT CONFIG`.

Plants sleep where a rank would compute. How long anything truly took depends on the machine, so every rank stamps what
it does itself, apart from the ledger, and leaves the stamps in RUN_DIR/stamps.rankN.json. A plant whose effect depends
on the order of events between ranks waits for that order instead of trusting in durations.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from dist_gpt.comm.group import Group, Pending
from dist_gpt.config.load import load
from dist_gpt.model.gpt import Layer
from dist_gpt.parallel.executor import Executor
from dist_gpt.parallel.sink import GradSink
from dist_gpt.train.trainer import main

RANK = int(os.environ.get("RANK", "0"))  # a test imports the constants
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
LATE_S = 0.100
FORWARD_S, BACKWARD_S, SLOW_STAGE = 0.010, 0.020, 2
UNDER_S = 0.015
CLOCK_RANK, CLOCK_S = 1, 3
EXTRA, OVERSIZED_STEP, SENDER = 1000, 4, 0  # elements
PATIENCE_S = 60.0


class Stamps:
    """What this rank does and when, on its own CLOCK_MONOTONIC in ns, by training step.

    `calls`: [step, axis, ranks, which call of the group, op, issue, wait, waited]; `entries`: [step, action, kind,
    begin, end] of the step list. `progress` is shared between the ranks, (world, 2) int64: how many waits along tp each
    rank has begun, and the step of its last wait for a reduction along data.
    """

    TP, DATA = 0, 1

    def __init__(self, folder: Path) -> None:
        self.calls: list[list[Any]] = []
        self.entries: list[list[Any]] = []
        self.path = folder / f"stamps.rank{RANK}.json"
        shared = folder / "progress"
        with open(shared, "ab") as file:
            file.truncate(WORLD * 2 * 8)
        self.progress = np.memmap(shared, np.int64, "r+", shape=(WORLD, 2))
        atexit.register(self.write)

    def write(self) -> None:
        """Leave the stamps for the test."""
        compiler = not {"torch._dynamo", "sympy"}.isdisjoint(sys.modules)
        self.path.write_text(json.dumps({"calls": self.calls, "entries": self.entries, "compiler": compiler}))

    def record(self) -> None:
        """From now on stamp every collective, message and entry of the step list."""
        issue, wait, dispatch = Group._issue, Pending.wait, Executor._dispatch
        rows: dict[int, list[Any]] = {}

        def stamped_issue(group: Group, op: str, payload: int, *rest: Any) -> Pending:
            began = time.perf_counter_ns()
            pending = issue(group, op, payload, *rest)
            record = pending._record
            if group.ledger.number is not None and record is not None:
                row = [group.ledger.number, group.axis, list(group.ranks), record.seq, op, began, 0, 0]
                rows[id(record)] = row
                self.calls.append(row)
            return pending

        def stamped_wait(pending: Pending, *rest: Any) -> None:
            row = rows.pop(id(pending._record), None) if pending._record is not None else None
            if row is not None:
                if row[1] == "tp":
                    self.progress[RANK, self.TP] += 1
                elif row[1] == "data" and row[4] != "all_gather":  # gathers are of the step before
                    self.progress[RANK, self.DATA] = row[0]
                row[6] = time.perf_counter_ns()
            wait(pending, *rest)
            if row is not None:
                row[7] = time.perf_counter_ns()

        def stamped_dispatch(executor: Executor, step: Any, update: Any) -> None:
            began = time.perf_counter_ns()
            dispatch(executor, step, update)
            number = executor.mesh.ledger.number
            if number is not None:
                self.entries.append([number, str(step.action), step.kind, began, time.perf_counter_ns()])

        Group._issue, Pending.wait = stamped_issue, stamped_wait  # type: ignore[method-assign, assignment]
        Executor._dispatch = stamped_dispatch  # type: ignore[method-assign]

    def wait_for_others(self, step: int, partners: list[int], copies: list[int]) -> None:
        """Return when `partners` have begun to wait in the tp collective that is this rank's next one, and `copies` in
        the reduction of gradients of `step`."""
        deadline = time.monotonic() + PATIENCE_S
        begun = self.progress[RANK, self.TP]
        while (self.progress[partners, self.TP] <= begun).any() or (self.progress[copies, self.DATA] < step).any():
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {RANK} waited for {partners} and {copies} in step {step}")
            time.sleep(0.001)


class _Slow(torch.autograd.Function):
    """Identity that takes its time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward_s: float, backward_s: float) -> torch.Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return grads[0], None, None


def slow_layers(forward_s: float, backward_s: float, before: Callable[[int], None] = lambda step: None) -> None:
    """Make every layer of this rank take that much longer; `before(step)` is called before it sleeps."""
    original = Layer.forward

    def forward(self: Layer, x: torch.Tensor, micro: Any) -> torch.Tensor:
        out = original(self, x, micro)
        if not micro.training:
            return out
        before(micro.step + 1)
        return _Slow.apply(out, forward_s, backward_s)  # type: ignore[no-any-return]

    Layer.forward = forward  # type: ignore[method-assign]


def late_rank(stamps: Stamps) -> None:
    """The last rank but one goes on LATE_S after the others have begun to wait for it: its tp partner in the tp
    collective that follows its layer, the other copies in the reduction of gradients."""
    if WORLD - 2 != RANK:
        return
    config = load(sys.argv[2], [], world=WORLD)
    tp = config.parallel.tp
    copy = RANK // tp
    partners = [r for r in range(copy * tp, copy * tp + tp) if r != RANK]
    copies = [r for r in range(WORLD) if r // tp != copy]
    slow_layers(LATE_S, 0.0, lambda step: stamps.wait_for_others(step, partners, copies))


def balanced_stages(stamps: Stamps) -> None:
    """All stages of a pipeline take the same time."""
    slow_layers(FORWARD_S, BACKWARD_S)


def slow_stage(stamps: Stamps) -> None:
    """One rank of a pipeline takes twice as long as the others."""
    times = 2 if RANK == SLOW_STAGE else 1
    slow_layers(times * FORWARD_S, times * BACKWARD_S)


def under_collective(stamps: Stamps) -> None:
    """Weight gradients, which column-parallel layers compute under the sum over tp, last until that sum is there, and
    UNDER_S longer."""
    submit, issue = GradSink.submit, Group._issue
    under_way: list[Pending] = []

    def issue_and_keep(self: Group, *rest: Any) -> Pending:
        pending = issue(self, *rest)
        if self.axis == "tp":
            under_way[:] = [pending]
        return pending

    def submit_late(self: GradSink, job: Any, *needs: torch.Tensor) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while under_way and not under_way[0].done() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(UNDER_S)
        return submit(self, job, *needs)

    GradSink.submit, Group._issue = submit_late, issue_and_keep  # type: ignore[method-assign]


def oversized_message(stamps: Stamps) -> None:
    """In one step rank SENDER's messages carry EXTRA elements more, and their receivers expect it."""
    send, recv = Group.send, Group.recv

    def wide(self: Group) -> bool:
        return self.ledger.number == OVERSIZED_STEP and SENDER in self.ranks

    def send_more(self: Group, tensor: torch.Tensor) -> Pending:
        if wide(self) and RANK == SENDER:
            return send(self, torch.cat((tensor.flatten(), tensor.new_zeros(EXTRA))))
        return send(self, tensor)

    def recv_more(self: Group, tensor: torch.Tensor) -> Pending:
        if not wide(self) or RANK == SENDER:
            return recv(self, tensor)
        larger = tensor.new_empty(tensor.numel() + EXTRA)
        pending = recv(self, larger)
        pending._finish = lambda: tensor.copy_(larger[: tensor.numel()].view_as(tensor))
        return pending

    Group.send, Group.recv = send_more, recv_more  # type: ignore[method-assign]


def shifted_clock(stamps: Stamps) -> None:
    """Rank CLOCK_RANK's CLOCK_MONOTONIC is CLOCK_S ahead: the process starts anew in a time namespace."""
    if RANK == CLOCK_RANK and "SHIFTED" not in os.environ:
        shifted = ["unshare", "--time", "--monotonic", str(CLOCK_S), "--fork", "--kill-child"]
        command = [*shifted, sys.executable, *sys.argv]
        os.execvpe(command[0], command, {**os.environ, "SHIFTED": "yes"})


PLANTS = (late_rank, balanced_stages, slow_stage, under_collective, oversized_message, shifted_clock)

if __name__ == "__main__":
    # A process that restarts does so before anything is stamped.
    stamps = Stamps(Path(sys.argv[2]).parent)
    {plant.__name__: plant for plant in PLANTS}[sys.argv[1]](stamps)
    stamps.record()
    sys.exit(main(load(sys.argv[2], [], world=WORLD)))
