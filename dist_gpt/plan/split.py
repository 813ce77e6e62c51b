"""Split of the blocks into pipeline chunks.

Blocks are numbered as in `params`: 0 embedding, 1 .. L layers, L + 1 head. Chunks are contiguous; the embedding is
in the first and the head in the last.
"""

from __future__ import annotations

from functools import lru_cache

from dist_gpt.config.schema import Config
from dist_gpt.params import qkv_sections


def layer_forward_flops(config: Config, tokens: int) -> int:
    """Return the forward FLOPs of one layer over `tokens` tokens: the four matmuls and non-causal attention.

    Source: arXiv:2205.05198 appendix A; grouped-query attention and SwiGLU only change the widths.
    """
    m = config.model
    heads, kv, _ = qkv_sections(config)
    up = int(m.ffn_size or 0) * (2 if m.activation == "swiglu" else 1)
    matmuls = m.hidden_size * (heads + 2 * kv) + heads * m.hidden_size + m.hidden_size * (up + int(m.ffn_size or 0))
    return 2 * tokens * matmuls + 4 * tokens * m.seq_len * heads


def head_forward_flops(config: Config, tokens: int) -> int:
    """Return the forward FLOPs of the vocabulary projection over `tokens` tokens."""
    return 2 * tokens * config.model.hidden_size * int(config.model.vocab_size or 0)


def layers_per_chunk(config: Config) -> list[int]:
    """Return the number of layers of each chunk, in chunk order; raise ValueError if they do not fit the model."""
    m, p = config.model, config.parallel
    chunks = p.pp * p.virtual_stages
    if isinstance(p.layers, list):
        counts = list(p.layers)
    elif p.layers == "equal":
        counts = [m.num_layers // chunks] * chunks
    else:
        counts = list(_balanced(m.num_layers, chunks, head_forward_flops(config, 1) / layer_forward_flops(config, 1)))
    if len(counts) != chunks or sum(counts) != m.num_layers:
        raise ValueError(
            f"parallel.layers: {counts} has {len(counts)} chunks and {sum(counts)} layers; the model has "
            f"{m.num_layers} layers and pp x virtual_stages = {chunks} chunks"
        )
    return counts


@lru_cache(maxsize=64)
def _balanced(layers: int, chunks: int, head_cost: float) -> tuple[int, ...]:
    """Return the split with the smallest largest chunk, where a layer costs 1 and the head `head_cost`.

    It is a dynamic program over (chunks placed, layers placed); among equals it takes one with a small sum of squares.
    """
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for chunk in range(chunks):
        left = chunks - chunk - 1  # every later chunk still needs one layer
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for placed, (largest, squares, counts) in best.items():
            widths = range(1, layers - placed - left + 1) if left else [layers - placed]
            for width in widths:
                cost = width + (head_cost if not left else 0.0)
                candidate = (max(largest, cost), squares + cost * cost, (*counts, width))
                at = placed + width
                if at not in following or candidate < following[at]:
                    following[at] = candidate
        best = following
    return best[layers][2]


def split_blocks(config: Config) -> list[tuple[int, ...]]:
    """Return the blocks of each chunk, in chunk order."""
    chunks, start = [], 1
    counts = layers_per_chunk(config)
    for index, count in enumerate(counts):
        blocks = list(range(start, start + count))
        start += count
        if index == 0:
            blocks.insert(0, 0)
        if index == len(counts) - 1:
            blocks.append(config.model.num_layers + 1)
        chunks.append(tuple(blocks))
    return chunks
