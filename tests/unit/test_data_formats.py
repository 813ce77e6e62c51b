"""Test the formats of tokenised files: known headers, foreign formats, doubtful widths. Files are written by hand from
the formats' descriptions."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gpt.config.schema import Config
from dist_gpt.data.corpus import DataError
from dist_gpt.data.tokens import cache_folder, prepare

RNG = np.random.default_rng(0)
SMALL = RNG.integers(0, 256, 4000)
BPE = (50_257 ** RNG.random(4000)).astype(int)  # small ids are frequent, as in text
LARGE = (128_256 ** RNG.random(4000)).astype(int)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Config]:
    """Return a function that builds a configuration with a cache of the test's own."""

    def build(source: Path | str, vocab_size: int = 50_257, **data: Any) -> Config:
        sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "seq_len": 16, "vocab_size": vocab_size}
        where = {"source": str(source), "cache": str(tmp_path / "cache"), **data}
        return Config.model_validate({"model": sizes, "train": {"steps": 2, "global_batch": 8}, "data": where})

    return build


def refused(config: Config, *words: str) -> str:
    """Check that `config` is refused with `words` and leaves nothing in the cache; return the message."""
    with pytest.raises(DataError) as caught:
        prepare(config)
    said = str(caught.value)
    for word in words:
        assert word in said, f"{word!r} is not in {said!r}"
    assert "\n" not in said and not cache_folder(config).exists()
    return said


def tokens_of(config: Config) -> np.ndarray[Any, Any]:
    prepared = prepare(config)
    return np.concatenate([prepared.train, prepared.val])


def llmc(ids: Any, magic: int, version: int, dtype: str, count: int | None = None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + np.asarray(ids).astype(dtype).tobytes()


def litgpt(ids: Any, code: int, dtype: str, chunk: int, version: int = 1) -> bytes:
    return b"LITPKDS" + struct.pack("<QBQ", version, code, chunk) + np.asarray(ids).astype(dtype).tobytes()


def npy_header(shape: str) -> bytes:
    """Return a NumPy file of 20 tokens whose header says `shape`, and is not whole where that is not."""
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}{'' if shape[-1] != ')' else ', }'}".encode()
    return b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117) + b"\n" + bytes(40)


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# Headers that are read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "ids", "vocab"),
    [
        (llmc(BPE, 20240520, 1, "<u2"), BPE, 50_257),
        (llmc(LARGE, 20240801, 7, "<u4"), LARGE, 128_256),
        (litgpt(LARGE, 4, "<i4", 1000), LARGE, 128_256),
        (litgpt(BPE, 8, "<u2", 4000), BPE, 50_257),
        (npy(BPE.astype("<u2")), BPE, 50_257),
        (npy(LARGE.astype("<u4")), LARGE, 128_256),
        (npy(LARGE), LARGE, 128_256),
        (npy(LARGE.astype(">i4")), LARGE, 128_256),
        (npy(SMALL.astype("u1")), SMALL, 256),
    ],
)
@pytest.mark.parametrize("name", ["ids.bin", "ids.npy", "ids.dat", "ids"])
def test_known_headers_are_read(make: Any, tmp_path: Path, content: bytes, ids: Any, vocab: int, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    if name == "ids.npy" and not content.startswith(b"\x93NUMPY"):
        name = "ids.bin"
        (tmp_path / name).write_bytes(content)
    config = make(tmp_path / name, vocab)
    assert np.array_equal(tokens_of(config), ids)
    stored = prepare(config).train.dtype.name
    assert np.array_equal(tokens_of(make(tmp_path / name, vocab, dtype=stored)), ids)
    other = "uint16" if stored == "uint32" else "uint32"
    with pytest.raises(DataError, match=rf"data.dtype: {other}, but the header of .* says {stored}"):
        prepare(make(tmp_path / name, vocab, dtype=other))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (llmc(BPE, 20240520, 2, "<u2"), ["llm.c", "version 2", "version 1"]),
        (llmc(BPE, 20240801, 1, "<u4"), ["llm.c", "magic 20240801 version 1"]),
        (llmc(BPE, 20240520, 1, "<u2")[:-200], ["counts 4000 tokens of 2 bytes", "9024 bytes", "8824"]),
        (llmc(BPE, 20240520, 1, "<u2", 3999), ["counts 3999"]),
        (llmc(BPE, 20240520, 1, "<u2")[:100], ["llm.c", "truncated, damaged"]),
        (llmc([], 20240520, 1, "<u2"), ["0 tokens"]),
        (llmc(BPE, 20240326, 3, "<u2"), ["llm.c model checkpoint"]),
        (llmc(BPE, 20240522, 1, "<u2"), ["llm.c evaluation file"]),
        (llmc(BPE, 20240328, 2, "<u2"), ["llm.c tokenizer"]),
        (litgpt(BPE, 8, "<u2", 1000, version=2), ["LitGPT", "version 2"]),
        (litgpt(BPE, 6, "<f4", 1000), ["dtype code 6"]),
        (litgpt(BPE, 8, "<u2", 4000)[:-2], ["chunks of 4000 tokens of 2 bytes"]),
        (litgpt(BPE, 8, "<u2", 0), ["LitGPT"]),
        (b"LITPKDS", ["LitGPT", "7 bytes"]),
        (npy(BPE.astype(float)), ["float64", "integers"]),
        (npy(BPE > 5), ["bool", "integers"]),
        (npy(BPE.reshape(40, 100)), ["(40, 100)", "reshape(-1)"]),
        (npy(np.array(7)), ["()"]),
        (npy(BPE)[:-8], ["NumPy", "counts 4000 tokens of", "truncated, damaged"]),
        (npy(BPE) + npy(BPE), ["NumPy", "counts 4000 tokens of"]),
        (b"\x93NUMPY\x01\x00\x10\x00nonsense", ["NumPy", "cannot be read"]),
        (npy_header("(10"), ["NumPy", "cannot be read"]),
        (npy_header(f"({10**30},)"), ["NumPy", f"counts {10**30} tokens"]),
        (npy_header(f"({1 << 62},)"), ["NumPy", f"counts {1 << 62} tokens"]),
        (npy_header("(-5,)"), ["NumPy", "counts -5 tokens"]),
        (npy(BPE).replace(b"NUMPY\1", b"NUMPY\3"), ["NumPy", "version 3.0"]),
        (llmc(BPE, 20240521, 1, "<u2"), ["header like llm.c's and an unknown magic", "20240520 (version 1)"]),
        (llmc(BPE, 20261231, 3, "<u4"), ["header like llm.c's and an unknown magic"]),
        (npy(np.zeros(0, "<u2")), ["0 tokens"]),
    ],
)
def test_damaged_headers_are_refused(make: Any, tmp_path: Path, content: bytes, words: list[str]) -> None:
    (tmp_path / "ids.bin").write_bytes(content)
    refused(make(tmp_path / "ids.bin"), str(tmp_path / "ids.bin"), *words)


def test_object_arrays_are_never_unpickled(make: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    refused(make(tmp_path / "ids.npy"), "holds Python objects, but tokens are integers")


@pytest.mark.parametrize(("name", "text", "words"), [
    ("corpus.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "run git lfs pull"),
    ("ids.json", "[" + ", ".join(map(str, range(5000))) + "]\n", "its digits would be trained on"),
    ("rows.json", "[[1, 2],\n [3, 4]]" * 500, "its digits would be trained on"),
])  # fmt: skip
def test_text_that_stands_for_something_else(make: Any, tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    refused(make(tmp_path / name), str(tmp_path / name), words)


def test_lists_of_numbers_and_empty_json_among_texts_are_no_reason_to_refuse(make: Any, tmp_path: Path) -> None:
    for name, text in (("a.txt", "some words " * 500), ("ids.json", "[1, 2, 3]"), ("none.json", "[]"), ("e.json", "")):
        (tmp_path / name).write_text(text)
    assert len(prepare(make(tmp_path)).train) > 1000


def test_json_with_words_and_numbers_in_a_text_are_text(make: Any, tmp_path: Path) -> None:
    for name, text in (("a.json", '[{"text": "1 2 3"}]' * 500), ("digits.txt", "3.14159265, 2, 3" * 500)):
        (tmp_path / name).write_text(text)
        assert len(prepare(make(tmp_path / name)).train) > 1000


# Formats that are named ----------------------------------------------------------------------------------------------


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a"), io.BytesIO(b""))
    elif kind == "npz":
        np.savez(file, ids=BPE)
    else:
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("archive/data.pkl" if kind == "torch" else "a.txt", b"x")
    return file.getvalue()


def samples(header: bytes) -> bytes:
    """Return a litdata shard: count, offsets, items; MDS has `header`, its columns as JSON, before the items."""
    items = [b"\0\1" * 20, b"\2\3" * 30]
    start = 4 * 4 + len(header)
    offsets = [start, start + 40, start + 100]
    return struct.pack("<4I", 2, *offsets) + header + b"".join(items)


def sqlite(folder: Path) -> bytes:
    connection = sqlite3.connect(folder / "db")
    connection.execute("create table t (a)")
    connection.commit()
    connection.close()
    return (folder / "db").read_bytes()


RAW = BPE.astype("<u2").tobytes()
FOREIGN: dict[str, tuple[bytes, str]] = {
    "gzip": (gzip.compress(RAW), "gzip"),
    "bzip2": (bz2.compress(RAW), "bzip2"),
    "xz": (lzma.compress(RAW), "xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + RAW, "zstd"),
    "lz4": (b"\x04\x22\x4d\x18" + RAW, "lz4"),
    "snappy": (b"\xff\x06\0\0sNaPpY" + RAW, "snappy"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + RAW, "7-Zip"),
    "tar": (archive("tar"), "tar archive"),
    "npz": (archive("npz"), ".npz"),
    "torch": (archive("torch"), "PyTorch"),
    "zip": (archive("zip"), "zip archive"),
    **{f"pickle{n}": (pickle.dumps([1, 2, 3] * 50, protocol=n), "pickle") for n in (2, 3, 4, 5)},
    "pickled dict": (pickle.dumps({"ids": BPE.tolist()}), "pickle"),
    "parquet": (b"PAR1" + RAW + b"PAR1", "Parquet"),
    "arrow": (b"ARROW1\0\0" + RAW, "Arrow file"),
    "arrow stream": (b"\xff" * 4 + struct.pack("<II", 136, 16) + RAW, "Arrow stream"),
    "avro": (b"Obj\x01" + RAW, "Avro"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + RAW, "HDF5"),
    "safetensors": (struct.pack("<Q", 64) + b'{"a":1}'.ljust(64) + RAW, "safetensors"),
    "gguf": (b"GGUF\x03\0\0\0" + RAW, "GGUF"),
    "litdata": (samples(b""), "litdata or MosaicML MDS"),
    "mds": (samples(json.dumps({"column_names": ["tokens"]}).encode()), "litdata or MosaicML MDS"),
    "tfrecord": (bytes.fromhex("0a00000000000000") + struct.pack("<I", 0) + RAW, "TFRecord"),
    "lmdb": (b"\0" * 16 + b"\xde\xc0\xef\xbe" + RAW, "LMDB"),
    "index": (b"MMIDIDX\0\0" + RAW, "Megatron index"),
    "fairseq": (b"TNTIDX\0\0" + RAW, "fairseq"),
    "pdf": (b"%PDF-1.7\n" + RAW, "PDF"),
    "png": (b"\x89PNG\r\n\x1a\n" + RAW, "image"),
    "elf": (b"\x7fELF\x02\x01\x01" + RAW, "ELF"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "json": (json.dumps({"ids": BPE.tolist()}).encode(), "text"),
    "text": (("two words, é 漢\n" * 2000).encode(), "text"),
    "html": (b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>\n", "text"),
    "utf-16": ("plain words\n".encode("utf-16") * 20, "UTF-16"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*FOREIGN, "sqlite"])
def test_foreign_formats_are_named(make: Any, tmp_path: Path, kind: str) -> None:
    content, name = FOREIGN.get(kind) or (sqlite(tmp_path), "SQLite")
    if kind == "tfrecord":  # its checksum, from the definition of CRC-32C with a table
        content = content[:8] + struct.pack("<I", masked_crc(content[:8])) + content[12:]
    path = tmp_path / "train.bin"
    path.write_bytes(content)
    said = refused(make(path), str(path), name)
    assert "; " in said, "the message says what to do"
    if kind not in ("json", "text", "html", "lfs"):  # text of another name is text
        other = tmp_path / "data.unknown"
        other.write_bytes(content)
        refused(make(other), str(other), name)


def masked_crc(data: bytes) -> int:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ 0x82F63B78 * (value & 1)
        table.append(value)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize("begins", [[35_615, 8], [640, 93], [65_279], [16_975, 67], [0, 1], [1, 0, 2, 0]])
def test_tokens_that_begin_like_a_short_magic_are_read(make: Any, tmp_path: Path, begins: list[int]) -> None:
    """An explicit dtype takes precedence over a signature of two or three bytes."""
    ids = np.concatenate([begins, BPE])
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    assert np.array_equal(tokens_of(make(tmp_path / "ids.bin", 65_536, dtype="uint16")), ids)


def test_folders_of_shards_are_not_read_as_text(make: Any, tmp_path: Path) -> None:
    """Otherwise training would use such a folder's README."""
    for name, files in {
        "litdata": {"index.json": b'{"chunks": []}', "chunk-0-0.bin": samples(b"")},
        "mds": {"index.json": b'{"shards": [], "version": 2}', "shard.00000.mds": samples(b"{}")},
        "llmc": {"fineweb_train_000001.bin": llmc(BPE, 20240520, 1, "<u2")},
        "headerless": {"shard0.bin": RAW, "shard1.bin": RAW},
        "npy": {"shard0.npy": npy(BPE), "shard1.npy": npy(BPE)},
        "parquet": {"0.parquet": b"PAR1" + RAW},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "README.md").write_text("about the data\n" * 500)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        refused(make(folder), str(folder))


# Widths of headerless files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "dtype", "vocab"),
    [
        *[(BPE, dtype, 50_257) for dtype in ("<u4", "<i4", "<i8", "<u8", ">u4", ">i8")],
        *[(LARGE, dtype, 128_256) for dtype in ("<u4", "<i8", ">i4")],
        *[(SMALL, dtype, 256) for dtype in ("<u4", "<i8", ">u4")],
        (SMALL % 4, "<u4", 256),
        (np.where(SMALL < 250, 0, SMALL), "<i4", 256),
        (np.where(SMALL < 100, -100, BPE), "<i4", 50_257),
        (np.where(SMALL < 100, -1, BPE), "<i8", 50_257),
    ],
)
def test_wider_tokens_are_not_read_as_16_bit(make: Any, tmp_path: Path, ids: Any, dtype: str, vocab: int) -> None:
    path = tmp_path / "ids.bin"
    ids.astype(dtype).tofile(path)
    said = refused(make(path, min(vocab, 65_535)), str(path), "8-byte" if dtype[2] == "8" else "4-byte")
    key = {"<u4": "uint32", "<i4": "uint32", "<i8": "int64", "<u8": "int64"}.get(dtype)
    assert (f"data.dtype: {key}" in said) if key else ("big-endian" in said and "little-endian" in said)
    if key and ids.min() >= 0:
        assert np.array_equal(tokens_of(make(path, vocab, dtype=key)), ids)
    if ids.min() < 0:
        with pytest.raises(DataError, match="outside the vocabulary"):
            prepare(make(path, vocab, dtype={"<i4": "int32", "<i8": "int64"}[dtype]))


@pytest.mark.parametrize(
    "ids",
    [
        BPE, SMALL, SMALL % 4, SMALL % 2, np.arange(4000) % 250, np.where(SMALL < 250, 0, SMALL),
        np.repeat(SMALL[:400], 10), np.where(SMALL < 128, 65_535, 0), np.sort(BPE),
    ],
)  # fmt: skip
def test_16_bit_tokens_are_not_doubted(make: Any, tmp_path: Path, ids: Any) -> None:
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    config = make(tmp_path / "ids.bin", 65_535)
    if ids.max() < 65_535:
        assert np.array_equal(tokens_of(config), ids)
    else:
        refused_later = pytest.raises(DataError, match="token id 65535 .* outside the vocabulary")
        with refused_later:
            prepare(config)


def test_a_large_vocabulary_needs_the_width(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "ids.bin"
    BPE.astype("<u2").tofile(path)
    refused(make(path, 128_256), "model.vocab_size 128256", "set data.dtype: uint32, or data.dtype: uint16")
    assert np.array_equal(tokens_of(make(path, 128_256, dtype="uint16")), BPE)


def test_sizes_that_are_no_multiple_of_the_width(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "ids.bin"
    path.write_bytes(LARGE.astype("<u4").tobytes()[:-2])
    refused(make(path, 128_256, dtype="uint32"), "15998 bytes", "not a multiple of 4")
    path.write_bytes(RAW[:-1])
    refused(make(path), "7999 bytes", "an odd number")


def test_a_folder_is_read_by_its_own_headers(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pair"
    folder.mkdir()
    (folder / "train.bin").write_bytes(llmc(BPE, 20240520, 1, "<u2"))
    (folder / "val.bin").write_bytes(RAW)
    refused(make(folder), "train.bin has a header but", "val.bin has none")
    (folder / "val.bin").write_bytes(llmc(BPE[:100], 20240801, 7, "<u4"))
    prepared = prepare(make(folder))
    assert np.array_equal(prepared.train[:], BPE) and np.array_equal(prepared.val[:], BPE[:100])
    BPE.astype("<u2").tofile(folder / "train.bin")
    BPE.astype("<u4").tofile(folder / "val.bin")
    with pytest.raises(DataError, match=r"val.bin has no header and looks like 4-byte"):
        prepare(make(folder))


def test_dtype_is_for_stored_tokens_alone(make: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words " * 500)
    for source in (tmp_path / "text.txt", "synthetic", "stdlib"):
        refused(make(source, dtype="uint16"), "data.dtype: uint16", "leave data.dtype at auto")
