"""Measured memory of one training step, in the categories of the plan, and the allocator's own peak."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dist_gpt.heap import Heap
from dist_gpt.parallel.saved import SavedBytes
from dist_gpt.plan.count import memory_document
from dist_gpt.replica import Rank


class MemoryWatch:
    """Memory measurement of one step of `rank`.

    On a CPU the heap in use is read between the entries of the step list, less what was in use before the model was
    built (`baseline`). On a GPU the allocator keeps its peak.
    """

    def __init__(self, rank: Rank, baseline: int | None) -> None:
        self.rank = rank
        self.cuda = rank.device.type == "cuda"
        self.heap, self.baseline = Heap(), baseline
        flats = rank.buffers.buckets
        self.saved = SavedBytes([b.parameters for b in flats] + [b.gradients for b in flats])
        self.peak: int | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the step that is trained inside the context."""
        executor, sink = self.rank.executor, self.rank.sink
        before = executor.after_step, sink.hold
        executor.after_step, sink.hold = self._look, self.saved.hold
        executor.peak_message_bytes = 0
        self.rank.mesh.shard.peak_scratch_bytes = 0
        self.rank.buffers.tally.peak = self.rank.buffers.tally.live
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.rank.device)
        try:
            with self.saved.counting():
                yield
        finally:
            executor.after_step, sink.hold = before
        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated(self.rank.device)

    def _look(self) -> None:
        self.saved.mark()
        if self.cuda:
            return
        in_use = self.heap.bytes_in_use()
        if in_use is not None and self.baseline is not None:
            self.peak = max(self.peak or 0, in_use - self.baseline)

    def fact(self, step: int) -> dict[str, Any]:
        """Return the row of the events file."""
        source = "cuda" if self.cuda else "mallinfo2" if self.peak is not None else None
        return {
            "step": step,
            "parts": parts(self.rank, self.saved.peak, self.rank.mesh.shard.peak_scratch_bytes),
            "peak_bytes": self.peak,
            "source": source,
            "rss_bytes": peak_rss_bytes(),
        }


def held_now(rank: Rank) -> dict[str, int]:
    """Return the bytes that `rank` holds now, without activations, by the plan's categories.

    The result is empty if another engine trains the rank.
    """
    if rank.config.optim.engine != "native":
        return {}
    found = parts(rank, 0, rank.mesh.shard.scratch_bytes)
    transient = rank.buffers.tally
    return {**found, "buffers": found["buffers"] - transient.peak + transient.live}


def parts(rank: Rank, activations: int, scratch: int) -> dict[str, int]:
    """Return the bytes `rank` holds, by the plan's categories; `scratch` are receive buffers of running reductions."""
    flats = rank.buffers.buckets
    return memory_document(
        parameters=sum((b.parameters if b.keeps_parameters else b.parameter_shard).nbytes for b in flats),
        gradients=sum((b.gradients if b.keeps_gradients else b.gradient_shard).nbytes for b in flats),
        optimizer=0 if rank.optimizer.offloaded else rank.optimizer.state_bytes,
        activations=activations,
        buffers=rank.executor.peak_message_bytes + rank.buffers.tally.peak + scratch,
        host=rank.optimizer.state_bytes if rank.optimizer.offloaded else 0,
    )


def peak_rss_bytes() -> int:
    """Return the largest resident set size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
