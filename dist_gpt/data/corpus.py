"""Text sources: the standard library's own sources, a text file, or a folder of text files.

A corpus is a list of documents (byte ranges of files), each checked to be UTF-8 text, and a digest of their contents.
Documents are read again when they are tokenised, so a corpus needs memory for its largest file only.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_gpt.config.errors import ConfigError
from dist_gpt.wording import counted

STDLIB_LIMIT = 16_000_000  # bytes; keeps the first preparation within seconds on every interpreter
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo"}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".csv", ".html", ".xml", ".yaml", ".yml", ".toml"}
IDS_LOOKED_AT = 1 << 16
LFS_POINTER = b"version https://git-lfs"
SOURCES = (
    "stdlib, synthetic, a text file, a folder of text files, a .bin or .npy of tokens, a folder with train.bin "
    "and val.bin, or a Megatron .bin with its .idx"
)


class DataError(ConfigError):
    """Error of data that cannot be used as configured; says what was found and what to change (exit code 2)."""

    def __init__(self, message: str) -> None:
        super().__init__([message])


@dataclass(frozen=True)
class Document:
    """Bytes [start, stop) of one text file."""

    name: str
    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Size of the document in bytes."""
        return self.stop - self.start

    def read(self) -> str:
        """Return the document's text. Raise DataError if the file no longer holds what was checked."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                data = file.read(self.size)
            if len(data) == self.size:
                return data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            pass
        raise DataError(f"data.source: {self.path} changed while it was being prepared; restart to prepare it again")


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order. `digest` depends on their contents and order, not on their paths."""

    source: str
    documents: tuple[Document, ...]
    digest: str
    skipped: tuple[str, ...] = ()  # files of a folder that are not text

    @property
    def size(self) -> int:
        """Size of all documents in bytes."""
        return sum(document.size for document in self.documents)


def read_corpus(source: str) -> Corpus:
    """Find and check every document of `source` ("stdlib", a text file or a folder).

    In a folder, empty and hidden files are skipped, and so are files that are not text, unless their suffix says that
    they are. Raise DataError for a missing path, a binary or empty file, or a folder without text.
    """
    if source == "stdlib":
        return _check_files(source, *_stdlib_files(), strict=set(), limit=STDLIB_LIMIT)
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        return _check_files(source, path, _text_files(path), strict=TEXT_SUFFIXES)
    if not path.exists():
        raise DataError(f"data.source: {source!r} does not exist (looked at {path}); allowed: {SOURCES}")
    if not path.is_file():
        raise DataError(f"data.source: {path} is neither a file nor a folder; allowed: {SOURCES}")
    if path.stat().st_size == 0:
        raise DataError(f"data.source: {path} is empty (0 bytes); give a file with text")
    return _check_files(source, path.parent, [path], strict={path.suffix})


def split_documents(documents: Sequence[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Return train and validation documents: whole ones, spread evenly, so that validation has its share of the bytes.

    A document goes to validation whenever that brings its share closer to `val_fraction`. If documents are too few or
    too large for that (as a single file is), validation is the last `val_fraction` of the bytes instead.
    """
    train: list[Document] = []
    val: list[Document] = []
    wanted = held = 0.0
    for document in documents:
        wanted += val_fraction * document.size
        if held + document.size / 2 <= wanted:
            val.append(document)
            held += document.size
        else:
            train.append(document)
    return (train, val) if val and held >= wanted / 2 else _split_tail(documents, val_fraction)


def _split_tail(documents: Sequence[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Cut the joined documents once, at a character boundary, into train and validation documents."""
    total = sum(document.size for document in documents)
    left = total - int(total * val_fraction)  # bytes still to go to train
    train: list[Document] = []
    val: list[Document] = []
    for document in documents:
        cut = document.start + min(left, document.size)
        left -= cut - document.start
        if document.start < cut < document.stop:
            cut = _character_start(document.path, cut)
        if cut > document.start:
            train.append(replace(document, stop=cut))
        if cut < document.stop:
            val.append(replace(document, start=cut))
    return train, val


def _character_start(path: Path, offset: int) -> int:
    """Return the largest offset <= `offset` at which a UTF-8 character begins (continuation bytes are 10xxxxxx)."""
    first = max(0, offset - 3)
    with path.open("rb") as file:
        file.seek(first)
        data = file.read(offset - first + 1)
    while offset > first and data[offset - first] & 0xC0 == 0x80:
        offset -= 1
    return offset


def _stdlib_files() -> tuple[Path, list[Path]]:
    """Return the root and .py files of the interpreter's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in _walk(root, STDLIB_SKIP) if path.suffix == ".py"]
    if not files:
        raise DataError(
            f"data.source: 'stdlib' needs the standard library's .py files, but {root} has none; "
            "set data.source to a text file or a folder"
        )
    return root, files


def _text_files(root: Path) -> list[Path]:
    """Return every visible file below `root`, sorted by relative path. Raise DataError if there is none."""
    files = _walk(root, set())
    if not files:
        raise DataError(f"data.source: the folder {root} holds no files; allowed: {SOURCES}")
    return files


def _walk(root: Path, skip: set[str]) -> list[Path]:
    """Return regular files below `root` in a fixed order, without hidden ones, bytecode and folders named in `skip`."""
    found: list[Path] = []
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in skip and n != "__pycache__" and not n.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def _check_files(source: str, root: Path, files: list[Path], strict: set[str], limit: int | None = None) -> Corpus:
    """Check that files are text and digest them, up to `limit` bytes. Binary ones with a `strict` suffix are errors."""
    digest = hashlib.sha256()
    documents: list[Document] = []
    skipped: list[str] = []
    total = 0
    for path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"data.source: cannot read {path}: {error.strerror}; change its permissions") from error
        if limit is not None and total + len(data) > limit:
            break
        name = path.relative_to(root).as_posix()
        problem = text_problem(data)
        if problem and path.suffix in strict:
            remove = "" if len(files) == 1 else "remove it, "
            raise DataError(
                f"data.source: {path} is not text: {problem}; convert it to UTF-8, {remove}or name it .bin if "
                "it holds tokens"
            )
        refuse_other_text(path, data, alone=len(files) == 1)
        if problem:
            skipped.append(name)
        elif data:
            digest.update(len(data).to_bytes(8, "little") + data)
            documents.append(Document(name, path, 0, len(data)))
            total += len(data)
    if not documents:
        raise DataError(
            f"data.source: {root} holds no text ({counted(len(files), 'file')}: {len(skipped)} "
            f"binary, {len(files) - len(skipped)} empty); allowed: {SOURCES}"
        )
    return Corpus(source, tuple(documents), digest.hexdigest(), tuple(skipped))


def refuse_other_text(path: Path, data: bytes, alone: bool) -> None:
    """Raise DataError for text that only stands for the data: a Git LFS pointer, a JSON list of ids.

    Among other files, a JSON list of numbers may be text to learn from; `alone` says that it is the only file.
    """
    if data.startswith(LFS_POINTER):
        raise DataError(f"data.source: {path} is a Git LFS pointer instead of the file; run git lfs pull")
    numbers = data[:IDS_LOOKED_AT].strip(b"[], \t\r\n")
    if alone and path.suffix == ".json" and numbers and not numbers.strip(b"[]0123456789, \t\r\n"):
        raise DataError(
            f"data.source: {path} holds only numbers, and as text its digits would be trained on; if these are token "
            "ids, save them as .npy with numpy.save; otherwise, rename the file to .txt"
        )


def text_problem(data: bytes) -> str | None:
    """Return why `data` is not UTF-8 text ("NUL byte at offset 12", "not UTF-8 at byte 5 (0xff)"), or None."""
    nul = data.find(b"\0")
    if nul >= 0:
        return f"NUL byte at offset {nul}"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start} (0x{data[error.start]:02x})"
    return None
