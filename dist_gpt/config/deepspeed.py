"""Check optim.engine deepspeed: its package, and settings it cannot serve, as sentences with reason and remedy."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config

NATIVE = "or set optim.engine: native"
REFUSED = ("parallel.cp", "optim.grad_dtype", "optim.reduce_dtype", "optim.state_dtype", "optim.reshard")
"""Settings that DeepSpeed supports at their defaults only: other problems of them are left out."""


def deepspeed_problems(config: Config, native: Collection[str]) -> list[str]:
    """Return every reason why DeepSpeed cannot train `config`, given `native`, the reasons of the native engine.

    Each setting of REFUSED is reported once. The native engine is offered only where it would accept the setting.
    """
    kept = [message for message in native if not message.startswith(REFUSED)]
    return [*kept, *_layout(config), *_state(config), *_refused(config, native), *_dtypes(config), *_loop(config)]


def require_deepspeed(engine: str) -> None:
    """Raise ConfigError when `engine` needs the package deepspeed and it is not installed."""
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError([
            "optim.engine: got deepspeed, but the package deepspeed is not installed; "
            "run pip install 'dist-gpt[deepspeed]', or set optim.engine=native"
        ])  # fmt: skip


def require_native(config: Config, what: str) -> None:
    """Raise ConfigError if the engine is not native. `what` begins the reason: "`what` of the native engine only"."""
    if config.optim.engine != "native":
        raise ConfigError([
            f"optim.engine: got {config.optim.engine}, expected native: {what} of the native engine only; "
            "add --set optim.engine=native"
        ])  # fmt: skip


def _layout(config: Config) -> list[str]:
    p = config.parallel
    found = []
    if p.pp > 1:
        found.append(
            f"parallel.pp {p.pp} is not supported with optim.engine deepspeed, which trains only layouts of dp x tp; "
            f"set pp: 1 (a larger parallel.tp or optim.sharding: zero3 also saves memory), {NATIVE}"
        )
    if p.sequence_parallel:
        found.append(
            "parallel.sequence_parallel true is not supported with optim.engine deepspeed, which does not sum the "
            f"gradients of norms over parallel.tp; set sequence_parallel: false, {NATIVE}"
        )
    if p.schedule != "1f1b":
        found.append(
            f"parallel.schedule {p.schedule} is not supported with optim.engine deepspeed, which finishes the backward "
            f"of a micro-batch before the next forward; set schedule: 1f1b, {NATIVE}"
        )
    return found


def _state(config: Config) -> list[str]:
    o = config.optim
    found = []
    if o.shard_group != "data":
        found.append(f"optim.shard_group {o.shard_group} is not supported with optim.engine deepspeed, which shards "
                     f"over all data ranks in this version; set shard_group: data, {NATIVE}")  # fmt: skip
    if o.offload and o.sharding == "none":
        found.append("optim.offload true with optim.sharding none is not supported with optim.engine deepspeed, which "
                     f"offloads only sharded state; set sharding: zero1, zero2 or zero3, {NATIVE}")  # fmt: skip
    if config.checkpoint.every:
        found.append(
            f"checkpoint.every {config.checkpoint.every} is not supported with optim.engine deepspeed: its checkpoints "
            "are pickles, which dist-gpt does not write, and its state does not match the native checkpoint format; "
            f"set checkpoint.every: 0, {NATIVE}"
        )
    return found


def _refused(config: Config, native: Collection[str]) -> list[str]:
    """Return the problems of the settings in REFUSED."""
    o, cp = config.optim, config.parallel.cp
    found = []
    if cp > 1:
        found.append(("parallel.cp", str(cp), "which trains only layouts of dp x tp; set cp: 1"))
    for key in ("grad_dtype", "reduce_dtype", "state_dtype"):
        if (given := getattr(o, key)) is not None:
            why = f"which keeps gradients, reductions and state in fp32; leave {key} out"
            found.append((f"optim.{key}", given, why))
    if o.reshard != "pass":
        found.append(("optim.reshard", o.reshard, "which decides itself what to keep gathered; leave reshard out"))
    return [
        f"{key} {given} is not supported with optim.engine deepspeed, {why}"
        + ("" if any(message.startswith(key) for message in native) else f", {NATIVE}")
        for key, given, why in found
    ]


def _dtypes(config: Config) -> list[str]:
    o, dtype = config.optim, config.train.dtype
    found = []
    if dtype == "fp64":
        found.append("train.dtype fp64 is not supported with optim.engine deepspeed, which keeps master weights and "
                     f"gradients in fp32; set train.dtype: fp32, {NATIVE}")  # fmt: skip
    if dtype == "fp16":
        found.append("train.dtype fp16 is not supported with optim.engine deepspeed: DeepSpeed has no fp16 on CPUs, "
                     "and on GPUs fp16 is not supported in this version; set train.dtype: bf16 or fp32, "
                     f"{NATIVE}")  # fmt: skip
    if dtype == "bf16" and o.sharding == "none":
        found.append(
            "train.dtype bf16 with optim.sharding none is not supported with optim.engine deepspeed, which would "
            f"accumulate gradients in bf16; set sharding: zero1, zero2 or zero3, {NATIVE}"
        )
    return found


def _loop(config: Config) -> list[str]:
    if config.train.recompute == "full":
        return [
            "train.recompute full is not supported with optim.engine deepspeed, which runs each forward once; set "
            f"recompute: selective or none, {NATIVE}"
        ]
    return []
