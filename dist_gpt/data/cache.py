"""The cache of prepared tokens: entries are written whole, checked, and opened read-only.

An entry is the folder <cache>/<sha256 of what it is made from>/ with train.bin, val.bin (headerless little-endian),
tokenizer.json for a BPE, and meta.json. Tokenised sources are used where they are; their entry holds meta.json alone.
An entry is written beside its place and renamed, so that it is whole or absent; if two processes prepare the same data,
the slower one uses the other's entry.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_gpt.data.corpus import DataError
from dist_gpt.data.reader import Span, Tokens

TAKEN = (errno.ENOTEMPTY, errno.EEXIST)  # errors of a rename onto an existing entry

Built = tuple[dict[str, "Part"], dict[str, object]]  # result of a recipe: parts, and further keys of meta.json


@dataclass(frozen=True)
class Part:
    """Tokens [offset, offset + count) of `file` (inside the entry, or an absolute path), their range and digests.

    `sha256` is the digest of all tokens; `sample` is that of blocks of them, which is cheap to check again.
    """

    file: str
    dtype: str
    offset: int
    count: int
    min_id: int
    max_id: int
    sha256: str
    sample: str


@dataclass(frozen=True)
class Prepared:
    """Tokens ready for training.

    `digest` depends on the tokens alone: ranks compare it in the roll call. `vocab_size` is the tokenizer's; for
    tokenised sources, the largest id + 1. `train_ids` and `val_ids` are the smallest and largest id of each part.
    `tokenizer` is "none" for tokenised and synthetic sources.
    """

    path: Path
    train: Tokens
    val: Tokens
    digest: str
    vocab_size: int
    min_id: int
    max_id: int
    train_ids: tuple[int, int]
    val_ids: tuple[int, int]
    source: str
    tokenizer: str


def open_prepared(path: str | Path) -> Prepared:
    """Open the data that `prepare` made, given its `.path`.

    Raise DataError if they are missing or unreadable, or if a file does not hold the tokens that were prepared: so a
    rank also detects that its node has a different file under the same path.
    """
    folder = Path(path)
    try:
        meta, parts = _read_meta(folder)
        train, val = _open(folder, parts["train"]), _open(folder, parts["val"])
        return Prepared(
            path=folder,
            train=train,
            val=val,
            digest=str(meta["digest"]),
            vocab_size=int(str(meta["vocab_size"])),
            min_id=min(part.min_id for part in parts.values() if part.count),
            max_id=max(part.max_id for part in parts.values()),
            train_ids=(parts["train"].min_id, parts["train"].max_id),
            val_ids=(parts["val"].min_id, parts["val"].max_id),
            source=str(meta["source"]),
            tokenizer=str(meta["tokenizer"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"prepared data {folder} cannot be read: {error}; restart to prepare the data again, and put data.cache "
            "(and a tokenised data.source) in a folder that every node can read"
        ) from error


def write_part(path: Path, dtype: str, chunks: Iterable[NDArray[np.int64]]) -> Part:
    """Write `chunks` to the file `path` and return the part that describes it."""
    digest = hashlib.sha256()
    count, low, high = 0, 0, -1
    with path.open("wb") as file:
        for chunk in chunks:
            if len(chunk) == 0:
                continue
            low = min(low, int(chunk.min())) if count else int(chunk.min())
            high = max(high, int(chunk.max()))
            data = chunk.astype(dtype).tobytes()
            digest.update(data)
            file.write(data)
            count += len(chunk)
    sample = Tokens(Span(path, dtype, 0, count)).sample()
    return Part(path.name, dtype, 0, count, low, high, digest.hexdigest(), sample)


def scan_part(span: Span) -> Part:
    """Return the part that describes existing tokens. Raise DataError if their file changes meanwhile."""
    low: list[int] = []
    high: list[int] = []

    def look(ids: NDArray[Any]) -> None:
        low.append(int(ids.min()))
        high.append(int(ids.max()))

    tokens = Tokens(span)
    sha256 = tokens.scan(look)
    ids = min(low, default=0), max(high, default=-1)
    return Part(str(span.path), span.dtype, span.offset, span.count, *ids, sha256, tokens.sample())


def _open(folder: Path, part: Part) -> Tokens:
    """Return the part's tokens. Raise ValueError if the file is too short for them or holds others."""
    path = folder / part.file  # an absolute part.file stands for itself
    dtype = np.dtype(part.dtype)
    if dtype.kind not in "iu":
        raise ValueError(f"{path} has dtype {part.dtype}, which is not an integer type")
    size, stop = path.stat().st_size, (part.offset + part.count) * dtype.itemsize
    if part.file == path.name and size != stop:
        raise ValueError(f"{path} has {size} bytes instead of {stop}")
    return Tokens(Span(path, part.dtype, part.offset, part.count), part.sample, part.sha256)


def _read_meta(folder: Path) -> tuple[dict[str, object], dict[str, Part]]:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    parts = {name: Part(**meta["parts"][name]) for name in ("train", "val")}
    if meta["digest"] != _digest(parts):
        raise ValueError("the digest in meta.json does not match its parts")
    return meta, parts


def _digest(parts: dict[str, Part]) -> str:
    """Return the digest of the tokens: dtypes, counts and contents, not their place."""
    what = [
        [name, part.dtype, part.count, part.min_id, part.max_id, part.sha256] for name, part in sorted(parts.items())
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def entry_problem(folder: Path) -> str | None:
    """Return why the entry cannot be used, or None.

    Its own files are hashed again in full; sources elsewhere only in blocks, as the key has their size and times.
    """
    try:
        meta, parts = _read_meta(folder)
        for part in parts.values():
            _open(folder, part)
            if not Path(part.file).is_absolute() and _file_digest(folder / part.file) != part.sha256:
                return f"{part.file} does not match its digest in meta.json"
        if meta["tokenizer_sha256"] and _file_digest(folder / "tokenizer.json") != meta["tokenizer_sha256"]:
            return "tokenizer.json does not match its digest in meta.json"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock on `folder` against other processes of this machine, if the file system can lock folders."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def build_entry(build: Callable[[Path], Built], folder: Path) -> None:
    """Let `build` fill a folder and rename it to `folder`; if another process was faster, keep its entry."""
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    aside: list[Path] = []
    try:
        parts, meta = build(made)
        tokenizer = made / "tokenizer.json"
        meta["tokenizer_sha256"] = _file_digest(tokenizer) if tokenizer.exists() else None
        meta |= {"digest": _digest(parts), "parts": {name: asdict(part) for name, part in parts.items()}}
        (made / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        made.chmod(0o755)  # mkdtemp's 0700 would lock out other users of the cache
        for _ in range(100):
            with _alone(folder.parent):  # else an entry that another process has just repaired could be moved
                try:
                    os.rename(made, folder)
                    return
                except OSError as error:
                    if error.errno not in TAKEN:
                        raise
                if entry_problem(folder) is None:
                    return
                # A damaged entry is in the way. It is moved as a whole, since a running job may have its files open.
                aside.append(Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent)))
                with contextlib.suppress(FileNotFoundError):  # another process moved it first
                    os.rename(folder, aside[-1])
        raise OSError(f"other processes keep replacing {folder}")
    finally:
        for left in (made, *aside):
            shutil.rmtree(left, ignore_errors=True)
