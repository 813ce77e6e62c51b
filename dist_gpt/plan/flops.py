"""Every matmul of the model: its shape, forward and backward FLOPs, and share of the total. Torch-free.

Counted are the matmuls with weights and the two of attention; a multiplication and an addition are one FLOP each.
Attention counts all T x T scores (non-causal), as the published formulas do. Biases, norms, activations and the
embedding lookup are not matmuls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_gpt.config.schema import Config
from dist_gpt.params import parameter_table, qkv_sections

ATTENTION = ("attention scores QK^T", "attention values PV")
LAST_OF_LAYER = "mlp.down"


@dataclass(frozen=True)
class Matmul:
    """`batch` matmuls (m, k) @ (k, n) for one sequence, in each of `count` layers."""

    name: str
    m: int
    k: int
    n: int
    count: int
    batch: int = 1

    @property
    def forward_flops(self) -> int:
        """Forward FLOPs of all layers, for one sequence."""
        return 2 * self.m * self.k * self.n * self.batch * self.count

    @property
    def backward_flops(self) -> int:
        """Backward FLOPs of all layers: two matmuls of the same size, one for the gradient of each factor."""
        return 2 * self.forward_flops


def matmuls(config: Config) -> list[Matmul]:
    """Return the matmuls of the whole model for one sequence, in the order of the forward pass."""
    m = config.model
    tokens, hidden, layers, ffn = m.seq_len, m.hidden_size, m.num_layers, int(m.ffn_size or 0)
    q, k, v = qkv_sections(config)
    head = hidden // m.num_heads
    up = 2 * ffn if m.activation == "swiglu" else ffn
    return [
        Matmul("attn.qkv", tokens, hidden, q + k + v, layers),
        Matmul(ATTENTION[0], tokens, head, tokens, layers, m.num_heads),
        Matmul(ATTENTION[1], tokens, tokens, head, layers, m.num_heads),
        Matmul("attn.out", tokens, q, hidden, layers),
        Matmul("mlp.up", tokens, hidden, up, layers),
        Matmul(LAST_OF_LAYER, tokens, ffn, hidden, layers),
        Matmul("head", tokens, hidden, int(m.vocab_size or 0), 1),
    ]


def flops_document(config: Config) -> dict[str, Any]:
    """Return what `dist-gpt flops --json` prints.

    FLOPs of a matmul are for one sequence and all layers; `share` is its part of the sum over all matmuls. Per-token
    numbers are for training: forward and backward.
    """
    rows = matmuls(config)
    tokens = config.model.seq_len
    model = sum(r.forward_flops + r.backward_flops for r in rows)
    return {
        "name": config.name,
        "parameters": sum(p.numel for p in parameter_table(config)),
        "seq_len": tokens,
        "matmuls": [
            {
                "name": r.name,
                "shape": [r.m, r.k, r.n],
                "batch": r.batch,
                "count": r.count,
                "forward_flops": r.forward_flops,
                "backward_flops": r.backward_flops,
                "share": (r.forward_flops + r.backward_flops) / model,
            }
            for r in rows
        ],
        "model_flops_per_token": model // tokens,
        "hardware_flops_per_token": (model + _recomputed(config, rows)) // tokens,
        "recompute": config.train.recompute,
        "published": _published(config, rows, model),
    }


def _recomputed(config: Config, rows: list[Matmul]) -> int:
    """Return the FLOPs of one sequence that `train.recompute` repeats.

    These are none, the attention matmuls (selective), or each layer's matmuls but the last (full).
    """
    if config.train.recompute == "none":
        return 0
    if config.train.recompute == "selective":
        return sum(r.forward_flops for r in rows if r.name in ATTENTION)
    return sum(r.forward_flops for r in rows if r.name not in (LAST_OF_LAYER, "head"))


def _published(config: Config, rows: list[Matmul], model: int) -> dict[str, int]:
    """Return the model FLOPs per token by other conventions, and N.

    `6n_12lht`: 6 N + 12 L H T (PaLM, arXiv:2204.02311, appendix B). N is the number of parameters without the tables
    that are only looked up (positions; the token embedding if the head has its own weight); it includes norms and
    biases, so the result is slightly above the sum of the matmuls.
    `causal`: only the half of the scores that a causal mask leaves (FlashAttention-2, arXiv:2307.08691, section 4.1).
    """
    m = config.model
    lookup = {"embed.position"} if m.tie_embeddings else {"embed.position", "embed.weight"}
    used = sum(p.numel for p in parameter_table(config) if p.name not in lookup)
    attention = sum(r.forward_flops + r.backward_flops for r in rows if r.name in ATTENTION)
    return {
        "n": used,
        "6n_12lht": 6 * used + 12 * m.num_layers * m.hidden_size * m.seq_len,
        "causal": (model - attention // 2) // m.seq_len,
    }
