"""Send heartbeats with this rank's position to the launcher's watch, twice a second. Torch-free.

    pulse = Pulse.from_environ(stop)   # does nothing if DIST_GPT_WATCH_FD is not set
    pulse.follow(ledger)               # as soon as there is a ledger: beats then give the rank's position
    pulse.failed(error); pulse.bye(code); pulse.close()

A separate thread sends beats on the socket that said hello and obeys the launcher
(launch/monitor/heartbeat_server.py): stop (at the next step boundary), leave (exit at once), probe (try to reach other
hosts). A rank that loses its launcher must not hold its node: it exits at once or, while it trains and can save
(`can_save`), requests a stop, so that all ranks save at the next step boundary and exit. Time in which this process was
suspended does not count. Messages are one JSON object per line of at most MAX_LINE bytes.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Protocol

from dist_gpt.awake import AwakeClock, is_silent
from dist_gpt.protocol import BAD_INPUT, MAX_ERROR, MAX_LINE, SILENCE, WATCH_FD

if TYPE_CHECKING:
    from dist_gpt.comm.ledger import Ledger

SILENCE_S = 30.0
BEAT_S = 0.5
PROBE_S = 3.0
SEND_S = 0.8
"""Longest time that sending a message may take; the socket's buffer holds hundreds of messages."""
ABOUT_OTHERS = ("RendezvousError", "DistError")
"""Errors caused by other ranks, by name since this module is torch-free; DistError is torch.distributed's."""
_ANSWERS = (0, errno.ECONNREFUSED)
STARTING: dict[str, Any] = {
    "step": None,
    "phase": "starting",
    "action": "",
    "state": "computing",
    "counts": [],
    "calls": 0,
}
"""Position of a rank that has no ledger yet."""


class Wish(Protocol):
    """Receiver of a request to stop, such as dist_gpt.train.preemption.Stop."""

    def request(self, why: str) -> None:
        """Request a stop for the reason `why`."""


class Pulse:
    """Heartbeat of one rank. No method raises, or blocks longer than a second."""

    def __init__(self, stop: Wish, line: socket.socket | None, silence_s: float = SILENCE_S) -> None:
        self.stop, self.line, self.silence_s = stop, line, silence_s
        self.ledger: Ledger | None = None
        self.record: Callable[[BaseException], None] = lambda error: None  # stores why this rank gives up
        self.clock = AwakeClock()
        self.heard = self.clock.now()
        self._grace_s: float | None = None  # for a save without the launcher; None: this rank cannot save
        self._lost_at: float | None = None
        self._writing = Lock()
        self._leaving = False  # after failed or bye: a launcher that hangs up is then expected
        self._over = Event()
        self._text = b""
        self._thread: Thread | None = None
        self._door: socket.socket | None = None
        if line is not None:
            line.settimeout(SEND_S)
            here, there = line.getsockname()[0], line.getpeername()
            self.launcher = f"{there[0]}:{there[1]}"
            self._door = _door(here)
            self._thread = Thread(target=self._run, name="pulse", daemon=True)
            self._thread.start()

    @classmethod
    def from_environ(cls, stop: Wish, environ: MutableMapping[str, str] = os.environ) -> Pulse:
        """Return a pulse that takes over the socket named in `environ`; if none is named, one that does nothing."""
        number = environ.pop(WATCH_FD, None)
        try:
            line = socket.socket(fileno=int(number)) if number is not None else None
            return cls(stop, line, float(environ.get(SILENCE, SILENCE_S)))
        except (OSError, ValueError) as error:
            print(f"no heartbeat: {WATCH_FD}={number}: {error}", file=sys.stderr, flush=True)
            return cls(stop, None)

    # --- messages of the rank -----------------------------------------------------------------------------------

    def follow(self, ledger: Ledger) -> None:
        """Send the groups of `ledger`, and from now on its position with each beat."""
        self.ledger = ledger
        port = self._door.getsockname()[1] if self._door is not None else 0
        self._send({"channels": [[axis, short(ranks), way] for axis, ranks, way in ledger.groups], "port": port})

    def can_save(self, grace_s: float) -> None:
        """Note that a stop now ends in a checkpoint, for which a rank that lost its launcher has `grace_s` seconds."""
        self._grace_s = grace_s

    def _position(self) -> dict[str, Any]:
        return self.ledger.position() if self.ledger is not None else STARTING

    def failed(self, error: BaseException) -> None:
        """Report that this rank fails with `error`; inside a collective another rank is the likely cause."""
        text = f"{type(error).__name__}: {error}"[:MAX_ERROR]
        self._leaving = True
        waited = self.ledger is not None and self.ledger.in_collective
        inside = waited or any(kind.__name__ in ABOUT_OTHERS for kind in type(error).__mro__)
        code = BAD_INPUT if any(kind.__name__ == "ConfigError" for kind in type(error).__mro__) else 1
        self._send({"failed": {"error": text, "inside": inside, "position": self._position(), "code": code}})

    def bye(self, code: int) -> None:
        """Report that this rank exits with exit code `code`."""
        self._leaving = True
        self._send({"bye": {"code": code}})

    def close(self) -> None:
        """Close the connection. Without `failed` or `bye` before, the launcher considers this rank dead."""
        self._leaving = True
        self._over.set()
        if self._thread is not None:
            self._thread.join(SEND_S)
        for link in (self.line, self._door):
            if link is not None:
                with suppress(OSError):
                    link.close()

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        assert self.line is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self.line, selectors.EVENT_READ)
            if self._door is not None:
                ready.register(self._door, selectors.EVENT_READ)
            beat = self.clock.now()
            while not self._over.is_set():
                now = self.clock.now()
                if self._is_silent(now):
                    self._lost("the link to its host is down, or the launcher has died")
                if self._is_late(now):
                    self._give_up(f"no checkpoint within {self._grace_s:.0f} s of losing the launcher; this rank exits")
                if now >= beat:
                    self._send({"beat": self._position()})
                    beat = now + BEAT_S
                for key, _ in ready.select(max(0.0, min(beat - now, 0.2))):
                    if key.fileobj is self._door:
                        self._knock()
                    elif not self._read():
                        if not self._leaving:
                            self._lost("the connection was closed, so the launcher has died")
                        ready.unregister(self.line)

    def _is_silent(self, now: float) -> bool:
        """Return whether the launcher has been silent for too long, allowing for a recent suspension."""
        excused = self.clock.last.excused_until if self.clock.last is not None else 0.0
        return not self._leaving and self._lost_at is None and is_silent(now, self.heard, excused, self.silence_s)

    def _is_late(self, now: float) -> bool:
        """Return whether this rank should have saved and exited by now."""
        waits = self._lost_at is not None and self._grace_s is not None and not self._leaving
        return waits and now - (self._lost_at or now) > (self._grace_s or 0.0)

    def _read(self) -> bool:
        """Receive and obey messages of the launcher. Return False if the connection is closed."""
        assert self.line is not None
        try:
            data = self.line.recv(MAX_LINE)
        except TimeoutError:
            return True
        except OSError:
            data = b""
        if not data:
            return False
        self.heard = self.clock.now()
        self._lost_at = None  # the launcher is back and supervises the save itself
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            with suppress(ValueError, AttributeError, KeyError, TypeError):
                self._obey(json.loads(line))
        return True

    def _obey(self, word: dict[str, Any]) -> None:
        if word["do"] == "stop":
            self.stop.request("asked by the launcher")
        elif word["do"] == "leave":
            self._leave(f"told to exit by the launcher: {word.get('why', '')}")
        elif word["do"] == "probe":
            Thread(target=self._probe, args=(dict(word["targets"]),), name="probe", daemon=True).start()

    def _probe(self, targets: dict[str, Sequence[Any]]) -> None:
        self._send({"probe": reach(targets)})

    def _knock(self) -> None:
        """Accept and close a connection with which another host tests whether it can reach this one."""
        if self._door is not None:
            with suppress(OSError):
                self._door.accept()[0].close()

    def _lost(self, why: str) -> None:
        """Have all ranks save and exit, as the launcher is lost; exit alone if nothing can be saved."""
        since = self.clock.now() - self.heard
        when = time.strftime("%H:%M:%S", time.localtime(time.time() - since))
        lost = f"no contact with the launcher at {self.launcher} since {when} ({since:.0f} s): {why}"
        here = socket.gethostname()
        if self._grace_s is None:
            self._give_up(f"{lost}; this rank on {here} exits")
        self._lost_at = self.clock.now()
        self.stop.request(lost)
        with suppress(Exception):
            sys.stderr.write(f"{lost}; the ranks save at the next step boundary and exit ({here})\n")
            sys.stderr.flush()

    def _give_up(self, why: str) -> None:
        """Exit because the launcher is lost; if it is only suspended, it reads the reason later."""
        with suppress(Exception):
            self.record(RuntimeError(why))
        self._send({"failed": {"error": why, "inside": False, "position": self._position(), "code": 1}})
        self._leave(why)

    def _leave(self, why: str) -> None:
        """Print `why` and end this process at once with exit code 1."""
        with suppress(Exception):
            sys.stderr.write(f"{why}\n")
            sys.stderr.flush()
            sys.stdout.flush()
        os._exit(1)

    def _send(self, message: dict[str, Any]) -> None:
        """Send a message as one line. If that fails, drop it and shut down the sending side of the socket."""
        if self.line is None or not self._writing.acquire(timeout=SEND_S):
            return
        try:
            self.line.sendall(json.dumps(message, default=str).encode() + b"\n")
        except (OSError, ValueError):  # `_read` notices if the launcher is gone
            with suppress(OSError):  # half a line may be sent: what follows could not be parsed
                self.line.shutdown(socket.SHUT_WR)
        finally:
            self._writing.release()


def _door(host: str) -> socket.socket | None:
    """Return a listening socket to which other hosts connect to test the link; None if it cannot be opened."""
    try:
        door = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        door.setblocking(False)
        return door
    except OSError:
        return None


def reach(targets: dict[str, Sequence[Any]], timeout_s: float = PROBE_S) -> dict[str, bool]:
    """Return for each host whether its (address, port) answers a TCP connect in `timeout_s`; a refusal is an answer."""
    found = dict.fromkeys(targets, False)
    with selectors.DefaultSelector() as ready:
        for host, (address, port) in targets.items():
            probe = socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET, socket.SOCK_STREAM)
            probe.setblocking(False)
            try:
                code = probe.connect_ex((str(address), int(port)))
            except OSError:  # the address cannot be resolved
                code = errno.EHOSTUNREACH
            if code == errno.EINPROGRESS:
                ready.register(probe, selectors.EVENT_WRITE, host)
            else:
                found[host] = code in _ANSWERS
                probe.close()
        end = time.monotonic() + timeout_s
        while ready.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in ready.select(left):
                assert isinstance(key.fileobj, socket.socket)
                code = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                found[key.data] = code in _ANSWERS
                ready.unregister(key.fileobj)
                key.fileobj.close()
        for key in list(ready.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
    return found


def short(ranks: Sequence[int]) -> Sequence[int] | str:
    """Return `ranks`, or start:stop:step if they are many and regular, since a line is at most MAX_LINE bytes."""
    if len(ranks) < 64:
        return ranks
    regular = range(ranks[0], ranks[-1] + 1, max(1, ranks[1] - ranks[0]))
    return f"{regular.start}:{regular.stop}:{regular.step}" if tuple(regular) == tuple(ranks) else ranks
