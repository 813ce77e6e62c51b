"""Prepare tokens: `prepare` makes them once, before the ranks start, or finds them in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_gpt.config.schema import Config
from dist_gpt.data.binary import find_tokenised, synthetic
from dist_gpt.data.cache import (
    Built,
    Prepared,
    build_entry,
    entry_problem,
    open_prepared,
    scan_part,
    write_part,
)
from dist_gpt.data.corpus import SOURCES, Corpus, DataError, Document, read_corpus, split_documents
from dist_gpt.data.formats import AUTO
from dist_gpt.data.reader import Span, Tokens
from dist_gpt.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, bpe_size
from dist_gpt.wording import counted

__all__ = ["Prepared", "cache_folder", "check_fits", "describe", "load_tokenizer", "open_prepared", "prepare"]

FORMAT = 2  # part of every key; raise it when the format of entries changes
SYNTHETIC_TOKENS = 2_000_000
SCAN_TOKENS = 1 << 23  # tokens checked at a time
BATCH_BYTES = 1 << 20  # text given to the tokenizer at a time

Say = Callable[[str], None]
Progress = Callable[[str], None] | None


@dataclass(frozen=True)
class _Recipe:
    """Recipe of a cache entry: `key` identifies its inputs, `build` fills a folder and returns parts and metadata."""

    key: dict[str, object]
    build: Callable[[Path], Built]


def prepare(config: Config, progress: Progress = None) -> Prepared:
    """Return the tokens of a resolved configuration, cached or made now. Call it before ranks start; it needs no torch.

    `progress` receives lines for the user. Raise DataError for data that cannot be used, for sequences longer than
    the data, and for token ids outside the vocabulary: before any rank exists, so equally for every layout.
    """
    say = progress or (lambda line: None)
    recipe = _recipe(config, say)
    key = hashlib.sha256(json.dumps({"format": FORMAT, **recipe.key}, sort_keys=True).encode()).hexdigest()
    root = cache_folder(config)
    folder = root / key
    problem = entry_problem(folder)
    if problem:
        if folder.exists():
            say(f"cache entry {folder} is damaged ({problem}); preparing it again")
        try:
            root.mkdir(parents=True, exist_ok=True)
            build_entry(recipe.build, folder)
        except OSError as error:
            raise DataError(
                f"data.cache: cannot write {root}: {error.strerror or error}; set data.cache to a "
                "writable folder with enough space"
            ) from error
    prepared = replace(open_prepared(folder), source=config.data.source)  # equal data may be cached under another name
    check_fits(prepared, config)
    return prepared


def load_tokenizer(prepared: Prepared) -> Tokenizer:
    """Return the tokenizer of these tokens. Raise DataError for tokenised and synthetic sources, which have none."""
    if prepared.tokenizer == "none":
        raise DataError(f"data.source: {prepared.source} holds tokens only, so text cannot be encoded or decoded")
    if bpe_size(prepared.tokenizer) is None:
        return ByteTokenizer()
    return BpeTokenizer.load(prepared.path / "tokenizer.json")


def check_fits(prepared: Prepared, config: Config) -> None:
    """Raise DataError if tokens are all equal or do not suit model.seq_len, model.vocab_size and train.eval_batches."""
    needed = config.model.seq_len + 1
    parts = [("train", prepared.train)] + ([("validation", prepared.val)] if config.train.eval_batches else [])
    for name, tokens in parts:
        if len(tokens) < needed:
            advice = "lower model.seq_len or use more data"
            if name == "validation":
                advice = "lower model.seq_len, use more data, raise data.val_fraction, or set train.eval_batches to 0"
            raise DataError(
                f"data.source: {name} part of {prepared.source} has {len(tokens)} tokens, but one sequence needs "
                f"{needed} (model.seq_len {config.model.seq_len} + 1 for the target); {advice}"
            )
    _refuse_constant(prepared, config.model.seq_len)
    vocabulary = config.model.vocab_size
    if vocabulary is None or (prepared.max_id < vocabulary and prepared.min_id >= 0):
        return
    for name, tokens in (("train", prepared.train), ("validation", prepared.val)):
        for first in range(0, len(tokens), SCAN_TOKENS):
            ids = tokens[first : first + SCAN_TOKENS]
            bad = np.flatnonzero((ids < 0) | (ids >= vocabulary))
            if len(bad):
                token = int(ids[bad[0]])
                advice = "write the data again without negative ids"
                if token >= vocabulary:
                    advice = f"set model.vocab_size to at least {prepared.max_id + 1}, or use other data"
                raise DataError(
                    f"data.source: token id {token} at position {first + bad[0]} of {name} is outside the vocabulary "
                    f"of {vocabulary} (model.vocab_size: ids 0 to {vocabulary - 1}); {advice}"
                )


def _refuse_constant(prepared: Prepared, seq_len: int) -> None:
    """Raise DataError if a part repeats one id: nothing can be learnt from it.

    Validation is the end of a single file, and is constant if the file was allocated but only partly written.
    """
    parts = (
        ("train", prepared.train, prepared.train_ids, 0),
        ("validation", prepared.val, prepared.val_ids, seq_len),  # a few tokens may be equal by chance
    )
    for name, tokens, (low, high), fewest in parts:
        if low == high and len(tokens) > fewest:
            why = "check the program that wrote it, and"
            if low == 0:
                why = "the file may have been allocated but never fully written;"
            raise DataError(
                f"data.source: all {len(tokens):,} {name} tokens of {prepared.source} are the id {low}, so there is "
                f"nothing to learn from them; {why} write it again"
            )


def describe(prepared: Prepared) -> str:
    """Return one line for the console: source, token counts, tokenizer, vocabulary and cache entry."""
    tokenizer = "no tokenizer" if prepared.tokenizer == "none" else f"{prepared.tokenizer} tokenizer"
    return (
        f"{prepared.source}: {_millions(len(prepared.train))} train tokens, {_millions(len(prepared.val))} validation, "
        f"{tokenizer}, vocabulary {prepared.vocab_size}, cache {prepared.path}"
    )


def cache_folder(config: Config) -> Path:
    """Return data.cache, $XDG_CACHE_HOME/dist_gpt or ~/.cache/dist_gpt; absolute, as ranks may start elsewhere."""
    if config.data.cache is not None:
        return Path(config.data.cache).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "dist_gpt"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 100_000 else f"{count:,}"


# Recipes of cache entries --------------------------------------------------------------------------------------------


def _recipe(config: Config, say: Say) -> _Recipe:
    data = config.data
    if data.source == "synthetic":
        _refuse_dtype(config)
        return _synthetic_recipe(config)
    if not data.source:
        raise DataError(f"data.source: got an empty text; allowed: {SOURCES}")
    with _reading():
        spans = None
        if data.source != "stdlib":
            spans = find_tokenised(data.source, data.val_fraction, data.dtype, config.model.vocab_size)
    if spans is not None:
        return _tokenised_recipe(data.source, spans)
    _refuse_dtype(config)
    bpe_size(data.tokenizer)  # raises for a wrong one before the corpus is read
    corpus = read_corpus(data.source)
    if corpus.skipped:
        examples = ", ".join(corpus.skipped[:3])
        are = "file is not text and is" if len(corpus.skipped) == 1 else "files are not text and are"
        say(f"{data.source}: {len(corpus.skipped)} {are} skipped (for example {examples})")
    key = {"corpus": corpus.digest, "tokenizer": data.tokenizer, "val_fraction": data.val_fraction}
    return _Recipe({"kind": "text", **key}, lambda folder: _text(folder, corpus, config, say))


def _refuse_dtype(config: Config) -> None:
    """Raise DataError if data.dtype is set and the source is not a file of tokens."""
    if config.data.dtype != AUTO:
        raise DataError(
            f"data.dtype: {config.data.dtype}, but data.source {config.data.source} is not a file of tokens; leave "
            "data.dtype at auto"
        )


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Raise DataError that blames the source, not the cache, for an OSError in the block."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data.source: cannot read {error.filename}: {error.strerror}; change its permissions"
        ) from error


def _synthetic_recipe(config: Config) -> _Recipe:
    vocabulary = config.model.vocab_size
    if vocabulary is None:
        raise DataError("model.vocab_size: missing, but synthetic data need it; set it to the number of tokens wanted")
    fraction = config.data.val_fraction
    count = max(SYNTHETIC_TOKENS, math.ceil(2 * (config.model.seq_len + 1) / fraction))  # enough for any seq_len
    held = int(count * fraction)

    def build(folder: Path) -> Built:
        tokens = synthetic(count, vocabulary)
        dtype = _dtype(vocabulary)
        parts = {
            "train": write_part(folder / "train.bin", dtype, [tokens[: count - held]]),
            "val": write_part(folder / "val.bin", dtype, [tokens[count - held :]]),
        }
        return parts, {"source": "synthetic", "tokenizer": "none", "vocab_size": vocabulary}

    return _Recipe({"kind": "synthetic", "vocabulary": vocabulary, "count": count, "val_fraction": fraction}, build)


def _tokenised_recipe(source: str, spans: tuple[Span, Span]) -> _Recipe:
    """Return the recipe of tokenised files.

    The key holds size, times and a digest of blocks: reading tens of GB at every start would take too long. A writer
    that changes bytes between the blocks can set the modification time back, but not the inode's change time.
    """
    key: list[object] = []
    with _reading():
        samples = [_opened(span).sample() for span in spans]
        for span, sample in zip(spans, samples, strict=True):
            stat = span.path.stat()
            place = [str(span.path), span.dtype, span.offset, span.count]
            key.append([*place, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, sample])

    def build(folder: Path) -> Built:
        with _reading():
            train, val = (scan_part(span) for span in spans)
        for part, sample in ((train, samples[0]), (val, samples[1])):
            if part.sample != sample:
                raise DataError(
                    f"data.source: {part.file} changed while it was being prepared; restart to prepare it again"
                )
        largest = max(train.max_id, val.max_id)
        return {"train": train, "val": val}, {"source": source, "tokenizer": "none", "vocab_size": largest + 1}

    return _Recipe({"kind": "tokenised", "spans": key}, build)


def _opened(span: Span) -> Tokens:
    try:
        return Tokens(span)
    except ValueError as error:
        raise DataError(
            f"data.source: {error}; it changed while it was being prepared; restart to prepare it again"
        ) from None


def _text(folder: Path, corpus: Corpus, config: Config, say: Say) -> Built:
    """Split a corpus, train the tokenizer on the train part if it is a BPE, and write both parts as tokens."""
    documents = dict(zip(("train", "val"), split_documents(corpus.documents, config.data.val_fraction), strict=True))
    size = bpe_size(config.data.tokenizer)
    tokenizer: Tokenizer
    if size is None:
        tokenizer = ByteTokenizer()
    else:
        say(f"training a BPE tokenizer of {size} tokens on {corpus.size / 1e6:.1f} MB of text")
        trained = BpeTokenizer.train((document.read() for document in documents["train"]), size)
        trained.save(folder / "tokenizer.json")
        if trained.vocab_size < size:
            say(f"the text yields only {trained.vocab_size} tokens; the other {size - trained.vocab_size} stay unused")
        tokenizer = trained
    say(f"tokenising {counted(len(corpus.documents), 'document')}, {corpus.size / 1e6:.1f} MB")
    dtype = _dtype(tokenizer.vocab_size)
    parts = {name: write_part(folder / f"{name}.bin", dtype, _encode(tokenizer, documents[name])) for name in documents}
    meta = {"source": corpus.source, "tokenizer": config.data.tokenizer, "vocab_size": tokenizer.vocab_size}
    return parts, meta


def _encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> Iterator[NDArray[np.int64]]:
    """Yield the tokens of the documents in order, with a separator between two of them."""
    between = np.array([], dtype=np.int64)  # no separator before the first
    batch: list[str] = []
    waiting = 0
    for number, document in enumerate(documents, 1):
        batch.append(document.read())
        waiting += document.size
        if waiting < BATCH_BYTES and number < len(documents):
            continue
        for tokens in tokenizer.encode_many(batch):
            yield between
            yield tokens
            between = np.array([tokenizer.separator], dtype=np.int64)
        batch, waiting = [], 0


def _dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"
