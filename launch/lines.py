"""One connection of the watch: what was read, what is not sent yet, and whether the other end acknowledges."""

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
"""Bytes that the other end may leave unread before nothing more is kept for it."""
OTHER_FILES = 128
"""Open files of a launcher beside the connections of its ranks."""
TCP_INFO_BYTES, UNACKED_AT = 104, 24  # struct tcp_info of linux/tcp.h: tcpi_unacked, u32


@dataclass(eq=False)
class Line:
    """A connection; its socket does not block."""

    socket: socket.socket
    address: str
    """Of the other end."""
    since: float
    rank: int | None = None
    """None as long as it has not said who it is; -1: a rank that is here already."""
    read: bytes = b""
    unsent: bytearray = field(default_factory=bytearray)
    port: int = 0
    """On which the other end can be probed."""
    asked: float | None = None
    """Since when a word to a silent rank is out."""

    def put(self, word: Mapping[str, Any]) -> None:
        """Send `word`, as soon as the connection takes it."""
        self.unsent += json.dumps(word).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what the connection takes; never blocks. That it is lost shows when it is read."""
        with suppress(OSError):
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent)]
        if len(self.unsent) > SEND_BUFFER:
            self.unsent.clear()

    def unacknowledged(self) -> bool | None:
        """Whether something that was sent is not acknowledged; None where the system does not tell."""
        if not sys.platform.startswith("linux"):
            return None
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            return bool(struct.unpack_from("=I", info, UNACKED_AT)[0])
        except (OSError, struct.error):
            return None


def room_for(lines: int) -> None:
    """Let this process open so many connections beside what it has, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = lines + OTHER_FILES
    if soft == resource.RLIM_INFINITY or want <= soft:
        return
    with suppress(OSError, ValueError):
        most = want if hard == resource.RLIM_INFINITY else min(want, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def group_ranks(told: str | Iterable[int]) -> tuple[int, ...]:
    """Ranks of a group as a rank writes them: a list, or start:stop:step. Raises ValueError for absurd sizes."""
    if isinstance(told, str):
        start, stop, step = (int(part) for part in told.split(":"))
        if not 0 <= start <= stop <= 1 << 20:
            raise ValueError(told)
        return tuple(range(start, stop, step))
    return tuple(int(rank) for rank in told)
