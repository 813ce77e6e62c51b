"""Make the configurations that the check trains: tiny ones for correctness, whole models for speed. Torch-free."""

from __future__ import annotations

from typing import Any

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import resolve
from dist_gpt.config.problems import problems
from dist_gpt.config.schema import Config

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "tie_embeddings": False, "bias": False},
}
TINY = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "seq_len": 16, "vocab_size": 64}


def config_of(
    family: str, model: dict[str, Any], train: dict[str, Any], parallel: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
) -> Config:  # fmt: skip
    """Return the resolved configuration of a model of `family`. Raise ConfigError if it cannot train."""
    if family not in FAMILIES:
        raise ConfigError([f"family {family!r} is not known; choose one of {', '.join(FAMILIES)}"])
    tree = {
        "model": {**model, **FAMILIES[family]},
        "parallel": {"dp": 1, **(parallel or {})},
        "optim": {"decay": "none", **(optim or {})},
        "train": {"steps": 1, "micro_batch": 1, **train},
        "data": {"source": "synthetic"},
    }
    config = resolve(Config.model_validate(tree))
    if found := [str(problem) for problem in problems(config)]:
        raise ConfigError(found)
    return config


def tiny(
    family: str = "gpt2", dtype: str = "fp32", model: dict[str, Any] | None = None, recompute: str = "none",
    parallel: dict[str, Any] | None = None, optim: dict[str, Any] | None = None, micro_batches: int = 2,
) -> Config:  # fmt: skip
    """Return a model of a few thousand parameters with `micro_batches` micro-batches per data rank."""
    parallel, dp = parallel or {}, (parallel or {}).get("dp", 1)
    kv_heads = {"num_kv_heads": 2} if family == "llama" else {}
    train = {"global_batch": 2 * dp * micro_batches, "micro_batch": 2, "dtype": dtype, "recompute": recompute}
    return config_of(family, {**TINY, **kv_heads, **(model or {})}, train, parallel, optim)
