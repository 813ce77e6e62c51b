"""What may run: impossible settings are named, "auto" becomes a number, legal layouts and only those are accepted."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dist_gpt.config import yaml_io
from dist_gpt.config.load import ConfigError, config_hash, dump, load, problems, resolve
from dist_gpt.config.problems import NOT_YET
from dist_gpt.config.schema import Config

SMALL = """\
model: {num_layers: 4, hidden_size: 128, num_heads: 4, seq_len: 16}
train: {steps: 10, global_batch: 8}
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    return write(tmp_path, SMALL)


def write(folder: Path, text: str) -> str:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def refused(path: str, overrides: list[str] | None = None, world: int | None = None) -> list[str]:
    """The problems `load` raises."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides or [], world)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


# --- what cannot run -------------------------------------------------------------------------------------------------

IMPOSSIBLE: dict[str, tuple[list[str], list[str]]] = {
    "a window beyond the last step": (
        ["profile.steps=[2, 1000000]"],
        ["profile.steps [2, 1000000]", "1 <= first <= last <= train.steps"],
    ),
    "a window from step 0": (["profile.steps=[0, 1]"], ["profile.steps [0, 1]", "1 <= first"]),
    "torch.profiler without a window": (["profile.torch=true"], ["profile.torch", "profile.steps: [first, last]"]),
    "torch.profiler on a rank that is not there": (
        ["profile.steps=[1, 1]", "profile.torch=true", "profile.torch_ranks=[0, 5]"],
        ["profile.torch_ranks [5]", "the world has 1 rank; use rank 0"],
    ),
    "heads do not divide the width": (
        ["model.hidden_size=130"],
        ["model.hidden_size 130", "model.num_heads 4", "128 or 132"],
    ),
    "odd head with rope": (
        ["model.hidden_size=12", "model.position=rope"],
        ["model.position rope", "12 / model.num_heads 4 = 3", "8 or 16"],
    ),
    "heads do not divide by tp": (
        ["model.num_heads=2", "parallel.tp=4"],
        ["model.num_heads 2", "parallel.tp 4", "change tp to 2, or num_heads to 4 or 8"],
    ),
    "heads that divide by tp would not divide the width": (
        ["model.num_heads=4", "parallel.tp=3", "model.ffn_size=96"],
        ["model.num_heads 4 is not divisible by parallel.tp 3", "change tp to 2 or 4"],
    ),
    "kv heads do not divide the heads": (
        ["model.num_kv_heads=3"],
        ["model.num_heads 4", "model.num_kv_heads 3", "2 or 4"],
    ),
    "fewer kv heads than tp": (
        ["model.num_kv_heads=2", "parallel.tp=4"],
        ["model.num_kv_heads 2 is smaller than parallel.tp 4", "change tp to 2"],
    ),
    "kv heads do not divide by tp": (
        ["model.num_heads=36", "model.hidden_size=72", "model.num_kv_heads=6", "parallel.tp=4"],
        ["model.num_kv_heads 6 is not divisible by parallel.tp 4", "3 or 6"],
    ),
    "ffn does not divide by tp": (
        ["model.ffn_size=65", "parallel.tp=2"],
        ["model.ffn_size 65", "parallel.tp 2", "64 or 66"],
    ),
    "vocabulary smaller than tp": (
        ["model.vocab_size=3", "parallel.tp=4"],
        ["model.vocab_size 3 is smaller than parallel.tp 4"],
    ),
    "tokens do not divide by tp": (
        ["model.seq_len=15", "parallel.tp=2", "parallel.sequence_parallel=true"],
        ["parallel.sequence_parallel", "model.seq_len 15", "parallel.tp 2", "14 or 16"],
    ),
    "batch does not divide": (
        ["parallel.dp=3", "train.micro_batch=2"],
        ["train.global_batch 8", "parallel.dp 3 x train.micro_batch 2 = 6", "6 or 12"],
    ),
    "batch smaller than one micro-batch each": (
        ["train.global_batch=2", "parallel.dp=4"],
        ["train.global_batch 2", "= 4; change global_batch to 4,"],
    ),
    "more stages than layers": (
        ["parallel.pp=5"],
        ["parallel.pp 5 x parallel.virtual_stages 1 = 5 chunks", "model.num_layers 4", "at most 4"],
    ),
    "more chunks than layers": (
        ["parallel.pp=2", "parallel.virtual_stages=3", "parallel.schedule=interleaved"],
        ["parallel.pp 2 x parallel.virtual_stages 3 = 6 chunks", "model.num_layers 4"],
    ),
    "layers do not divide equally": (
        ["parallel.layers=equal", "parallel.pp=3"],
        ["parallel.layers equal", "model.num_layers 4", "3 or 6", "balanced"],
    ),
    "list of layers has the wrong length": (
        ["parallel.layers=[1, 3]", "parallel.pp=3"],
        ["parallel.layers has 2 entries", "parallel.pp 3 x parallel.virtual_stages 1 = 3"],
    ),
    "list of layers has the wrong sum": (
        ["parallel.layers=[1, 2]", "parallel.pp=2"],
        ["[1, 2] sums to 3", "model.num_layers 4", "add 1"],
    ),
    "an inner chunk is empty": (["parallel.layers=[2, 0, 2]", "parallel.pp=3"], ["parallel.layers", "chunk 1 empty"]),
    "interleaved with one virtual stage": (
        ["parallel.schedule=interleaved", "parallel.pp=2"],
        ["interleaved needs parallel.virtual_stages >= 2, got 1"],
    ),
    "interleaved with one stage": (
        ["parallel.schedule=interleaved", "parallel.virtual_stages=2"],
        ["interleaved needs parallel.pp >= 2, got 1"],
    ),
    "interleaved with an odd number of micro-batches": (
        ["parallel.schedule=interleaved", "parallel.virtual_stages=2", "parallel.pp=2", "train.global_batch=7"],
        ["multiples of parallel.pp 2", "= 7", "6 or 8"],
    ),
    "1f1b with virtual stages": (
        ["parallel.virtual_stages=2"],
        ["parallel.virtual_stages 2", "parallel.schedule 1f1b"],
    ),
    "gpipe with virtual stages": (
        ["parallel.virtual_stages=2", "parallel.schedule=gpipe"],
        ["parallel.virtual_stages 2", "parallel.schedule gpipe"],
    ),
    "warm-up longer than the run": (["optim.warmup=11"], ["optim.warmup 11", "train.steps 10"]),
    "validation on nothing": (["train.eval_every=5"], ["train.eval_every 5", "train.eval_batches 0"]),
    "name is a path": (["name=../up"], ["name: '../up'", "letters, digits"]),
    "name is empty": (["name=''"], ["name: ''"]),
    "name is hidden": (["name=.x"], ["name: '.x'"]),
    "vocabulary of a tokenised file": (["data.source=/data/train.bin"], ["model.vocab_size: missing", "train.bin"]),
    "vocabulary of synthetic data": (["data.source=synthetic"], ["model.vocab_size: missing", "synthetic"]),
    "unknown tokenizer": (["data.tokenizer=wordpiece"], ["data.tokenizer: got 'wordpiece'", "byte", "bpe:SIZE"]),
    "tokenizer without the end of text": (["data.tokenizer=bpe:256"], ["data.tokenizer: got 'bpe:256'", ">= 257"]),
    "ranks do not spread over nodes": (
        ["launch.nodes=3", "parallel.dp=2"],
        ["parallel.dp 2", "= 2 ranks", "launch.nodes 3"],
    ),
    "launch and axes differ": (
        ["launch.ranks_per_node=6", "parallel.dp=2", "parallel.tp=2"],
        ["world 6 (launch.nodes 1 x launch.ranks_per_node 6)", "parallel.dp 2 x parallel.tp 2", "start 4 ranks"],
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_settings_are_named_once(small: str, case: str) -> None:
    overrides, fragments = IMPOSSIBLE[case]
    found = refused(small, overrides)
    assert len(found) == 1, found
    for fragment in fragments:
        assert fragment in found[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.layers=[0, 4, 0]", "parallel.pp=3"],
        ["parallel.layers=[1, 3]", "parallel.pp=2"],
        ["parallel.schedule=interleaved", "parallel.virtual_stages=2", "parallel.pp=2"],
        ["parallel.sequence_parallel=true"],
        ["model.position=rope", "model.hidden_size=24"],
        ["model.num_kv_heads=2", "parallel.tp=2"],
        ["model.vocab_size=11", "data.source=synthetic"],
        ["train.eval_every=5", "train.eval_batches=1"],
        ["train.eval_batches=1"],
        ["optim.warmup=10", "optim.clip=0", "optim.name=sgd"],
        ["name=a.b_c-9"],
        ["profile.steps=[1, 1]"],
        ["profile.steps=[1, 2]", "profile.torch=true"],
    ],
)
def test_the_legal_neighbours_are_accepted(small: str, overrides: list[str]) -> None:
    assert problems(load(small, overrides)) == []


REFUSED_NOW = {
    "parallel.cp": "2", "parallel.p2p_scatter": "true", "parallel.schedule": "zbv",
    "train.compile": "true", "train.loss_chunks": "2", "checkpoint.async_save": "true", "launch.elastic": "true",
}  # fmt: skip


def test_every_refusal_has_a_case() -> None:
    assert set(REFUSED_NOW) == set(NOT_YET)


@pytest.mark.parametrize("key", NOT_YET)
def test_what_is_not_proven_yet_is_refused(small: str, key: str) -> None:
    found = refused(small, [f"{key}={REFUSED_NOW[key]}"])
    assert len(found) == 1 and found[0].startswith(f"{key}: ") and "is not supported in this version" in found[0]


def test_refusal_in_full(small: str) -> None:
    assert refused(small, ["parallel.schedule=zbv"]) == [
        "parallel.schedule: 'zbv' is not supported in this version; allowed: gpipe, 1f1b, interleaved"
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.grad_dtype=bf16"], "optim.grad_dtype bf16 with train.dtype fp32"),
        (["train.dtype=fp16", "optim.grad_dtype=bf16"], "optim.grad_dtype bf16 with train.dtype fp16"),
        (["train.dtype=fp64", "optim.reduce_dtype=fp32"], "optim.reduce_dtype fp32 with train.dtype fp64"),
        (["train.dtype=fp64", "optim.state_dtype=bf16"], "optim.state_dtype bf16 with train.dtype fp64"),
        (["train.dtype=fp64", "optim.grad_dtype=bf16"], "leave grad_dtype out, or set train.dtype: bf16"),
        (["train.dtype=fp16", "optim.reduce_dtype=bf16"], "would round gradients twice"),
        (["optim.name=sgd", "optim.state_dtype=bf16"], "only adamw's moments"),
        (["optim.name=sgd", "train.dtype=bf16", "optim.grad_dtype=bf16"], "only adamw supports bf16 gradients"),
        (["optim.reshard=step"], "only zero3 reshards"),
        (["optim.shard_group=node", "optim.sharding=none"], "shards nothing"),
        (["optim.shard_group=node", "parallel.dp=4", "parallel.tp=2", "launch.nodes=4"], "it holds one data rank of 4"),
        (["optim.shard_group=node", "parallel.pp=3", "parallel.dp=2", "train.global_batch=12", "launch.nodes=2",
          "model.num_layers=4", "parallel.tp=1"], "a node's 3 ranks are neither whole stages"),
        (["optim.shard_group=node", "parallel.dp=3", "launch.nodes=2", "parallel.tp=4", "train.global_batch=12",
          "launch.ranks_per_node=6"], "a node's 6 ranks are neither whole stages"),
    ],
)  # fmt: skip
def test_dtypes_and_shards_that_do_not_go_together(small: str, overrides: list[str], said: str) -> None:
    found = refused(small, overrides)
    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.dtype=bf16", "optim.grad_dtype=bf16", "optim.state_dtype=bf16"],
        ["train.dtype=fp32", "optim.reduce_dtype=bf16", "optim.offload=true"],
        ["train.dtype=fp16", "optim.sharding=zero3", "optim.reshard=step"],
        ["optim.shard_group=node", "launch.nodes=2", "parallel.dp=4", "optim.sharding=zero3"],
    ],
)
def test_dtypes_and_shards_that_do(small: str, overrides: list[str]) -> None:
    assert problems(load(small, overrides)) == []


# --- overrides, resolving, hashing -----------------------------------------------------------------------------------


def test_overrides_are_read_as_yaml_and_applied_in_order(small: str) -> None:
    config = load(small, [
        "optim.lr=1e-4", "optim.betas=[0.8, 0.9]", "train.seed=1", "train.seed = 2", "model.attention_dropout=null",
        "log.wandb.mode=offline", "parallel.layers=[1,3]", "parallel.pp=2", "data.source=a=b", "data.tokenizer=bpe:257",
        "train={steps: 4, global_batch: 2}", "train.global_batch=6",
    ])  # fmt: skip
    assert config.optim.lr == 1e-4 and config.optim.betas == [0.8, 0.9] and config.train.seed == 0
    assert (config.train.steps, config.train.global_batch) == (4, 6)
    assert config.model.attention_dropout == 0.0 and config.log.wandb.mode == "offline"
    assert config.parallel.layers == [1, 3] and config.data.source == "a=b" and config.model.vocab_size == 257


@pytest.mark.parametrize("text", ["train.steps", "=3", "", ".=1", "train.=1", "train..steps=1"])
def test_overrides_of_the_wrong_form_are_explained(small: str, text: str) -> None:
    assert refused(small, [text]) == [f"--set {text}: expected KEY=VALUE, for example --set train.steps=100"]


def test_overrides_that_cannot_be_read(small: str) -> None:
    assert refused(small, ["train.steps=[1"])[0].startswith("--set train.steps:1:3: invalid YAML")
    [message] = refused(small, ["parallel.tp.x=1"])
    assert "parallel.tp is a single value, not a section" in message


def test_resolve_fills_every_number(small: str) -> None:
    config = load(small, ["model.dropout=0.25"])
    m = config.model
    assert (m.num_kv_heads, m.ffn_size, m.vocab_size, m.attention_dropout) == (4, 512, 256, 0.25)
    assert config.parallel.dp == 1 and config.run_dir == "runs/run" and config.micro_batches == 8
    assert resolve(config) == config
    kept = load(small, ["model.num_kv_heads=2", "model.ffn_size=100", "model.vocab_size=300", "run_dir=/x",
                        "model.dropout=0.5", "model.attention_dropout=0"])  # fmt: skip
    m = kept.model
    assert (m.num_kv_heads, m.ffn_size, m.vocab_size, m.attention_dropout, kept.run_dir) == (2, 100, 300, 0.0, "/x")


def test_world_comes_from_the_argument_then_launch_then_the_axes(small: str) -> None:
    both = ["launch.nodes=2", "launch.ranks_per_node=4", "parallel.tp=2"]
    assert load(small, both).parallel.dp == 4
    assert load(small, ["launch.nodes=2", "parallel.tp=2"]).parallel.dp == 2
    told = load(small, both, world=2)
    assert (told.parallel.dp, told.world_size, told.launch.nodes, told.launch.ranks_per_node) == (1, 2, 1, 2)
    told = load(small, both, world=16)
    assert (told.parallel.dp, told.launch.nodes, told.launch.ranks_per_node) == (8, 4, 4)


@pytest.mark.parametrize("world", [2, 4, 8, 16, 12])
def test_what_ran_on_another_world_reads_back_equal(tmp_path: Path, world: int) -> None:
    overrides = ["launch.nodes=2", "launch.ranks_per_node=8", "parallel.tp=2", "train.global_batch=48"]
    config = load(write(tmp_path, SMALL), overrides, world=world)
    assert config.world_size == world
    assert load(write(tmp_path, dump(config))) == config


def test_a_world_that_is_no_product_names_the_nearest(small: str) -> None:
    [message] = refused(small, ["parallel.tp=2", "parallel.pp=2"], world=6)
    for fragment in (
        "world 6 is not a positive multiple of",
        "parallel.tp 2 x parallel.pp 2",
        "= 4; nearest worlds",
        "4 or 8 (parallel.dp 1 or 2",
    ):
        assert fragment in message
    [message] = refused(small, ["parallel.dp=2", "parallel.tp=2"], world=8)
    assert "world 8 is not parallel.dp 2 x parallel.tp 2" in message and "set parallel.dp to 4 or auto" in message
    [message] = refused(small, ["parallel.tp=2"], world=0)
    assert "nearest worlds: 2 (parallel.dp 1)" in message


def test_resolve_raises_what_load_reports() -> None:
    config = Config.model_validate(yaml_io.parse(SMALL + "data: {source: synthetic}\n", "x")[0])
    with pytest.raises(ConfigError, match=r"model\.vocab_size: missing"):
        resolve(config)
    with pytest.raises(ValueError, match="takes a resolved configuration"):
        problems(config)


def test_hash_follows_every_value_but_the_run_directory(small: str) -> None:
    base = config_hash(load(small))
    assert len(base) == 64 and config_hash(load(small, ["run_dir=/elsewhere"])) == base
    assert config_hash(load(small, ["optim.lr=3e-4"])) == base  # the default, written out
    for change in ("optim.lr=4e-4", "name=other", "train.seed=1", "model.seq_len=17"):
        assert config_hash(load(small, [change])) != base


def legal(world: int, dp: int | None, tp: int, pp: int) -> bool:
    """Independent of the product: which layouts of the model below a person would accept."""
    if tp * pp * (dp or 1) > world or world % (tp * pp) or (dp and dp * tp * pp != world):
        return False
    copies = world // (tp * pp)
    return tp in (1, 2) and pp in (1, 2, 3) and copies in (1, 2, 4, 8)  # 4 heads of 2 kv, 3 layers, batch 8


def test_exactly_the_legal_layouts_of_worlds_1_to_8_are_accepted() -> None:
    tree = yaml_io.parse(SMALL, "x")[0]
    tree["model"].update(num_layers=3, num_kv_heads=2)
    accepted = 0
    for tp, pp, dp in product(range(1, 9), range(1, 9), [None, *range(1, 9)]):
        config = Config.model_validate({**tree, "parallel": {"tp": tp, "pp": pp, "dp": dp or "auto"}})
        for world in range(1, 9):
            try:
                resolved = resolve(config, world)
                found = problems(resolved)
            except ConfigError as error:
                found = error.problems
            assert (not found) == legal(world, dp, tp, pp), (world, dp, tp, pp, found)
            if not found:
                accepted += 1
                assert resolved.world_size == world
    assert accepted == 2 * sum(legal(w, None, tp, pp) for w, tp, pp in product(range(1, 9), repeat=3)) > 0


def test_with_a_model_that_divides_by_everything_the_products_alone_decide() -> None:
    n = 840  # the least common multiple of 1..8
    base: dict[str, Any] = {
        "model": {"num_layers": 8, "hidden_size": 2 * n, "num_heads": n, "ffn_size": n, "seq_len": n},
        "train": {"steps": 1, "global_batch": n},
    }
    for tp, pp in product(range(1, 9), repeat=2):
        parallel = {"tp": tp, "pp": pp, "sequence_parallel": True}
        config = Config.model_validate({**base, "parallel": parallel})
        for world in range(1, 9):
            try:
                accepted = problems(resolve(config, world)) == []
            except ConfigError:
                accepted = False
            assert accepted == (world in {tp * pp * dp for dp in range(1, 9)}), (world, tp, pp)
