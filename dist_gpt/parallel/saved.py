"""Bytes that a step of the list keeps for later steps, in tensors saved by autograd and by queued weight jobs.

The dry run counts them on meta tensors, the profile on real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SavedBytes:
    """Live bytes of storages kept for later steps, and their peak; `parameters` and their views are not counted."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._state = {t.untyped_storage()._cdata for t in parameters}
        self._users: dict[int, int] = {}
        self.live = self.peak = 0

    @contextmanager
    def counting(self) -> Iterator[SavedBytes]:
        """Count what autograd saves inside the context."""
        with torch.autograd.graph.saved_tensors_hooks(self.hold, lambda held: held.tensor):
            yield self

    def mark(self) -> None:
        """End a step: include the bytes that are live now in the peak."""
        self.peak = max(self.peak, self.live)

    def hold(self, tensor: Tensor) -> _Held:
        """Count `tensor` until the returned object is dropped."""
        return _Held(self, tensor)

    def add(self, tensor: Tensor) -> None:
        """Add a user of the storage of `tensor`; only the first one adds bytes."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._state:
            return
        self._users[storage._cdata] = self._users.get(storage._cdata, 0) + 1
        if self._users[storage._cdata] == 1:
            self.live += storage.nbytes()

    def remove(self, tensor: Tensor) -> None:
        """Remove a user of the storage of `tensor`; the last one removes its bytes."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._state:
            return
        self._users[storage._cdata] -= 1
        if not self._users[storage._cdata]:
            del self._users[storage._cdata]
            self.live -= storage.nbytes()


class _Held:
    """Saved tensor that is counted until autograd or the job drops it."""

    def __init__(self, owner: SavedBytes, tensor: Tensor) -> None:
        self.owner, self.tensor = owner, tensor
        owner.add(tensor)

    def __del__(self) -> None:
        self.owner.remove(self.tensor)
