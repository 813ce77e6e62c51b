"""Tokens that exist already: nanoGPT's headerless uint16 .bin, Megatron's .bin/.idx; and synthetic ones.

Tokenised files are used where they lie, never copied: a corpus of tens of GB is normal.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_gpt.data.corpus import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, entries of the document index
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron's codes; 6 and 7 are floats


@dataclass(frozen=True)
class Span:
    """Tokens [offset, offset + count) of a headerless little-endian file."""

    path: Path
    dtype: str
    offset: int
    count: int


def find_tokenised(source: str, val_fraction: float) -> tuple[Span, Span] | None:
    """Train and validation spans of tokenised data, or None if `source` is something else.

    Accepted: a folder with train.bin and val.bin; NAME.bin (uint16); NAME.bin, NAME.idx or NAME where both exist
    (Megatron). One file is split at its end, Megatron's between documents where one ends near the wanted place.
    """
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        return _folder(path)
    if path.suffix not in (".bin", ".idx"):
        both = path.with_name(path.name + ".bin"), path.with_name(path.name + ".idx")
        return _megatron(*both, val_fraction) if not path.exists() and all(p.is_file() for p in both) else None
    index = path.with_suffix(".idx")
    if index.is_file():
        return _megatron(path.with_suffix(".bin"), index, val_fraction)
    if not path.is_file():
        return None  # the text reader reports what is missing
    whole = _nanogpt(path)
    return _cut(whole, whole.count - int(whole.count * val_fraction))


def synthetic(count: int, vocab_size: int) -> NDArray[np.int64]:
    """`count` tokens of a first-order Markov chain, (count,): with chance 3/4 a fixed successor, else any token.

    Entropy per token ~ 0.56 + ln(vocab_size) / 4 nats, against ln(vocab_size) before learning. Philox's raw output is
    used because numpy promises it, and not its distributions, to be the same in every version.
    """
    raw = np.random.Philox(key=np.zeros(2, dtype=np.uint64)).random_raw(2 * count + vocab_size)
    cycle = np.argsort(raw[2 * count :], kind="stable")  # a random order of the vocabulary: each token's successor
    jump = raw[:count] < np.uint64(2**62)
    jump[0] = True
    position = np.arange(count)
    last_jump = np.maximum.accumulate(np.where(jump, position, 0))
    start = raw[count : 2 * count] % np.uint64(vocab_size)
    tokens: NDArray[np.int64] = cycle[(start[last_jump].astype(np.int64) + position - last_jump) % vocab_size]
    return tokens


def _folder(path: Path) -> tuple[Span, Span] | None:
    train, val = path / "train.bin", path / "val.bin"
    if not train.is_file() and not val.is_file():
        return None
    for one in (train, val):
        if not one.is_file():
            raise DataError(
                f"data.source: the folder {path} has no {one.name}; tokenised folders hold train.bin and val.bin; "
                "to have one file split, give the file itself"
            )
    return _nanogpt(train), _nanogpt(val)


def _nanogpt(path: Path) -> Span:
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"data.source: {path} is empty (0 bytes); give a file with tokens")
    if size % 2:
        raise DataError(
            f"data.source: {path} has {size} bytes, an odd number, but a headerless .bin holds 2-byte tokens; "
            "it is cut off, or not such a file (Megatron's needs its .idx beside it)"
        )
    return Span(path, "<u2", 0, size // 2)


def _cut(whole: Span, first_val: int) -> tuple[Span, Span]:
    train = Span(whole.path, whole.dtype, 0, first_val)
    return train, Span(whole.path, whole.dtype, first_val, whole.count - first_val)


def _megatron(path: Path, index: Path, val_fraction: float) -> tuple[Span, Span]:
    """Read and check the index: 34 bytes of header, sizes int32[s], pointers int64[s], document starts int64[d]."""
    if not path.is_file():
        raise DataError(f"data.source: {index} is there, but {path.name} is not; give both files of the pair")
    with index.open("rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise _bad_index(index, f"begins with {head[:9]!r} instead of {MAGIC!r}")
        _, version, code, sequences, entries = HEADER.unpack(head)
        if version != 1:
            raise _bad_index(index, f"has version {version}, only 1 is known")
        if code not in DTYPES:
            raise _bad_index(index, f"has dtype code {code}; integers are {sorted(DTYPES)} (6 and 7 are floats)")
        needed = HEADER.size + 12 * sequences + 8 * entries
        size = index.stat().st_size
        if size not in (needed, needed + sequences):  # the longer form ends with one mode byte a sequence
            raise _bad_index(index, f"has {size} bytes, but {sequences} sequences, {entries} documents need {needed}")
        sizes = np.fromfile(file, "<i4", sequences).astype(np.int64)
        pointers = np.fromfile(file, "<i8", sequences)
        documents = np.fromfile(file, "<i8", entries)
    whole = Span(path, DTYPES[code], 0, int(sizes.sum()))
    width = np.dtype(whole.dtype).itemsize
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])  # (sequences + 1,) in tokens
    if (sizes < 0).any() or not np.array_equal(pointers, starts[:-1] * width):
        raise _bad_index(index, "lists sequences that do not follow one another without gaps")
    if path.stat().st_size != whole.count * width:
        raise _bad_index(index, f"counts {whole.count} tokens of {width} bytes, but {path} has {path.stat().st_size}")
    if whole.count == 0:
        raise DataError(f"data.source: {path} is empty (0 tokens); give a file with tokens")
    if ((documents < 0) | (documents > sequences)).any():
        raise _bad_index(index, f"has a document that begins outside its {sequences} sequences")
    return _cut(whole, _document_cut(whole.count, starts[documents], val_fraction))


def _document_cut(count: int, boundaries: NDArray[Any], val_fraction: float) -> int:
    """Where validation begins: the boundary nearest to the wanted place if that leaves 1/2 to 2 times its share."""
    wanted = count - int(count * val_fraction)
    if len(boundaries) == 0:
        return wanted
    nearest = int(boundaries[np.argmin(np.abs(boundaries - wanted))])
    share = (count - nearest) / count
    return nearest if val_fraction / 2 <= share <= 2 * val_fraction else wanted


def _bad_index(index: Path, found: str) -> DataError:
    return DataError(
        f"data.source: {index} {found}; it must be the index that Megatron's preprocess_data writes beside its .bin "
        "(write both again)"
    )
