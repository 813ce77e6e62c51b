"""Recognise files of tokens: read known headers, name and refuse other known formats.

`identify` reads the first bytes of a file. It returns the span of the tokens for a supported header (llm.c, NumPy,
LitGPT) and None for a file without a known header, and raises DataError for a format that holds no plain tokens.
"""

from __future__ import annotations

import struct
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic

from dist_gpt.data.corpus import LFS_POINTER, DataError
from dist_gpt.data.reader import Span

HEAD = 4096
AUTO = "auto"
SUFFIXES = (".bin", ".npy")
"""Suffixes of files that hold tokens, with or without a header."""

LLMC_HEADER = 1024  # 256 int32: magic, version, tokens, zeros
LLMC = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
LLMC_OTHER = {
    20240326: "model checkpoint", 20240803: "model checkpoint", 20240327: "optimizer state", 20240328: "tokenizer",
    20240522: "evaluation file",
}  # fmt: skip
LITGPT = struct.Struct("<7sQBQ")  # magic, version, dtype code, tokens per chunk
CODED_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Dtype codes of Megatron, which LitGPT uses too; 6 and 7 are floats."""

WRITE_AGAIN = "write the token ids as .npy or as a headerless little-endian .bin"
UNPACK = "decompress it first"


@dataclass(frozen=True)
class Head:
    """Size, first bytes and last byte of a file."""

    path: Path
    size: int
    first: bytes
    last: bytes

    def word(self, offset: int) -> int:
        """Return the little-endian uint32 at `offset`; bytes beyond `first` count as 0."""
        return int.from_bytes(self.first[offset : offset + 4].ljust(4, b"\0"), "little")

    def long(self, offset: int) -> int:
        """Return the little-endian uint64 at `offset`; bytes beyond `first` count as 0."""
        return int.from_bytes(self.first[offset : offset + 8].ljust(8, b"\0"), "little")


@dataclass(frozen=True)
class Format:
    """Format that is refused: its name, a test that recognises it, and advice to the user."""

    name: str
    matches: Callable[[Head], bool]
    advice: str = WRITE_AGAIN
    sure: bool = True
    """False if tokens may match by chance (a short signature); then an explicit data.dtype takes precedence."""


def _at(magic: bytes, offset: int = 0) -> Callable[[Head], bool]:
    return lambda head: head.first[offset : offset + len(magic)] == magic


def _any(*magics: bytes) -> Callable[[Head], bool]:
    return lambda head: head.first.startswith(magics)


def _zip_of(names: bytes) -> Callable[[Head], bool]:
    return lambda head: head.first.startswith(b"PK\x03\x04") and names in head.first[30:200]


def _pickle(head: Head) -> bool:
    """Match pickle protocols 2 to 5: a version, an opcode that may follow it, and the STOP opcode at the end."""
    if head.first[:1] != b"\x80" or head.last != b".":
        return False
    version, opcode = head.first[1:2], head.first[2:3]
    framed = opcode == b"\x95" and head.long(3) <= head.size
    return framed if version in (b"\x04", b"\x05") else version in (b"\x02", b"\x03") and opcode in b"}](cX\x8a)"


def _like_llmc(head: Head) -> bool:
    """Match the layout of llm.c's headers: a date as magic, a small version, and zeros after the first 16 words."""
    year, month, day = head.word(0) // 10000, head.word(0) // 100 % 100, head.word(0) % 100
    dated = 2020 <= year < 2050 and 1 <= month <= 12 and 1 <= day <= 31
    return dated and 0 < head.word(4) < 100 and len(head.first) >= LLMC_HEADER and not any(head.first[64:LLMC_HEADER])


def _shard_of_samples(head: Head) -> bool:
    """Match litdata and MosaicML MDS: uint32 n, then n + 1 uint32 offsets, of which the last is the file's size."""
    count = head.word(0)
    end = 4 * (count + 1)
    if count < 1 or end + 4 > min(head.size, 1 << 32):
        return False
    if head.word(4) < end + 4 or head.word(4) > head.size:
        return False
    return _word_of(head.path, end) == head.size


def _word_of(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return int.from_bytes(file.read(4), "little")


def _tfrecord(head: Head) -> bool:
    """Match TFRecord: a length, its masked CRC-32C, and room for the record and another checksum."""
    if len(head.first) < 16 or head.long(0) + 16 > head.size:
        return False
    crc = 0xFFFFFFFF
    for byte in head.first[:8]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return head.word(8) == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _safetensors(head: Head) -> bool:
    return head.first[8:9] == b"{" and 2 <= head.long(0) <= head.size - 8


def _arrow_stream(head: Head) -> bool:
    """Match an Arrow stream: continuation marker, the metadata's length, a flatbuffer with its root near its start."""
    return head.first[:4] == b"\xff" * 4 and 0 < head.word(4) < head.size and head.word(4) % 8 == 0 < head.word(8) < 64


def begins_as_utf8(data: bytes) -> bool:
    """Return whether `data`, the first HEAD bytes of a file or all of a shorter one, are UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(data) == HEAD and error.start >= HEAD - 3  # the end of the head cuts a character
    return True


def _text(head: Head) -> bool:
    """Match UTF-8 without control characters, 16 bytes or more: a few tokens may look like text by chance."""
    data = head.first
    if len(data) < 16 or any(byte < 32 and byte not in b"\t\n\r\f\x1b" or byte == 127 for byte in data):
        return False
    return begins_as_utf8(data)


REFUSED: tuple[Format, ...] = (
    Format("a gzip file", lambda h: h.first[:3] == b"\x1f\x8b\x08" and h.first[3:4] < b"\x20", UNPACK, sure=False),
    Format("a zstd file", _any(b"\x28\xb5\x2f\xfd"), UNPACK),
    Format("an xz file", _at(b"\xfd7zXZ\0"), UNPACK),
    Format("a bzip2 file", lambda h: h.first[:3] == b"BZh" and h.first[4:10] == b"1AY&SY", UNPACK),
    Format("an lz4 file", _at(b"\x04\x22\x4d\x18"), UNPACK),
    Format("an lzip file", _at(b"LZIP\1"), UNPACK),
    Format("a snappy file", _at(b"\xff\x06\0\0sNaPpY"), UNPACK),
    Format("a 7-Zip archive", _at(b"7z\xbc\xaf\x27\x1c"), "unpack it first"),
    Format("a RAR archive", _at(b"Rar!\x1a\x07"), "unpack it first"),
    Format("a tar archive", _at(b"ustar", 257), "unpack it first"),
    Format("a PyTorch file (a zip archive with a pickle)", _zip_of(b"/data.pkl"), "save the ids with numpy.save"),
    Format("a NumPy .npz file", _zip_of(b".npy"), "save the one array of token ids with numpy.save"),
    Format("a zip archive (also .npz, .pt)", _any(b"PK\x03\x04", b"PK\x05\x06"), "unpack it first"),
    Format("a pickle (or an old PyTorch file)", _pickle, "pickles are never loaded: save the ids with numpy.save"),
    Format("a Parquet file", _any(b"PAR1", b"PARE")),
    Format("an Arrow file", _at(b"ARROW1")),
    Format("an Arrow stream (a Hugging Face dataset)", _arrow_stream),
    Format("a Feather file", _at(b"FEA1")),
    Format("an ORC file", _at(b"ORC"), sure=False),
    Format("an Avro file", _at(b"Obj\x01")),
    Format("an HDF5 file", _at(b"\x89HDF\r\n\x1a\n")),
    Format("a MATLAB file", _at(b"MATLAB 5.0")),
    Format("an LMDB database", _at(b"\xde\xc0\xef\xbe", 16)),
    Format("an SQLite database", _at(b"SQLite format 3\0")),
    Format("a TFRecord file", _tfrecord),
    Format("a safetensors file", _safetensors),
    Format("a GGUF file (a model)", _at(b"GGUF"), "give the data, not the model"),
    Format("a GGML file (a model)", _any(b"lmgg", b"fmgg", b"tjgg"), "give the data, not the model"),
    Format("a shard of litdata or MosaicML MDS (an index of samples, then the samples)", _shard_of_samples),
    Format("a file with a header like llm.c's and an unknown magic", _like_llmc,
           "supported: magic 20240520 (version 1) and 20240801 (version 7)", sure=False),
    Format("a Megatron index", _at(b"MMIDIDX\0\0"),
           "put it next to its NAME.bin, which holds the tokens, as NAME.idx, and give NAME.bin"),
    Format("an old fairseq index", _at(b"TNTIDX\0\0"), "write the data again with Megatron's preprocess_data"),
    Format("a PDF", _at(b"%PDF-"), "extract its text to a .txt file"),
    Format("an image", _any(b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1")),
    Format("a RIFF file (audio or images)", lambda h: h.first[:4] == b"RIFF" and h.word(4) + 8 == h.size),
    Format("a program or library (ELF)", _at(b"\x7fELF")),
    Format("a Git LFS pointer instead of the file", _at(LFS_POINTER), "run git lfs pull"),
    Format("UTF-16 text (a byte order mark)", _any(b"\xff\xfe", b"\xfe\xff"),
           "convert it to UTF-8 and rename it to .txt", sure=False),
    Format("text (UTF-8, such as JSON, CSV or a web page)", _text,
           "rename it to .txt to tokenise it; for byte tokens, set data.dtype: uint8", sure=False),
)  # fmt: skip
"""Formats that are refused by name. The first match counts."""


def read_head(path: Path) -> Head:
    """Return the size, the first HEAD bytes and the last byte of a file."""
    with path.open("rb") as file:
        first = file.read(HEAD)
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        return Head(path, size, first, file.read(1))


def identify(path: Path, dtype: str = AUTO) -> Span | None:
    """Return the span of tokens in a file with a known header, or None for a file without one.

    Raise DataError for a format that is not supported, for a header that is damaged or contradicts the file's size, and
    for one that contradicts `dtype` (data.dtype).
    """
    head = read_head(path)
    if head.size == 0:
        raise DataError(f"data.source: {path} is empty (0 bytes); give a file with tokens")
    for reads in (_llmc, _numpy, _litgpt):
        span = reads(head)
        if span is not None:
            refuse_contradiction(path, span.dtype, dtype)
            return span
    for known in REFUSED:
        if (known.sure or dtype == AUTO) and known.matches(head):
            raise DataError(f"data.source: {path} is {known.name}, which cannot be read as tokens; {known.advice}")
    return None


def refuse_contradiction(path: Path, header: str, dtype: str) -> None:
    """Raise DataError if data.dtype contradicts the file's header."""
    name = np.dtype(header).name
    if dtype not in (AUTO, name):
        raise DataError(
            f"data.dtype: {dtype}, but the header of {path} says {name}; leave data.dtype at auto for files with a "
            "header"
        )


def _llmc(head: Head) -> Span | None:
    """Return the span of an llm.c or modded-nanogpt file (a header of 1,024 bytes), or None."""
    magic, version, count = head.word(0), head.word(4), head.word(8)
    tokens = {known for known, _ in LLMC}
    if magic in LLMC_OTHER and 0 < version < 100 and len(head.first) >= LLMC_HEADER:
        raise DataError(
            f"data.source: {head.path} is an llm.c {LLMC_OTHER[magic]} (magic {magic}), which cannot be read as tokens;"
            " give a file with magic 20240520 or 20240801"
        )
    if magic not in tokens:
        return None
    if (magic, version) not in LLMC:
        known = " and ".join(f"magic {m} version {v}" for m, v in LLMC)
        raise _damaged(head, "llm.c", f"has magic {magic} version {version} (supported: {known})")
    dtype = LLMC[magic, version]
    width = np.dtype(dtype).itemsize
    needed = LLMC_HEADER + count * width
    if head.size != needed:
        raise _damaged(head, "llm.c", f"counts {count} tokens of {width} bytes, which need {needed} bytes, but the "
                                      f"file has {head.size} bytes")  # fmt: skip
    return _span(head, "llm.c", dtype, LLMC_HEADER, count)


UNREADABLE = (
    ValueError, EOFError, SyntaxError, TypeError, ArithmeticError, RecursionError, tokenize.TokenError,
)  # fmt: skip
"""Errors that NumPy raises for a damaged header."""
NUMPY_HEADERS = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}
"""Versions of NumPy's header; 3.0 is for structured arrays alone."""


def _numpy(head: Head) -> Span | None:
    if not head.first.startswith(b"\x93NUMPY"):
        return None
    try:
        with head.path.open("rb") as file:
            version = read_magic(file)
            if version not in NUMPY_HEADERS:
                raise ValueError(f"version {version[0]}.{version[1]}")
            shape, _, kind = NUMPY_HEADERS[version](file)
            offset = file.tell()
    except UNREADABLE as error:
        raise _damaged(head, "NumPy", f"cannot be read ({str(error).splitlines()[0][:100]})") from None
    if kind.kind not in "iu":
        held = "Python objects" if kind.hasobject else f"{kind.name} values"
        raise DataError(f"data.source: {head.path} holds {held}, but tokens are integers; save the ids as "
                        "numpy.uint16 or numpy.uint32")  # fmt: skip
    if len(shape) != 1:
        raise DataError(f"data.source: {head.path} has the shape {shape}, but tokens are one-dimensional; save "
                        "array.reshape(-1)")  # fmt: skip
    needed = offset + shape[0] * kind.itemsize
    if head.size != needed:
        raise _damaged(head, "NumPy", f"counts {shape[0]} tokens of {kind.itemsize} bytes, which need {needed} bytes, "
                                      f"but the file has {head.size} bytes")  # fmt: skip
    return _span(head, "NumPy", kind.str, offset, shape[0])


def _litgpt(head: Head) -> Span | None:
    """Return the span of LitGPT's PackedDataset (a header of 24 bytes, then whole chunks), or None."""
    if not head.first.startswith(b"LITPKDS"):
        return None
    if len(head.first) < LITGPT.size:
        raise _damaged(head, "LitGPT", f"has only {head.size} bytes instead of {LITGPT.size}")
    _, version, code, chunk = LITGPT.unpack(head.first[: LITGPT.size])
    if version != 1:
        raise _damaged(head, "LitGPT", f"has version {version} (supported: version 1)")
    if code not in CODED_DTYPES:
        raise _damaged(head, "LitGPT", f"has dtype code {code} (integers: {sorted(CODED_DTYPES)}; floats: 6, 7)")
    width = np.dtype(CODED_DTYPES[code]).itemsize
    payload = head.size - LITGPT.size
    if chunk == 0 or payload % (chunk * width):
        raise _damaged(head, "LitGPT", f"gives chunks of {chunk} tokens of {width} bytes, but the file's {payload} "
                                       "bytes of tokens are not a multiple of that")  # fmt: skip
    return _span(head, "LitGPT", CODED_DTYPES[code], LITGPT.size, payload // width)


def _span(head: Head, name: str, dtype: str, header: int, count: int) -> Span:
    width = np.dtype(dtype).itemsize
    if count == 0:
        raise DataError(f"data.source: {head.path} has a header but 0 tokens; give a file with tokens")
    if header % width:  # no writer of these formats does that
        raise _damaged(head, name, f"ends at byte {header}, not a multiple of {width}")
    return Span(head.path, dtype, header // width, count)


def _damaged(head: Head, name: str, found: str) -> DataError:
    return DataError(f"data.source: {head.path} begins with the {name} header, which {found}; the file is truncated, "
                     "damaged or of another version; write it again")  # fmt: skip
