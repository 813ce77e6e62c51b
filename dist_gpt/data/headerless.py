"""Files of tokens without a header: how wide a token is, and when that is in doubt.

A headerless .bin does not say how wide its tokens are. uint16 is the custom (nanoGPT), and 4-byte tokens that are read
so give every second token the value 0 or 1, which trains without complaint. `refuse_doubt` looks for that pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_gpt.data.corpus import DataError
from dist_gpt.data.formats import AUTO
from dist_gpt.data.reader import Span

BLOCK, BLOCKS = 4096, 64
TINY = (64, 1)
"""What a high half is below: ids up to 2^22, and, for small vocabularies, ids below 2^16."""
FEWEST, RATIO = 8, 50
"""A pattern needs so many words that are not tiny in the low places, and this many times fewer in the high ones."""


@dataclass(frozen=True)
class Layout:
    """One way to store wider integers: where the low 2-byte word is among `words`."""

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
    """Return the tokens of a file without a header. DataError where its size or the width of its tokens is wrong."""
    size = path.stat().st_size
    width = np.dtype("uint16" if dtype == AUTO else dtype).itemsize
    if size % width:
        odd = "an odd number" if width == 2 else f"no multiple of {width}"
        raise DataError(
            f"data.source: {path} has {size} bytes, {odd}, but a headerless .bin holds {width}-byte tokens "
            f"(data.dtype {dtype}); it is cut off, or not such a file (Megatron's needs its .idx beside it)"
        )
    if dtype == AUTO:
        refuse_doubt(path, size, vocab_size)
    kind = np.dtype("uint16" if dtype == AUTO else dtype).newbyteorder("<")
    return Span(path, f"<{kind.kind}{width}", 0, size // width)


def refuse_doubt(path: Path, size: int, vocab_size: int | None) -> None:
    """Raise DataError where data.dtype auto, which means uint16, may be wrong."""
    layout = wider(_samples(path, size))
    if layout is not None:
        every = "every other 2-byte word is" if layout.words == 2 else "3 of 4 2-byte words are"
        raise DataError(
            f"data.source: {path} has no header and looks like {layout.name} ({every} 0 or tiny), but without "
            f"data.dtype a headerless file is read as uint16; {layout.advice}, or data.dtype: uint16 if that is right"
        )
    if vocab_size is not None and vocab_size > 65_535:
        raise DataError(
            f"data.source: {path} has no header, and with model.vocab_size {vocab_size} its tokens may be wider than "
            "uint16; say which: set data.dtype: uint32 or data.dtype: uint16"
        )


def wider(words: NDArray[np.uint16]) -> Layout | None:
    """Return the layout of wider integers whose pattern the words show, (multiple of 4,); None if there is none."""
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
    """Return 2-byte words of blocks spread over the file, each beginning at a multiple of 8 bytes."""
    blocks = min(BLOCKS, -(-size // BLOCK))
    found = []
    with path.open("rb") as file:
        for number in range(blocks):
            file.seek((size - BLOCK) * number // max(blocks - 1, 1) // 8 * 8 if size > BLOCK else 0)
            data = file.read(BLOCK)
            found.append(np.frombuffer(data[: len(data) // 8 * 8], dtype="<u2"))
    return np.concatenate(found)
