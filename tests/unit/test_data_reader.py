"""Test token files that change during a run or were never written: what is noticed, and when."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gpt.config.schema import Config
from dist_gpt.data import reader
from dist_gpt.data.corpus import DataError
from dist_gpt.data.loader import Batches
from dist_gpt.data.reader import BLOCK, BLOCKS, Span, Tokens
from dist_gpt.data.tokens import cache_folder, open_prepared, prepare

IDS = np.random.default_rng(1).integers(0, 256, 4000).astype("<u2")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    IDS.tofile(tmp_path / "ids.bin")
    return tmp_path / "ids.bin"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Config]:
    """Return a function that builds a configuration with a cache of the test's own."""

    def build(source: Path | str, **data: Any) -> Config:
        sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "seq_len": 16, "vocab_size": 256}
        loop = {"steps": 2, "global_batch": 8, "eval_batches": 1}
        where = {"source": str(source), "cache": str(tmp_path / "cache"), **data}
        return Config.model_validate({"model": sizes, "train": loop, "data": where})

    return build


def rewrite(path: Path, ids: Any, same_time: bool) -> None:
    """Write other tokens into the same file."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(np.asarray(ids, "<u2").tobytes())
        file.truncate()
    shift = 0 if same_time else 10**9
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + shift))


def test_a_file_rewritten_with_its_old_size_and_time_is_prepared_anew(make: Any, path: Path) -> None:
    first = prepare(make(path))
    rewrite(path, IDS[::-1], same_time=True)
    with pytest.raises(DataError, match=r"ids.bin does not hold the tokens that were prepared; restart"):
        open_prepared(first.path)  # a rank whose node has another file
    second = prepare(make(path))
    assert second.path != first.path and second.digest != first.digest
    assert np.array_equal(second.train[:], IDS[::-1][: len(second.train)])


def test_a_change_between_the_blocks_of_a_large_file_is_noticed(
    make: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with the old size and time: at the next start, and while a run reads it."""
    monkeypatch.setattr(reader, "WHOLE", 0)
    monkeypatch.setattr(reader, "BLOCK", 64)
    first = prepare(make(path))
    batches = Batches(first, make(path))
    sample, ids = first.train.sample(), IDS.copy()
    ids[40] ^= 1
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:  # the file system's clock may tick slowly
        rewrite(path, ids, same_time=True)
    assert first.train.sample() == sample, "no block has it"
    with pytest.raises(DataError, match=r"it was rewritten"):
        batches.sample(0, 0, 8)
    assert prepare(make(path)).digest != first.digest


@pytest.mark.parametrize("place", [0, BLOCK // 2 - 1, -BLOCK // 2, -1])
def test_large_files_are_compared_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(reader, "WHOLE", BLOCK)
    read: list[int] = []
    inner = Tokens._bytes
    monkeypatch.setattr(Tokens, "_bytes", lambda self, start, count: read.append(count) or inner(self, start, count))
    ids = np.arange(BLOCKS * BLOCK, dtype="<u2")
    span = Span(tmp_path / "ids.bin", "<u2", 0, len(ids))
    ids.tofile(span.path)
    before = Tokens(span).sample()
    assert len(read) == BLOCKS and set(read) == {BLOCK}
    ids[place] ^= 1
    ids.tofile(span.path)
    assert Tokens(span).sample() != before
    with pytest.raises(ValueError, match="does not hold the tokens that were prepared"):
        Tokens(span, before)


def test_a_file_that_is_cut_while_a_run_reads_it(make: Any, path: Path) -> None:
    """With a memory map, SIGBUS would kill the process."""
    batches = Batches(prepare(make(path)), make(path))
    batches.sample(0, 0, 8)
    os.truncate(path, 100)
    with pytest.raises(DataError, match=r"ids.bin changed while it was being read \(it was truncated: .* it has 100\)"):
        for step in range(10):
            batches.sample(step, 0, 8)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_file_that_is_rewritten_while_a_run_reads_it(
    make: Any, path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(reader, "RECHECK_WHOLE", limit)
    batches = Batches(prepare(make(path)), make(path))
    first = batches.sample(0, 0, 8)
    os.utime(path, (1, 1))
    assert np.array_equal(batches.sample(0, 0, 8), first), "the same tokens with another time are fine"
    rewrite(path, IDS[::-1], same_time=False)
    with pytest.raises(DataError, match=r"ids.bin changed while it was being read \(it was rewritten\)"):
        batches.sample(1, 0, 8)


def test_appended_tokens_change_nothing(make: Any, path: Path) -> None:
    batches = Batches(prepare(make(path)), make(path))
    first = batches.sample(0, 0, 8)
    with path.open("ab") as file:
        file.write(b"\1\0" * 100)
    assert np.array_equal(batches.sample(0, 0, 8), first)


def test_every_id_is_checked_when_it_is_read(make: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(prepare(make(path)), make(path))
    monkeypatch.setattr(Tokens, "refuse_changes", lambda self: None)
    rewrite(path, np.where(IDS[20] == IDS, 999, IDS), same_time=True)
    with pytest.raises(DataError, match=r"token id 999 at position \d+ of .*ids.bin is outside the vocabulary of 256"):
        for step in range(100):
            batches.sample(step, 0, 8)
    with pytest.raises(DataError, match="token id 999 at position"):
        rewrite(path, np.full(4000, 999), same_time=True)
        batches.validation(0, 0, 8)


@pytest.mark.parametrize("change", ["cut", "rewritten"])
def test_a_file_that_changes_while_it_is_prepared(
    make: Any, path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    inner = Tokens.scan

    def scan(self: Tokens, look: Any) -> str:
        if change == "cut":
            os.truncate(path, 1000)
            return inner(self, look)
        found = inner(self, look)
        rewrite(path, IDS[::-1], same_time=True)
        return found

    monkeypatch.setattr(Tokens, "scan", scan)
    with pytest.raises(DataError, match=r"ids.bin (changed while it was being|has 1000 bytes)"):
        prepare(make(path))
    assert list(cache_folder(make(path)).iterdir()) == [], "nothing is left of it"


@pytest.mark.parametrize(("value", "dtype"), [(0, "<u2"), (7, "<u2"), (0, "<u4"), (9, "<i8"), (3, "u1")])
def test_constant_files_are_refused(make: Any, tmp_path: Path, value: int, dtype: str) -> None:
    np.full(4000, value, dtype).tofile(tmp_path / "ids.bin")
    given = "auto" if value == 0 else np.dtype(dtype).name
    with pytest.raises(DataError, match=rf"all [\d,]+ train tokens of .*ids.bin are the id {value}, so .*nothing to l"):
        prepare(make(tmp_path / "ids.bin", dtype=given))


def test_a_file_that_was_partly_written_is_refused(make: Any, tmp_path: Path) -> None:
    """The file was allocated in full and copied in part, so validation is all zeros."""
    np.concatenate([IDS, np.zeros(400, "<u2")]).tofile(tmp_path / "ids.bin")
    with pytest.raises(DataError, match=r"all 220 validation tokens of .* are the id 0, .*never fully written"):
        prepare(make(tmp_path / "ids.bin"))


def test_constant_text_is_refused(make: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 4000)
    with pytest.raises(DataError, match="are the id 97"):
        prepare(make(tmp_path / "a.txt"))
