"""What optim.engine deepspeed needs, and cannot serve: sentences with what was given, why, and what to set instead."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config

NATIVE = "or set optim.engine: native"
REFUSED = ("parallel.cp", "optim.grad_dtype", "optim.reduce_dtype", "optim.state_dtype", "optim.reshard")
"""Settings that DeepSpeed refuses whatever they are set to: no other reason is worth telling."""


def deepspeed_problems(config: Config, native: Collection[str]) -> list[str]:
    """`native`, every reason why our engine cannot train `config`, as DeepSpeed sees it: with its own reasons, and
    each setting of REFUSED once. The other engine is offered only where it would take the setting."""
    kept = [message for message in native if not message.startswith(REFUSED)]
    return [*kept, *_layout(config), *_state(config), *_refused(config, native), *_dtypes(config), *_loop(config)]


def require_deepspeed(engine: str) -> None:
    """Raise ConfigError when `engine` needs the package deepspeed and it is not installed."""
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError([
            "optim.engine: got deepspeed, which needs the package deepspeed, and it is not installed; "
            "pip install 'dist-gpt[deepspeed]', or set optim.engine=native"
        ])  # fmt: skip


def require_native(config: Config, what: str) -> None:
    """Raise ConfigError where `what` (a sentence's subject) is asked of another engine than ours."""
    if config.optim.engine != "native":
        raise ConfigError([
            f"optim.engine: got {config.optim.engine}; {what} of the native engine only. --set optim.engine=native"
        ])  # fmt: skip


def _layout(config: Config) -> list[str]:
    p = config.parallel
    found = []
    if p.pp > 1:
        found.append(
            f"parallel.pp {p.pp} with optim.engine deepspeed, which trains layouts of dp x tp; set pp: 1 (a larger "
            f"parallel.tp or optim.sharding: zero3 make room for the model), {NATIVE}"
        )
    if p.sequence_parallel:
        found.append(
            "parallel.sequence_parallel true with optim.engine deepspeed, which does not sum the gradients of norms "
            f"over parallel.tp; set sequence_parallel: false, {NATIVE}"
        )
    if p.schedule != "1f1b":
        found.append(
            f"parallel.schedule {p.schedule} with optim.engine deepspeed, which ends the backward of a micro-batch "
            f"before the next forward; set schedule: 1f1b, {NATIVE}"
        )
    return found


def _state(config: Config) -> list[str]:
    o = config.optim
    found = []
    if o.shard_group != "data":
        found.append(f"optim.shard_group {o.shard_group} with optim.engine deepspeed, which shards over all data ranks "
                     f"here; set shard_group: data, {NATIVE}")  # fmt: skip
    if o.offload and o.sharding == "none":
        found.append("optim.offload true with optim.sharding none and optim.engine deepspeed, which offloads sharded "
                     f"state alone; set sharding: zero1, zero2 or zero3, {NATIVE}")  # fmt: skip
    if config.checkpoint.every:
        found.append(
            f"checkpoint.every {config.checkpoint.every} with optim.engine deepspeed: its checkpoints are pickles, "
            f"which are not written here, and its state does not fit ours; set checkpoint.every: 0, {NATIVE}"
        )
    return found


def _refused(config: Config, native: Collection[str]) -> list[str]:
    """The settings of REFUSED."""
    o, cp = config.optim, config.parallel.cp
    found = []
    if cp > 1:
        found.append(("parallel.cp", str(cp), "which trains layouts of dp x tp; set cp: 1"))
    for key in ("grad_dtype", "reduce_dtype", "state_dtype"):
        if (given := getattr(o, key)) is not None:
            why = f"where gradients, reductions and state are fp32; leave {key} out"
            found.append((f"optim.{key}", given, why))
    if o.reshard != "pass":
        found.append(("optim.reshard", o.reshard, "which decides by itself what it keeps gathered; leave reshard out"))
    return [
        f"{key} {given} with optim.engine deepspeed, {why}"
        + ("" if any(message.startswith(key) for message in native) else f", {NATIVE}")
        for key, given, why in found
    ]


def _dtypes(config: Config) -> list[str]:
    o, dtype = config.optim, config.train.dtype
    found = []
    if dtype == "fp64":
        found.append("train.dtype fp64 with optim.engine deepspeed, which keeps masters and gradients in fp32; set "
                     f"train.dtype: fp32, {NATIVE}")  # fmt: skip
    if dtype == "fp16":
        found.append("train.dtype fp16 with optim.engine deepspeed: it has no fp16 on CPUs, and on GPUs it is not "
                     f"proven in this version; set train.dtype: bf16 or fp32, {NATIVE}")  # fmt: skip
    if dtype == "bf16" and o.sharding == "none":
        found.append(
            "train.dtype bf16 with optim.sharding none and optim.engine deepspeed, which would add gradients up in "
            f"bf16; set sharding: zero1, zero2 or zero3, {NATIVE}"
        )
    return found


def _loop(config: Config) -> list[str]:
    if config.train.recompute == "full":
        return [
            "train.recompute full with optim.engine deepspeed, which runs each forward once; set recompute: selective "
            f"or none, {NATIVE}"
        ]
    return []
