"""Textbook formulas as plain functions: the independent oracle of the product's counting. No torch, no dist_gpt.

Symbols, the same in every function:
  B sequences per step; b sequences per micro-batch; s tokens per sequence; h hidden size; L layers; a query heads;
  k key/value heads; f MLP inner width; V vocabulary; t tensor-, p pipeline-, d data-parallel ranks; n ranks of a group;
  v model chunks per pipeline rank; m micro-batches per step and pipeline; psi parameters.
Sources, by the short names used below:
  SC21     Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, arXiv 2104.04473
  RAR      Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198
  ZeRO     ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, arXiv 1910.02054
  ZB       Zero Bubble Pipeline Parallelism, arXiv 2401.10241
  GPipe    Efficient Training of Giant Neural Networks using Pipeline Parallelism, arXiv 1811.06965
  PaLM     arXiv 2204.02311, appendix B (MFU and 6N + 12 L h s per token)
  NCCL     nccl-tests doc/PERFORMANCE.md (bus bandwidth factors)
Integers stay integers wherever the formula is one; counts are compared exactly.
"""

from __future__ import annotations

from fractions import Fraction

# --- parameters -----------------------------------------------------------------------------------


def sc21_parameters(L: int, h: int, V: int, s: int) -> int:
    """SC21 eq 2, P = 12 L h^2 (1 + 13/(12h) + (V+s)/(12 L h)), multiplied out; without the last LayerNorm."""
    return 12 * L * h * h + 13 * L * h + (V + s) * h


def gpt2_parameters(
    L: int,
    h: int,
    V: int,
    s: int,
    f: int | None = None,
    bias: bool = True,
    tied: bool = True,
) -> int:
    """GPT-2 family exactly: SC21 eq 2 plus the last LayerNorm, for any MLP width (f = 4h: eq 2 + 2h).

    A layer has q, k, v (3h^2), output (h^2), up and down (2hf), two LayerNorm weights (2h) and, with biases,
    3h + h + f + h and two LayerNorm biases (2h).
    """
    f = 4 * h if f is None else f
    layer = 4 * h * h + 2 * h * f + 2 * h + (7 * h + f if bias else 0)
    return L * layer + (1 if tied else 2) * V * h + s * h + (2 * h if bias else h)


def llama_parameters(L: int, h: int, V: int, a: int, k: int, f: int, tied: bool = False) -> int:
    """Llama family (arXiv 2302.13971; grouped queries as in Llama 2, arXiv 2307.09288): no biases, no position weights.

    A layer has q and output (2h^2), k and v (2h * hk/a), gate, up, down (3hf) and two RMSNorms (2h).
    """
    layer = 2 * h * h + 2 * h * (h // a) * k + 3 * h * f + 2 * h
    return L * layer + (1 if tied else 2) * V * h + h


# --- floating-point operations --------------------------------------------------------------------


def gpt_layer_forward_flops(B: int, s: int, h: int) -> int:
    """SC21 appendix, RAR appendix A: 24 B s h^2 + 4 B s^2 h (f = 4h, all s^2 scores counted, biases and norms not)."""
    return 24 * B * s * h * h + 4 * B * s * s * h


def head_forward_flops(B: int, s: int, h: int, V: int) -> int:
    """SC21 appendix: logits, 2 B s h V."""
    return 2 * B * s * h * V


def gpt_model_flops(B: int, s: int, L: int, h: int, V: int) -> int:
    """RAR eq 7, 72 B L s h^2 (1 + s/(6h) + V/(12 h L)) per step, multiplied out: backward is twice the forward."""
    return 72 * B * L * s * h * h + 12 * B * L * s * s * h + 6 * B * s * h * V


def gpt_full_recompute_flops(B: int, s: int, L: int, h: int, V: int) -> int:
    """SC21 eq 3, 96 B s L h^2 (1 + s/(6h) + V/(16 L h)): every layer's forward is run twice in full, the head once."""
    return 96 * B * s * L * h * h + 16 * B * s * s * L * h + 6 * B * s * h * V


def gpt_selective_recompute_flops_published(B: int, s: int, L: int, h: int, V: int) -> int:
    """RAR eq 8, 72 B L s h^2 (1 + s/(3h) + V/(12 h L)), as printed and as its HFU column uses it.

    It adds 12 B L s^2 h, three times the forward of the attention scores; see the next function for one forward.
    """
    return 72 * B * L * s * h * h + 24 * B * L * s * s * h + 6 * B * s * h * V


def gpt_selective_recompute_flops_executed(B: int, s: int, L: int, h: int, V: int) -> int:
    """RAR eq 7 plus one forward of attention (q k^T and probabilities x v: 4 B s^2 h a layer), what is really run."""
    return gpt_model_flops(B, s, L, h, V) + 4 * B * L * s * s * h


def layer_forward_flops(B: int, s: int, h: int, a: int, k: int, f: int, gated: bool) -> int:
    """Any layer: per token 2h(h + 2hk/a) + 2h^2 + 4hf (6hf if gated) + 4sh; equals the GPT form at k = a, f = 4h."""
    qkv = 2 * h * (h + 2 * (h // a) * k)
    return B * s * (qkv + 2 * h * h + (6 if gated else 4) * h * f + 4 * s * h)


def model_flops(
    B: int,
    s: int,
    L: int,
    h: int,
    V: int,
    a: int,
    k: int,
    f: int,
    gated: bool,
) -> int:
    """RAR eq 7 for grouped queries, any width and SwiGLU: 3 x (layers + head), one step of B sequences."""
    return 3 * (L * layer_forward_flops(B, s, h, a, k, f, gated) + head_forward_flops(B, s, h, V))


def full_recompute_flops(
    B: int,
    s: int,
    L: int,
    h: int,
    V: int,
    a: int,
    k: int,
    f: int,
    gated: bool,
) -> int:
    """SC21 eq 3 for any layer: 4 forwards' worth of the layers, 3 of the head."""
    return 4 * L * layer_forward_flops(B, s, h, a, k, f, gated) + 3 * head_forward_flops(B, s, h, V)


def per_token_flops(psi: int, L: int, h: int, s: int) -> int:
    """PaLM appendix B: 6 psi + 12 L h s a token. psi counts matmul weights: with the head, without the input embedding.

    With psi the matrices alone, s times this is RAR eq 7 at B = 1; norm weights and biases in psi overstate it.
    """
    return 6 * psi + 12 * L * h * s


# --- traffic --------------------------------------------------------------------------------------


def wire_factor(op: str, n: int) -> Fraction:
    """Bytes a rank sends over the payload (the full tensor): NCCL, ring or pairwise algorithms, n ranks."""
    if op in ("send", "recv"):
        return Fraction(1 if op == "send" else 0)
    if op == "all_reduce":
        return Fraction(2 * (n - 1), n)
    if op in ("all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        return Fraction(n - 1, n)
    raise ValueError(f"no wire factor for {op!r}")


def wire_bytes(op: str, n: int, payload_bytes: int) -> int:
    """floor(factor x payload) of one call."""
    return int(wire_factor(op, n) * payload_bytes)


def busbw_factor(op: str, n: int) -> Fraction:
    """NCCL: busbw = factor x payload / time; broadcast, reduce and send/recv have factor 1."""
    if op in ("broadcast", "reduce", "send", "recv"):
        return Fraction(1)
    return wire_factor(op, n)


def tp_all_reduces(layers: int, micro_batches: int, full_recompute: bool = False) -> int:
    """SC21 section 3.2: a layer and micro-batch, 2 all-reduces forward, 2 backward; recompute of all of it adds 2.

    A recompute that stops before the layer's last reduction adds 1 (nothing saved needs that result).
    """
    return (6 if full_recompute else 4) * layers * micro_batches


def tp_payload(b: int, s: int, h: int, layers: int, micro_batches: int) -> int:
    """SC21 section 3.2: elements all-reduced in a step without recompute, 4 b s h a layer and micro-batch."""
    return tp_all_reduces(layers, micro_batches) * b * s * h


def tp_wire_elements(b: int, s: int, h: int, t: int) -> Fraction:
    """SC21 section 3.2: 8 b s h (t-1)/t elements sent per rank, layer and micro-batch."""
    return 8 * b * s * h * Fraction(t - 1, t)


def sequence_parallel_calls(layers: int, micro_batches: int) -> dict[str, int]:
    """RAR section 4.2.2: each all-reduce becomes a gather and a scatter, 4 + 4 a layer and micro-batch.

    The backward gathers each column-parallel layer's input once more for its weight gradient: 2 gathers extra.
    """
    return {"all_gather": (4 + 2) * layers * micro_batches, "reduce_scatter": 4 * layers * micro_batches}


def dp_wire_elements(psi: int, n: int, sharding: str) -> Fraction:
    """ZeRO section 7, exact for n ranks: 2 psi (n-1)/n for none, zero1, zero2; 3 psi (n-1)/n for zero3.

    zero3 is for one gather per forward and per backward, that is one micro-batch, or weights kept between them.
    """
    return (3 if sharding == "zero3" else 2) * psi * Fraction(n - 1, n)


def pp_elements(b: int, s: int, h: int, p: int, v: int, m: int) -> int:
    """SC21 section 3: elements sent in one direction in a step, over all p*v - 1 boundaries between chunks."""
    return m * (p * v - 1) * b * s * h


# --- pipeline -------------------------------------------------------------------------------------


def bubble_rate(p: int, m: int, v: int = 1) -> Fraction:
    """Idle share of the step, (p-1)/(v m + p - 1): GPipe, 1F1B (v = 1), interleaved (SC21 section 2.2)."""
    return Fraction(p - 1, v * m + p - 1)


def cost_1f1b(p: int, m: int, f: float, b: float, w: float, c: float = 0.0) -> float:
    """Step time of 1F1B; f, b, w: forward, input- and weight-gradient time of a stage, c: one transfer. p divides m.

    (m+p-1)(f+b+w) + c (2(p-1)m/p + 2(p-2)): reproduces ZB table 5 to 4 decimals.
    """
    transfers = 2 * (p - 1) * m / p + 2 * (p - 2) if p > 1 else 0.0
    return (m + p - 1) * (f + b + w) + c * transfers


def cost_interleaved(p: int, m: int, v: int, f: float, b: float, w: float, c: float = 0.0) -> float:
    """Step time of interleaved 1F1B: m T + (p-1) T/v + (2 p v - 2 - p) c, T = f+b+w of the whole rank (ZB table 5)."""
    whole = f + b + w
    transfers = 2 * p * v - 2 - p if p > 1 else 0
    return m * whole + (p - 1) * whole / v + transfers * c


def cost_zb_h1(p: int, m: int, f: float, b: float, w: float, c: float = 0.0) -> float:
    """Step time of ZB-H1: m T + (p-1)(f + b - w) + 4(p-1) c (ZB section 2.3, table 5). Needs w <= f, b."""
    return m * (f + b + w) + (p - 1) * (f + b - w) + 4 * (p - 1) * c


def cost_zb_h2(p: int, m: int, f: float, b: float, w: float, c: float = 0.0) -> float:
    """Step time of ZB-H2: m T + (p-1)(f + b - 2w) + 2(p-1) c (ZB section 2.3, table 5)."""
    return m * (f + b + w) + (p - 1) * (f + b - 2 * w) + 2 * (p - 1) * c


def idle_rate(cost: float, m: int, f: float, b: float, w: float) -> float:
    """ZB section 5: (cost - m T) / cost."""
    return (cost - m * (f + b + w)) / cost


def in_flight_1f1b(p: int, stage: int, m: int) -> int:
    """Micro-batches whose activations stage `stage` holds at most: min(m, p - stage) (SC21 section 2.2); GPipe: m."""
    return min(m, p - stage)


def in_flight_interleaved(p: int, v: int) -> Fraction:
    """RAR section 4.2.3: micro-batches' worth of its own layers that the first rank holds, p (1 + (p-1)/(p v))."""
    return p * (1 + Fraction(p - 1, p * v))


# ZB tables 5 and 6 (12 settings; times in ms): p, m, v of 1F1B-I, F, B, W, transfer, and the
# published bubble rates of 1F1B, 1F1B-I, ZB-H1, ZB-H2.
ZB_TABLE5 = (
    (8, 24, 3, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1055, 0.1585, 0.1083),
    (8, 32, 3, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.0818, 0.1242, 0.0837),
    (8, 64, 3, 18.546, 18.097, 9.321, 0.762, 0.124, 0.0443, 0.0674, 0.0444),
    (8, 24, 4, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.0808, 0.1323, 0.0698),
    (8, 32, 4, 29.802, 29.428, 19.53, 0.577, 0.1898, 0.0628, 0.1045, 0.0559),
    (8, 64, 4, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.032, 0.0554, 0.0294),
    (16, 48, 3, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1104, 0.1397, 0.0672),
    (16, 64, 3, 11.307, 11.254, 8.101, 0.379, 0.2082, 0.0852, 0.1088, 0.0516),
    (16, 128, 3, 11.325, 11.308, 8.109, 0.378, 0.1251, 0.0445, 0.0576, 0.0266),
    (32, 96, 2, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1493, 0.1421, 0.0641),
    (32, 128, 2, 10.408, 10.204, 7.703, 0.408, 0.2168, 0.1164, 0.1106, 0.049),
    (32, 256, 2, 10.402, 10.248, 7.698, 0.46, 0.1352, 0.0624, 0.0594, 0.0257),
)
