"""Bytes a rank must hold: state exactly, activations by what each block keeps for its backward.

The activation terms count what the blocks' code saves, tensor by tensor, as the tests measure it with saved-tensor
hooks; the published formula s b h (34 + 5 a s / h) (arXiv:2205.05198) is for unfused attention and is not this.
"""

from __future__ import annotations

from dist_gpt.config.schema import DTYPE_BYTES, Config
from dist_gpt.params import qkv_sections, vocab_range
from dist_gpt.plan.precision import Precision, stage_of

TOKEN_BYTES = 8  # int64


def input_bytes(config: Config) -> int:
    """Bytes of a layer's input, one micro-batch: all that is kept of it where the rest is computed again."""
    m, p = config.model, config.parallel
    tokens = config.train.micro_batch * m.seq_len // p.cp
    here = tokens // p.tp if p.sequence_parallel else tokens
    return here * m.hidden_size * DTYPE_BYTES[config.train.dtype]


def queued_bytes(config: Config, block: int, tp_index: int = 0) -> int:
    """Bytes that a backward of inputs alone leaves for the weight step of `block`, one micro-batch: the input and the
    output gradient of every product with a weight; both instead of what the forward left. Where whole gradients are
    not kept (ZeRO's stages 2 and 3) also the finished gradients of norms and positions, until the weight step.
    """
    m, p = config.model, config.parallel
    tokens = config.train.micro_batch * m.seq_len // p.cp
    element = DTYPE_BYTES[config.train.dtype]
    here = tokens // p.tp if p.sequence_parallel else tokens
    held = _finished(config, block) * element if stage_of(config) >= 2 else 0
    if block == 0:
        return tokens * TOKEN_BYTES + tokens * m.hidden_size * element + held
    if block == m.num_layers + 1:
        start, stop = vocab_range(config, tp_index)
        return (here * m.hidden_size + tokens * (stop - start)) * element + held
    q, k, v = (width // p.tp for width in qkv_sections(config))
    ffn = int(m.ffn_size or 0) // p.tp
    up = 2 * ffn if m.activation == "swiglu" else ffn
    columns = 2 * here * m.hidden_size + tokens * (q + k + v + up)  # qkv and up: split inputs, whole gradients
    rows = tokens * (q + ffn + 2 * m.hidden_size)  # out and down: inputs, gathered gradients
    return (columns + rows) * element + held


def _finished(config: Config, block: int) -> int:
    """Elements of parameters whose gradient is finished in the backward of inputs: norms, positions, and biases that
    are added behind a sum over tp."""
    m = config.model
    norm = m.hidden_size * (2 if m.norm == "layernorm" and m.bias else 1)
    if block == 0:
        return m.seq_len * m.hidden_size if m.position == "learned" else 0
    if block == m.num_layers + 1:
        return norm
    return 2 * norm + (2 * m.hidden_size if m.bias else 0)


def saved_bytes(config: Config, block: int, tp_index: int = 0) -> int:
    """Bytes that the forward of `block` leaves on the tape for one micro-batch: its input and what autograd keeps."""
    m, p = config.model, config.parallel
    tokens = config.train.micro_batch * m.seq_len // p.cp
    element = DTYPE_BYTES[config.train.dtype]
    statistic = Precision.of(config).statistic
    here = tokens // p.tp if p.sequence_parallel else tokens  # rows of what is split by sequence parallelism
    hidden = here * m.hidden_size * element
    norm = hidden + here * statistic * (2 if m.norm == "layernorm" else 1)  # its output, and mean and/or 1/deviation
    if block == 0:
        return tokens * TOKEN_BYTES + (tokens if p.tp > 1 else 0)  # row numbers; which of them are foreign
    if block == m.num_layers + 1:
        start, stop = vocab_range(config, tp_index)
        loss = tokens * (stop - start) * statistic + tokens * (2 * statistic + TOKEN_BYTES + 1)
        return hidden + norm + loss
    q, k, v = (width // p.tp for width in qkv_sections(config))
    qkv = tokens * (q + k + v) * element
    rotated = tokens * (q + k) * element if m.position == "rope" else 0
    attended = tokens * q * element + tokens * (m.num_heads // p.tp) * statistic  # output and log-sum-exp
    if config.train.recompute == "selective":
        attended = 0
    ffn = tokens * (int(m.ffn_size or 0) // p.tp) * element
    mlp = 3 * ffn if m.activation == "swiglu" else 2 * ffn  # before and after the activation
    return 2 * hidden + 2 * norm + qkv + rotated + attended + mlp
