"""Compute ports that are the same on all ranks of a job, and find free ports."""

from __future__ import annotations

import hashlib
import socket

FIRST, COUNT = 20000, 12768
"""20000 to 32767: below Linux's ports for outgoing connections (32768 to 60999), above the well-known ones."""


def port_of(job_id: str, step_id: str = "0") -> int:
    """Return the port of a job's step: the same on every rank, most likely another for another job or a restart."""
    digest = hashlib.sha256(f"{job_id}.{step_id}".encode()).digest()
    return FIRST + int.from_bytes(digest[:8], "big") % COUNT


def free_port(host: str, seed: str = "") -> int:
    """Return a port that is free at `host` now, if possible in our range. Raise OSError if `host` is not ours."""
    for attempt in range(64):
        port = port_of(seed, str(attempt))
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)  # with SO_REUSEADDR two may bind, only one may listen
            except OSError as error:
                if error.errno in (98, 48, 13):  # in use (Linux, macOS), not allowed
                    continue
                raise
            return port
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])
