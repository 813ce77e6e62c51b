"""Small stand-in for a large configuration, for the certificate: it keeps divisibility, not sizes.

Bugs of combined parallelisms show at any size, as long as the same axes, remainders and options are in play.
"""

from __future__ import annotations

from typing import Any

from dist_gpt.config.schema import Config

MAX_WORLD = 8
MAX_PARAMETERS = 3_000_000


def certificate_config(config: Config, full: bool, parameters: int) -> tuple[Config, list[str]]:
    """Return `config` as the certificate runs it, and the changes in words.

    It is in float64 throughout, on gloo, without attention dropout and warm-up. With more than MAX_WORLD ranks or
    MAX_PARAMETERS parameters it is also smaller, unless `full`.
    """
    notes = []
    if config.train.dtype != "fp64":
        notes.append(f"train.dtype {config.train.dtype} -> fp64")
    if config.model.attention_dropout:
        notes.append(f"model.attention_dropout {config.model.attention_dropout} -> 0 (its mask is drawn per rank)")
    if config.optim.warmup:
        notes.append(f"optim.warmup {config.optim.warmup} -> 0")
    if config.launch.backend != "gloo":
        notes.append(f"launch.backend {config.launch.backend} -> gloo")
    narrow = dict.fromkeys(("grad_dtype", "reduce_dtype", "state_dtype"))
    notes += [f"optim.{k} {getattr(config.optim, k)} -> null" for k in narrow if getattr(config.optim, k) is not None]
    changes: dict[str, dict[str, Any]] = {
        "train": {"dtype": "fp64"},
        "model": {"attention_dropout": 0.0},
        "optim": {"warmup": 0, **narrow},
        "launch": {"backend": "gloo"},
    }
    if not full and (config.world_size > MAX_WORLD or parameters > MAX_PARAMETERS):
        for section, keys in shrunk(config).items():
            changes.setdefault(section, {}).update(keys)
            notes += [f"{section}.{k} {getattr(getattr(config, section), k)} -> {v}" for k, v in keys.items()
                      if getattr(getattr(config, section), k) != v]  # fmt: skip
    update = {name: getattr(config, name).model_copy(update=keys) for name, keys in changes.items()}
    return config.model_copy(update=update), notes


def shrunk(config: Config) -> dict[str, dict[str, Any]]:
    """Return the changed keys by section.

    Degrees shrink to at most MAX_WORLD ranks, none from above 1 to 1 (except cp, if all four are above 1).
    """
    p, m, t = config.parallel, config.model, config.train
    degrees = {"pp": p.pp, "dp": int(p.dp), "tp": p.tp, "cp": p.cp}
    while _product(degrees) > MAX_WORLD and max(degrees.values()) > 2:
        largest = max(degrees, key=lambda axis: degrees[axis])
        degrees[largest] = max(2, degrees[largest] // 2)
    while _product(degrees) > MAX_WORLD:  # four axes of 2: give up cp
        degrees[next(a for a in ("cp", "dp", "pp", "tp") if degrees[a] > 1)] = 1
    virtual = min(p.virtual_stages, 2) if degrees["pp"] > 1 else 1
    schedule = p.schedule if degrees["pp"] > 1 or virtual == p.virtual_stages else "1f1b"
    chunks = degrees["pp"] * virtual
    uneven = m.num_layers % (p.pp * p.virtual_stages) != 0
    layers = min(m.num_layers, (2 * chunks if chunks <= 4 else chunks) + (1 if uneven else 0))
    micro = min(t.micro_batch, 2)
    micro_batches = _micro_batches(config.micro_batches, p.pp, degrees["pp"])
    model = _small_model(config, degrees["tp"])
    return {
        "parallel": {**degrees, "virtual_stages": virtual, "schedule": schedule, "layers": "balanced"},
        "model": {**model, "num_layers": layers},
        "train": {"micro_batch": micro, "global_batch": degrees["dp"] * micro * micro_batches},
        "optim": {"bucket_mb": 0.05},
        "launch": _small_launch(config, degrees),
    }


def _small_launch(config: Config, degrees: dict[str, int]) -> dict[str, int]:
    """Return the nodes, and the ranks per node: one node, unless state is sharded inside nodes.

    In that case an even number of data ranks, at least 4, makes nodes of two data ranks each.
    """
    world, data = _product(degrees), degrees["dp"] * degrees["cp"]
    nodes = 1
    if config.optim.shard_group == "node" and data % 2 == 0 and data >= 4:
        nodes = world // (2 * degrees["tp"])
    return {"nodes": nodes, "ranks_per_node": world // nodes}


def _micro_batches(given: int, pp: int, small_pp: int) -> int:
    """Return a small number of micro-batches: a multiple of `small_pp` if `given` is one of `pp`; 1 stays 1."""
    if given == 1:
        return 1
    if given % pp == 0:
        return 2 * small_pp
    return min(given, 2 * small_pp + 1)


def _small_model(config: Config, tp: int) -> dict[str, Any]:
    """Return small model sizes that keep the grouped-query ratio (at most 4) and the vocabulary's remainder over tp.

    Heads and the MLP's width are divisible by tp.
    """
    m = config.model
    kv_given = int(m.num_kv_heads or m.num_heads)
    ratio = min(4, m.num_heads // kv_given)
    kv = min(kv_given, 2 * tp)
    kv -= kv % tp
    head = min(8, m.hidden_size // m.num_heads)
    hidden = kv * ratio * head
    wide = int(m.ffn_size or 4 * m.hidden_size) / m.hidden_size
    vocab = int(m.vocab_size or 0)
    return {
        "num_kv_heads": kv,
        "num_heads": kv * ratio,
        "hidden_size": hidden,
        "ffn_size": max(tp, round(hidden * wide / tp) * tp),
        "vocab_size": min(vocab, 32 * tp + vocab % config.parallel.tp % tp),
        "seq_len": min(m.seq_len, 8 * tp),
    }


def _product(degrees: dict[str, int]) -> int:
    result = 1
    for degree in degrees.values():
        result *= degree
    return result
