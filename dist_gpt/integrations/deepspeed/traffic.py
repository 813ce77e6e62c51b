"""Traffic of an engine with communication of its own, counted at its backend in the terms of our ledger.

DeepSpeed's comms logger is not used: it adds up latencies over calls, takes the world for the group in bandwidths, does
not distinguish groups, counts a shard for a reduce-scatter, and waits for the device after every call. Here every call
on DeepSpeed's backend is counted by axis, operation and payload (the full tensor, as everywhere), and none is timed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dist_gpt.events import Tally, wire_bytes

START = "start"
"""Phase before training: weights are broadcast, state is laid out."""
CALLS = {
    "all_reduce": ("all_reduce", "tensor", "tensor op group"),
    "all_reduce_coalesced": ("all_reduce", "tensors", "tensors op group"),
    "inference_all_reduce": ("all_reduce", "tensor", "tensor op group"),
    "all_gather": ("all_gather", "tensor_list", "tensor_list tensor group"),
    "all_gather_base": ("all_gather", "output_tensor", "output_tensor input_tensor group"),
    "all_gather_into_tensor": ("all_gather", "output_tensor", "output_tensor input_tensor group"),
    "all_gather_coalesced": ("all_gather", "output_tensors", "output_tensors input_tensors group"),
    "reduce_scatter": ("reduce_scatter", "input_list", "output input_list op group"),
    "reduce_scatter_tensor": ("reduce_scatter", "input_tensor", "output_tensor input_tensor op group"),
    "all_to_all_single": ("all_to_all", "input", "output input output_split_sizes input_split_sizes group"),
    "all_to_all": ("all_to_all", "input_tensor_list", "output_tensor_list input_tensor_list group"),
    "broadcast": ("broadcast", "tensor", "tensor src group"),
    "reduce": ("reduce", "tensor", "tensor dst op group"),
    "barrier": ("barrier", "", "group"),
}
"""Backend call -> our operation, the argument that is the full tensor or its pieces, and the first parameters."""
REDUCE = "reduce"


class Traffic:
    """Calls and bytes by phase, axis and operation.

    `axes`: id of a process group -> its axis (all other groups are the world); `sizes`: number of ranks by axis.
    """

    def __init__(self, axes: Mapping[int, str], sizes: Mapping[str, int]) -> None:
        self.axes, self.sizes = axes, sizes
        self.phase = START
        self.counts: dict[str, dict[tuple[str, str], Tally]] = defaultdict(lambda: defaultdict(Tally))

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the traffic inside the context under `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def watch(self, backend: Any) -> Any:
        """Return a wrapper of `backend` that counts every call here."""
        return _Watched(backend, self)

    def add(self, group: Any, op: str, payload: int) -> None:
        """Count one call of `payload` bytes; a group of one rank moves nothing."""
        axis = self.axes.get(id(group), "world")
        size = self.sizes[axis]
        if size > 1:
            # a reduction to one rank: on a ring, all ranks but one send the tensor once
            wire = (size - 1) * payload // size if op == REDUCE else wire_bytes(op, payload, size)
            self.counts[self.phase][axis, op].add(1, payload, wire)

    def document(self) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
        """Return {phase: {axis: {op: {calls, payload_bytes, wire_bytes}}}}."""
        found: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
        for phase, tallies in self.counts.items():
            for (axis, op), tally in sorted(tallies.items()):
                found.setdefault(phase, {}).setdefault(axis, {})[op] = tally.as_dict()
        return found


class _Watched:
    """Wrapper of DeepSpeed's backend that counts collectives and forwards everything to it."""

    def __init__(self, backend: Any, traffic: Traffic) -> None:
        self._backend = backend
        for name, (op, whole, parameters) in CALLS.items():
            setattr(self, name, _counted(getattr(backend, name), traffic, op, whole, parameters.split()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def _counted(
    call: Callable[..., Any], traffic: Traffic, op: str, whole: str, parameters: list[str]
) -> Callable[..., Any]:
    def counted(*args: Any, **words: Any) -> Any:
        given = {**dict(zip(parameters, args, strict=False)), **words}
        traffic.add(given.get("group"), op, _bytes(given.get(whole, [])))
        return call(*args, **words)

    return counted


def _bytes(whole: Any) -> int:
    return whole.nbytes if isinstance(whole, Tensor) else sum(piece.nbytes for piece in whole)
