"""One rank of a real run with a planted truth: `python -m launch.worker tests/ranks/planted_run.py PLANT CONFIG`.

Plants sleep where a rank would compute: that takes the same time on a machine with two cores as on one with twenty.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from dist_gpt.comm.group import Group, Pending
from dist_gpt.config.load import load
from dist_gpt.model.gpt import Layer
from dist_gpt.parallel.sink import GradSink
from dist_gpt.train import main

RANK = int(os.environ.get("RANK", "0"))  # a test imports the constants
LATE_S = 0.040
FORWARD_S, BACKWARD_S, SLOW_STAGE = 0.010, 0.020, 2
UNDER_S = 0.015
CLOCK_RANK, CLOCK_S = 1, 3
EXTRA, OVERSIZED_STEP, SENDER = 1000, 4, 0  # elements


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


def slow_layers(forward_s: float, backward_s: float) -> None:
    """Every layer of this rank takes that much longer."""
    original = Layer.forward

    def forward(self: Layer, x: torch.Tensor, micro: Any) -> torch.Tensor:
        out = original(self, x, micro)
        return _Slow.apply(out, forward_s, backward_s) if micro.training else out  # type: ignore[no-any-return]

    Layer.forward = forward  # type: ignore[method-assign]


def late_rank() -> None:
    """The last rank but one takes LATE_S longer for its layer."""
    if int(os.environ.get("WORLD_SIZE", "1")) - 2 == RANK:
        slow_layers(LATE_S, 0.0)


def balanced_stages() -> None:
    slow_layers(FORWARD_S, BACKWARD_S)


def slow_stage() -> None:
    """One rank of a pipeline takes twice as long as the others."""
    times = 2 if RANK == SLOW_STAGE else 1
    slow_layers(times * FORWARD_S, times * BACKWARD_S)


def under_collective() -> None:
    """Weight gradients, which column-parallel layers compute under the sum over tp, take UNDER_S longer."""
    original = GradSink.submit

    def submit(self: GradSink, job: Any, *needs: torch.Tensor) -> Any:
        time.sleep(UNDER_S)
        return original(self, job, *needs)

    GradSink.submit = submit  # type: ignore[method-assign]


def oversized_message() -> None:
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


def shifted_clock() -> None:
    """Rank CLOCK_RANK's CLOCK_MONOTONIC is CLOCK_S ahead: the process starts anew in a time namespace."""
    if RANK == CLOCK_RANK and "SHIFTED" not in os.environ:
        shifted = ["unshare", "--time", "--monotonic", str(CLOCK_S), "--fork", "--kill-child"]
        command = [*shifted, sys.executable, *sys.argv]
        os.execvpe(command[0], command, {**os.environ, "SHIFTED": "yes"})


PLANTS = (late_rank, balanced_stages, slow_stage, under_collective, oversized_message, shifted_clock)

if __name__ == "__main__":
    {plant.__name__: plant for plant in PLANTS}[sys.argv[1]]()
    sys.exit(main(load(sys.argv[2], [], world=int(os.environ["WORLD_SIZE"]))))
