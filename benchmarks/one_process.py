"""`one-process`: compare one process of ours with the plain PyTorch GPT on as many threads, in speed and memory.

The plain side has the same C heap and matmuls as ours, so that the ratio shows the overhead of our code. A second
comparison, with the plain side as torch makes it, shows how much these two gain.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.pairs import Pairs, measure, summarise
from benchmarks.processes import Team
from benchmarks.result import Result, Row
from benchmarks.settings import Settings, tokens_per_step
from dist_gpt.config.schema import Config

NAME = "one-process"
RATIO_TARGET, MEMORY_TARGET = 0.98, 1.0
LOSS_TOLERANCE = 1e-3
"""float32 sums in another order drift apart during training; a side that does different work is far outside."""
PAIRS, MICRO_BATCHES, THREADS, MEMORY_STEPS = 20, 2, 1, 3


def run(settings: Settings, say: Callable[[str], None]) -> Result:
    """Measure both sides in turn, one idle while the other runs; then the memory of each side alone."""
    threads = settings.threads or THREADS
    config = settings.config(settings.micro_batches or MICRO_BATCHES)
    tokens = tokens_per_step(config)
    what = f"ours against the plain PyTorch GPT, {threads} thread(s), {tokens:,} tokens a step, AdamW, clipping"
    result = Result(NAME, what, settings.document())
    found = _against("plain", config, threads, settings, say)
    summary = summarise(found.ratios)
    result.rows += [
        Row("ours, median", tokens / statistics.median(found.ours), "tokens/s"),
        Row("plain, median", tokens / statistics.median(found.plain), "tokens/s"),
        Row(f"ratio, median of {summary.pairs} pairs", summary.median),
        Row("ratio, mean (geometric)", summary.mean),
        Row("ratio, lower 95 % bound of the mean (t)", summary.lower, target=RATIO_TARGET),
        Row("largest difference of the losses, relative", found.loss_error, target=LOSS_TOLERANCE, at_least=False),
    ]
    result.raw = {"steps_per_sample": found.steps, "ours_s": found.ours, "plain_s": found.plain}
    _stock(config, threads, settings, result, say)
    _memory(config, threads, result, say)
    return result


def _against(side: str, config: Config, threads: int, settings: Settings, say: Callable[[str], None]) -> Pairs:
    """Measure ours and `side` in turn."""
    tokens = tokens_per_step(config)
    with Team("ours", config, threads) as ours, Team(side, config, threads) as other:
        return measure(
            ours, other, settings.pairs or PAIRS, settings.warm_up,
            lambda pair, a, b: say(
                f"{side}, pair {pair}: {tokens / a:,.0f} and {tokens / b:,.0f} tokens/s, ratio {b / a:.4f}"
            ),
        )  # fmt: skip


def _stock(config: Config, threads: int, settings: Settings, result: Result, say: Callable[[str], None]) -> None:
    """Compare ours with the plain side on torch's own matmuls and heap."""
    found = _against("stock", config, threads, settings, say)
    summary = summarise(found.ratios)
    result.rows += [
        Row("ratio to the plain one with torch's own products and heap", summary.median),
        Row("... lower 95 % bound of the mean (t)", summary.lower),
    ]
    result.raw |= {"ours_against_stock_s": found.ours, "stock_s": found.plain}


def _memory(config: Config, threads: int, result: Result, say: Callable[[str], None]) -> None:
    """Measure the peak resident size less that after `import torch`, each side in a fresh process."""
    peaks = {}
    for side in ("ours", "plain"):
        with Team(side, config, threads, same_weights=False) as team:
            team.run(MEMORY_STEPS)
            peaks[side] = team.peak_bytes()[0]
        say(f"peak memory, {side}: {peaks[side] / 1e6:,.1f} MB")
    result.rows += [
        Row("ours, peak memory above torch's own", peaks["ours"] / 1e6, "MB"),
        Row("plain, peak memory above torch's own", peaks["plain"] / 1e6, "MB"),
        Row("ratio of the peaks", peaks["ours"] / peaks["plain"], target=MEMORY_TARGET, at_least=False),
    ]
    result.raw["peak_bytes"] = peaks
