"""The only table of parameters: every weight of the model with its shape, its split and the kind of its gradient.

Initialisation, counting, clipping, gradient buckets, optimizer shards and checkpoints all read this table, so a
parameter that is missing here does not exist anywhere.

Blocks are numbered 0 (embedding), 1 .. num_layers (layers), num_layers + 1 (head).

Gradient kinds, over the tp axis:
  sharded     every tp rank holds a piece of its own; nothing to sum
  replicated  every tp rank holds the whole and computes the same gradient
  partial     every tp rank holds the whole but sees part of the tokens (sequence parallel): sum over tp
Over the data axis every gradient is a partial sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from dist_gpt.config.schema import Config
from dist_gpt.layout import even_split

SHARDED, REPLICATED, PARTIAL = "sharded", "replicated", "partial"


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of full shape `shape`.

    `sections` are the sizes of the parts of dim `shard_dim` (q, k and v of a fused projection; gate and up of SwiGLU),
    each of which is split evenly over tp.
    """

    name: str
    shape: tuple[int, ...]
    block: int
    shard_dim: int | None
    sections: tuple[int, ...]
    kind: str
    init: str
    std: float
    decay: bool

    @property
    def numel(self) -> int:
        """Number of elements of the full parameter."""
        return prod(self.shape)

    def pieces(self, tp: int, index: int) -> list[tuple[int, int]]:
        """Return the ranges [start, stop) along `shard_dim` that rank `index` of `tp` holds, in storage order."""
        if self.shard_dim is None:
            return []
        ranges, offset = [], 0
        for size in self.sections:
            start, stop = even_split(size, tp, index)
            ranges.append((offset + start, offset + stop))
            offset += size
        return ranges

    def local_shape(self, tp: int, index: int) -> tuple[int, ...]:
        """Return the shape of the part that rank `index` of `tp` stores."""
        if self.shard_dim is None:
            return self.shape
        length = sum(stop - start for start, stop in self.pieces(tp, index))
        return tuple(length if d == self.shard_dim else n for d, n in enumerate(self.shape))


def vocab_range(config: Config, index: int) -> tuple[int, int]:
    """Return the vocabulary rows [start, stop) of tp rank `index`. For any size, pieces differ by at most one row."""
    return even_split(int(config.model.vocab_size or 0), config.parallel.tp, index)


def qkv_sections(config: Config) -> tuple[int, int, int]:
    """Return the numbers of rows of q, k and v in the fused projection."""
    m = config.model
    head = m.hidden_size // m.num_heads
    kv = int(m.num_kv_heads or m.num_heads) * head
    return (m.num_heads * head, kv, kv)


def parameter_table(config: Config) -> tuple[Param, ...]:
    """Return all parameters in the order of the forward pass. A tied embedding is listed once, in block 0."""
    return tuple(_Builder(config).rows())


class _Builder:
    """Builder of the rows of the table; holds the values that they share."""

    def __init__(self, config: Config) -> None:
        self.config = config
        m, p = config.model, config.parallel
        self.whole = PARTIAL if p.sequence_parallel and p.tp > 1 else REPLICATED
        self.residual_std = m.init_std / (2 * m.num_layers) ** 0.5  # GPT-2's, for projections into the residual

    def rows(self) -> Iterator[Param]:
        m = self.config.model
        vocab, hidden = int(m.vocab_size or 0), m.hidden_size
        yield self._matrix("embed.weight", 0, (vocab, hidden), 0, (vocab,), m.init_std)
        if m.position == "learned":
            yield Param("embed.position", (m.seq_len, hidden), 0, None, (), self.whole, "normal", m.init_std, True)
        for i in range(m.num_layers):
            yield from self._layer(i)
        last = m.num_layers + 1
        yield from self._norm("head.norm", last)
        if not m.tie_embeddings:
            yield self._matrix("head.weight", last, (vocab, hidden), 0, (vocab,), m.init_std)

    def _layer(self, i: int) -> Iterator[Param]:
        m = self.config.model
        name, block, hidden, ffn = f"layers.{i}", i + 1, m.hidden_size, int(m.ffn_size or 0)
        qkv = qkv_sections(self.config)
        up = (ffn, ffn) if m.activation == "swiglu" else (ffn,)
        yield from self._norm(f"{name}.norm1", block)
        yield from self._linear(f"{name}.attn.qkv", block, sum(qkv), hidden, 0, qkv, m.init_std)
        yield from self._linear(f"{name}.attn.out", block, hidden, qkv[0], 1, (qkv[0],), self.residual_std)
        yield from self._norm(f"{name}.norm2", block)
        yield from self._linear(f"{name}.mlp.up", block, sum(up), hidden, 0, up, m.init_std)
        yield from self._linear(f"{name}.mlp.down", block, hidden, ffn, 1, (ffn,), self.residual_std)

    def _norm(self, name: str, block: int) -> Iterator[Param]:
        hidden = self.config.model.hidden_size
        yield Param(f"{name}.weight", (hidden,), block, None, (), self.whole, "ones", 0.0, False)
        if self.config.model.norm == "layernorm" and self.config.model.bias:
            yield Param(f"{name}.bias", (hidden,), block, None, (), self.whole, "zeros", 0.0, False)

    def _linear(
        self, name: str, block: int, rows: int, columns: int, shard_dim: int, sections: tuple[int, ...], std: float
    ) -> Iterator[Param]:
        """Yield a column-parallel (shard_dim 0: output rows split) or row-parallel (shard_dim 1: input split) layer."""
        yield self._matrix(f"{name}.weight", block, (rows, columns), shard_dim, sections, std)
        if self.config.model.bias:
            if shard_dim == 0:
                yield Param(f"{name}.bias", (rows,), block, 0, sections, SHARDED, "zeros", 0.0, False)
            else:  # added once, after the sum over tp
                yield Param(f"{name}.bias", (rows,), block, None, (), self.whole, "zeros", 0.0, False)

    def _matrix(
        self, name: str, block: int, shape: tuple[int, int], dim: int, sections: tuple[int, ...], std: float
    ) -> Param:
        return Param(name, shape, block, dim, sections, SHARDED, "normal", std, True)


def params_of_blocks(config: Config, blocks: tuple[int, ...]) -> tuple[Param, ...]:
    """Return the parameters that a chunk of `blocks` stores; a tied head without block 0 stores the embedding too."""
    table = parameter_table(config)
    rows = [p for p in table if p.block in blocks]
    if config.model.tie_embeddings and config.model.num_layers + 1 in blocks and 0 not in blocks:
        rows.append(table[0])
    return tuple(rows)
