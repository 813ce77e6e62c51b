"""Connection of the watch: data read, data not sent yet, and whether the other end acknowledges."""

from __future__ import annotations

import json
import resource
import socket
import struct
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

SEND_BUFFER = 1 << 20
"""Bytes that may wait for the other end to read; beyond that, all of them are dropped."""
OTHER_FILES = 128
"""Number of files that a launcher opens besides the connections of its ranks."""
TCP_INFO_BYTES, UNACKED_AT = 104, 24  # struct tcp_info of linux/tcp.h: tcpi_unacked, u32


@dataclass(eq=False)
class Line:
    """Connection with a non-blocking socket."""

    socket: socket.socket
    address: str
    """Address of the other end."""
    since: float
    rank: int | None = None
    """None until it has said hello; -1: its rank has said hello already."""
    read: bytes = b""
    unsent: bytearray = field(default_factory=bytearray)
    port: int = 0
    """Port on which the other end can be probed."""
    asked: float | None = None
    """Time since which a message to a silent rank has had no answer; None: there is none."""

    def put(self, word: Mapping[str, Any]) -> None:
        """Send `word` as soon as the connection takes it."""
        self.unsent += json.dumps(word).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what the connection takes, without blocking; a lost connection is noticed when it is read."""
        with suppress(OSError):
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent)]
        if len(self.unsent) > SEND_BUFFER:
            self.unsent.clear()

    def unacknowledged(self) -> bool | None:
        """Return whether sent data is not acknowledged yet; None if the system does not tell."""
        if not sys.platform.startswith("linux"):
            return None
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            return bool(struct.unpack_from("=I", info, UNACKED_AT)[0])
        except (OSError, struct.error):
            return None


def room_for(lines: int) -> None:
    """Let this process open `lines` more connections, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = lines + OTHER_FILES
    if soft == resource.RLIM_INFINITY or want <= soft:
        return
    with suppress(OSError, ValueError):
        most = want if hard == resource.RLIM_INFINITY else min(want, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def group_ranks(told: str | Iterable[int]) -> tuple[int, ...]:
    """Return the ranks of a group, sent as a list or as start:stop:step. Raise ValueError for absurd sizes."""
    if isinstance(told, str):
        start, stop, step = (int(part) for part in told.split(":"))
        if not 0 <= start <= stop <= 1 << 20:
            raise ValueError(told)
        return tuple(range(start, stop, step))
    return tuple(int(rank) for rank in told)
