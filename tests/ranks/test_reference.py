"""The reference held against itself, against published numbers, and against formulas written a second time."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.reference import formulas
from tests.reference.plain_gpt import (
    MLP,
    CausalAttention,
    PlainConfig,
    PlainGPT,
    RMSNorm,
    gpt2,
    llama,
    make_optimizer,
    rotary_table,
    rotate,
    train_step,
)

GPT2 = gpt2(num_layers=2, hidden_size=32, num_heads=4, seq_len=12, vocab_size=61)
LLAMA = llama(2, 32, num_heads=4, num_kv_heads=2, ffn_size=56, seq_len=12, vocab_size=61)
MIXED = replace(LLAMA, norm="layernorm", bias=True, tie_embeddings=True, num_kv_heads=1)
MODELS = pytest.mark.parametrize("config", [GPT2, LLAMA, MIXED], ids=["gpt2", "llama", "mixed"])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weights(config: PlainConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random float64 weights, large enough that every term of the model matters, norms and biases included."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in PlainGPT(config).named_weights().items()}
    return {name: 0.2 * torch.randn(s, dtype=torch.float64, generator=draw) for name, s in shapes.items()}


def model(config: PlainConfig, attention: str = "sdpa") -> PlainGPT:
    built = PlainGPT(config, "formula" if attention == "formula" else "sdpa").double()
    built.load_named(weights(config))
    return built


def batch(config: PlainConfig, count: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (count, config.seq_len + 1), generator=draw)
    return tokens[:, :-1], tokens[:, 1:]


def on_meta(config: PlainConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in PlainGPT(config).parameters())


# --- the model ------------------------------------------------------------------------------------


@MODELS
def test_written_out_attention_equals_sdpa(config: PlainConfig) -> None:
    results = []
    for attention in ("sdpa", "formula"):
        built = model(config, attention)
        loss = built(*batch(config))
        loss.backward()
        results.append((loss.item(), built.named_gradients()))
    (loss, gradients), (loss_formula, gradients_formula) = results
    assert abs(loss - loss_formula) <= 1e-12
    assert list(gradients) == list(gradients_formula)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-6 or name.endswith("qkv.bias"), f"{name}: the test must exercise it"
        assert (gradient - gradients_formula[name]).abs().max() <= 1e-12, name


@MODELS
def test_gradient_is_the_slope_of_the_loss(config: PlainConfig) -> None:
    """A central difference along a random direction of all weights at once."""
    built, data = model(config), batch(config)
    built(*data).backward()
    direction = weights(config, seed=7)
    slope = sum((g * direction[name]).sum().item() for name, g in built.named_gradients().items())
    step, losses = 1e-5, []
    for sign in (1, -1):
        built.load_named({name: w + sign * step * direction[name] for name, w in weights(config).items()})
        losses.append(built(*data).item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


@MODELS
def test_a_position_sees_no_later_token(config: PlainConfig) -> None:
    built, (tokens, _) = model(config), batch(config)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % config.vocab_size
    before, after = built.logits(tokens), built.logits(changed)
    assert (before[:, :7] - after[:, :7]).abs().max() < 1e-12
    assert (before[:, 7] - after[:, 7]).abs().amin(dim=-1).max() > 0


def test_a_fresh_model_predicts_the_uniform_distribution() -> None:
    config = gpt2(2, 64, 4, seq_len=32, vocab_size=256)
    torch.manual_seed(0)
    assert PlainGPT(config)(*batch(config)).item() == pytest.approx(math.log(256), abs=0.05)


def test_rotary_products_depend_on_distance_alone_and_pair_the_halves() -> None:
    cos, sin = rotary_table(16, 8, 10000.0, torch.device("cpu"))
    draw = torch.Generator().manual_seed(3)
    q, k = (torch.randn(8, dtype=torch.float64, generator=draw).expand(1, 1, 16, 8) for _ in range(2))
    products = (rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-2, -1))[0, 0]  # (T, T)
    for distance in range(-15, 16):
        along = products.diagonal(distance)
        assert (along - along[0]).abs().max() < 1e-12
    unit = torch.zeros(1, 1, 2, 8, dtype=torch.float64)
    unit[..., 1] = 1.0  # component 1 turns into component 1 + K/2, by 1 x theta^(-2/8) at position 1
    turned = rotate(unit, cos[:2], sin[:2])[0, 0, 1]
    angle = 10000.0 ** (-2 / 8)
    assert turned.nonzero().flatten().tolist() == [1, 5]
    assert turned[[1, 5]].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-15)


def test_names_and_shapes_are_the_shared_ones() -> None:
    def shapes(config: PlainConfig) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in PlainGPT(config).named_weights().items() if "layers.1." not in name}

    assert shapes(GPT2) == {
        "embed.weight": (61, 32),
        "embed.position": (12, 32),
        "layers.0.norm1.weight": (32,),
        "layers.0.norm1.bias": (32,),
        "layers.0.attn.qkv.weight": (96, 32),
        "layers.0.attn.qkv.bias": (96,),
        "layers.0.attn.out.weight": (32, 32),
        "layers.0.attn.out.bias": (32,),
        "layers.0.norm2.weight": (32,),
        "layers.0.norm2.bias": (32,),
        "layers.0.mlp.up.weight": (128, 32),
        "layers.0.mlp.up.bias": (128,),
        "layers.0.mlp.down.weight": (32, 128),
        "layers.0.mlp.down.bias": (32,),
        "head.norm.weight": (32,),
        "head.norm.bias": (32,),
    }
    assert shapes(LLAMA) == {
        "embed.weight": (61, 32),
        "layers.0.norm1.weight": (32,),
        "layers.0.attn.qkv.weight": (64, 32),
        "layers.0.attn.out.weight": (32, 32),
        "layers.0.norm2.weight": (32,),
        "layers.0.mlp.up.weight": (112, 32),
        "layers.0.mlp.down.weight": (32, 56),
        "head.norm.weight": (32,),
        "head.weight": (61, 32),
    }


def test_conventions_that_no_other_test_would_notice() -> None:
    """Rows of swiglu's `up` are [gate; up]; rows of qkv are [q; k; v]; GELU is the tanh form; norms have their eps."""
    config = llama(1, 2, num_heads=1, num_kv_heads=1, ffn_size=1, seq_len=2, vocab_size=3)
    mlp, x = MLP(config).double(), torch.tensor([3.0, 5.0], dtype=torch.float64)
    with torch.no_grad():
        mlp.up.weight.copy_(torch.eye(2))  # gate = 3, up = 5
        mlp.down.weight.copy_(torch.tensor([[1.0], [0.0]]))
    assert mlp(x).tolist() == pytest.approx([3 / (1 + math.exp(-3)) * 5, 0.0], rel=1e-14)
    plain = MLP(replace(config, activation="gelu")).double()
    with torch.no_grad():
        plain.up.weight.copy_(torch.tensor([[1 / 3, 0.0]], dtype=torch.float64))
        plain.down.weight.copy_(torch.tensor([[1.0], [0.0]]))
    tanh_form = 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))
    assert plain(x)[0].item() == pytest.approx(tanh_form, abs=1e-14)  # the erf form is 1.5e-4 away
    attention = CausalAttention(config, "sdpa").double()
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.arange(6.0).outer(torch.tensor([1.0, 0.0])))
        attention.out.weight.copy_(torch.eye(2))
    assert attention(torch.ones(1, 1, 2, dtype=torch.float64), None).flatten().tolist() == [4.0, 5.0]
    for written_out in (True, False):
        root = math.sqrt((9 + 25) / 2 + 0.5)
        normed = RMSNorm(2, 0.5, written_out).double()(x)
        assert normed.tolist() == pytest.approx([3 / root, 5 / root], rel=1e-14)


def test_load_named_lists_everything_that_does_not_fit() -> None:
    tensors = weights(GPT2)
    del tensors["embed.position"]
    tensors["head.weight"] = torch.zeros(61, 32)
    tensors["head.norm.bias"] = torch.zeros(31)
    with pytest.raises(ValueError) as caught:
        PlainGPT(GPT2).load_named(tensors)
    for part in ("missing embed.position", "unknown head.weight", "head.norm.bias has shape (31,), expected (32,)"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="run backward first"):
        PlainGPT(GPT2).named_gradients()


# --- a training step ------------------------------------------------------------------------------


@MODELS
def test_accumulated_micro_batches_equal_one_large_batch(config: PlainConfig) -> None:
    tokens, targets = batch(config)
    stepped = []
    for batches in ([(tokens, targets)], [(tokens[i : i + 1], targets[i : i + 1]) for i in range(len(tokens))]):
        built = model(config)
        loss, norm = train_step(built, make_optimizer(built, "sgd", lr=0.1), batches, clip=0.2)
        stepped.append((loss, norm, built.named_weights()))
    (loss, norm, whole), (loss_split, norm_split, split) = stepped
    assert abs(loss - loss_split) < 1e-12 and abs(norm - norm_split) < 1e-12 and norm > 0.2
    for name in whole:
        assert (whole[name] - split[name]).abs().max() < 1e-12, name


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_adamw_steps_equal_the_formula(clip: float) -> None:
    """arXiv 1711.05101 algorithm 2 written out, over three steps with clipping, decay on matrices alone."""
    lr, beta1, beta2, eps, decay = 0.01, 0.9, 0.95, 1e-8, 0.1
    built = model(LLAMA)
    optimizer = make_optimizer(built, "adamw", lr=99.0, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    shadow = model(LLAMA)
    first = {name: torch.zeros_like(w) for name, w in shadow.named_weights().items()}
    second = {name: torch.zeros_like(w) for name, w in shadow.named_weights().items()}
    for step in range(1, 4):
        data = batch(LLAMA, seed=step)
        _, norm = train_step(built, optimizer, [data], clip, lr=lr)
        shadow.zero_grad()
        shadow(*data).backward()
        gradients = shadow.named_gradients()
        own_norm = math.sqrt(sum((g * g).sum().item() for g in gradients.values()))
        assert norm.item() == pytest.approx(own_norm, rel=1e-12)
        scale = min(1.0, clip / (own_norm + 1e-6)) if clip else 1.0
        after = {}
        for name, weight in shadow.named_weights().items():
            g = gradients[name] * scale
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g * g
            unbiased, square = first[name] / (1 - beta1**step), second[name] / (1 - beta2**step)
            shrunk = weight.detach() * (1 - lr * decay) if weight.ndim >= 2 else weight.detach()
            after[name] = shrunk - lr * unbiased / (square.sqrt() + eps)
        shadow.load_named(after)
    for name, weight in built.named_weights().items():
        assert (weight - shadow.named_weights()[name]).abs().max() < 1e-12, name


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (gpt2(12, 768, 12), 124_439_808),
        (gpt2(48, 1600, 25), 1_557_611_200),
        (llama(32, 4096, 32, 8, 14336, 8192, 128256, 500000.0), 8_030_261_248),
    ],
    ids=["GPT-2 124M", "GPT-2 1.5B", "Llama-3 8B"],
)
def test_published_parameter_counts(config: PlainConfig, published: int) -> None:
    c = config
    if c.position == "learned":
        counted = formulas.gpt2_parameters(c.num_layers, c.hidden_size, c.vocab_size, c.seq_len)
        eq2 = formulas.sc21_parameters(c.num_layers, c.hidden_size, c.vocab_size, c.seq_len)
        assert counted == eq2 + 2 * c.hidden_size
    else:
        counted = formulas.llama_parameters(
            c.num_layers, c.hidden_size, c.vocab_size, c.num_heads, c.num_kv_heads, c.ffn_size
        )
    assert counted == on_meta(config) == published


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parameter_formulas_of_the_variants(tied: bool, bias: bool) -> None:
    config = replace(gpt2(3, 32, 4, 12, 61), ffn_size=100, bias=bias, tie_embeddings=tied)
    assert on_meta(config) == formulas.gpt2_parameters(3, 32, 61, 12, f=100, bias=bias, tied=tied)
    small = replace(LLAMA, tie_embeddings=tied)
    assert on_meta(small) == formulas.llama_parameters(2, 32, 61, 4, 2, 56, tied=tied)


# --- formulas against each other and against published numbers ------------------------------------


@MODELS
def test_model_flops_equal_the_matmuls_of_the_weights(config: PlainConfig) -> None:
    """Every matrix but the embeddings: 2 x rows x columns a token; attention 4 s h a token and layer; x 3."""
    c = config
    matrices = sum(p.numel() for name, p in PlainGPT(c).named_weights().items() if "layers" in name and p.ndim == 2)
    tokens, matrices = 5 * c.seq_len, matrices + c.vocab_size * c.hidden_size
    expected = tokens * formulas.per_token_flops(matrices, c.num_layers, c.hidden_size, c.seq_len)
    sizes = (5, c.seq_len, c.num_layers, c.hidden_size, c.vocab_size)
    gated = c.activation == "swiglu"
    assert formulas.model_flops(*sizes, c.num_heads, c.num_kv_heads, c.ffn_size, gated) == expected
    if c is GPT2:
        assert formulas.gpt_model_flops(*sizes) == expected


def test_flop_formulas_equal_their_printed_form() -> None:
    B, s, L, h, V, a = 64, 2048, 96, 12288, 51200, 96
    base = 72 * B * L * s * h * h
    assert formulas.gpt_model_flops(B, s, L, h, V) == pytest.approx(base * (1 + s / (6 * h) + V / (12 * h * L)))
    full = formulas.gpt_full_recompute_flops(B, s, L, h, V)
    assert full == pytest.approx(96 * B * L * s * h * h * (1 + s / (6 * h) + V / (16 * L * h)))
    assert full == formulas.full_recompute_flops(B, s, L, h, V, a, a, 4 * h, gated=False)
    published = formulas.gpt_selective_recompute_flops_published(B, s, L, h, V)
    assert published == pytest.approx(base * (1 + s / (3 * h) + V / (12 * h * L)))
    executed = formulas.gpt_selective_recompute_flops_executed(B, s, L, h, V)
    assert formulas.gpt_model_flops(B, s, L, h, V) < executed < published


@pytest.mark.parametrize(
    ("a", "h", "L", "gpus", "B", "seconds", "mfu", "hfu"),
    [
        (64, 6144, 48, 8, 4, 1.10, 41.5, 43.7),
        (96, 12288, 96, 64, 64, 13.75, 51.4, 52.8),
        (128, 20480, 105, 280, 280, 37.83, 56.0, 57.0),
        (160, 25600, 128, 512, 512, 71.49, 56.3, 57.0),
    ],
)
def test_utilisation_of_rar_table_5(
    a: int, h: int, L: int, gpus: int, B: int, seconds: float, mfu: float, hfu: float
) -> None:
    """arXiv 2205.05198 table 5, A100 at 312 TFLOP/s, V = 51200, s = 2048; agreement to the printed rounding of time."""
    peak = 312e12 * gpus * seconds / 100
    sizes = (B, 2048, L, h, 51200)
    assert formulas.gpt_model_flops(*sizes) / peak == pytest.approx(mfu, abs=0.25)
    assert formulas.gpt_selective_recompute_flops_published(*sizes) / peak == pytest.approx(hfu, abs=0.25)


@pytest.mark.parametrize("row", formulas.ZB_TABLE5, ids=lambda row: f"p{row[0]}-m{row[1]}-v{row[2]}")
def test_pipeline_costs_reproduce_the_published_bubbles(row: tuple[float, ...]) -> None:
    p, m, v = (int(x) for x in row[:3])
    times, published = row[3:7], row[7:]
    costs = (
        formulas.cost_1f1b(p, m, *times),
        formulas.cost_interleaved(p, m, v, *times),
        formulas.cost_zb_h1(p, m, *times),
        formulas.cost_zb_h2(p, m, *times),
    )
    rates = [formulas.idle_rate(cost, m, *times[:3]) for cost in costs]
    assert rates == pytest.approx(list(published), abs=1.01e-4)


def test_costs_without_transfers_give_the_bubble_rate() -> None:
    for p, m, v in [(1, 1, 1), (4, 8, 1), (4, 8, 2), (8, 8, 4)]:
        ideal = float(formulas.bubble_rate(p, m, v))
        assert formulas.idle_rate(formulas.cost_interleaved(p, m, v, 1.0, 1.0, 1.0), m, 1, 1, 1) == pytest.approx(ideal)
        if v == 1:
            assert formulas.idle_rate(formulas.cost_1f1b(p, m, 1.0, 1.0, 1.0), m, 1, 1, 1) == pytest.approx(ideal)
    assert [formulas.in_flight_1f1b(4, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert formulas.in_flight_interleaved(4, 2) == 4 + 1.5


def test_traffic_formulas() -> None:
    assert formulas.wire_bytes("all_reduce", 4, 1000) == 1500
    assert formulas.wire_bytes("all_gather", 3, 1000) == 666
    assert [formulas.wire_bytes(op, 2, 10) for op in ("send", "recv")] == [10, 0]
    assert formulas.busbw_factor("broadcast", 8) == 1
    assert formulas.busbw_factor("all_gather", 8) == formulas.wire_factor("all_gather", 8)
    for t in (1, 2, 8):
        # Sequence parallelism moves what the all-reduces moved; the weight gradient's two gathers come on top.
        calls = formulas.sequence_parallel_calls(layers=1, micro_batches=1)
        needed = (
            3
            * 5
            * 7
            * (
                (calls["all_gather"] - 2) * formulas.wire_factor("all_gather", t)
                + calls["reduce_scatter"] * formulas.wire_factor("reduce_scatter", t)
            )
        )
        assert formulas.tp_wire_elements(3, 5, 7, t) == needed
        assert needed == formulas.wire_factor("all_reduce", t) * formulas.tp_payload(3, 5, 7, 1, 1)
    for n in (1, 2, 16):
        assert formulas.dp_wire_elements(999, n, "none") == formulas.wire_factor("all_reduce", n) * 999
        assert formulas.dp_wire_elements(999, n, "zero3") == 3 * formulas.wire_factor("all_gather", n) * 999
    assert formulas.pp_elements(2, 3, 4, p=4, v=2, m=5) == 5 * 7 * 24
    with pytest.raises(ValueError, match="no wire factor"):
        formulas.wire_factor("gossip", 2)


def test_the_reference_imports_torch_and_the_standard_library_alone() -> None:
    folder = Path(formulas.__file__).parent
    roots = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots.add("." if node.level else str(node.module).split(".")[0])
    assert roots <= {"__future__", "collections", "dataclasses", "fractions", "math", "torch", "typing"}
