"""Data: sources, tokenizers and what does not fit. Sources are written by the test, the formats by hand."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config
from dist_gpt.data.corpus import STDLIB_LIMIT, DataError, read_corpus, split_documents
from dist_gpt.data.loader import Batches
from dist_gpt.data.tokenizer import BpeTokenizer, ByteTokenizer, bpe_size
from dist_gpt.data.tokens import cache_folder, load_tokenizer, open_prepared, prepare

TEXT = "".join(f"line {i}: the quick brown fox jumps over the lazy dog, é 漢 {i * i}\n" for i in range(400))
ENDOFTEXT = "<|endoftext|>"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Config]:
    """A configuration whose cache is the test's own; sections are given as keywords."""

    def build(source: Path | str, model: Any = None, train: Any = None, **data: Any) -> Config:
        sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "seq_len": 16, "vocab_size": 256, **(model or {})}
        loop = {"steps": 2, "global_batch": 8, "eval_batches": 3, **(train or {})}
        where = {"source": str(source), "cache": str(tmp_path / "cache"), **data}
        return Config.model_validate({"model": sizes, "train": loop, "data": where})

    return build


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def write_megatron(prefix: Path, documents: list[list[int]], dtype: str = "<i4", code: int = 4) -> None:
    """Megatron's pair, written from the description of its format: one sequence a document."""
    sizes = [len(document) for document in documents]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    counts = struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(sizes) + 1)
    arrays = np.array(sizes, "<i4"), starts.astype("<i8"), np.arange(len(sizes) + 1, dtype="<i8")
    prefix.with_suffix(".idx").write_bytes(head + counts + b"".join(array.tobytes() for array in arrays))
    prefix.with_suffix(".bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())


# Text ----------------------------------------------------------------------------------------------------------------


def test_one_file_is_split_at_its_end_without_losing_a_byte(make: Any, text: Path) -> None:
    prepared = prepare(make(text, val_fraction=0.1))
    joined = np.concatenate([prepared.train, prepared.val])
    assert joined.astype(np.uint8).tobytes() == TEXT.encode()
    assert abs(len(prepared.val) / len(joined) - 0.1) < 0.001
    assert prepared.train.dtype == np.dtype("<u2") and not prepared.train[:5].flags.writeable
    assert (prepared.vocab_size, prepared.max_id) == (256, max(TEXT.encode()))


@pytest.mark.parametrize("fraction", [0.3 + i / 97 for i in range(8)])
def test_the_cut_falls_between_characters(make: Any, tmp_path: Path, fraction: float) -> None:
    (tmp_path / "chinese.txt").write_text("漢字" * 40, encoding="utf-8")
    prepared = prepare(make(tmp_path / "chinese.txt", val_fraction=fraction))
    both = [ByteTokenizer().decode(part) for part in (prepared.train, prepared.val)]
    assert "".join(both) == "漢字" * 40 and "\ufffd" not in both[0] + both[1]


def test_folder_is_split_by_whole_documents_in_a_fixed_order(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for i in range(60):
        path = folder / f"sub{i % 3}" / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i} " * (5 + i % 7))
    (folder / "empty.txt").write_text("")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    notes: list[str] = []
    prepared = prepare(make(folder, val_fraction=0.1), notes.append)
    parts = [ByteTokenizer().decode(part).split("\0") for part in (prepared.train, prepared.val)]
    files = sorted(folder.glob("sub*/*.txt"), key=lambda path: path.relative_to(folder).as_posix())
    contents = [path.read_text() for path in files]
    assert sorted(parts[0] + parts[1]) == sorted(contents)
    assert parts[0] == [one for one in contents if one in parts[0]]  # order kept
    assert 0.08 < len(prepared.val) / (len(prepared.train) + len(prepared.val)) < 0.12
    assert len({one.split()[1] for one in parts[1]}) >= 4  # spread, not one block
    assert any("picture.png" in note for note in notes)


def test_stdlib_is_this_interpreters_own_sources(make: Any) -> None:
    corpus = read_corpus("stdlib")
    names = [document.name for document in corpus.documents]
    assert "dataclasses.py" in names and "asyncio/tasks.py" in names and names == sorted(names)
    assert not [n for n in names if {"site-packages", "test", "tests", "idlelib"} & set(n.split("/"))]
    assert 2_000_000 < corpus.size <= STDLIB_LIMIT
    train, val = split_documents(corpus.documents, 0.05)
    assert 0.04 < sum(d.size for d in val) / corpus.size < 0.06
    assert not {d.name for d in train} & {d.name for d in val}
    assert len(train) + len(val) == len(names)
    assert prepare(make("stdlib")).source == "stdlib"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "empty (0 bytes)"),
        ("nul.txt", b"hello world.\0", "NUL byte at offset 12"),
        ("latin.txt", b"caf\xc3\xa9\xff!", "not UTF-8 at byte 5 (0xff)"),
        ("picture.png", b"\x89PNG", "not UTF-8 at byte 0 (0x89)"),
        ("odd.bin", b"\1\0\2", "3 bytes, an odd number"),
        ("empty.bin", b"", "empty (0 bytes)"),
        ("alone.idx", b"MMIDIDX\0\0", "alone.bin does not"),
        ("missing.txt", None, "does not exist"),
        ("missing.bin", None, "does not exist"),
        ("missing.idx", None, "does not exist"),
        ("folder/bad.txt", b"a\0", "NUL byte at offset 1"),
        ("folder/empty.txt", b"", "holds no text (1 file: 0 binary, 1 empty)"),
        ("folder/train.bin", b"\1\0", "has no val.bin"),
    ],
)
def test_unusable_sources_are_named(make: Any, tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    source = path.parent if name.startswith("folder/") else path
    with pytest.raises(DataError) as caught:
        prepare(make(source))
    assert said in str(caught.value) and str(source) in str(caught.value)
    assert isinstance(caught.value, ConfigError)  # the command line's exit code 2
    assert not cache_folder(make(source)).exists()  # nothing is left of a refused source


def test_empty_and_unreadable_sources(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="got an empty text; allowed: stdlib"):
        prepare(make(""))
    write_megatron(tmp_path / "corpus", [[1] * 40])

    def refuse(self: Path, *_: object) -> None:  # permissions do not stop a test that runs as root
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"cannot read .*corpus.idx: Permission denied"):
        prepare(make(tmp_path / "corpus"))


# Fits the model ------------------------------------------------------------------------------------------------------


def test_sequence_longer_than_the_data(make: Any, text: Path) -> None:
    size = len(TEXT.encode())
    longest = len(prepare(make(text, train={"eval_batches": 0})).train) - 1
    prepare(make(text, {"seq_len": longest}, {"eval_batches": 0}))
    with pytest.raises(DataError, match=f"one sequence needs {longest + 2}"):
        prepare(make(text, {"seq_len": longest + 1}, {"eval_batches": 0}))
    with pytest.raises(DataError, match=f"train part .* has {longest + 1} tokens, but one sequence needs {size + 1}"):
        prepare(make(text, {"seq_len": size}))
    with pytest.raises(DataError, match=rf"validation part .* has {size - longest - 1} tokens.*eval_batches to 0"):
        prepare(make(text, {"seq_len": longest}))


def test_token_outside_the_vocabulary_is_found_before_ranks_start(make: Any, tmp_path: Path) -> None:
    ids = np.arange(1000) % 200
    ids[17], ids[970] = 300, 400
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    prepare(make(tmp_path / "ids.bin", {"vocab_size": 401}))
    with pytest.raises(DataError, match=r"token id 300 at position 17 of train is outside the vocabulary of 256 .*401"):
        prepare(make(tmp_path / "ids.bin"))
    with pytest.raises(DataError, match="token id 400 at position 20 of validation is outside the vocabulary of 400"):
        prepare(make(tmp_path / "ids.bin", {"vocab_size": 400}))
    prepared = open_prepared(prepare(make(tmp_path / "ids.bin", {"vocab_size": 401})).path)
    with pytest.raises(DataError, match="token id 300"):
        Batches(prepared, make(tmp_path / "ids.bin"))
    ids[17] = -1
    write_megatron(tmp_path / "negative", [ids.tolist()])
    with pytest.raises(DataError, match="token id -1 at position 17 of train"):
        prepare(make(tmp_path / "negative", {"vocab_size": 1000}))


# Tokenised -----------------------------------------------------------------------------------------------------------


def test_nanogpt_file_and_folder(make: Any, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 3000).astype("<u2")
    ids.tofile(tmp_path / "ids.bin")
    one = prepare(make(tmp_path / "ids.bin", val_fraction=0.1))
    assert np.array_equal(one.train, ids[:2700]) and np.array_equal(one.val, ids[2700:])
    folder = tmp_path / "pair"
    folder.mkdir()
    ids[:1000].tofile(folder / "train.bin")
    ids[1000:].tofile(folder / "val.bin")
    two = prepare(make(folder))
    assert np.array_equal(two.train, ids[:1000]) and np.array_equal(two.val, ids[1000:])
    assert [path.name for path in two.path.iterdir()] == ["meta.json"]  # used where they lie
    ids[::-1].tofile(tmp_path / "ids.bin")
    os.utime(tmp_path / "ids.bin", (1, 1))
    again = prepare(make(tmp_path / "ids.bin", val_fraction=0.1))
    assert again.digest != one.digest and again.path != one.path
    (folder / "val.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=r"val.bin has 2 bytes, but its tokens end at byte 4000"):
        open_prepared(two.path)


@pytest.mark.parametrize(("dtype", "code"), [("<u1", 1), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<u2", 8)])
def test_megatron_round_trip_and_split_between_documents(make: Any, tmp_path: Path, dtype: str, code: int) -> None:
    rng = np.random.default_rng(code)
    documents = [rng.integers(0, 128, 20 + int(rng.integers(30))).tolist() for _ in range(100)]
    write_megatron(tmp_path / "corpus", documents, dtype, code)
    for source in ("corpus.bin", "corpus.idx", "corpus"):
        prepared = prepare(make(tmp_path / source, val_fraction=0.1))
        flat = np.concatenate(documents)
        assert np.array_equal(np.concatenate([prepared.train, prepared.val]), flat)
        assert len(prepared.train) in np.cumsum([len(document) for document in documents])
        assert 0.07 < len(prepared.val) / len(flat) < 0.13
    batch = Batches(prepared, make(tmp_path / "corpus")).sample(0, 0, 8)
    assert batch.dtype == np.int64


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (0, b"TNTIDX\0\0", "begins with"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\7", "dtype code 7"),
        (18, struct.pack("<Q", 3), "3 sequences"),
        (34, struct.pack("<i", 5), "are not contiguous"),
        (34 + 8, struct.pack("<q", 4), "are not contiguous"),
        (34 + 24, struct.pack("<q", 9), "outside its 2 sequences"),
    ],
)
def test_damaged_megatron_index(make: Any, tmp_path: Path, at: int, value: bytes, said: str) -> None:
    write_megatron(tmp_path / "corpus", [[1] * 40, [2] * 40])
    index = tmp_path / "corpus.idx"
    data = bytearray(index.read_bytes())
    data[at : at + len(value)] = value
    index.write_bytes(bytes(data))
    with pytest.raises(DataError, match=said) as caught:
        prepare(make(tmp_path / "corpus"))
    assert str(index) in str(caught.value)


def test_megatron_pair_that_disagrees(make: Any, tmp_path: Path) -> None:
    write_megatron(tmp_path / "corpus", [[1] * 40, [2] * 40])
    with (tmp_path / "corpus.bin").open("ab") as file:
        file.write(b"\0\0\0\0")
    with pytest.raises(DataError, match=r"counts 80 tokens of 4 bytes, but .*corpus.bin has 324"):
        prepare(make(tmp_path / "corpus"))


def test_synthetic_tokens_have_a_structure_to_learn(make: Any) -> None:
    config = make("synthetic", {"vocab_size": 50})
    prepared = prepare(config)
    assert len(prepared.train) + len(prepared.val) == 2_000_000 and (prepared.min_id, prepared.max_id) == (0, 49)
    counts = np.zeros((50, 50))
    np.add.at(counts, (prepared.train[:-1], prepared.train[1:]), 1)
    chance = counts / counts.sum(1, keepdims=True)
    entropy = -(counts / counts.sum() * np.log(chance)).sum()
    jump, stay = 0.25 / 50, 0.75 + 0.25 / 50  # 49 successors by chance, one by rule
    assert entropy == pytest.approx(-49 * jump * np.log(jump) - stay * np.log(stay), abs=0.01)
    assert (
        prepare(make("synthetic", {"vocab_size": 50}, cache=str(prepared.path.parent / "b"))).digest == prepared.digest
    )
    assert prepare(make("synthetic", {"seq_len": 100_000})).val[:].size >= 100_001  # no sequence is too long
    with pytest.raises(DataError, match=r"model\.vocab_size"):
        prepare(make("synthetic", {"vocab_size": None}))
    with pytest.raises(DataError, match="tokens only"):
        load_tokenizer(prepared)


# Tokenizers ----------------------------------------------------------------------------------------------------------


def test_byte_tokenizer_round_trip() -> None:
    assert ByteTokenizer().encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert ByteTokenizer().decode(ByteTokenizer().encode(TEXT)) == TEXT


def test_bpe_is_trained_on_the_train_part_and_cached(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(TEXT[i * 300 : i * 300 + 300] + f"\r\n unusualword{i}" * 20)
    config = make(folder, {"vocab_size": 400}, tokenizer="bpe:400", val_fraction=0.1)
    notes: list[str] = []
    prepared = prepare(config, notes.append)
    tokenizer = load_tokenizer(prepared)
    assert prepared.vocab_size == tokenizer.vocab_size == 400 and prepared.max_id < 400
    assert any("BPE" in note for note in notes)
    documents = tokenizer.decode(prepared.train).split(ENDOFTEXT) + tokenizer.decode(prepared.val).split(ENDOFTEXT)
    assert sorted(documents) == sorted(path.read_bytes().decode() for path in folder.iterdir())
    assert len(prepared.train) + len(prepared.val) < sum(path.stat().st_size for path in folder.iterdir()) / 2
    for sample in ("plain", "日本 é \r\n\t", f"a {ENDOFTEXT} b", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
        assert tokenizer.separator not in tokenizer.encode(sample)
    other = prepare(make(folder, {"vocab_size": 400}, tokenizer="bpe:400", val_fraction=0.1, cache=str(tmp_path / "b")))
    assert other.digest == prepared.digest  # training is deterministic
    # only the train part is seen: the same tokenizer comes from the train documents alone
    train, _ = split_documents(read_corpus(str(folder)).documents, 0.1)
    alone = BpeTokenizer.train((document.read() for document in train), 400)
    assert np.array_equal(alone.encode(TEXT), tokenizer.encode(TEXT))


def test_tokenizer_specifications(make: Any, text: Path) -> None:
    assert (bpe_size("byte"), bpe_size("bpe:70000")) == (None, 70000)
    for wrong in ("bpe", "bpe:", "bpe:256", "bpe:-1", "bpe:1e4", "gpt2", ""):
        with pytest.raises(DataError, match=r"allowed: byte, or bpe:SIZE with SIZE at least 257"):
            prepare(make(text, tokenizer=wrong))
    notes: list[str] = []
    small = prepare(make(text, {"vocab_size": 70000}, tokenizer="bpe:70000"), notes.append)
    assert small.vocab_size < 70000 and any("the text yields only" in note for note in notes)
