"""One rank's output to two places: its log and the launcher's own stream."""

from __future__ import annotations

import codecs
import os
import re
import threading
from pathlib import Path
from typing import IO, TextIO

REDRAWN = b"\r\x1b[2K"
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"  # the cursor is hidden exactly while a progress bar is drawn
CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\r")
CLOSE_S = 2.0
FOLLOW_S = 0.2


def plain(line: bytes) -> bytes:
    """A line as it stood on the terminal when it was finished: redrawn progress bars and colours left out."""
    return CONTROL.sub(b"", line.rpartition(REDRAWN)[2])


class Tee:
    """Copies `source` until its end: chunks to `live` as they come, finished lines to `log` without control codes."""

    def __init__(self, source: IO[bytes], log: Path, live: TextIO) -> None:
        self.source = source
        self.log = log
        self.live: TextIO | None = live
        self.told = False  # that the log cannot be written
        self.thread = threading.Thread(target=self._copy, name="tee", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Wait for the rest; not for ever, since a stray process may hold the pipe open."""
        self.thread.join(CLOSE_S)

    def _copy(self) -> None:
        """To the end of `source`, whatever becomes of the log: a rank whose pipe closes would fail for that."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pending, bar = b"", False
        with self.source:
            while chunk := os.read(self.source.fileno(), 65536):
                self._show(decoder.decode(chunk))
                if HIDE in chunk or SHOW in chunk:
                    bar = chunk.rfind(HIDE) > chunk.rfind(SHOW)
                *lines, pending = (pending + chunk).split(b"\n")
                if lines:
                    self._write(b"".join(plain(line) + b"\n" for line in lines))
            if bar:  # the rank was killed: take its bar away
                self._show((REDRAWN + SHOW).decode())
            elif text := plain(pending):
                self._write(text + b"\n")

    def _write(self, text: bytes) -> None:
        try:
            with open(self.log, "ab", buffering=0) as log:
                log.write(text)
        except OSError as error:
            if not self.told:
                self.told = True
                self._show(f"{self.log} cannot be written: {error.strerror}; what follows is lost there\n")

    def _show(self, text: str) -> None:
        if self.live is None:
            return
        try:
            self.live.write(text)
            self.live.flush()
        except (OSError, ValueError):  # `| head` left, or the stream is closed: the log goes on
            self.live = None


class Follow:
    """Shows what another process appends to `log`, from byte `start` on, as it comes."""

    def __init__(self, log: Path, start: int, live: TextIO) -> None:
        self.log, self.position, self.live = log, start, live
        self.over = threading.Event()
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.thread = threading.Thread(target=self._run, name="follow", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Show the rest and stop."""
        self.over.set()
        self.thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self.over.wait(FOLLOW_S):
            self._show()
        self._show()

    def _show(self) -> None:
        try:
            with open(self.log, "rb") as file:
                file.seek(self.position)
                chunk = file.read()
            self.position += len(chunk)
            self.live.write(self.decoder.decode(chunk))
            self.live.flush()
        except (OSError, ValueError):  # not there yet, or nobody reads any more
            return
