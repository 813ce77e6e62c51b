"""Read tokens from a file with pread, and check them while they are read.

A memory map would be simpler, but if its file is truncated, SIGBUS kills the process without a message. Here a short
read is an error that names the file, and a change of the file during the run is detected.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_gpt.data.corpus import DataError

BLOCK, BLOCKS = 4096, 64
WHOLE = 4 << 20  # bytes up to which a file is digested whole, not in blocks
RECHECK_WHOLE = 1 << 30  # bytes up to which a file is read whole again after its times changed
SCAN_BYTES = 16 << 20


@dataclass(frozen=True)
class Span:
    """Tokens [offset, offset + count) of a file; the offset counts tokens and includes the header."""

    path: Path
    dtype: str
    offset: int
    count: int


class Tokens:
    """Tokens of a span, (count,), read-only. Slices are read from the file.

    `sample` and `sha256` are digests taken when the data were prepared; "" if there are none yet.
    """

    def __init__(self, span: Span, sample: str = "", sha256: str = "") -> None:
        self.path, self.dtype, self._count = span.path, np.dtype(span.dtype), span.count
        self._first = span.offset * self.dtype.itemsize
        self._sample, self._sha256 = sample, sha256
        self._file = os.open(span.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._seen = self._stamp()
        stop = self._first + self.nbytes
        if self._seen[0] < stop:
            raise ValueError(f"{span.path} has {self._seen[0]} bytes, but its tokens end at byte {stop}")
        if sample and self.sample() != sample:
            raise ValueError(f"{span.path} does not hold the tokens that were prepared")

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Size of the tokens in bytes."""
        return self._count * self.dtype.itemsize

    def __getitem__(self, key: slice) -> NDArray[Any]:
        start, stop, step = key.indices(self._count)
        if step != 1:
            raise IndexError("tokens are read in slices of step 1")
        return self.read(start, max(stop - start, 0))

    def __iter__(self) -> Iterator[Any]:
        step = SCAN_BYTES // self.dtype.itemsize
        for first in range(0, self._count, step):
            yield from self.read(first, min(step, self._count - first))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.read(0, self._count).astype(dtype or self.dtype)

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Return tokens [start, start + count), (count,). Raise DataError if the file ends before them."""
        width = self.dtype.itemsize
        return np.frombuffer(self._bytes(start * width, count * width), dtype=self.dtype)

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Return the tokens [start, start + length) of each start, (starts, length).

        Raise DataError if the file was truncated, or rewritten with other tokens, since it was opened.
        """
        found = np.empty((len(starts), length), dtype=np.int64)
        for row, start in enumerate(starts.tolist()):
            found[row] = self.read(start, length)
        self.refuse_changes()
        return found

    def refuse_changes(self) -> None:
        """Raise DataError if the file holds other tokens than when it was opened.

        Size and times are compared first. If they have changed, the contents decide: up to 1 GiB of tokens are
        read again in full; of more, blocks are compared.
        """
        stamp = self._stamp()
        if stamp == self._seen:
            return
        whole = bool(self._sha256) and self.nbytes <= RECHECK_WHOLE
        same = self.sha256() == self._sha256 if whole else bool(self._sample) and self.sample() == self._sample
        if not same:
            raise self._changed("it was rewritten")
        self._seen = stamp

    def sample(self) -> str:
        """Return a digest of blocks spread over the tokens, both ends included, or of all tokens up to 4 MiB."""
        size = self.nbytes
        digest = hashlib.sha256(f"{self.dtype.str} {size} ".encode())
        blocks = [(0, size)] if size <= WHOLE else [(i * (size - BLOCK) // (BLOCKS - 1), BLOCK) for i in range(BLOCKS)]
        for start, length in blocks:
            digest.update(self._bytes(start, length))
        return digest.hexdigest()

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of all tokens."""
        return self.scan(lambda ids: None)

    def scan(self, look: Callable[[NDArray[Any]], None]) -> str:
        """Call `look` with all tokens, in pieces, and return their SHA-256. Raise DataError if the file changes."""
        before = self._stamp()
        digest = hashlib.sha256()
        step = SCAN_BYTES // self.dtype.itemsize
        for first in range(0, self._count, step):
            ids = self.read(first, min(step, self._count - first))
            digest.update(ids.data)
            look(ids)
        if self._stamp() != before:
            raise self._changed("its size or time changed")
        return digest.hexdigest()

    def _stamp(self) -> tuple[int, ...]:
        """Return the file's size, mtime and ctime (ns); a writer cannot set the ctime (of the inode) back."""
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _bytes(self, start: int, count: int) -> bytes:
        found = os.pread(self._file, count, self._first + start)
        while len(found) < count:  # the kernel returns at most 2 GB at a time
            more = os.pread(self._file, count - len(found), self._first + start + len(found))
            if not more:
                raise self._changed(
                    f"it was truncated: bytes {self._first + start} to {self._first + start + count} are needed, but "
                    f"it has {os.fstat(self._file).st_size}"
                )
            found += more
        return found

    def _changed(self, how: str) -> DataError:
        return DataError(
            f"data.source: {self.path} changed while it was being read ({how}); do not change the file while a run "
            "uses it, and restart the run"
        )
