"""GPT as blocks: an embedding, layers, a head.

Activations are (N, H): N tokens of one micro-batch (B sequences of T tokens, flattened) by H features. Under sequence
parallelism they are (N/tp, H) from a row-parallel matmul to the next column-parallel one. K is the width of a head.

The same code is the one-process model (every group has size 1) and a rank's part of a parallel one. There is no loop
over the blocks here: `parallel.executor` calls them one by one, forward and backward, in the order of its step list.
For the same reason a parameter's gradient bypasses autograd. The layers hand it to the GradSink, which adds it to the
parameter's place in a flat buffer, at once or in a later step; `use(parameter, sink)` does this for parameters of
ordinary functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from dist_gpt.comm.group import Group
from dist_gpt.config.schema import Config
from dist_gpt.model.core import CoreAgain, merge_heads
from dist_gpt.model.functions import (
    attention_core,
    dropout,
    layer_norm,
    rms_norm,
    rotary_table,
    rotate,
    seed_of,
    swiglu,
)
from dist_gpt.parallel.executor import MicroBatch
from dist_gpt.parallel.linear import ColumnLinear, RowLinear
from dist_gpt.parallel.matmul import sum_rows
from dist_gpt.parallel.sink import GradSink, use
from dist_gpt.parallel.vocab import cross_entropy, embedding
from dist_gpt.params import Param, params_of_blocks, qkv_sections, vocab_range

ATTENTION_BRANCH, MLP_BRANCH, ATTENTION_WEIGHTS, EMBEDDING = range(4)  # dropout sites


@dataclass(frozen=True)
class Wiring:
    """Objects that all blocks of a rank share.

    `find` returns the parameter of a name, or None if the table has none (a model without biases).
    """

    config: Config
    tp: Group
    sink: GradSink
    find: Callable[[str], Parameter | None]

    @property
    def sequence_parallel(self) -> bool:
        """True if sequence parallelism is configured and there is more than one tp rank."""
        return self.config.parallel.sequence_parallel and self.tp.size > 1

    def parameter(self, name: str) -> Parameter:
        """Return the parameter `name`; raise ValueError if this rank's table does not have it."""
        found = self.find(name)
        if found is None:
            raise ValueError(f"parameter {name} is not in the table of this rank")
        return found

    def column(self, name: str) -> ColumnLinear:
        """Return the column-parallel layer with the parameters `name`.weight and, if any, `name`.bias."""
        weight, bias = self.parameter(f"{name}.weight"), self.find(f"{name}.bias")
        return ColumnLinear(weight, bias, self.tp, self.sequence_parallel, self.sink)

    def row(self, name: str) -> RowLinear:
        """Return the row-parallel layer with the parameters `name`.weight and, if any, `name`.bias."""
        weight, bias = self.parameter(f"{name}.weight"), self.find(f"{name}.bias")
        return RowLinear(weight, bias, self.tp, self.sequence_parallel, self.sink)

    def first_token(self, micro: MicroBatch, tokens_here: int) -> int:
        """Return the index of this rank's first token among all tokens of the step's global batch."""
        start = micro.first_sample * self.config.model.seq_len
        return start + (self.tp.index * tokens_here if self.sequence_parallel else 0)

    def drop(self, x: Tensor, micro: MicroBatch, block: int, site: int, skip: bool = False) -> Tensor:
        """Apply residual or embedding dropout to x (N/tp or N, H); with `skip`, only in the backward."""
        rate = self.config.model.dropout if micro.training else 0.0
        if rate == 0.0:
            return x
        key = (self.config.train.seed, micro.step, block, site)
        return dropout(x, rate, key, self.first_token(micro, x.shape[0]), skip)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the features, as set by `model.norm`."""

    def __init__(self, wiring: Wiring, name: str) -> None:
        super().__init__()
        self.weight = wiring.parameter(f"{name}.weight")
        self.bias = wiring.find(f"{name}.bias")
        self.sink = wiring.sink
        self.kind, self.eps = wiring.config.model.norm, wiring.config.model.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N/tp or N, H)."""
        weight = use(self.weight, self.sink)
        if self.kind == "rmsnorm":
            return rms_norm(x, weight, self.eps)
        bias = use(self.bias, self.sink) if self.bias is not None else None
        return layer_norm(x, weight, bias, self.eps)


class Attention(nn.Module):
    """Causal self-attention; heads are split over tp."""

    def __init__(self, wiring: Wiring, name: str, block: int) -> None:
        super().__init__()
        self.wiring, self.block = wiring, block
        self.qkv = wiring.column(f"{name}.qkv")
        self.out = wiring.row(f"{name}.out")
        m = wiring.config.model
        self.seq_len, self.head_dim = m.seq_len, m.hidden_size // m.num_heads
        self.widths = [section // wiring.tp.size for section in qkv_sections(wiring.config)]

    def forward(self, x: Tensor, micro: MicroBatch) -> Tensor:
        """Return the attention branch of x (N/tp or N, H), in the same shape."""
        m = self.wiring.config.model
        qkv = self.qkv(x)  # (N, (heads + 2 kv_heads)/tp * K)
        q, k, v = (
            part.view(-1, self.seq_len, part.shape[-1] // self.head_dim, self.head_dim)
            for part in qkv.split(self.widths, dim=-1)
        )  # (B, T, heads/tp, K)
        if m.position == "rope":
            table = rotary_table(self.seq_len, self.head_dim, m.rope_theta, q.dtype, q.device)
            q, k = rotate(q, table), rotate(k, table)
        rate = float(m.attention_dropout or 0.0) if micro.training else 0.0
        # keyed per rank: the kernel draws its own mask, so this one site depends on the layout
        key = (self.wiring.config.train.seed, micro.step, self.block, ATTENTION_WEIGHTS, micro.first_sample)
        seed = seed_of((*key, self.wiring.tp.index)) if rate else 0
        heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.wiring.config.train.recompute == "selective" and micro.training:
            core = CoreAgain(rate, seed, self.wiring.sink.again)
            return self.out(merge_heads(core(*heads)), before=core, kept=heads)
        return self.out(merge_heads(attention_core(*heads, rate, seed)))


class Mlp(nn.Module):
    """Feed-forward branch (up, activation, down); the inner width is split over tp."""

    def __init__(self, wiring: Wiring, name: str) -> None:
        super().__init__()
        self.up = wiring.column(f"{name}.up")
        self.down = wiring.row(f"{name}.down")
        self.activation = wiring.config.model.activation

    def forward(self, x: Tensor, skip_last: bool) -> Tensor:
        """Return the MLP branch of x (N/tp or N, H), in the same shape; with `skip_last`, `down` is not computed."""
        x = self.up(x)  # (N, F/tp), with SwiGLU (N, 2F/tp)
        x = swiglu(x) if self.activation == "swiglu" else F.gelu(x, approximate="tanh")
        return self.down(x, skip_last)


class Embed(nn.Module):
    """Block 0: token ids to activations."""

    def __init__(self, wiring: Wiring) -> None:
        super().__init__()
        self.wiring = wiring
        self.weight = wiring.parameter("embed.weight")
        self.position = wiring.find("embed.position")
        self.first_row, _ = vocab_range(wiring.config, wiring.tp.index)

    def forward(self, x: Tensor | None, micro: MicroBatch) -> Tensor:
        """Return the embeddings of the micro-batch's tokens, (N/tp or N, H); `x` is not used."""
        w = self.wiring
        if micro.tokens is None:
            raise ValueError("the embedding needs the micro-batch's tokens")
        vocab_size = int(w.config.model.vocab_size or 0)
        x = embedding(self.weight, micro.tokens, self.first_row, vocab_size, w.tp, w.sequence_parallel, w.sink)
        if self.position is not None:
            x = add_positions(x, self.position, w.first_token(micro, x.shape[0]), w.sink)
        return w.drop(x, micro, 0, EMBEDDING)


class _AddPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, position: Parameter, first_token: int, sink: GradSink) -> Tensor:
        ctx.position, ctx.first_token, ctx.sink = position, first_token, sink
        return x + position.detach()[_rows_of(x, position, first_token)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        length, width = ctx.position.shape
        position, sink = ctx.position, ctx.sink
        if grads[0].shape[0] % length == 0 and ctx.first_token % length == 0:  # whole sequences: a plain sum
            total = grads[0].view(-1, length, width).sum(0)
        else:
            rows = _rows_of(grads[0], position, ctx.first_token)
            total = sum_rows(grads[0], rows, length).to(grads[0].dtype)
        given = sink.deliver(lambda: (sink.add(position, total),), total)
        return grads[0], given[0], None, None


def _rows_of(x: Tensor, position: Tensor, first_token: int) -> Tensor:
    return (first_token + torch.arange(x.shape[0], device=x.device)) % position.shape[0]


def add_positions(x: Tensor, position: Parameter, first_token: int, sink: GradSink) -> Tensor:
    """Add rows of `position` (T, H) to x (N/tp or N, H); token n of the batch is at position n mod T."""
    result: Tensor = _AddPositions.apply(x, position, first_token, sink)
    return result


class Layer(nn.Module):
    """One of blocks 1 .. L: pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, wiring: Wiring, block: int) -> None:
        super().__init__()
        self.wiring, self.block = wiring, block
        name = f"layers.{block - 1}"
        self.norm1 = Norm(wiring, f"{name}.norm1")
        self.attn = Attention(wiring, f"{name}.attn", block)
        self.norm2 = Norm(wiring, f"{name}.norm2")
        self.mlp = Mlp(wiring, f"{name}.mlp")

    def forward(self, x: Tensor, micro: MicroBatch) -> Tensor:
        """Return the residual stream after this layer, (N/tp or N, H) like x."""
        drop = self.wiring.drop
        x = x + drop(self.attn(self.norm1(x), micro), micro, self.block, ATTENTION_BRANCH)
        return x + drop(self.mlp(self.norm2(x), micro.again), micro, self.block, MLP_BRANCH, skip=micro.again)


class Head(nn.Module):
    """Block L + 1: the last norm, the logits, and the loss (scaled sum over the micro-batch's tokens)."""

    def __init__(self, wiring: Wiring, weight: Parameter) -> None:
        super().__init__()
        self.wiring = wiring
        self.norm = Norm(wiring, "head.norm")
        self.logits = ColumnLinear(weight, None, wiring.tp, wiring.sequence_parallel, wiring.sink)
        self.first_id, _ = vocab_range(wiring.config, wiring.tp.index)

    def forward(self, x: Tensor, micro: MicroBatch) -> Tensor:
        """Return the scaled loss of x (N/tp or N, H), a scalar equal on all tp ranks."""
        if micro.targets is None:
            raise ValueError("the head needs the micro-batch's targets")
        logits = self.logits(self.norm(x))  # (N, V/tp)
        vocab_size = int(self.wiring.config.model.vocab_size or 0)
        return cross_entropy(logits, micro.targets, self.first_id, vocab_size, micro.scale, self.wiring.tp)


class Stage(nn.Module):
    """Blocks of one rank, by block number, with parameters made by `new` (one call per table row)."""

    def __init__(
        self,
        config: Config,
        blocks: tuple[int, ...],
        tp: Group,
        sink: GradSink,
        new: Callable[[Param], Parameter],
    ) -> None:
        super().__init__()
        self.named: dict[str, Parameter] = {p.name: new(p) for p in params_of_blocks(config, blocks)}
        wiring = Wiring(config, tp, sink, self.named.get)
        head = "embed.weight" if config.model.tie_embeddings else "head.weight"
        self.blocks = nn.ModuleDict()
        for block in blocks:
            if block == 0:
                self.blocks[str(block)] = Embed(wiring)
            elif block <= config.model.num_layers:
                self.blocks[str(block)] = Layer(wiring, block)
            else:
                self.blocks[str(block)] = Head(wiring, wiring.parameter(head))

    def forward(self, block: int, x: Tensor | None, micro: MicroBatch) -> Tensor:
        """Return the output of `block` for input `x` (None for block 0); the head returns the loss."""
        result: Tensor = self.blocks[str(block)](x, micro)
        return result
