"""Find existing tokens (files with a known header, headerless files, Megatron's pairs), or make synthetic ones.

Tokenised files are used where they lie, never copied: a corpus of tens of GB is normal.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_gpt.data.corpus import DataError
from dist_gpt.data.formats import AUTO, CODED_DTYPES, HEAD, SUFFIXES, begins_as_utf8, identify, refuse_contradiction
from dist_gpt.data.headerless import headerless
from dist_gpt.data.reader import Span

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, entries of the document index


def find_tokenised(
    source: str, val_fraction: float, dtype: str = AUTO, vocab_size: int | None = None
) -> tuple[Span, Span] | None:
    """Return the train and validation spans of tokenised data, or None if `source` is something else.

    Accepted: a folder with train.bin and val.bin (or .npy); a file with a known header; NAME.bin without one; NAME.bin,
    NAME.idx or NAME if both files exist (Megatron). Validation is the end of a single file; Megatron's is cut between
    documents if one ends near the wanted place. `dtype` is data.dtype. Raise DataError for other formats of tokens.
    """
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        return _folder(path, dtype, vocab_size)
    if path.suffix not in (".bin", ".idx") and not path.exists():
        both = path.with_name(path.name + ".bin"), path.with_name(path.name + ".idx")
        return _megatron(*both, val_fraction, dtype) if all(p.is_file() for p in both) else None
    index = path.with_suffix(".idx")
    if path.suffix in (".bin", ".idx") and index.is_file():
        return _megatron(path.with_suffix(".bin"), index, val_fraction, dtype)
    if not path.is_file() or (path.suffix not in SUFFIXES and _is_text(path)):
        return None  # the text reader reports what is missing
    whole = identify(path, dtype)
    if whole is None and path.suffix == ".npy":
        raise DataError(f"data.source: {path} does not begin with NumPy's header; write it with numpy.save")
    if whole is None and path.suffix != ".bin":
        return None
    whole = whole or headerless(path, dtype, vocab_size)
    return _cut(whole, whole.count - int(whole.count * val_fraction))


def _is_text(path: Path) -> bool:
    """Return whether a file not named .bin or .npy begins as text or is empty: the text reader handles both."""
    with path.open("rb") as file:
        first = file.read(HEAD)
    return b"\0" not in first and begins_as_utf8(first)


def synthetic(count: int, vocab_size: int) -> NDArray[np.int64]:
    """Return tokens of a first-order Markov chain, (count,): with probability 3/4 a fixed successor, else any token.

    Entropy per token ~ 0.56 + ln(vocab_size) / 4 nats, against ln(vocab_size) before learning. Philox's raw output is
    used because numpy guarantees that it, unlike its distributions, is the same in every version.
    """
    raw = np.random.Philox(key=np.zeros(2, dtype=np.uint64)).random_raw(2 * count + vocab_size)
    cycle = np.argsort(raw[2 * count :], kind="stable")  # random order of the vocabulary: each token's successor
    jump = raw[:count] < np.uint64(2**62)
    jump[0] = True
    position = np.arange(count)
    last_jump = np.maximum.accumulate(np.where(jump, position, 0))
    start = raw[count : 2 * count] % np.uint64(vocab_size)
    tokens: NDArray[np.int64] = cycle[(start[last_jump].astype(np.int64) + position - last_jump) % vocab_size]
    return tokens


def _folder(path: Path, dtype: str, vocab_size: int | None) -> tuple[Span, Span] | None:
    """Return the spans of train.bin and val.bin (or .npy), or None; refuse a pair of which only one has a header."""
    for suffix in SUFFIXES:
        pair = path / f"train{suffix}", path / f"val{suffix}"
        if not any(one.is_file() for one in pair):
            continue
        for one in pair:
            if not one.is_file():
                raise DataError(
                    f"data.source: the folder {path} has no {one.name}; a folder of tokens needs train.bin and "
                    "val.bin; to split a single file, give its path"
                )
        train, val = (identify(one, dtype) for one in pair)
        if (train is None) != (val is None):
            with_header, without = pair if train is not None else pair[::-1]
            raise DataError(
                f"data.source: {with_header} has a header but {without} has none, so their formats differ; write "
                "both in the same format"
            )
        return train or headerless(pair[0], dtype, vocab_size), val or headerless(pair[1], dtype, vocab_size)
    _refuse_shards(path)
    return None


def _refuse_shards(folder: Path) -> None:
    """Raise DataError for a folder of token shards, of which the text reader would read only the README."""
    index = folder / "index.json"
    if index.is_file():
        try:
            tree = json.loads(index.read_bytes())
        except (OSError, ValueError):
            tree = None
        if isinstance(tree, dict) and ("chunks" in tree or "shards" in tree):
            name = "litdata chunks" if "chunks" in tree else "MosaicML MDS shards"
            raise DataError(
                f"data.source: the folder {folder} holds {name} (index.json), which are not supported in this version; "
                "write the token ids as train.bin and val.bin"
            )
    shards = sorted(p for p in folder.iterdir() if p.suffix in (*SUFFIXES, ".mds", ".parquet", ".arrow", ".tfrecord"))
    for shard in shards[:1]:
        span = identify(shard) if shard.is_file() else None
        if span is not None or len(shards) > 1:
            found = shard.name if len(shards) == 1 else f"{shard.name} and {len(shards) - 1} more"
            raise DataError(
                f"data.source: the folder {folder} holds token files ({found}), but only train.bin and val.bin are "
                "read from a folder in this version; merge the files into these two, or give the path of a single file"
            )


def _cut(whole: Span, first_val: int) -> tuple[Span, Span]:
    train = Span(whole.path, whole.dtype, whole.offset, first_val)
    return train, Span(whole.path, whole.dtype, whole.offset + first_val, whole.count - first_val)


def _megatron(path: Path, index: Path, val_fraction: float, dtype: str) -> tuple[Span, Span]:
    """Return the train and validation spans of Megatron's pair after checking its index.

    The index holds 34 bytes of header, sizes int32[s], pointers int64[s], document starts int64[d].
    """
    if not path.is_file():
        raise DataError(f"data.source: {index} exists, but {path.name} does not; provide both files of the pair")
    with index.open("rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise _bad_index(index, f"begins with {head[:9]!r} instead of {MAGIC!r}")
        _, version, code, sequences, entries = HEADER.unpack(head)
        if version != 1:
            raise _bad_index(index, f"has version {version}, but only version 1 is supported")
        if code not in CODED_DTYPES:
            raise _bad_index(index, f"has dtype code {code}, but integers are {sorted(CODED_DTYPES)} (floats: 6, 7)")
        refuse_contradiction(index, CODED_DTYPES[code], dtype)
        needed = HEADER.size + 12 * sequences + 8 * entries
        size = index.stat().st_size
        if size not in (needed, needed + sequences):  # the longer form ends with one mode byte per sequence
            raise _bad_index(
                index, f"has {size} bytes, but {sequences} sequences and {entries} documents need {needed}"
            )
        sizes = np.fromfile(file, "<i4", sequences).astype(np.int64)
        pointers = np.fromfile(file, "<i8", sequences)
        documents = np.fromfile(file, "<i8", entries)
    whole = Span(path, CODED_DTYPES[code], 0, int(sizes.sum()))
    width = np.dtype(whole.dtype).itemsize
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])  # (sequences + 1,) in tokens
    if (sizes < 0).any() or not np.array_equal(pointers, starts[:-1] * width):
        raise _bad_index(index, "lists sequences that are not contiguous")
    if path.stat().st_size != whole.count * width:
        raise _bad_index(index, f"counts {whole.count} tokens of {width} bytes, but {path} has {path.stat().st_size}")
    if whole.count == 0:
        raise DataError(f"data.source: {path} is empty (0 tokens); give a file with tokens")
    if ((documents < 0) | (documents > sequences)).any():
        raise _bad_index(index, f"has a document that begins outside its {sequences} sequences")
    return _cut(whole, _document_cut(whole.count, starts[documents], val_fraction))


def _document_cut(count: int, boundaries: NDArray[Any], val_fraction: float) -> int:
    """Return where validation begins: at the boundary nearest to its share if that leaves 1/2 to 2 times the share."""
    wanted = count - int(count * val_fraction)
    if len(boundaries) == 0:
        return wanted
    nearest = int(boundaries[np.argmin(np.abs(boundaries - wanted))])
    share = (count - nearest) / count
    return nearest if val_fraction / 2 <= share <= 2 * val_fraction else wanted


def _bad_index(index: Path, found: str) -> DataError:
    return DataError(
        f"data.source: {index} {found}; expected the index that Megatron's preprocess_data writes with its .bin; write "
        "both files again"
    )
