"""Executor of a rank's step list, the same list that is checked, simulated and drawn.

Autograd never crosses a block. The tape holds, per (block, micro-batch), the block's detached input and the graph
edge of its output; a backward step consumes one entry. Every step thus computes one block at most, and the list alone
decides what runs when: there are no gradient hooks and no synchronisation flags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.autograd.variable import Variable

from dist_gpt.comm.group import Pending
from dist_gpt.comm.mesh import Mesh
from dist_gpt.events import EVAL, TRAIN
from dist_gpt.parallel.buckets import TORCH_DTYPE, FlatBuffers
from dist_gpt.parallel.sink import GradSink
from dist_gpt.plan.steps import RankPlan, calls_by_key, p2p_direction
from dist_gpt.schedule import expand
from dist_gpt.schedule.action import Action, Op
from dist_gpt.schedule.expand import Step


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of blocks besides the activation.

    `tokens` (for the first block) and `targets` (for the last) are (N,) int64; `first_sample` is the index of the first
    sequence in the global batch; `scale` is 1 / tokens of the step. With `again`, the forward is repeated for its
    backward and its result is not used.
    """

    tokens: Tensor | None
    targets: Tensor | None
    step: int
    first_sample: int
    scale: float
    training: bool = True
    again: bool = False


def _no_batch(m: int) -> MicroBatch:
    raise ValueError(f"micro-batch {m} is read where none is")


class Stage(Protocol):
    """Callable that runs one of a rank's blocks."""

    def __call__(self, block: int, x: Tensor | None, micro: MicroBatch) -> Tensor:
        """Return the output of `block` for input `x` (None for block 0); the head returns the loss."""


def _run_backward(edge: GradientEdge, gradient: Tensor) -> None:
    """Run the backward from `edge`, whose gradient is `gradient`.

    torch.autograd.backward does the same, but its check of shapes imports sympy: a second of CPU time in the first step
    of every rank, and 480 files from what may be a shared file system.
    """
    Variable._execution_engine.run_backward(
        (edge,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )  # keep no graph, make none of the backward; gradients of all leaves


Batches = Callable[[int], MicroBatch]
Update = Callable[[Tensor], None]
Key = tuple[int, int]  # (chunk or block, micro-batch)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Tape entry of a block's forward: its input, and the graph edge of its output.

    Of a forward that is repeated it has only the input until then (`held`: as the dry run counts it).
    """

    x: Tensor | None
    held: object
    edge: GradientEdge | None


class Executor:
    """Executor of the steps of one rank.

    `loss` is the scaled loss summed over the micro-batches seen so far (0 on ranks without the head).
    """

    def __init__(
        self, plan: RankPlan, stage: Stage, buffers: FlatBuffers, mesh: Mesh, sink: GradSink, device: torch.device
    ) -> None:
        self.plan, self.stage, self.buffers, self.mesh, self.sink = plan, stage, buffers, mesh, sink
        self.device = device
        self.dtype = TORCH_DTYPE[plan.precision.compute]
        self.blocks = dict(plan.chunks)
        self.loss = torch.zeros((), dtype=TORCH_DTYPE[plan.precision.master], device=device)
        self.loss_scale: Callable[[], Tensor] | None = None  # fp16: factor of the loss in the backward
        self._recomputed = {step.block for step in plan.steps if step.kind == expand.RECOMPUTE}
        self._tape: dict[Key, _Entry] = {}
        self._activations: dict[Key, Tensor] = {}  # input of the chunk's next forward step
        self._gradients: dict[Key, Tensor] = {}  # input of the chunk's next backward step
        self._receiving: dict[Action, tuple[Tensor, Pending]] = {}
        self._sending: list[tuple[Pending, Tensor]] = []
        self._micro_batches: dict[int, MicroBatch] = {}
        self._declared: dict[str, list[dict[tuple[str, str, int], int]]] = {}
        self.after_step: Callable[[], None] | None = None  # the dry run and the profile read live bytes here
        self.peak_message_bytes = 0  # of receives posted and not yet read

    def train(self, batch: Batches, update: Update) -> Tensor:
        """Run one training step, with `update` called on the loss where the list says so; return the loss part."""
        self.buffers.begin()
        return self._run(TRAIN, TRAIN, self.plan.steps, batch, update)

    def refresh(self) -> None:
        """Gather whole parameters before the forwards of a validation if this rank has stepped its shards only."""
        self._run(EVAL, "refresh", self.plan.refresh_steps, _no_batch, None)

    def evaluate(self, batch: Batches) -> Tensor:
        """Run the forwards of one validation batch; return this rank's part of the summed loss."""
        with torch.no_grad():
            return self._run(EVAL, EVAL, self.plan.eval_steps, batch, None)

    def _run(self, phase: str, name: str, steps: Sequence[Step], batch: Batches, update: Update | None) -> Tensor:
        if name not in self._declared:
            self._declared[name] = [calls_by_key(self.plan.declare(step).comm) for step in steps]
        self.loss = torch.zeros_like(self.loss)
        ledger = self.mesh.ledger
        for index, (step, declared) in enumerate(zip(steps, self._declared[name], strict=True)):
            if step.kind == expand.FORWARD and step.action.micro_batch not in self._micro_batches:
                with ledger.reading():
                    self._micro_batches[step.action.micro_batch] = batch(step.action.micro_batch)
            with ledger.step(phase, step, declared, index):
                self._dispatch(step, update)
            if self.after_step is not None:
                self.after_step()
        self._finish_sends()
        self._micro_batches.clear()
        if self._tape or self._activations or self._gradients or self._receiving:
            raise RuntimeError(f"rank {self.mesh.rank}: the step list ended with unfinished work on the tape")
        return self.loss

    def _dispatch(self, step: Step, update: Update | None) -> None:
        if self._sending:
            self._free_sent()
        if step.kind == expand.FORWARD:
            self._forward(step, self._micro_batches[step.action.micro_batch])
        elif step.kind == expand.BACKWARD:
            self._backward(step)
        elif step.kind == expand.RECOMPUTE:
            self._recompute(step, self._micro_batches[step.action.micro_batch])
        elif step.kind == expand.WEIGHT:
            self.buffers.open_gradients(step.action.chunk, step.block or 0)
            self.sink.run((step.block, step.action.micro_batch))
        elif step.kind == expand.SEND:
            self._send(step.action)
        elif step.kind == expand.RECV:
            self._receive(step.action)
        elif step.kind == expand.REDUCE:
            self.buffers.reduce(step.bucket or 0, self.mesh)
        elif step.kind == expand.GATHER:
            self.buffers.buckets[step.bucket or 0].start_gather(self.mesh)
        elif step.kind == expand.FREE:
            self.buffers.buckets[step.bucket or 0].free()
        elif update is not None:
            update(self.loss)

    # --- compute ------------------------------------------------------------------------------------------------

    def _forward(self, step: Step, micro: MicroBatch) -> None:
        block, chunk, m = step.block or 0, step.action.chunk, step.action.micro_batch
        x = None if block == 0 else self._input(chunk, m)
        self.buffers.ready(chunk, block)
        if micro.training and block in self._recomputed:
            with torch.no_grad():
                y = self.stage(block, x, micro)
            self._tape[block, m] = _Entry(x, self.sink.hold(x) if x is not None else None, None)
        elif micro.training:
            x, y = self._traced(block, x, micro)
            self._tape[block, m] = _Entry(x, None, get_gradient_edge(y))
        else:
            y = self.stage(block, x, micro)
        if self.plan.is_head(block):
            self.loss += y.detach()
        elif block == self.blocks[chunk][-1] and self._holds(chunk + 1):
            self._activations[chunk + 1, m] = y.detach()
        else:
            self._activations[chunk, m] = y.detach()

    def _traced(self, block: int, x: Tensor | None, micro: MicroBatch) -> tuple[Tensor | None, Tensor]:
        x = x.detach().requires_grad_() if x is not None else None
        return x, self.stage(block, x, micro)

    def _recompute(self, step: Step, micro: MicroBatch) -> None:
        """Repeat the forward of a block for what its backward needs; the output is not used."""
        block = step.block or 0
        entry = self._tape[block, step.action.micro_batch]
        self.buffers.ready(step.action.chunk, block)
        with self.sink.again():
            x, y = self._traced(block, entry.x, replace(micro, again=True))
        self._tape[block, step.action.micro_batch] = _Entry(x, None, get_gradient_edge(y))

    def _backward(self, step: Step) -> None:
        block, chunk, m = step.block or 0, step.action.chunk, step.action.micro_batch
        entry = self._tape.pop((block, m))
        gradient = self._loss_gradient() if self.plan.is_head(block) else self._output_gradient(chunk, m)
        self.buffers.ready(chunk, block)
        if not step.split:
            self.buffers.open_gradients(chunk, block)
        self.sink.defer((block, m) if step.split else None)
        assert entry.edge is not None  # its RECOMPUTE step, if any, came before
        _run_backward(entry.edge, gradient)
        self.sink.defer(None)
        if entry.x is None or entry.x.grad is None:
            return
        first = block == self.blocks[chunk][0]
        self._gradients[(chunk - 1, m) if first and self._holds(chunk - 1) else (chunk, m)] = entry.x.grad

    def _loss_gradient(self) -> Tensor:
        return torch.ones_like(self.loss) if self.loss_scale is None else self.loss_scale().to(self.loss.dtype)

    def _input(self, chunk: int, m: int) -> Tensor:
        received = self._receiving.pop(Action(chunk, Op.RECV_F, m), None)
        return self._arrived(received) if received else self._activations.pop((chunk, m))

    def _output_gradient(self, chunk: int, m: int) -> Tensor:
        received = self._receiving.pop(Action(chunk, Op.RECV_B, m), None)
        return self._arrived(received) if received else self._gradients.pop((chunk, m))

    def _holds(self, chunk: int) -> bool:
        return chunk in self.blocks

    # --- pipeline messages ---------------------------------------------------------------------------------------

    @staticmethod
    def _arrived(received: tuple[Tensor, Pending]) -> Tensor:
        tensor, pending = received
        pending.wait()
        return tensor

    def _send(self, action: Action) -> None:
        """Start a send without waiting for it. The tensor is kept only until the message is sent."""
        forward = action.op is Op.SEND_F
        held = self._activations if forward else self._gradients
        tensor = held.pop((action.chunk, action.micro_batch)).contiguous()
        peer = self.plan.holders[action.chunk + (1 if forward else -1)]
        group = self.mesh.edge(self.mesh.coords.pp, peer, p2p_direction(action.op))
        self._sending.append((group.send(tensor), tensor))

    def _receive(self, action: Action) -> None:
        """Post a receive; the step that reads the message waits for it."""
        forward = action.op is Op.RECV_F
        peer = self.plan.holders[action.chunk + (-1 if forward else 1)]
        group = self.mesh.edge(peer, self.mesh.coords.pp, p2p_direction(action.op))
        p = self.plan.config.parallel
        tokens = self.plan.tokens // (p.tp if p.sequence_parallel else 1)
        tensor = torch.empty((tokens, self.plan.config.model.hidden_size), dtype=self.dtype, device=self.device)
        self._receiving[action] = (tensor, group.recv(tensor))
        self.peak_message_bytes = max(self.peak_message_bytes, len(self._receiving) * tensor.nbytes)

    def _free_sent(self) -> None:
        """Release sent messages, so that of a sent activation only its graph edge remains.

        Raise the error of a send that failed.
        """
        under_way = []
        for pending, tensor in self._sending:
            if pending.done():
                pending.wait()
            else:
                under_way.append((pending, tensor))
        self._sending = under_way

    def _finish_sends(self) -> None:
        for pending, _ in self._sending:
            pending.wait()
        self._sending.clear()
