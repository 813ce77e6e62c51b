"""Prepared data: the cache (second use, damage, races) and the batches drawn from it."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gpt.config.schema import Config
from dist_gpt.data import cache, tokens
from dist_gpt.data.corpus import DataError
from dist_gpt.data.loader import Batches
from dist_gpt.data.tokenizer import ByteTokenizer
from dist_gpt.data.tokens import cache_folder, describe, open_prepared, prepare

TEXT = "".join(f"line {i}: the quick brown fox jumps over the lazy dog, é 漢 {i * i}\n" for i in range(400))


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


def entries(config: Config) -> list[Path]:
    """Everything in the cache, hidden leftovers included."""
    return sorted(cache_folder(config).iterdir())


# The cache -----------------------------------------------------------------------------------------------------------


def test_second_call_uses_the_entry(make: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(make(text))
    before = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    monkeypatch.setattr(tokens, "build_entry", lambda *_: pytest.fail("made again"))
    second = prepare(make(text))
    assert (second.path, second.digest) == (first.path, first.digest)
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == before
    copy = tmp_path / "copy.txt"
    shutil.copy(text, copy)
    assert prepare(make(copy)).path == first.path and prepare(make(copy)).source == str(copy)  # contents, not names
    monkeypatch.undo()
    text.write_text(TEXT.replace("fox", "cat"))
    assert prepare(make(text)).path != first.path
    assert prepare(make(copy, val_fraction=0.1)).path != first.path
    assert len(entries(make(text))) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "meta", "tokenizer"])
def test_damaged_entry_is_made_again(make: Any, text: Path, damage: str) -> None:
    config = make(text, {"vocab_size": 300}, tokenizer="bpe:300")
    first = prepare(config)
    kept = first.train[:50].copy()
    name = {"meta": "meta.json", "tokenizer": "tokenizer.json"}.get(damage, "train.bin")
    data = bytearray((first.path / name).read_bytes())
    os.unlink(first.path / name)  # the old map stays valid: damage goes to a new file
    if damage != "gone":
        data[len(data) // 2] ^= 1
        (first.path / name).write_bytes(bytes(data[:-2] if damage in ("cut", "meta") else data))
    if damage == "cut":
        with pytest.raises(DataError, match="bytes instead of"):
            open_prepared(first.path)
    notes: list[str] = []
    again = prepare(config, notes.append)
    assert any("damaged" in note and "preparing it again" in note for note in notes)
    assert again.digest == first.digest and np.array_equal(again.train[:50], kept)
    assert entries(config) == [first.path]
    assert cache.entry_problem(first.path) is None


def test_numbers_changed_in_meta_are_noticed(make: Any, text: Path) -> None:
    first = prepare(make(text))
    meta = json.loads((first.path / "meta.json").read_text())
    meta["parts"]["train"]["max_id"] = 7  # would let ids beyond the vocabulary through
    (first.path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="the digest in meta.json does not match its parts"):
        open_prepared(first.path)
    assert prepare(make(text)).max_id == first.max_id


def test_loser_of_a_race_takes_the_winners_entry(make: Any, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(text)
    inner = tokens._text
    winner: list[int] = []

    def slow(folder: Path, *rest: Any) -> Any:
        built = inner(folder, *rest)
        if not winner:  # while this one writes, another process prepares the same data
            winner.append(0)
            winner[0] = (prepare(config).path / "train.bin").stat().st_ino
        return built

    monkeypatch.setattr(tokens, "_text", slow)
    loser = prepare(config)
    assert (loser.path / "train.bin").stat().st_ino == winner[0]
    assert entries(config) == [loser.path]


def _prepare_at(moment: float, config: Config) -> tuple[str, bool]:
    time.sleep(max(0.0, moment - time.time()))
    return prepare(config).digest, "torch" in sys.modules


def test_processes_racing_agree_and_need_no_torch(make: Any, text: Path) -> None:
    config = make(text)
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in range(2):  # the second time over a damaged entry
            results = list(pool.map(_prepare_at, [time.time() + 0.5] * 3, [config] * 3))
            assert len(set(results)) == 1 and not results[0][1]
            assert len(entries(config)) == 1
            (entries(config)[0] / "val.bin").write_bytes(b"")


def test_failed_preparation_leaves_nothing(make: Any, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "encode_many", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(make(text))
    assert entries(make(text)) == []


def test_cache_place_and_description(make: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepared = prepare(make(text, cache=None))
    assert prepared.path.parent == tmp_path / "xdg" / "dist_gpt"
    meta = json.loads((prepared.path / "meta.json").read_text())
    assert meta["parts"]["train"]["count"] == len(prepared.train) and meta["tokenizer"] == "byte"
    line = describe(prepared)
    assert "byte tokenizer, vocabulary 256" in line and str(prepared.path) in line and "\n" not in line
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(make(text, cache=None)) == Path.home() / ".cache" / "dist_gpt"
    with pytest.raises(DataError, match=r"set data\.cache to a writable folder"):
        prepare(make(text, cache=str(text)))
    with pytest.raises(DataError, match="cannot be read"):
        open_prepared(tmp_path / "nowhere")


# Batches -------------------------------------------------------------------------------------------------------------


def test_slices_make_up_the_batch_whoever_asks(make: Any, text: Path) -> None:
    config = make(text)
    prepared = prepare(config)
    whole = Batches(prepared, config).sample(3, 0, 8)
    for widths in ([4, 4], [1] * 8, [3, 5]):
        firsts = np.cumsum([0, *widths[:-1]])
        ranks = [Batches(open_prepared(prepared.path), config) for _ in widths]  # every rank has its own, no history
        parts = [rank.sample(3, int(f), w) for rank, f, w in zip(ranks, firsts, widths, strict=True)]
        assert np.array_equal(np.concatenate(parts), whole)
        parts = [rank.validation(1, int(f), w) for rank, f, w in zip(ranks, firsts, widths, strict=True)]
        assert np.array_equal(np.concatenate(parts), ranks[0].validation(1, 0, 8))
    assert whole.shape == (8, 17) and whole.dtype == np.int64


def test_batches_depend_on_seed_and_step_alone(make: Any, text: Path) -> None:
    prepared = prepare(make(text))
    base = Batches(prepared, make(text, order="replacement")).offsets(5, 0, 8)
    larger = make(text, train={"global_batch": 16, "steps": 9, "seed": 4}, order="replacement")
    bigger = Batches(prepared, larger).offsets(5, 0, 8)
    assert np.array_equal(base, bigger)
    for order in ("epochs", "replacement"):
        here = Batches(prepared, make(text, order=order)).offsets(5, 0, 8)
        other_run = Batches(prepared, make(text, train={"steps": 9, "seed": 4}, order=order))
        assert np.array_equal(here, other_run.offsets(5, 0, 8))
        assert not np.array_equal(here, Batches(prepared, make(text, order=order)).offsets(6, 0, 8))
        assert not np.array_equal(here, Batches(prepared, make(text, seed=1, order=order)).offsets(5, 0, 8))
    words = np.random.Philox(key=np.array([0, 5], dtype=np.uint64)).random_raw(8)
    assert base.tolist() == [int(word) % (len(prepared.train) - 16) for word in words]


def test_windows_lie_in_the_data_and_reach_its_ends(make: Any, tmp_path: Path) -> None:
    (np.arange(40, dtype="<u2")).tofile(tmp_path / "ids.bin")
    config = make(tmp_path / "ids.bin", {"seq_len": 4}, val_fraction=0.25, order="replacement")
    batches = Batches(prepare(config), config)
    starts = set()
    for step in range(100):
        batch = batches.sample(step, 0, 8)
        assert (np.diff(batch) == 1).all() and batch.max() <= 29
        starts |= set(batch[:, 0].tolist())
    assert starts == set(range(26))  # all windows of 30 tokens
    val = np.concatenate([batches.validation(i, 0, 8) for i in range(3)])
    assert (np.diff(val) == 1).all() and set(val[:, 0].tolist()) == set(range(30, 36))
    assert (np.diff(val[:, 0]) >= 0).all()
    for first, count in ((4, 5), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="of a global batch of 8"):
            batches.sample(0, first, count)
    with pytest.raises(ValueError, match="validation batch 3 of 3"):
        batches.validation(3, 0, 1)
