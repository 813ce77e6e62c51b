"""Matmuls of one rank and micro-batch: shapes, FLOPs and the least bytes that they must move. Torch-free.

The bytes count each factor read once and the result written once, as in the roofline model (Williams, Waterman,
Patterson 2009, doi:10.1145/1498765.1498785). The two matmuls of attention run as one fused kernel that keeps the
scores on the chip: its bytes are those of q, k, v and the output.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_gpt.config.schema import DTYPE_BYTES, Config
from dist_gpt.params import qkv_sections, vocab_range

ATTENTION = "attention"


@dataclass(frozen=True)
class Kernel:
    """`batch` matmuls (m, k) @ (k, n) of `element` bytes per number.

    For attention, m = n = sequence length, k = head width, `batch` = query heads of the whole micro-batch, and
    `kv_batch` = its key and value heads.
    """

    name: str
    m: int
    k: int
    n: int
    element: int
    batch: int = 1
    kv_batch: int = 0

    @property
    def flops(self) -> int:
        """Forward FLOPs; for attention, of its two matmuls over all T x T scores."""
        products = 2 if self.name == ATTENTION else 1
        return 2 * products * self.batch * self.m * self.k * self.n

    @property
    def bytes(self) -> int:
        """Compulsory memory traffic in bytes."""
        if self.name == ATTENTION:
            return 2 * (self.batch + self.kv_batch) * self.m * self.k * self.element  # q and output, k and v
        return self.batch * (self.m * self.k + self.k * self.n + self.m * self.n) * self.element


def rank_kernels(config: Config) -> list[Kernel]:
    """Return the forward matmuls of tp rank 0, one of each shape, in the order of the forward pass."""
    m, p, t = config.model, config.parallel, config.train
    tokens, head = t.micro_batch * m.seq_len // p.cp, m.hidden_size // m.num_heads
    q, k, v = (width // p.tp for width in qkv_sections(config))
    ffn = int(m.ffn_size or 0) // p.tp
    start, stop = vocab_range(config, 0)
    element = DTYPE_BYTES[t.dtype]
    return [
        Kernel("attn.qkv", tokens, m.hidden_size, q + k + v, element),
        Kernel(
            ATTENTION, m.seq_len, head, m.seq_len, element,
            batch=t.micro_batch * q // head, kv_batch=t.micro_batch * k // head,
        ),
        Kernel("attn.out", tokens, q, m.hidden_size, element),
        Kernel("mlp.up", tokens, m.hidden_size, 2 * ffn if m.activation == "swiglu" else ffn, element),
        Kernel("mlp.down", tokens, ffn, m.hidden_size, element),
        Kernel("head", tokens, m.hidden_size, stop - start, element),
    ]  # fmt: skip
