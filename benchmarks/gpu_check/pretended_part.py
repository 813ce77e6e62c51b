"""Check one step on the fake device (`pretended`), for machines without a GPU."""

from __future__ import annotations

from benchmarks.gpu_check.cases import tiny
from benchmarks.gpu_check.pretended import observe
from benchmarks.gpu_check.section import Context


def run(context: Context) -> None:
    """Train one step of each family; check that the host never waits and no devices are mixed."""
    for family in ("gpt2", "llama"):
        found = observe(tiny(family, "bf16"))
        context.put(family, found["step"].document())
        for part in ("step", "evaluation"):
            if part in found:
                places = [*found[part].waits, *found[part].mixed]
                context.check(not places, f"{family}, {part}: {'; '.join(places)}")
