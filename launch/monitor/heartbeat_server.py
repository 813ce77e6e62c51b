"""Watch the ranks' heartbeats in the launcher: one TCP server, on one interface, for one attempt of a job.

Every rank connects, proves with the token that it belongs to this job, sends what it found on its node (hello), waits
for "go", and sends heartbeats from then on (dist_gpt/train/heartbeat.py). A message is one line with a JSON object of
at most MAX_LINE bytes. `states()` returns what is known of the ranks; launch.monitor.diagnose interprets it.

A silent rank is sent a message each second: the kernel of a stopped process still acknowledges it, a broken link does
not (Linux's TCP_INFO).
"""

from __future__ import annotations

import errno
import hmac
import json
import secrets
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from dist_gpt.awake import AwakeClock, Suspension, is_silent
from dist_gpt.protocol import MAX_LINE
from launch.monitor.connection import Line, group_ranks, room_for
from launch.monitor.diagnose import QUIET_S, RankState

HELLO_S = 10.0
"""Seconds after which a connection that has not said hello is dropped."""
STRANGERS = 64
"""Open connections that are allowed besides the ranks' without having said hello."""
ASK_S = 1.0
PROBE_S = 5.0
BEAT_S, STAGGER_S = 0.5, 10.0
"""Seconds between two heartbeats of a rank (dist_gpt.train.heartbeat); twice the allowance for stopping the launcher
and its ranks at different times."""
STILL_S = 5.0
"""Seconds without progress after which hosts are asked whether they reach each other; later they may have exited."""
_UNREACHED = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)
Pairs = dict[tuple[str, str], bool]


class Watch:
    """Server that listens on `host` from construction to `close`. Methods may be called from any thread."""

    def __init__(
        self,
        host: str,
        world: int,
        token: str | None = None,
        silence_s: float = 30.0,
        name: str | None = None,
        on_event: Callable[[], object] | None = None,
        clock: AwakeClock | None = None,
    ) -> None:
        """Listen on the one address `host`. Raise OSError if it is not one of this machine's.

        `name`: name of this machine in messages. `on_event` is called on the watch's thread when a rank joins, fails,
        says bye, closes, falls silent or is heard again.
        """
        self.world, self.silence_s = world, silence_s
        self.token = token or secrets.token_hex(16)
        self.name = name or socket.gethostname()
        self._on_event = on_event
        self.clock = clock or AwakeClock()
        self._back: Suspension | None = None
        self._beats: Counter[int] = Counter()  # of each rank since the last suspension of the launcher
        self._lock = threading.Condition()
        self._states = [RankState(rank) for rank in range(world)]
        self._lines: dict[int, Line] = {}
        self._all: set[Line] = set()
        self._was_silent: frozenset[int] = frozenset()
        self._dismissed = self._closing = False
        self._reached: Pairs = {}  # (from, to)
        self._hosts_asked = 0.0
        self._probing: dict[int, str] = {}
        self._groups: dict[tuple[int, ...], tuple[int, ...]] = {}  # one object for all ranks that have the group
        self._accepting = True
        room_for(world + STRANGERS)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family, backlog=max(128, world))
        self._server.setblocking(False)
        self.address = f"{host}:{self._server.getsockname()[1]}"
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._server, selectors.EVENT_READ)
        self._bell, self._ear = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)
        self._ready.register(self._ear, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    # --- time ----------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Return the time on the clock of all states, which leaves out suspensions of this process.

        After a suspension every rank may stay silent for longer, since it may be continued later.
        """
        with self._lock:
            now, last = self.clock.now(), self.clock.last
            if last is not None and last is not self._back:
                self._back = last
                self._beats.clear()
                self._states = [replace(s, excused=last.excused_until) for s in self._states]
            return now

    def ran_on(self) -> bool:
        """Return whether a rank kept beating while the launcher was last suspended.

        It did if more heartbeats have been read since then than it can have sent in that time.
        """
        with self._lock:
            if self._back is None:
                return False
            fresh = 1 + (self.now() - self._back.at) / BEAT_S
            return max(self._beats.values(), default=0) > fresh + min(self._back.seconds, STAGGER_S) / BEAT_S / 2

    # --- for the launcher ----------------------------------------------------------------------------------------

    def states(self) -> list[RankState]:
        """Return what is known of every rank now."""
        with self._lock:
            now = self.now()
            return [replace(s, silent=True) if self._is_silent(s, now) else s for s in self._states]

    def missing(self) -> list[int]:
        """Return the ranks that have not said hello."""
        with self._lock:
            return [state.rank for state in self._states if state.hello is None]

    def go(self) -> None:
        """Let the ranks start."""
        self._tell({"do": "go"})

    def ask_stop(self) -> None:
        """Ask the ranks to save at the next step boundary and exit."""
        self._tell({"do": "stop"})

    def leave(self, why: str) -> None:
        """Tell the ranks to exit at once; from now on a closed connection is not a death."""
        with self._lock:
            self._dismissed = True
            self._states = [s if s.closed is not None else replace(s, dismissed=True) for s in self._states]
        self._tell({"do": "leave", "why": why})

    def probe(self, timeout_s: float = PROBE_S) -> Pairs:
        """Ask the hosts now, for at most `timeout_s` seconds, and return which of them reach each other.

        The result is {(host, host): reached}, each pair in alphabetical order, without pairs that could not be tried. A
        missing answer is as last heard since the job made progress.
        """
        with self._lock:
            self._ask_hosts(self.now())
            self._ring()
            self._lock.wait_for(lambda: not self._probing, timeout_s)
            self._probing = {}
            pairs: Pairs = {}
            for way, reached in self._reached.items():
                pair = (min(way), max(way))
                pairs[pair] = reached and pairs.get(pair, True)
            return pairs

    def close(self) -> None:
        """Close all connections and stop listening."""
        with self._lock:
            self._closing = True
        self._ring()
        self._thread.join(5.0)

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        turn = 0.0
        while not self._closing:
            for key, mask in self._ready.select(0.2):
                with self._lock:
                    self._serve(key, mask)
            with self._lock:
                now = self.now()
                for line in self._all:
                    if line.unsent:
                        line.flush()
                if now - turn >= ASK_S:
                    turn = now
                    self._look_after(now)
        with self._lock:
            for line in list(self._all):
                line.flush()
                self._drop(line)
            self._server.close()
            self._ready.close()
            self._bell.close()
            self._ear.close()

    def _serve(self, key: selectors.SelectorKey, mask: int) -> None:
        if key.fileobj is self._ear:
            with suppress(OSError):
                self._ear.recv(4096)
        elif key.fileobj is self._server:
            self._accept()
        elif key.data in self._all and mask & selectors.EVENT_READ:
            self._receive(key.data)

    def _accept(self) -> None:
        if len(self._all) - len(self._lines) >= self.world + STRANGERS:
            self._drop_a_stranger()
        try:
            link, address = self._server.accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                return  # the other end hung up while it waited
            if not self._drop_a_stranger():  # it stays queued: asking again at once would keep a core busy
                self._ready.unregister(self._server)
                self._accepting = False
            return
        with suppress(OSError):
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line = Line(link, str(address[0]), self.now())
            self._all.add(line)
            self._ready.register(link, selectors.EVENT_READ, line)

    def _drop_a_stranger(self) -> bool:
        """Drop the oldest connection without a hello, which ranks send at once; return whether there was one."""
        oldest = min((line for line in self._all if line.rank is None), key=lambda line: line.since, default=None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    def _receive(self, line: Line) -> None:
        try:
            data = line.socket.recv(MAX_LINE)
        except BlockingIOError:
            return
        except OSError as error:
            self._closed(line, error.errno in _UNREACHED)
            return
        if not data:
            self._closed(line, False)
            return
        *lines, line.read = (line.read + data).split(b"\n")
        for text in lines:
            if line in self._all:
                self._understand(line, text)
        if len(line.read) > MAX_LINE and line in self._all:
            self._closed(line, False)

    def _understand(self, line: Line, text: bytes) -> None:
        """Handle one line; a stranger or a malformed line ends the connection."""
        try:
            if len(text) > MAX_LINE:
                raise ValueError("too long")
            message = json.loads(text)
            if line.rank is None:
                self._hello(line, message["hello"])
            else:
                self._heard(line, line.rank, message)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._closed(line, False)

    def _hello(self, line: Line, hello: dict[str, Any]) -> None:
        if not hmac.compare_digest(str(hello["token"]).encode(), self.token.encode()):
            raise ValueError("a stranger")
        rank, now = int(hello["rank"]), self.now()
        hello = {key: value for key, value in hello.items() if key != "token"}
        if not 0 <= rank < self.world:
            first = self._states[0]  # noted at rank 0: a process was started with another world
            self._states[0] = replace(first, rivals=(*first.rivals, hello))
            raise ValueError("no rank of this job")
        state = self._states[rank]
        if state.hello is not None:
            self._states[rank] = replace(state, rivals=(*state.rivals, hello))
            line.rank = -1
        else:
            line.rank = rank
            self._lines[rank] = line
            arrived = None if now < state.excused else time.time()  # it may have waited to be read
            self._states[rank] = replace(
                state, hello=hello, joined=now, heard=now, arrived=arrived, dismissed=self._dismissed
            )
            if self._dismissed:
                line.put({"do": "leave", "why": "the job has ended"})
        self._event()

    def _heard(self, line: Line, rank: int, message: dict[str, Any]) -> None:
        if rank < 0:
            return
        now = self.now()
        state = replace(self._states[rank], heard=now, unacknowledged=None)
        line.asked = None
        if "beat" in message:
            position = dict(message["beat"])
            moved = state.moved if position == state.position and state.moved is not None else now
            state = replace(state, position=position, moved=moved)
            self._beats[rank] += 1
            line.put({"do": "ok"})
        elif "channels" in message:
            line.port = int(message.get("port", 0))
            groups = tuple((str(axis), group_ranks(ranks), str(way)) for axis, ranks, way in message["channels"])
            shared = tuple((axis, self._groups.setdefault(ranks, ranks), way) for axis, ranks, way in groups)
            state = replace(state, channels=shared)
        elif "failed" in message:
            failed = dict(message["failed"])
            self._freeze()
            last = failed.get("position") or state.position
            known = any(s.failed is not None for s in self._states)
            then = self._states[rank].then if known else last  # the first failure knows its position best
            state = replace(state, failed=failed, failed_at=now, position=last, then=then)
        elif "bye" in message:
            state = replace(state, bye=int(message["bye"]["code"]))
        elif "probe" in message and rank in self._probing:
            here = self._probing.pop(rank)
            for there, reached in dict(message["probe"]).items():
                self._reached[here, str(there)] = bool(reached)
        self._states[rank] = state
        if "beat" not in message:
            self._event()

    def _freeze(self) -> None:
        """Keep every rank's position before the first failure is noted: what ranks do later is its consequence."""
        if not any(s.then is not None for s in self._states):
            self._states = [replace(s, then=s.position) for s in self._states]

    def _closed(self, line: Line, unreached: bool) -> None:
        """Note that a connection ended; `unreached`: not by its other end."""
        rank = line.rank
        self._drop(line)
        if rank is None or rank < 0:
            return
        state = self._states[rank]
        if unreached:
            state = replace(state, unacknowledged=True)
        else:
            state = replace(state, closed=self.now(), dismissed=state.dismissed or self._dismissed)
        self._probing.pop(rank, None)
        self._states[rank] = state
        self._event()

    def _drop(self, line: Line) -> None:
        self._all.discard(line)
        if line.rank is not None and self._lines.get(line.rank) is line:
            del self._lines[line.rank]
        with suppress(KeyError, ValueError):
            self._ready.unregister(line.socket)
        line.socket.close()

    def _look_after(self, now: float) -> None:
        """Drop connections that never say hello; message silent ranks and note whether their kernels acknowledge."""
        if not self._accepting:
            self._accepting = True
            self._ready.register(self._server, selectors.EVENT_READ)
        for line in list(self._all):
            if line.rank is None and now - line.since > HELLO_S:
                self._drop(line)
        for rank, line in list(self._lines.items()):
            state = self._states[rank]
            if state.position is None or now - (state.heard or now) < QUIET_S / 2:
                continue
            if line.asked is not None:  # what was sent a second ago should have arrived
                self._states[rank] = replace(state, unacknowledged=line.unacknowledged())
            line.asked = now
            line.put({"do": "ok"})
        self._look_at_hosts(now)
        silent = frozenset(s.rank for s in self._states if self._is_silent(s, now))
        if silent != self._was_silent:
            self._was_silent = silent
            self._event()

    def _look_at_hosts(self, now: float) -> None:
        """Ask the hosts when the job makes no progress; forget their answers when it does again."""
        moved = [s.moved for s in self._states if s.moved is not None]
        if any(s.failed is not None or s.died for s in self._states) or not moved:
            return
        if now - max(moved) < STILL_S:
            self._reached = {}
        elif now - self._hosts_asked > STILL_S:
            self._ask_hosts(now)

    def _ask_hosts(self, now: float) -> None:
        """Ask the first rank on every host that sends heartbeats to try to reach the other hosts."""
        first: dict[str, Line] = {}
        for rank, line in sorted(self._lines.items()):
            if line.port and not self._states[rank].quiet(now):
                first.setdefault(self._states[rank].host, line)
        for rank, line in sorted(self._lines.items()):  # hosts that are entirely silent can be tried all the same
            if line.port:
                first.setdefault(self._states[rank].host, line)
        self._probing, self._hosts_asked = {}, now
        for host, line in first.items():
            targets = {other: [there.address, there.port] for other, there in first.items() if other != host}
            if targets and line.rank is not None:
                line.put({"do": "probe", "targets": targets})
                if not self._states[line.rank].quiet(now):
                    self._probing[line.rank] = host

    def _is_silent(self, state: RankState, now: float) -> bool:
        begun = state.position is not None and state.closed is None and not state.over and state.failed is None
        return begun and is_silent(now, state.heard or now, state.excused, self.silence_s)

    # --- sending -------------------------------------------------------------------------------------------------

    def _tell(self, word: Mapping[str, Any]) -> None:
        with self._lock:
            for line in list(self._lines.values()):
                line.put(word)
            for line in [line for line in self._all if line.rank == -1]:
                line.put(word if word["do"] == "leave" else {"do": "leave", "why": "this rank is already connected"})
        self._ring()

    def _event(self) -> None:
        self._lock.notify_all()
        if self._on_event is not None:
            self._on_event()

    def _ring(self) -> None:
        with suppress(OSError):
            self._bell.send(b".")
