"""`layouts`: compare 2 ranks of one thread each with the plain PyTorch GPT on 2 threads, on the same global batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.one_process import LOSS_TOLERANCE
from benchmarks.pairs import measure, summarise
from benchmarks.processes import Team
from benchmarks.result import Result, Row
from benchmarks.settings import Settings, tokens_per_step
from dist_gpt.config.errors import ConfigError

NAME = "layouts"
TARGETS = {"tp": 0.75, "pp": 0.75, "dp": 0.85}
PAIRS, MICRO_BATCHES, RANKS = 10, 8, 2


def run(settings: Settings, say: Callable[[str], None]) -> Result:
    """Measure one layout after the other. Each has its own ranks and its own plain side, which take turns."""
    total = settings.micro_batches or MICRO_BATCHES
    threads = settings.threads or 1
    chosen = [axis for axis in TARGETS if axis in settings.only or not settings.only]
    if unknown := set(settings.only) - set(TARGETS):
        raise ConfigError([f"--only {', '.join(sorted(unknown))}: the layouts are {', '.join(TARGETS)}"])
    tokens = tokens_per_step(settings.config(total))
    what = (
        f"{RANKS} ranks on {threads} thread(s) each against the plain GPT on {RANKS * threads}, {tokens:,} tokens a "
        f"step, micro-batches of {settings.micro_batch * settings.seq:,} tokens"
    )
    result = Result(NAME, what, settings.document())
    for axis in chosen:
        _layout(axis, settings, total, threads, result, say)
    return result


def _layout(
    axis: str, settings: Settings, total: int, threads: int, result: Result, say: Callable[[str], None]
) -> None:
    config = settings.config(total, **{axis: RANKS})
    tokens, label = tokens_per_step(config), f"{axis} {RANKS}"
    with Team("ours", config, threads) as ours, Team("plain", config, RANKS * threads) as plain:
        found = measure(
            ours, plain, settings.pairs or PAIRS, settings.warm_up,
            lambda pair, a, b: say(
                f"{label}, pair {pair}: {tokens / a:,.0f} and {tokens / b:,.0f} tokens/s, ratio {b / a:.4f}"
            ),
        )  # fmt: skip
    summary = summarise(found.ratios)
    result.rows += [
        Row(f"{label} (m = {config.micro_batches}): ours, median", tokens / statistics.median(found.ours), "tokens/s"),
        Row(f"{label}: plain, median", tokens / statistics.median(found.plain), "tokens/s"),
        Row(f"{label}: ratio, median of {summary.pairs} pairs", summary.median, target=TARGETS[axis]),
        Row(f"{label}: ratio, lower 95 % bound of the mean (t)", summary.lower),
        Row(f"{label}: difference of the losses", found.loss_error, target=LOSS_TOLERANCE, at_least=False),
    ]
    result.raw[axis] = {"steps_per_sample": found.steps, "ours_s": found.ours, "plain_s": found.plain}
