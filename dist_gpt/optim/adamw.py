"""The optimizer of a rank: it finishes the reductions, clips, steps its shards and gathers the parameters.

The arithmetic of one step is torch's fused AdamW or SGD on flat slices. Clipping and the skip of a non-finite step are
decided on the device, so the host never waits and every rank issues the same collectives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from dist_gpt.comm.mesh import Mesh
from dist_gpt.config.schema import Config
from dist_gpt.optim.clip import clip_divisor, squared_norm_here
from dist_gpt.parallel.buckets import FlatBuffers


class Optimizer:
    """Steps the slices of the buckets that this rank owns. After a step, on the device, in float64: `statistics` (2,),
    the loss summed over the batch and the global gradient norm before clipping; `stop_votes` (), how many ranks wanted
    to stop (`wants_stop`) in this step, equal on all ranks."""

    def __init__(self, config: Config, buffers: FlatBuffers, mesh: Mesh) -> None:
        self.config = config
        self.flats = buffers.buckets
        self.mesh = mesh
        self.slices: dict[str, Parameter] = {}
        decayed, plain = self._slices()
        o = config.optim
        self.fused = buffers.device.type != "meta"  # a dry run has no kernel to fuse
        groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
        self.engine: torch.optim.Optimizer
        if o.name == "adamw":
            self.engine = torch.optim.AdamW(
                groups, lr=o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps, fused=self.fused
            )
        else:
            self.engine = torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, fused=self.fused)
            if o.momentum:  # torch leaves it uninitialised where the very first step is skipped
                for piece in decayed + plain:
                    self.engine.state[piece]["momentum_buffer"] = torch.zeros_like(piece)
        self.statistics = torch.zeros(2, dtype=torch.float64)
        self.stop_votes = torch.zeros((), dtype=torch.float64)
        self.wants_stop: Callable[[], object] = lambda: False
        self.before_clip: Callable[[], None] | None = None  # the certificate reads final gradients here

    def _slices(self) -> tuple[list[Parameter], list[Parameter]]:
        """Flat views of what this rank steps, with and without weight decay, their gradients bound."""
        decayed: list[Parameter] = []
        plain: list[Parameter] = []
        for flat in self.flats:
            for segment in flat.bucket.segments:
                start, stop = max(segment.start, flat.start), min(segment.stop, flat.stop)
                if start < stop:
                    piece = Parameter(flat.parameters[start:stop])
                    piece.grad = flat.gradients[start:stop]
                    self.slices[f"{flat.bucket.index}.{start}-{stop}"] = piece
                    (decayed if segment.decay else plain).append(piece)
        return decayed, plain

    def step(self, rate: float, loss: Tensor) -> None:
        """One update with learning rate `rate`; `loss` is this rank's part of the summed loss (0 off the last stage).

        Non-finite gradients or loss leave the weights as they are; the collectives still run.
        """
        for flat in self.flats:
            flat.finish_reduction()
        self._sum_tied()
        if self.before_clip is not None:
            self.before_clip()
        vote = loss.new_full((), 1.0 if self.wants_stop() else 0.0, dtype=torch.float64)
        sums = torch.stack((loss.double(), squared_norm_here(self.flats, self.mesh), vote))
        self.mesh.world.all_reduce(sums).wait()
        statistics, self.stop_votes = sums[:2], sums[2]
        statistics[1] = statistics[1].sqrt()
        self.statistics = statistics
        bad = torch.isfinite(statistics).all().logical_not()
        self._apply(rate, clip_divisor(statistics[1], self.config.optim.clip), bad)
        pending = [flat.start_gather(self.mesh) for flat in self.flats if flat.shards > 1]
        for gather in pending:
            gather.wait()

    def state(self) -> dict[str, Tensor]:
        """The live state, `BUCKET.START-STOP.KEY` -> tensor; where nothing was stepped yet it is made first, zero."""
        found: dict[str, Tensor] = {}
        for name, piece in self.slices.items():
            state = self.engine.state[piece]
            if not state and self.config.optim.name == "adamw":  # as torch makes it in the first step
                state["step"] = torch.zeros((), dtype=torch.float32, device=piece.device)
                state |= {key: torch.zeros_like(piece.detach()) for key in ("exp_avg", "exp_avg_sq")}
            found |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        return found

    def _sum_tied(self) -> None:
        """The first and the last stage add up their gradients of the tied embedding, on the reduced shard."""
        for flat in self.flats:
            if flat.bucket.tied and self.mesh["embed"].size > 1:
                self.mesh["embed"].all_reduce(flat.gradient_shard).wait()

    def _apply(self, rate: float, divisor: Tensor, bad: Tensor) -> None:
        for group in self.engine.param_groups:
            group["lr"] = rate
        if self.fused and self.config.train.dtype != "fp64":
            self.engine.grad_scale = divisor.float()  # type: ignore[attr-defined]  # the kernel divides: no extra pass
        else:  # the kernel's divisor is float32: not for a float64 certificate
            for flat in self.flats:
                flat.gradient_shard.div_(divisor.to(flat.gradients.dtype))
        if self.fused:
            self.engine.found_inf = bad.float()  # type: ignore[attr-defined]  # read by the kernel, on the device
        with torch.no_grad():
            self.engine.step()


def state_bytes(engine: torch.optim.Optimizer) -> int:
    """Bytes of optimizer state held here (step counters left out)."""
    tensors = [t for state in engine.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
    return sum(t.nbytes for t in tensors)
