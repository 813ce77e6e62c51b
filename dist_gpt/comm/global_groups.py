"""Global process group for an engine that communicates through `torch.distributed` itself (DeepSpeed).

No other part needs one: see `comm.mesh`. It uses the run's own store and the interface of the other groups, and is
destroyed when it is closed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dist_gpt.comm.rendezvous import LOOPBACK, RankEnv, RendezvousError, Store, address_towards, scoped

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class GlobalGroups:
    """Default process group over all ranks of `env`, and groups below it; all ranks open and close it together."""

    def __init__(self, store: Store, env: RankEnv, device: torch.device, timeout_s: float) -> None:
        if dist.is_initialized():
            raise RuntimeError("torch.distributed already has a default process group: use one engine per process")
        self._timeout = timedelta(seconds=timeout_s)
        self._interface = None if device.type == "cuda" else gloo_interface(env)
        with self._bound():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=scoped(store, "global"),
                rank=env.rank,
                world_size=env.world,
                timeout=self._timeout,
                device_id=device if device.type == "cuda" else None,
            )
        self.world = dist.group.WORLD

    def group(self, axis: str, ranks: Sequence[int]) -> Any:
        """Return the process group of `ranks`, which include this one; only its members call it, at the same point."""
        with self._bound():
            return dist.new_group(list(ranks), timeout=self._timeout, use_local_synchronization=True, group_desc=axis)

    @contextmanager
    def _bound(self) -> Iterator[None]:
        """Make gloo listen on one interface alone inside the context; gloo takes it from the environment only."""
        before = os.environ.get(GLOO_INTERFACE)
        if self._interface is not None:
            os.environ[GLOO_INTERFACE] = self._interface
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(GLOO_INTERFACE, None)
            else:
                os.environ[GLOO_INTERFACE] = before

    def close(self) -> None:
        """Destroy all process groups."""
        if dist.is_initialized():
            dist.destroy_process_group()


def gloo_interface(env: RankEnv) -> str:
    """Return the name of the interface that gloo is to use; raise RendezvousError if there is none.

    It is loopback on one node, else what GLOO_SOCKET_IFNAME names, else the one whose route leads to MASTER_ADDR.
    """
    named = os.environ.get(GLOO_INTERFACE, "")
    if named and not env.one_node:
        return named
    address = LOOPBACK if env.one_node else address_towards(env.master_addr, env.master_port)
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address and a.family in (socket.AF_INET, socket.AF_INET6) for a in addresses):
            return name
    raise RendezvousError(f"no network interface has the address {address}; set launch.interface to the one to use")
