"""Tokenizers: UTF-8 bytes, and a byte-level BPE trained on the corpus (Sennrich et al. 2016, bytes as in GPT-2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dist_gpt.config.schema import SMALLEST_BPE
from dist_gpt.data.corpus import DataError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """Converter of text to ids and back. `separator` stands between documents; encoding text never produces it."""

    vocab_size: int
    separator: int

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of one text, (tokens,)."""

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Return the ids of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; invalid UTF-8 (a cut character) becomes U+FFFD."""


class ByteTokenizer:
    """Tokenizer with 256 ids, the UTF-8 bytes. NUL separates documents: a text that holds one is refused as binary."""

    vocab_size = 256
    separator = 0

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of one text, (bytes,)."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; cut characters become U+FFFD."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")


class BpeTokenizer:
    """Byte-level BPE of the `tokenizers` library; id 0 is the end of text."""

    separator = 0

    def __init__(self, inner: Any) -> None:  # a tokenizers.Tokenizer; imported where it is needed
        inner.encode_special_tokens = True  # "<|endoftext|>" inside a text is text, not the separator
        self._inner = inner
        self.vocab_size = int(inner.get_vocab_size())

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> BpeTokenizer:
        """Learn at most `size` tokens from `texts`; fewer if no more pairs repeat."""
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers

        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte has a token: no unknown text
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer=trainer)
        return cls(inner)

    @classmethod
    def load(cls, path: Path) -> BpeTokenizer:
        """Read a tokenizer from `path`, a tokenizer.json."""
        from tokenizers import Tokenizer as Inner

        return cls(Inner.from_file(str(path)))

    def save(self, path: Path) -> None:
        """Write the tokenizer to `path`, a tokenizer.json."""
        self._inner.save(str(path))

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of one text, (tokens,)."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Return the ids of each text."""
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int64) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, including any end of text; cut characters become U+FFFD."""
        return str(self._inner.decode([int(i) for i in ids], skip_special_tokens=False))


def bpe_size(spec: str) -> int | None:
    """Return SIZE of "bpe:SIZE", or None for "byte". Raise DataError for anything else."""
    if spec == "byte":
        return None
    kind, _, size = spec.partition(":")
    if kind == "bpe" and size.isascii() and size.isdigit() and int(size) >= SMALLEST_BPE:
        return int(size)
    raise DataError(f"data.tokenizer: got {spec!r}; allowed: byte, or bpe:SIZE with SIZE at least {SMALLEST_BPE}")
