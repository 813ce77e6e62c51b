"""A GPT in plain PyTorch, one process, written the ordinary way: the independent reference for numbers and for speed.

It shares no code with dist_gpt (it imports torch alone) and uses what a good single-process trainer uses: one matmul
for q, k and v, `F.scaled_dot_product_attention`, fused AdamW, gradients set to None, cross entropy on flattened
logits. `attention="formula"` writes attention and RMSNorm out instead, as the textbook does; both must agree.

Sources: GPT-2 (Radford et al. 2019; tanh GELU, pre-norm), Llama (arXiv 2302.13971), RoPE (arXiv 2104.09864, in the
half-split layout of the published Llama weights), RMSNorm (arXiv 1910.07467), SwiGLU (arXiv 2002.05202), grouped
queries (arXiv 2305.13245), AdamW (arXiv 1711.05101).

Shape letters: B sequences, T tokens, H hidden, A query heads, G key/value heads, K = H/A, F inner width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Literal["sdpa", "formula"]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PlainConfig:
    """Sizes and kinds of the model; the same words as the `model` section of a configuration. No dropout."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    seq_len: int
    vocab_size: int
    norm: str = "layernorm"
    activation: str = "gelu"
    position: str = "learned"
    tie_embeddings: bool = True
    bias: bool = True
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @classmethod
    def of(cls, section: object) -> PlainConfig:
        """The same model from any object that has these attributes (a resolved `model` section)."""
        return cls(**{field.name: getattr(section, field.name) for field in fields(cls)})

    @property
    def head_size(self) -> int:
        """K."""
        return self.hidden_size // self.num_heads


def gpt2(
    num_layers: int, hidden_size: int, num_heads: int, seq_len: int = 1024, vocab_size: int = 50257
) -> PlainConfig:
    """The GPT-2 family: learned positions, LayerNorm, tanh GELU, biases, tied head."""
    return PlainConfig(num_layers, hidden_size, num_heads, num_heads, 4 * hidden_size, seq_len, vocab_size)


def llama(
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    ffn_size: int,
    seq_len: int,
    vocab_size: int,
    rope_theta: float = 10000.0,
) -> PlainConfig:
    """The Llama family: rotary positions, RMSNorm, SwiGLU, no bias, untied head."""
    sizes = (num_layers, hidden_size, num_heads, num_kv_heads, ffn_size, seq_len, vocab_size)
    return PlainConfig(*sizes, "rmsnorm", "swiglu", "rope", False, False, 1e-5, rope_theta)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dim, in at least float32."""

    def __init__(self, size: int, eps: float, written_out: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.written_out = written_out

    def forward(self, x: Tensor) -> Tensor:
        if not self.written_out:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = 1.0 / torch.sqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def rotary_table(seq_len: int, head_size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, both (T, K), float64; frequency i is theta^(-2i/K), the same for i + K/2."""
    pair = torch.arange(head_size // 2, dtype=torch.float64, device=device)
    positions = torch.arange(seq_len, dtype=torch.float64, device=device)
    angle = torch.outer(positions, theta ** (-2.0 * pair / head_size)).repeat(1, 2)  # (T, K)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) of x (B, heads, T, K) by its position's angle; keeps x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def written_out_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K) with a causal mask) v; q (B, A, T, K), k and v (B, G, T, K). Result (B, A, T, K)."""
    group = q.shape[1] // k.shape[1]  # query heads a*group .. a*group+group-1 read key head a
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, A, T, T)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(diagonal=1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v


class CausalAttention(nn.Module):
    """Multi-head (or grouped-query) causal self-attention; rows of qkv: all q heads, all k heads, all v heads."""

    def __init__(self, config: PlainConfig, kind: Attention) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.num_heads, config.num_kv_heads, config.head_size
        self.kind = kind
        rows = (self.heads + 2 * self.kv_heads) * self.head_size
        self.qkv = nn.Linear(config.hidden_size, rows, bias=config.bias)
        self.out = nn.Linear(self.heads * self.head_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        B, T, _ = x.shape
        A, G, K = self.heads, self.kv_heads, self.head_size
        heads = self.qkv(x).view(B, T, A + 2 * G, K).transpose(1, 2)  # (B, A+2G, T, K)
        q, k, v = heads.split((A, G, G), dim=1)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.kind == "formula":
            y = written_out_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=G != A)
        out: Tensor = self.out(y.transpose(1, 2).reshape(B, T, A * K))
        return out


class MLP(nn.Module):
    """down(gelu(up x)), or down(silu(gate x) * up x) with the rows of `up` being [gate; up]."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        rows = config.ffn_size * (2 if self.gated else 1)
        self.up = nn.Linear(config.hidden_size, rows, bias=config.bias)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.up(x).chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(self.up(x), approximate="tanh")
        out: Tensor = self.down(inner)
        return out


def make_norm(config: PlainConfig, kind: Attention) -> nn.Module:
    """LayerNorm or RMSNorm over the hidden size."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_eps, written_out=kind == "formula")
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: PlainConfig, kind: Attention) -> None:
        super().__init__()
        self.norm1 = make_norm(config, kind)
        self.attn = CausalAttention(config, kind)
        self.norm2 = make_norm(config, kind)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary)
        x = x + self.mlp(self.norm2(x))
        return x


class PlainGPT(nn.Module):
    """The model. Where the shared names differ from torch's own, `NAMES` says so."""

    NAMES: ClassVar = {
        "token.weight": "embed.weight",
        "position.weight": "embed.position",
        "norm.weight": "head.norm.weight",
        "norm.bias": "head.norm.bias",
    }

    def __init__(self, config: PlainConfig, attention: Attention = "sdpa") -> None:
        super().__init__()
        if attention not in ("sdpa", "formula"):
            raise ValueError(f"attention is {attention!r}; it must be 'sdpa' or 'formula'")
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.seq_len, config.hidden_size) if config.position == "learned" else None
        self.layers = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        self.norm = make_norm(config, attention)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token.weight
        self._rotary_tables: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, Tensor]] = {}
        self.initialise()

    def initialise(self, std: float = 0.02) -> None:
        """GPT-2's initial weights: normal, the two projections into the residual scaled by 1/sqrt(2 layers)."""
        residual = std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, 0.0, residual if name.endswith(("out.weight", "down.weight")) else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def rotary(self, x: Tensor, T: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin (T, K) for activations like `x`, at least float32 (float64 for float64); kept after first use."""
        if self.config.position != "rope":
            return None
        key = (x.device, torch.promote_types(x.dtype, torch.float32), T)
        if key not in self._rotary_tables:
            cos, sin = rotary_table(T, self.config.head_size, self.config.rope_theta, x.device)
            self._rotary_tables[key] = cos.to(key[1]), sin.to(key[1])
        return self._rotary_tables[key]

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) token numbers -> (B, T, V) scores of the next token; T may be below seq_len."""
        T = tokens.shape[1]
        x = self.token(tokens)  # (B, T, H)
        if self.position is not None:
            x = x + self.position.weight[:T]
        rotary = self.rotary(x, T)
        for block in self.layers:
            x = block(x, rotary)
        scores: Tensor = self.head(self.norm(x))
        return scores

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy (nats, 0-d) of `targets` (B, T) given `tokens` (B, T)."""
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())

    def named_weights(self) -> dict[str, Tensor]:
        """Shared name -> the live parameter; a tied head does not appear twice."""
        return {self.NAMES.get(name, name): parameter for name, parameter in self.named_parameters()}

    def named_gradients(self) -> dict[str, Tensor]:
        """Shared name -> the live `.grad`. Raises ValueError where a parameter has none (no backward was run)."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.named_weights().items():
            if parameter.grad is None:
                raise ValueError(f"{name} has no gradient; run backward first")
            found[name] = parameter.grad
        return found

    def load_named(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy full tensors in by shared name. Raises ValueError that lists every missing, unknown or misshapen one."""
        own = self.named_weights()
        wrong = [f"missing {name}" for name in own if name not in tensors]
        wrong += [f"unknown {name}" for name in tensors if name not in own]
        wrong += [
            f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
            for name, parameter in own.items()
            if name in tensors and tensors[name].shape != parameter.shape
        ]
        if wrong:
            raise ValueError("weights do not fit the model: " + "; ".join(wrong))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])


def make_optimizer(
    model: nn.Module,
    name: str = "adamw",
    lr: float = 3e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    momentum: float = 0.9,
    weight_decay: float = 0.1,
) -> torch.optim.Optimizer:
    """torch's fused AdamW, or its SGD with momentum. Parameters with two dims or more decay, the others do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    raise ValueError(f"optimizer is {name!r}; it must be 'adamw' or 'sgd'")


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], clip: float, lr: float | None = None
) -> tuple[Tensor, Tensor]:
    """One optimizer step over equal micro-batches of (tokens, targets), each (B, T).

    Returns the mean loss and the gradient norm before clipping, 0-d tensors on the device, so that the host need not
    wait. Gradients are scaled by min(1, clip / (norm + 1e-6)); clip 0 measures the norm and changes nothing. `lr`
    sets the learning rate of this and later steps.
    """
    if lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
    total: Tensor | None = None
    for tokens, targets in batches:
        loss = model(tokens, targets) / len(batches)
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        raise ValueError("no micro-batch was given; a step needs at least one")
    if clip > 0:
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm
