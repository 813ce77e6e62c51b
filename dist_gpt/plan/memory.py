"""Activation bytes of a rank: what each block keeps for its backward.

The terms count what the blocks' code saves, tensor by tensor, as the tests measure it with saved-tensor hooks. The
published formula s b h (34 + 5 a s / h) (arXiv:2205.05198) is for unfused attention and does not apply.
"""

from __future__ import annotations

from dist_gpt.config.schema import DTYPE_BYTES, Config
from dist_gpt.params import qkv_sections, vocab_range
from dist_gpt.plan.precision import Precision, stage_of

TOKEN_BYTES = 8  # int64


def input_bytes(config: Config) -> int:
    """Return the bytes of a layer's input for one micro-batch: all that it keeps if the rest is recomputed."""
    m, p = config.model, config.parallel
    tokens = config.train.micro_batch * m.seq_len // p.cp
    here = tokens // p.tp if p.sequence_parallel else tokens
    return here * m.hidden_size * DTYPE_BYTES[config.train.dtype]


def queued_bytes(config: Config, block: int, tp_index: int = 0) -> int:
    """Return the bytes that a backward of inputs alone leaves for the weight step of `block`, for one micro-batch.

    These are the input and the output gradient of every matmul with a weight; they replace what the forward left. If
    whole gradients are not kept (ZeRO stages 2 and 3), finished ones of norms, positions and row-parallel biases stay
    as well.
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
    """Return the number of elements whose gradient the backward of inputs finishes.

    They belong to norms, positions, and biases that are added after a sum over tp.
    """
    m = config.model
    norm = m.hidden_size * (2 if m.norm == "layernorm" and m.bias else 1)
    if block == 0:
        return m.seq_len * m.hidden_size if m.position == "learned" else 0
    if block == m.num_layers + 1:
        return norm
    return 2 * norm + (2 * m.hidden_size if m.bias else 0)


def saved_bytes(config: Config, block: int, tp_index: int = 0) -> int:
    """Return the bytes that the forward of `block` leaves on the tape for one micro-batch: input and saved tensors."""
    m, p = config.model, config.parallel
    tokens = config.train.micro_batch * m.seq_len // p.cp
    element = DTYPE_BYTES[config.train.dtype]
    statistic = Precision.of(config).statistic
    here = tokens // p.tp if p.sequence_parallel else tokens  # rows of tensors that sequence parallelism splits
    hidden = here * m.hidden_size * element
    norm = hidden + here * statistic * (2 if m.norm == "layernorm" else 1)  # its output, and mean and/or 1/deviation
    if block == 0:
        return tokens * TOKEN_BYTES + (tokens if p.tp > 1 else 0)  # row numbers; mask of rows on other ranks
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
