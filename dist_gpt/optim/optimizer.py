"""Optimizer of a rank: it finishes the reductions, clips, and steps its shards.

The arithmetic of one step is torch's fused AdamW or SGD on flat slices (`optim.narrow` if moments or gradients are in a
narrower dtype than the master). Clipping, the loss scale and the skip of a non-finite step are decided on the device,
so the host never waits and every rank issues the same collectives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from dist_gpt.comm.mesh import Mesh
from dist_gpt.config.schema import Config
from dist_gpt.optim.grad_norm import clip_divisor, squared_norm_here
from dist_gpt.optim.loss_scale import LossScale
from dist_gpt.optim.low_precision_adamw import NarrowAdamW
from dist_gpt.optim.rules import SGD, AdamW, Group, Rule
from dist_gpt.parallel.buckets import TORCH_DTYPE, FlatBucket, FlatBuffers
from dist_gpt.plan.buckets import Slot
from dist_gpt.plan.precision import Precision


class Optimizer:
    """Optimizer of the bucket slices that this rank owns.

    After a step, on the device, in float64 and equal on all ranks: `statistics` (2,), the loss summed over the batch
    and the global gradient norm before clipping; `stop_votes` (), how many ranks wanted to stop (`wants_stop`).
    """

    def __init__(self, config: Config, buffers: FlatBuffers, mesh: Mesh) -> None:
        self.config, self.buffers, self.mesh = config, buffers, mesh
        self.flats = buffers.buckets
        self.precision = Precision.of(config)
        self.fused = buffers.device.type != "meta"  # a dry run has no kernel to fuse
        self.offloaded = config.optim.offload
        self.device = torch.device("cpu") if self.offloaded and self.fused else buffers.device  # of the slices
        self.separate = self.precision.low or self.offloaded  # the parameters are not their own masters
        dtypes = TORCH_DTYPE[self.precision.master], TORCH_DTYPE[self.precision.gradient]
        self.masters = [
            self._room(flat.parameter_shard, dtypes[0]) if self.separate else flat.parameter_shard
            for flat in self.flats
        ]
        self.gradients = [
            self._room(flat.gradient_shard, dtypes[1]) if self.offloaded else flat.gradient_shard for flat in self.flats
        ]
        self.slices: dict[str, Parameter] = {}
        self._gradient_of: dict[Parameter, Tensor] = {}
        self.rule = self._rule()
        self.scale = LossScale(config, buffers.device) if config.train.dtype == "fp16" else None
        self.statistics = torch.zeros(2, dtype=torch.float64)
        self.stop_votes = torch.zeros((), dtype=torch.float64)
        self.wants_stop: Callable[[], object] = lambda: False
        self.before_clip: Callable[[], None] | None = None  # the certificate reads final gradients here

    # --- slices --------------------------------------------------------------------------------------------------

    def _room(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return zeros on the device of the slices; with offload from a GPU pinned, to be copied at full speed."""
        pinned = like.is_cuda and self.offloaded
        return torch.zeros(like.shape, dtype=dtype, device=self.device, pin_memory=pinned)

    def _rule(self) -> Rule:
        o, p = self.config.optim, self.precision
        decayed, plain = self._slices()
        both = Group(tuple(decayed), o.weight_decay), Group(tuple(plain), 0.0)
        groups = [group for group in both if group.params]
        betas = (o.betas[0], o.betas[1])
        if o.name == "adamw" and (p.state != p.master or p.gradient != p.master):
            return NarrowAdamW(groups, self._gradient_of, betas, o.eps, TORCH_DTYPE[p.state])
        if o.name == "adamw":
            return AdamW(groups, betas, o.eps, self.fused)
        return SGD(groups, o.momentum, self.fused)

    def _slices(self) -> tuple[list[Parameter], list[Parameter]]:
        """Return flat views of what this rank steps, with and without weight decay, their gradients bound."""
        decayed: list[Parameter] = []
        plain: list[Parameter] = []
        for flat, master, gradient in zip(self.flats, self.masters, self.gradients, strict=True):
            for segment in flat.bucket.segments:
                start, stop = max(segment.start, flat.start), min(segment.stop, flat.stop)
                if start < stop:
                    piece = Parameter(master[start - flat.start : stop - flat.start])
                    part = gradient[start - flat.start : stop - flat.start]
                    if part.dtype == piece.dtype:
                        piece.grad = part
                    self._gradient_of[piece] = part
                    self.slices[f"{flat.bucket.index}.{start}-{stop}"] = piece
                    (decayed if segment.decay else plain).append(piece)
        return decayed, plain

    # --- a step --------------------------------------------------------------------------------------------------

    def step(self, rate: float, loss: Tensor) -> None:
        """Update with learning rate `rate`; `loss` is this rank's part of the summed loss (0 off the last stage).

        Non-finite gradients or loss leave the weights unchanged; the collectives still run.
        """
        self.buffers.finish_reductions()
        self._sum_copies()
        if self.before_clip is not None:
            self.before_clip()
        vote = loss.new_full((), 1.0 if self.wants_stop() else 0.0, dtype=torch.float64)
        sums = torch.stack((loss.double(), squared_norm_here(self.flats, self.mesh), vote))
        self.mesh.world.all_reduce(sums).wait()
        statistics, self.stop_votes = sums[:2], sums[2]
        statistics[1] = statistics[1].sqrt()
        bad = torch.isfinite(statistics).all().logical_not()
        scale = self.scale.applied().double() if self.scale is not None else torch.ones_like(statistics[1])
        statistics[1] = statistics[1] / scale
        self.statistics = statistics
        self._apply(rate, clip_divisor(statistics[1], self.config.optim.clip) * scale, bad)
        if self.scale is not None:
            self.scale.update(bad)

    def _sum_copies(self) -> None:
        """Sum the reduced shards over the ranks that hold copies of the same state.

        These are the nodes if each holds all of the state, and the first and last stage, which hold a tied embedding.
        """
        for pending in [self.mesh.replica.all_reduce(flat.gradient_shard) for flat in self.flats]:
            pending.wait()
        for flat in self.flats:
            if flat.bucket.tied and self.mesh["embed"].size > 1:
                self.mesh["embed"].all_reduce(flat.gradient_shard).wait()

    def _apply(self, rate: float, divisor: Tensor, bad: Tensor) -> None:
        if self.offloaded:
            for flat, gradient in zip(self.flats, self.gradients, strict=True):
                gradient.copy_(flat.gradient_shard)
        divisor, bad = divisor.to(self.device), bad.to(self.device)
        by_rule = isinstance(self.rule, NarrowAdamW) or (self.fused and self.precision.master != "fp64")
        if not by_rule:  # the fused kernel's float32 divisor is too coarse for a float64 certificate
            for gradient in self.gradients:
                gradient.div_(divisor.to(gradient.dtype))
        with torch.no_grad():
            self.rule.step(rate, divisor if by_rule else None, bad if self.fused else None)
            if self.separate:
                for flat, master in zip(self.flats, self.masters, strict=True):
                    flat.parameter_shard.copy_(master)

    # --- state ---------------------------------------------------------------------------------------------------

    def load(self, flat: FlatBucket, slot: Slot, value: Tensor) -> None:
        """Set the master of the parameter in `slot` to `value`, of this tp rank's shape."""
        if self.separate:
            flat.load_shard(self.masters[flat.bucket.index], slot, value)

    def state(self) -> dict[str, Tensor]:
        """Return the live state, `BUCKET.START-STOP.KEY` -> tensor; missing state of slices is created as zero."""
        found: dict[str, Tensor] = {}
        for name, piece in self.slices.items():
            found |= {f"{name}.{key}": value for key, value in self.rule.state_of(piece).items()}
        if self.separate:
            found |= {f"{flat.bucket.index}.master": m for flat, m in zip(self.flats, self.masters, strict=True)}
        if self.scale is not None:
            found |= self.scale.state()
        return found

    @property
    def state_bytes(self) -> int:
        """Bytes of moments, and of masters and gradients that are copies (step counters left out)."""
        states = [t for state in self.rule.state.values() for t in state.values()]
        copies = self.masters if self.separate else []
        copies = copies + (self.gradients if self.offloaded else [])
        return sum(t.nbytes for t in [*states, *copies] if t.ndim)
