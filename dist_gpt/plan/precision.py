"""Dtypes of a rank's tensors, and sharding of state over the data axis: pure arithmetic.

Mixed precision as in arXiv:1710.03740: 16-bit parameters and activations, a float32 master of every parameter that the
optimizer steps, gradients accumulated in float32. In fp64 everything is fp64, in fp32 everything is fp32: there the
parameters are their own masters. ZeRO's stages are those of arXiv:1910.02054.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_gpt.config.schema import DTYPE_BYTES, Config

LOW = ("bf16", "fp16")
STAGES = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True)
class Precision:
    """Dtypes by purpose; names as in train.dtype."""

    compute: str
    """Parameters and activations."""
    gradient: str
    """Gradients, as kept and accumulated."""
    reduce: str
    """Gradients on the wire of the data axis."""
    master: str
    """Parameters that the optimizer steps."""
    state: str
    """Moments of the optimizer."""

    @staticmethod
    def of(config: Config) -> Precision:
        """Return the dtypes of a resolved configuration."""
        o, compute = config.optim, config.train.dtype
        full = "fp32" if compute in LOW else compute
        gradient = o.grad_dtype or full
        return Precision(compute, gradient, o.reduce_dtype or gradient, full, o.state_dtype or full)

    @property
    def low(self) -> bool:
        """True for 16-bit parameters, which are not their own masters."""
        return self.compute in LOW

    @property
    def casts(self) -> bool:
        """True if gradients are cast to another dtype for the reduction."""
        return self.reduce != self.gradient

    def bytes(self, what: str) -> int:
        """Return the bytes of one element of `what`: compute, gradient, reduce, master or state."""
        return DTYPE_BYTES[getattr(self, what)]

    @property
    def statistic(self) -> int:
        """Bytes of a number that is never 16-bit: means, deviations, log-sum-exps, losses."""
        return 8 if self.compute == "fp64" else 4


def shard_ranks(config: Config) -> int:
    """Return the number of ranks that share sharded state; 1 without sharding.

    It is N = dp x cp, or the members of the data group in one node (optim.shard_group: node).
    """
    data = int(config.parallel.dp) * config.parallel.cp
    if config.optim.sharding == "none":
        return 1
    return node_members(config) if config.optim.shard_group == "node" else data


def node_members(config: Config) -> int:
    """Return the members of a data group in one node: ranks of a node are consecutive, and tp is the innermost axis."""
    data = int(config.parallel.dp) * config.parallel.cp
    return max(1, min(data, config.world_size // config.launch.nodes // config.parallel.tp))


def stage_of(config: Config) -> int:
    """Return the ZeRO stage; 0 also if there is no rank to share with."""
    return STAGES[config.optim.sharding] if shard_ranks(config) > 1 else 0
