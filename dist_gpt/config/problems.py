"""Find every problem of a resolved configuration: sentences with the value, the allowed values, the change to make.

Every message names all keys it depends on by their full path: `load` leaves out messages about a key that is
already known to be wrong, so that one mistake is reported once.
"""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Any

from dist_gpt.config.deepspeed import deepspeed_problems
from dist_gpt.config.launch_problems import launch_problems
from dist_gpt.config.schema import Config

NOT_YET: dict[str, tuple[Any, ...]] = {
    "parallel.cp": (1,),
    "parallel.p2p_scatter": (False,),
    "parallel.schedule": ("gpipe", "1f1b", "interleaved"),
    "train.compile": (False,),
    "train.loss_chunks": (1,),
    "checkpoint.async_save": (False,),
    "launch.elastic": (False,),
}
"""Keys with values that the schema has but this version does not support: key -> values allowed now."""


def problems(config: Config) -> list[str]:
    """Return every reason why the resolved `config` cannot run; empty if it can."""
    checks = (
        _not_yet, _name, _model, _tensor_parallel, _batch, _layers, _schedule, _loop, _precision, _shards, _profile,
        launch_problems,
    )  # fmt: skip
    found = [message for check in checks for message in check(config)]
    return deepspeed_problems(config, found) if config.optim.engine == "deepspeed" else found


def near_multiples(value: int, of: int) -> str:
    """Return the multiples of `of` nearest to `value`, in words: "128 or 132"; only those >= 1."""
    below = value // of * of
    return f"{below} or {below + of}" if below else f"{of}"


def near_divisors(value: int, of: int, each: int = 1) -> str:
    """Return the divisors of `of` nearest to `value`, times `each`, in words; search 100,000 numbers each way."""
    start = max(1, min(value, of))
    below = next((d for d in range(start, max(0, start - 100_000), -1) if of % d == 0), 1)
    above = next((d for d in range(start + 1, min(of, start + 100_000) + 1) if of % d == 0), None)
    return f"{below * each} or {above * each}" if above else f"{below * each}"


def _yaml_word(value: object) -> str:
    """Return `value` as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _not_yet(config: Config) -> list[str]:
    found = []
    for path, allowed in NOT_YET.items():
        value = attrgetter(path)(config)
        if value not in allowed:
            given = f"'{value}'" if isinstance(value, str) else _yaml_word(value)
            words = ", ".join(_yaml_word(option) for option in allowed)
            found.append(f"{path}: {given} is not supported in this version; allowed: {words}")
    return found


def _name(config: Config) -> list[str]:
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", config.name):
        return []
    return [
        f"name: {config.name!r} is not a valid folder name (runs/NAME is the run directory); use up to 100 letters, "
        "digits, '.', '_' and '-', not beginning with '.' or '-'"
    ]


def _model(config: Config) -> list[str]:
    m = config.model
    found = []
    if m.hidden_size % m.num_heads:
        found.append(
            f"model.hidden_size {m.hidden_size} is not divisible by model.num_heads {m.num_heads}; "
            f"change hidden_size to {near_multiples(m.hidden_size, m.num_heads)}, "
            f"or num_heads to {near_divisors(m.num_heads, m.hidden_size)}"
        )
    elif m.position == "rope" and m.hidden_size // m.num_heads % 2:
        found.append(
            f"model.position rope rotates pairs, so the head size must be even, but model.hidden_size {m.hidden_size} "
            f"/ model.num_heads {m.num_heads} = {m.hidden_size // m.num_heads}; "
            f"change hidden_size to {near_multiples(m.hidden_size, 2 * m.num_heads)}"
        )
    kv = _filled(m.num_kv_heads, "model.num_kv_heads")
    if m.num_heads % kv:
        found.append(
            f"model.num_heads {m.num_heads} is not divisible by model.num_kv_heads {kv}; "
            f"change num_kv_heads to {near_divisors(kv, m.num_heads)}"
        )
    return found


def _tensor_parallel(config: Config) -> list[str]:
    m, p, t = config.model, config.parallel, config.train
    kv = _filled(m.num_kv_heads, "model.num_kv_heads")
    ffn = _filled(m.ffn_size, "model.ffn_size")
    vocab = _filled(m.vocab_size, "model.vocab_size")
    found = []
    if m.num_heads % p.tp:
        heads = ""
        if m.hidden_size % p.tp == 0:  # otherwise no number of heads suits both
            heads = f", or num_heads to {near_divisors(m.num_heads // p.tp, m.hidden_size // p.tp, each=p.tp)}"
        found.append(
            f"model.num_heads {m.num_heads} is not divisible by parallel.tp {p.tp}, and heads are not split; "
            f"change tp to {near_divisors(p.tp, m.num_heads)}{heads}"
        )
    if kv % p.tp and kv != m.num_heads:
        why = "is smaller than" if kv < p.tp else "is not divisible by"
        found.append(
            f"model.num_kv_heads {kv} {why} parallel.tp {p.tp}, and every rank needs the same number of whole heads; "
            f"change tp to {near_divisors(p.tp, kv)}, or num_kv_heads to {near_multiples(kv, p.tp)}"
        )
    if ffn % p.tp:
        found.append(
            f"model.ffn_size {ffn} is not divisible by parallel.tp {p.tp}; change ffn_size to "
            f"{near_multiples(ffn, p.tp)}, or tp to {near_divisors(p.tp, ffn)}"
        )
    if vocab < p.tp:
        found.append(
            f"model.vocab_size {vocab} is smaller than parallel.tp {p.tp}, and every rank needs a row; "
            f"change tp to at most {vocab}, or vocab_size to at least {p.tp}"
        )
    tokens = t.micro_batch * m.seq_len
    if p.sequence_parallel and tokens % p.tp:
        found.append(
            f"parallel.sequence_parallel splits the tokens of a micro-batch over parallel.tp {p.tp}, but "
            f"train.micro_batch {t.micro_batch} x model.seq_len {m.seq_len} = {tokens} is not divisible by it; change "
            f"seq_len to {near_multiples(m.seq_len, p.tp)}, or set sequence_parallel: false"
        )
    return found


def _batch(config: Config) -> list[str]:
    p, t = config.parallel, config.train
    dp = _filled(p.dp, "parallel.dp")
    unit = dp * t.micro_batch
    if t.global_batch % unit == 0:
        return []
    return [
        f"train.global_batch {t.global_batch} is not divisible by parallel.dp {dp} x train.micro_batch "
        f"{t.micro_batch} = {unit}; change global_batch to {near_multiples(t.global_batch, unit)}, "
        "or micro_batch, or dp"
    ]


def _layers(config: Config) -> list[str]:
    layers, p = config.model.num_layers, config.parallel
    chunks = p.pp * p.virtual_stages
    product = f"parallel.pp {p.pp} x parallel.virtual_stages {p.virtual_stages} = {chunks}"
    found = []
    if isinstance(p.layers, list):
        total = sum(p.layers)
        if len(p.layers) != chunks:
            found.append(
                f"parallel.layers has {len(p.layers)} entries, expected {product}, one number of layers per chunk"
            )
        if total != layers:
            found.append(
                f"parallel.layers {shown_list(p.layers)} sums to {total}, expected model.num_layers {layers}; "
                f"{'add' if total < layers else 'remove'} {abs(layers - total)}"
            )
        inner = [i for i in range(1, len(p.layers) - 1) if p.layers[i] == 0]
        if inner:
            found.append(
                f"parallel.layers {shown_list(p.layers)} leaves chunk{'s' if len(inner) > 1 else ''} "
                f"{', '.join(map(str, inner))} empty; only the first (embedding) and the last (head) may hold 0 layers"
            )
        return found
    if chunks > layers:
        found.append(
            f"{product} chunks, which is more than model.num_layers {layers}, but every chunk needs a layer; "
            f"change pp x virtual_stages to at most {layers}, or num_layers to at least {chunks} "
            "(parallel.layers as a list may leave the first and the last chunk empty)"
        )
    elif p.layers == "equal" and layers % chunks:
        found.append(
            f"parallel.layers equal, but model.num_layers {layers} is not divisible by {product}; "
            f"change num_layers to {near_multiples(layers, chunks)}, or set layers: balanced"
        )
    return found


def _schedule(config: Config) -> list[str]:
    p, t = config.parallel, config.train
    found = []
    if p.schedule in ("gpipe", "1f1b") and p.virtual_stages != 1:
        found.append(
            f"parallel.virtual_stages {p.virtual_stages} does not fit parallel.schedule {p.schedule}, which has one "
            "chunk per rank; set virtual_stages: 1, or schedule: interleaved"
        )
    if p.schedule != "interleaved":
        return found
    if p.virtual_stages < 2:
        found.append(
            f"parallel.schedule interleaved needs parallel.virtual_stages >= 2, got {p.virtual_stages}; "
            "set virtual_stages: 2, or schedule: 1f1b"
        )
    if p.pp < 2:
        found.append(
            f"parallel.schedule interleaved needs parallel.pp >= 2, got {p.pp}; set pp: 2, or schedule: 1f1b "
            "with virtual_stages: 1"
        )
    dp = _filled(p.dp, "parallel.dp")
    unit = dp * t.micro_batch
    if t.global_batch % unit == 0 and t.global_batch // unit % p.pp:
        found.append(
            f"parallel.schedule interleaved needs micro-batches in multiples of parallel.pp {p.pp}, but "
            f"train.global_batch {t.global_batch} / (parallel.dp {dp} x train.micro_batch {t.micro_batch}) = "
            f"{t.global_batch // unit}; change global_batch to {near_multiples(t.global_batch, unit * p.pp)}"
        )
    return found


def _loop(config: Config) -> list[str]:
    o, t = config.optim, config.train
    found = []
    if o.warmup > t.steps:
        found.append(
            f"optim.warmup {o.warmup} is more than train.steps {t.steps}; change warmup to at most {t.steps}, "
            f"or steps to at least {o.warmup}"
        )
    if t.eval_every > 0 and t.eval_batches == 0:
        found.append(
            f"train.eval_every {t.eval_every} with train.eval_batches 0 would validate on no data; "
            "set eval_batches >= 1, or eval_every: 0"
        )
    return found


def _precision(config: Config) -> list[str]:
    """Return the problems of dtypes that cannot be combined."""
    o, dtype = config.optim, config.train.dtype
    found = []
    if o.grad_dtype == "bf16" and dtype not in ("bf16", "fp64"):
        found.append(
            f"optim.grad_dtype bf16 with train.dtype {dtype}: bf16 gradients need bf16 activations; "
            "leave grad_dtype out, or set train.dtype: bf16"
        )
    if dtype == "fp64":
        for key in ("grad_dtype", "reduce_dtype", "state_dtype"):
            if getattr(o, key) is not None:
                found.append(f"optim.{key} {getattr(o, key)} with train.dtype fp64, where everything is fp64; "
                             f"leave {key} out, or set train.dtype: bf16")  # fmt: skip
    if dtype == "fp16" and o.reduce_dtype == "bf16":
        found.append(
            "optim.reduce_dtype bf16 with train.dtype fp16 would round gradients twice; leave reduce_dtype out"
        )
    if o.state_dtype is not None and o.name != "adamw":
        found.append(f"optim.state_dtype {o.state_dtype} with optim.name {o.name}: only adamw's moments can be kept "
                     "in another dtype; leave state_dtype out, or set name: adamw")  # fmt: skip
    if o.grad_dtype == "bf16" and o.name != "adamw":
        found.append(f"optim.grad_dtype bf16 with optim.name {o.name}: only adamw supports bf16 gradients; leave "
                     "grad_dtype out, or set name: adamw")  # fmt: skip
    return found


def _shards(config: Config) -> list[str]:
    """Return the problems of sharding; inside nodes, a node holds whole data groups or an equal part of one."""
    o, p, nodes = config.optim, config.parallel, config.launch.nodes
    found = []
    if o.reshard == "step" and o.sharding != "zero3":
        found.append(f"optim.reshard step with optim.sharding {o.sharding}: only zero3 reshards; leave reshard out")
    if o.shard_group != "node":
        return found
    if o.sharding == "none":
        return [*found, "optim.shard_group node with optim.sharding none shards nothing; set sharding: zero1, zero2 or "
                "zero3, or leave shard_group out"]  # fmt: skip
    per_node, data = config.world_size // nodes, _filled(p.dp, "parallel.dp") * p.cp
    members, stage = per_node // p.tp, data * p.tp
    whole = members >= data and per_node % stage == 0  # every data group is inside one node
    if members == 1 < data and per_node % p.tp == 0:
        found.append(
            f"optim.shard_group node with launch.nodes {nodes} shards nothing: the {per_node} ranks of a node are one "
            f"group of parallel.tp {p.tp}, so it holds one data rank of {data}; set shard_group: data"
        )
    elif per_node % p.tp or not (whole or (0 < members < data and data % members == 0)):
        found.append(
            f"optim.shard_group node with launch.nodes {nodes}: a node's {per_node} ranks are neither whole stages "
            f"(parallel.dp x parallel.tp = {stage} ranks each) nor equal parts of one, so data ranks that share state "
            "would be on different nodes; change launch.nodes or parallel.*, or set shard_group: data"
        )
    return found


def _profile(config: Config) -> list[str]:
    window, steps = config.profile.steps, config.train.steps
    found = []
    if window is None:
        if config.profile.torch:
            found.append(
                "profile.torch true without profile.steps has no window to run in; set profile.steps: [first, last]"
            )
        return found
    if not 1 <= window[0] <= window[1] <= steps:
        found.append(
            f"profile.steps {shown_list(window)} must be [first, last] with 1 <= first <= last <= train.steps {steps}"
        )
    world = config.world_size
    outside = [rank for rank in config.profile.torch_ranks if rank >= world]
    if config.profile.torch and outside:
        found.append(
            f"profile.torch_ranks {shown_list(outside)}: the world has "
            + ("1 rank; use rank 0" if world == 1 else f"{world} ranks; use ranks 0 to {world - 1}")
        )
    return found


def shown_list(values: list[int]) -> str:
    """Return a list as YAML writes it, cut after 16 values."""
    text = ", ".join(map(str, values[:16]))
    return f"[{text}{', ...' if len(values) > 16 else ''}]"


def _filled(value: int | str | None, key: str) -> int:
    if not isinstance(value, int):
        raise ValueError(f"{key} is {value!r}: problems() takes a resolved configuration, see load.resolve")
    return value
