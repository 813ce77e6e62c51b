"""The table of parameters against published counts, textbook formulas and the names that everything else uses."""

from __future__ import annotations

import pytest

from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.params import (
    PARTIAL,
    REPLICATED,
    SHARDED,
    Param,
    parameter_table,
    params_of_blocks,
    qkv_sections,
    vocab_range,
)
from dist_gpt.plan.split import split_blocks
from tests.reference import formulas

GPT = ["model.num_layers=3", "model.hidden_size=24", "model.num_heads=4", "model.seq_len=8", "model.vocab_size=61",
       "parallel.dp=1", "parallel.tp=1", "parallel.pp=1"]  # fmt: skip
LLAMA = [*GPT, "model.num_kv_heads=2", "model.ffn_size=40", "model.norm=rmsnorm", "model.activation=swiglu",
         "model.position=rope", "model.tie_embeddings=false", "model.bias=false"]  # fmt: skip
FAMILIES = pytest.mark.parametrize("family", [GPT, LLAMA], ids=["gpt", "llama"])


def small(family: list[str], *sets: str) -> Config:
    return load("demo", [*family, *sets])


def count(config: Config) -> int:
    return sum(p.numel for p in parameter_table(config))


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("demo", None),
        ("gpt2-124m", 124_439_808),
        ("gpt2-355m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1.5b", 1_557_611_200),
        ("gpt3-175b", 174_604_259_328),
        ("llama-8b", 8_030_261_248),
    ],
)
def test_presets_have_their_published_number_of_parameters(preset: str, published: int | None) -> None:
    config = load(preset)
    m = config.model
    vocab, kv, ffn = int(m.vocab_size or 0), int(m.num_kv_heads or 0), int(m.ffn_size or 0)
    if preset.startswith("llama"):
        formula = formulas.llama_parameters(m.num_layers, m.hidden_size, vocab, m.num_heads, kv, ffn)
    else:
        formula = formulas.gpt2_parameters(m.num_layers, m.hidden_size, vocab, m.seq_len)
    assert count(config) == formula
    assert published is None or formula == published


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("bias", ["true", "false"])
def test_counts_with_and_without_biases_and_tying(tied: str, bias: str) -> None:
    config = small(GPT, f"model.tie_embeddings={tied}", f"model.bias={bias}", "model.ffn_size=52")
    expected = formulas.gpt2_parameters(3, 24, 61, 8, 52, bias == "true", tied == "true")
    assert count(config) == expected
    config = small(LLAMA, f"model.tie_embeddings={tied}")
    assert count(config) == formulas.llama_parameters(3, 24, 61, 4, 2, 40, tied == "true")


def test_names_and_shapes_of_gpt() -> None:
    layer = {
        "norm1.weight": (24,), "norm1.bias": (24,), "attn.qkv.weight": (72, 24), "attn.qkv.bias": (72,),
        "attn.out.weight": (24, 24), "attn.out.bias": (24,), "norm2.weight": (24,), "norm2.bias": (24,),
        "mlp.up.weight": (96, 24), "mlp.up.bias": (96,), "mlp.down.weight": (24, 96), "mlp.down.bias": (24,),
    }  # fmt: skip
    expected = {"embed.weight": (61, 24), "embed.position": (8, 24)}
    expected |= {f"layers.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}
    expected |= {"head.norm.weight": (24,), "head.norm.bias": (24,)}
    table = parameter_table(small(GPT))
    assert [(p.name, p.shape) for p in table] == list(expected.items())
    assert [p.block for p in table] == [0] * 2 + [1] * 12 + [2] * 12 + [3] * 12 + [4] * 2


def test_names_and_shapes_of_llama() -> None:
    layer = {
        "norm1.weight": (24,), "attn.qkv.weight": (48, 24), "attn.out.weight": (24, 24), "norm2.weight": (24,),
        "mlp.up.weight": (80, 24), "mlp.down.weight": (24, 40),
    }  # fmt: skip
    expected = {"embed.weight": (61, 24)}
    expected |= {f"layers.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}
    expected |= {"head.norm.weight": (24,), "head.weight": (61, 24)}
    assert [(p.name, p.shape) for p in parameter_table(small(LLAMA))] == list(expected.items())


@FAMILIES
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_pieces_of_all_tp_ranks_tile_every_parameter(family: list[str], tp: int) -> None:
    config = small(family, f"parallel.tp={tp}", "model.num_kv_heads=4")
    for p in parameter_table(config):
        if p.shard_dim is None:
            assert all(p.local_shape(tp, i) == p.shape for i in range(tp))
            continue
        rows = sorted(row for i in range(tp) for start, stop in p.pieces(tp, i) for row in range(start, stop))
        assert rows == list(range(p.shape[p.shard_dim])), p.name
        assert sum(p.sections) == p.shape[p.shard_dim], p.name
        lengths = [p.local_shape(tp, i)[p.shard_dim] for i in range(tp)]
        assert sum(lengths) == p.shape[p.shard_dim], p.name
        others = {p.local_shape(tp, i)[: p.shard_dim] + p.local_shape(tp, i)[p.shard_dim + 1 :] for i in range(tp)}
        assert others == {p.shape[: p.shard_dim] + p.shape[p.shard_dim + 1 :]}, p.name


def test_fused_sections_give_each_rank_its_own_heads() -> None:
    """Rank 1 of 2 holds query heads 2, 3 and key and value head 1, not the second half of the rows."""
    config = small(LLAMA, "parallel.tp=2")
    named = {p.name: p for p in parameter_table(config)}
    assert qkv_sections(config) == (24, 12, 12)  # heads of 6
    assert named["layers.0.attn.qkv.weight"].pieces(2, 1) == [(12, 24), (30, 36), (42, 48)]
    assert named["layers.0.mlp.up.weight"].pieces(2, 1) == [(20, 40), (60, 80)]
    assert named["layers.0.attn.out.weight"].local_shape(2, 1) == (24, 12)
    assert named["layers.0.mlp.down.weight"].local_shape(2, 1) == (24, 20)


def test_an_odd_vocabulary_is_split_without_padding() -> None:
    config = small(GPT, "parallel.tp=4")
    assert [vocab_range(config, i) for i in range(4)] == [(0, 16), (16, 31), (31, 46), (46, 61)]
    assert [parameter_table(config)[0].local_shape(4, i)[0] for i in range(4)] == [16, 15, 15, 15]


@FAMILIES
@pytest.mark.parametrize(
    ("tp", "split", "whole"), [(2, "true", PARTIAL), (2, "false", REPLICATED), (1, "true", REPLICATED)]
)
def test_gradient_kinds(family: list[str], tp: int, split: str, whole: str) -> None:
    table = parameter_table(small(family, f"parallel.tp={tp}", f"parallel.sequence_parallel={split}"))

    def is_split(p: Param) -> bool:
        return p.name in ("embed.weight", "head.weight") or (
            any(part in p.name for part in (".qkv.", ".out.", ".up.", ".down."))
            and not p.name.endswith(("out.bias", "down.bias"))  # added after the sum over tp, whole on every rank
        )

    for p in table:
        assert p.kind == (SHARDED if is_split(p) else whole), p.name
        assert (p.shard_dim is None) == (p.kind != SHARDED), p.name


@FAMILIES
def test_decay_and_initial_weights(family: list[str]) -> None:
    config = small(family, "model.init_std=0.02")
    for p in parameter_table(config):
        matrix = len(p.shape) == 2
        assert p.decay == matrix, p.name
        assert p.init == ("normal" if matrix else "zeros" if p.name.endswith("bias") else "ones"), p.name
        into_residual = p.name.endswith(("out.weight", "down.weight"))
        assert p.std == pytest.approx((0.02 / 6**0.5 if into_residual else 0.02) if matrix else 0.0), p.name


@FAMILIES
@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_chunks_hold_every_row_once_and_the_tied_embedding_at_both_ends(family: list[str], pp: int, tied: str) -> None:
    config = small(family, f"parallel.pp={pp}", f"model.tie_embeddings={tied}")
    held = [p.name for blocks in split_blocks(config) for p in params_of_blocks(config, blocks)]
    copies = 2 if tied == "true" and pp > 1 else 1
    assert held.count("embed.weight") == copies
    held = [name for i, name in enumerate(held) if name != "embed.weight" or held.index(name) == i]
    assert held == [p.name for p in parameter_table(config)]
    if copies == 2:
        last = params_of_blocks(config, split_blocks(config)[-1])
        assert last[-1] == parameter_table(config)[0]
