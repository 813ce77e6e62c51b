"""Copy a rank's output to its log and to the launcher's own stream."""

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
    """Return a line as it last stood on the terminal, without redrawn progress bars and colours."""
    return CONTROL.sub(b"", line.rpartition(REDRAWN)[2])


class Tee:
    """Copies `source` until its end: chunks to `live` as they come, finished lines to `log` without control codes."""

    def __init__(self, source: IO[bytes], log: Path, live: TextIO) -> None:
        self.source = source
        self.log = log
        self.live: TextIO | None = live
        self.told = False  # whether a log that cannot be written was reported
        self.thread = threading.Thread(target=self._copy, name="tee", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Wait for the rest, at most CLOSE_S seconds, since a stray process may hold the pipe open."""
        self.thread.join(CLOSE_S)

    def _copy(self) -> None:
        """Copy to the end of `source` even if the log cannot be written: a rank whose pipe closes would fail."""
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
            if bar:  # the rank was killed: erase its bar
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
                self._show(f"cannot write {self.log}: {error.strerror}; further output is missing from it\n")

    def _show(self, text: str) -> None:
        if self.live is None:
            return
        try:
            self.live.write(text)
            self.live.flush()
        except (OSError, ValueError):  # `| head` has exited, or the stream is closed: the log continues
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
        except (OSError, ValueError):  # no log yet, or the stream is closed
            return
