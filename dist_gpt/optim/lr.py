"""Learning rate by step: linear warm-up, then constant, or cosine or linear decay."""

from __future__ import annotations

import math

from dist_gpt.config.schema import Config


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of optimizer step `step` (0-based).

    Warm-up reaches lr at step `warmup`; the decay ends at the last step with min_lr_ratio x lr.
    """
    o, steps = config.optim, config.train.steps
    if step < o.warmup:
        return o.lr * (step + 1) / (o.warmup + 1)
    if o.decay == "none" or steps - 1 <= o.warmup:
        return o.lr
    progress = min(1.0, (step - o.warmup) / (steps - 1 - o.warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if o.decay == "cosine" else 1 - progress
    return o.lr * (o.min_lr_ratio + (1 - o.min_lr_ratio) * shape)
