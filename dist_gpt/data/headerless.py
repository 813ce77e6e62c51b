"""Read token files without a header, and refuse those whose token width is in doubt.

A headerless .bin does not say how wide its tokens are. The convention is uint16 (nanoGPT). If 4-byte tokens are read as
uint16, every second one is 0 or 1, and training raises no error. `refuse_doubt` looks for that pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_gpt.data.corpus import DataError
from dist_gpt.data.formats import AUTO
from dist_gpt.data.reader import BLOCK, BLOCKS, Span

TINY = (64, 1)
"""Upper bounds (exclusive) of high words: 64 covers ids below 2^22, 1 (for small vocabularies) ids below 2^16."""
FEWEST, RATIO = 8, 50
"""A layout matches if at least FEWEST low words are not tiny, and RATIO times as many as high words."""


@dataclass(frozen=True)
class Layout:
    """Layout of integers wider than 2 bytes: `low` is the index of the low 2-byte word among `words`."""

    name: str
    words: int
    low: int
    swapped: bool
    advice: str


BIG_ENDIAN = "write them again in little-endian order, or as .npy"
LAYOUTS = (
    Layout("8-byte integers", 4, 0, False, "set data.dtype: int64"),
    Layout("big-endian 8-byte integers", 4, 3, True, BIG_ENDIAN),
    Layout("4-byte integers", 2, 0, False, "set data.dtype: uint32 (or int32)"),
    Layout("big-endian 4-byte integers", 2, 1, True, BIG_ENDIAN),
)


def headerless(path: Path, dtype: str, vocab_size: int | None) -> Span:
    """Return the span of tokens in a headerless file. Raise DataError if their width is in doubt or does not fit."""
    size = path.stat().st_size
    kind = np.dtype("uint16" if dtype == AUTO else dtype)
    width = kind.itemsize
    if size % width:
        odd = "an odd number" if width == 2 else f"not a multiple of {width}"
        raise DataError(
            f"data.source: {path} has {size} bytes, {odd}, but a headerless .bin holds {width}-byte tokens "
            f"(data.dtype {dtype}); it is truncated or in another format (a Megatron .bin needs its .idx next to it); "
            "write it again"
        )
    if dtype == AUTO:
        refuse_doubt(path, size, vocab_size)
    return Span(path, f"<{kind.kind}{width}", 0, size // width)


def refuse_doubt(path: Path, size: int, vocab_size: int | None) -> None:
    """Raise DataError if uint16, which data.dtype auto means for a headerless file, may be wrong."""
    layout = wider(_samples(path, size))
    if layout is not None:
        every = "every other 2-byte word is" if layout.words == 2 else "3 of every 4 2-byte words are"
        raise DataError(
            f"data.source: {path} has no header and looks like {layout.name} ({every} 0 or very small), but without "
            f"data.dtype a headerless file is read as uint16; {layout.advice}, or data.dtype: uint16 if the "
            "tokens are uint16"
        )
    if vocab_size is not None and vocab_size > 65_535:
        raise DataError(
            f"data.source: {path} has no header, and with model.vocab_size {vocab_size} its tokens may be wider than "
            "uint16; set data.dtype: uint32, or data.dtype: uint16 if the tokens are uint16"
        )


def wider(words: NDArray[np.uint16]) -> Layout | None:
    """Return the layout of wider integers that 2-byte `words`, (multiple of 4,), look like, or None."""
    for layout in LAYOUTS:
        places = words[: len(words) // layout.words * layout.words].reshape(-1, layout.words)
        if layout.swapped:
            places = places.byteswap()
        low = places[:, layout.low]
        high = np.delete(places, layout.low, axis=1)
        for tiny in TINY:
            # 65535 is the high half of small negative numbers, such as the -100 of ignored labels.
            in_low, in_high = (int(((part >= tiny) & (part != 65_535)).sum()) for part in (low, high))
            if in_low >= FEWEST and in_high * RATIO <= in_low:
                return layout
    return None


def _samples(path: Path, size: int) -> NDArray[np.uint16]:
    """Return the 2-byte words of blocks spread over the file; each block begins at a multiple of 8 bytes."""
    blocks = min(BLOCKS, -(-size // BLOCK))
    found = []
    with path.open("rb") as file:
        for number in range(blocks):
            file.seek((size - BLOCK) * number // max(blocks - 1, 1) // 8 * 8 if size > BLOCK else 0)
            data = file.read(BLOCK)
            found.append(np.frombuffer(data[: len(data) // 8 * 8], dtype="<u2"))
    return np.concatenate(found)
