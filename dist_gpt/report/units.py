"""Format numbers for reading: 12.3 ms, 4.5 MB, 31 %. Three digits, SI prefixes (1 kB = 1000 B), a dash for None."""

from __future__ import annotations

import math
import re
from typing import Any

NONE = "–"
_UNIT = re.compile(r"(?<=\d) (?=(?:%|[kMGTP]?B|[mµn]?s|points|[kMGTP]?FLOP/s)(?:\W|$))")


def glued(text: str) -> str:
    """Return text with a no-break space between each number and its unit."""
    return _UNIT.sub("\N{NO-BREAK SPACE}", text)


def number(value: Any) -> float | None:
    """Return `value` as a finite float, or None for anything else (a bool is no number)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return result if math.isfinite(result) else None


def amount(value: Any) -> float:
    """Return `value` as a finite float, or 0 for anything else."""
    return number(value) or 0.0


def digits(value: float, significant: int = 3) -> str:
    """Return decimal notation rounded to `significant` digits or to a whole number, thousands grouped: 1,234."""
    if value == 0:
        return "0"
    places = significant - 1 - math.floor(math.log10(abs(value)))
    if abs(round(value, places)) >= 10 ** (significant - places):  # 0.9996 is 1.00
        places -= 1
    rounded = round(value, places) if abs(value) < 1000 else round(value)
    if abs(rounded) >= 1e15 or abs(rounded) < 1e-6:
        return f"{rounded:.{significant - 1}e}"
    return f"{rounded:,.{max(0, min(places, 12))}f}"


def plain(value: Any) -> str:
    """Return a count or a ratio as text: 12, 3.5, 12,345; whole numbers in full up to 9,999,999."""
    x = number(value)
    if x is None:
        return NONE
    if abs(x) >= 1e7:
        return scaled(x, "").strip()
    if x == int(x):
        return f"{int(x):,}"
    text = digits(x)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def scaled(value: Any, unit: str) -> str:
    """Return a value with an SI prefix from k to E: 4.5 MB, 120 GB/s, 41.3 TFLOP/s."""
    x = number(value)
    if x is None:
        return NONE
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(x) >= 0.9995 * 10**power:
            return f"{digits(x / 10**power)} {prefix}{unit}"
    text = digits(x) if x != int(x) else str(int(x))
    return f"{text} {unit}".rstrip()


def size(value: Any) -> str:
    """Return a number of bytes as text: 4.5 MB."""
    return scaled(value, "B")


def rate(value: Any) -> str:
    """Return a number of bytes per second as text: 120 GB/s."""
    return scaled(value, "B/s")


def flops(value: Any) -> str:
    """Return a number of FLOPs per second as text: 41.3 TFLOP/s."""
    return scaled(value, "FLOP/s")


def time_unit(largest: float) -> tuple[float, str]:
    """Return factor and name of the unit in which times up to `largest` seconds read well."""
    for limit, factor, name in ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (1e-6, 1e6, "µs")):
        if largest >= limit:
            return factor, name
    return (1e9, "ns") if largest > 0 else (1e3, "ms")


def byte_unit(largest: float) -> tuple[float, str]:
    """Return size in bytes and name of the unit in which sizes up to `largest` bytes read well."""
    for power, name in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if largest >= 10**power:
            return 10.0**power, name
    return 1.0, "B"


def seconds(value: Any) -> str:
    """Return a duration as text: 12.3 ms; from two minutes on 2 min 20 s, from an hour on 1 h 12 min."""
    x = number(value)
    if x is None:
        return NONE
    if x == 0:
        return "0 s"
    whole = round(abs(x))
    sign = "-" if x < 0 else ""
    if whole >= 3600:
        return f"{sign}{plain(whole // 3600)} h {whole % 3600 // 60} min"
    if whole >= 120:
        return f"{sign}{whole // 60} min {whole % 60} s"
    if abs(x) < 1e-9:
        return f"{sign}<1 ns"
    factor, unit = time_unit(abs(x) * 1.0005)
    return f"{digits(x * factor)} {unit}"


def percent(value: Any) -> str:
    """Return a share as text: 31 %, 4.2 %, 0.03 %."""
    x = number(value)
    if x is None:
        return NONE
    x *= 100
    if x == 0:
        return "0 %"
    if abs(x) < 0.01:
        return "<0.01 %" if x > 0 else ">-0.01 %"
    places = 0 if abs(x) >= 9.95 else 1 if abs(x) >= 0.95 else 2
    return f"{x:,.{places}f} %" if abs(x) < 1e6 else f"{x:.1e} %"


def points(value: Any) -> str:
    """Return a difference of shares in percentage points: 12 points."""
    x = number(value)
    return NONE if x is None else f"{digits(100 * x, 2) if abs(x) < 0.1 else round(100 * x)} points"


def binary(value: Any) -> str:
    """Return bytes that are a power of two in binary units, 64 KiB, and others as `size` does."""
    x = number(value)
    if x is None:
        return NONE
    for power, prefix in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if 2**power <= x < 2 ** (power + 10) and math.log2(x).is_integer():
            return f"{int(x / 2**power):,} {prefix}iB"
    return size(x)


def with_unit(value: Any, unit: Any) -> str:
    """Return a value whose unit is known only at run time: s, B, B/s, FLOP/s, share, or any other word."""
    known = {
        "s": seconds, "B": size, "bytes": size, "B/s": rate, "FLOP/s": flops, "flops/s": flops, "flops_per_s": flops,
        "share": percent, "%": percent, "fraction": percent, "": plain, "1": plain, "ratio": plain, "calls": plain,
    }  # fmt: skip
    if not isinstance(unit, str):
        return plain(value)
    if unit in known:
        return known[unit](value)
    if number(value) is None:
        return NONE
    if unit.endswith("/step"):
        return f"{with_unit(value, unit.removesuffix('/step'))} a step"
    return f"{scaled(value, '').strip() if abs(amount(value)) >= 1e5 else plain(value)} {unit}"


def count_of(n: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun: 1 rank, 8 ranks."""
    return f"{plain(n)} {one if n == 1 else many or one + 's'}"
