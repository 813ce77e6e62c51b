"""report.md, the terminal's lines, and the numbers in both."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import pytest

from dist_gpt.report import units
from dist_gpt.report.render.elements import LONGEST, clean, listing, short
from dist_gpt.report.render.sections import summary
from dist_gpt.report.render.text import _inline, markdown, terminal
from tests.unit import report_document


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0123, "12.3 ms"), (0.339, "339 ms"), (1.5, "1.50 s"), (67.8, "67.8 s"), (140, "2 min 20 s"),
     (4320, "1 h 12 min"), (2.13e-6, "2.13 µs"), (4e-9, "4.00 ns"), (1e-12, "<1 ns"), (0, "0 s"),
     (-0.002, "-2.00 ms"), (0.9999, "1.00 s"), (119.7, "2 min 0 s"), (None, "–"), (float("nan"), "–"),
     (float("inf"), "–"), ("3", "–"), (True, "–"), (10**400, "–")],
)  # fmt: skip
def test_seconds(value: object, shown: str) -> None:
    assert units.seconds(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 B"), (16, "16 B"), (131_072, "131 kB"), (4_500_000, "4.50 MB"), (999_999, "1.00 MB"), (1.2e9, "1.20 GB"),
     (3e15, "3.00 PB"), (-2e6, "-2.00 MB"), (None, "–")],
)  # fmt: skip
def test_size(value: object, shown: str) -> None:
    assert units.size(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.31, "31 %"), (0.0423, "4.2 %"), (0.0003, "0.03 %"), (0, "0 %"), (1e-6, "<0.01 %"), (-0.67, "-67 %"),
     (1, "100 %"), (12.5, "1,250 %"), (0.0999, "10 %"), (None, "–")],
)  # fmt: skip
def test_percent(value: object, shown: str) -> None:
    assert units.percent(value) == shown


def test_other_numbers() -> None:
    assert units.plain(12) == "12" and units.plain(3.5) == "3.5" and units.plain(6039.4) == "6,039"
    assert units.plain(123_456_789) == "123 M" and units.plain(0.1 + 0.2) == "0.3"
    assert units.flops(41.3e12) == "41.3 TFLOP/s" and units.rate(2.11e8) == "211 MB/s"
    assert units.binary(131_072) == "128 KiB" and units.binary(1_581_056) == "1.58 MB"
    assert units.with_unit(7_159_808, "B/step") == "7.16 MB a step" and units.with_unit(16, "1/step") == "16 a step"
    assert units.with_unit(6039.2, "tokens/s") == "6,039 tokens/s" and units.with_unit(None, "tokens/s") == "–"
    assert units.count_of(1, "rank") == "1 rank" and units.count_of(1024, "rank") == "1,024 ranks"


def test_nothing_has_many_digits() -> None:
    for name in ("full", "large"):
        text = terminal(getattr(report_document, name)()) + markdown(getattr(report_document, name)())
        assert not re.search(r"\d\.\d{5}", text) and not re.search(r"\d{10}", text)


def test_clean_lets_only_printable_things_through() -> None:
    bad = {"a\x00": ["b\ud800\x1b[31m", float("nan"), float("-inf"), 3, None, ("\u202e", {"c": "x" * 9999})]}
    ((key, values),) = clean(bad).items()
    assert key == "a�" and values[:5] == ["b��[31m", None, None, 3, None]
    assert values[5][0] == "�" and len(values[5][1]["c"]) == LONGEST + 1


def test_short_and_listing() -> None:
    assert short("abcdefghij" * 3, 12) == "abcdefg…ghij" and short(None, 9) == "None" and short("a\n b", 9) == "a b"
    assert listing(["a"]) == "a" and listing(["a", "b", "c"]) == "a, b and c" and listing([]) == ""
    assert listing(list("abcdefgh"), 3) == "a, b, c and 5 more"


# --- the terminal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "large", "poor"])
def test_terminal_fits(name: str) -> None:
    lines = terminal(getattr(report_document, name)()).splitlines()
    assert 20 <= len(lines) <= 40
    assert max(map(len, lines)) <= 110


def test_terminal_fits_whatever_is_said() -> None:
    document = report_document.hostile("a name with \x1b[2J in it " * 60)
    document["problems"] = ["p" * 500] * 30
    text = terminal(document)
    assert text.count("\n") <= 40 and max(map(len, text.splitlines())) <= 110 and "\x1b" not in text
    assert "and 27 more problems" in text


def test_terminal_says_what_counts() -> None:
    text = terminal(report_document.full())
    for said in ("bound by waiting in the tensor-parallel axis", "rank 5", "64 % computing", "tp wait", "11.4 ms",
                 "MFU 41 %", "tp all_gather 131 kB", "Cost of profiling", "2.13 µs",
                 "8 ranks (pp 2 × dp 2 × tp 2)"):  # fmt: skip
        assert said in text, said
    assert text.index("Verdict") < text.index("Next") < text.index("A step takes") < text.index("Stragglers")
    assert "the file of rank 3 is missing" in terminal(report_document.poor())


def test_summary_adds_up() -> None:
    document = report_document.full()
    shares = [float(x) for x in re.findall(r"([\d.]+) %", summary(document))]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert summary({"budget_s": {}}) == "" and summary({}) == ""


# --- Markdown ----------------------------------------------------------------------------------------


def test_markdown_has_every_section_and_sound_tables() -> None:
    text = markdown(report_document.full(), report_document.comparison())
    titles = re.findall(r"^## (.*)$", text, re.M)
    assert titles[0].startswith("Compared with") and len(titles) == 16
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block[:300]
    assert "| tp wait | 11.4 ms | 3.4 % |" in text
    assert "- the file of rank 3 is missing: events.rank3.jsonl" in markdown(report_document.poor())


@pytest.mark.parametrize("bad", ["<script>alert(1)</script>", "a|b", "**bold** [x](y)", "line\n\n# head", "`<b>`"])
def test_markdown_lets_no_markup_in(bad: str) -> None:
    text = markdown(report_document.hostile(bad))
    assert "<script" not in text and "<b>" not in text
    assert "\n# head" not in text and not re.search(r"(?<!\\)\*\*bold", text) and "[x](" not in text
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_values_that_must_be_equal_are_told_apart() -> None:
    document = copy.deepcopy(report_document.full())
    document["predicted"][0]["measured"] += 1
    text = markdown(document)
    assert "1 value that must be equal differs." in text
    assert "| 7,340,032 | 7,340,033 |" in text and "| differs |" in text


def test_accounting_differences_name_where_they_are() -> None:
    document = report_document.full()
    row = {
        "rank": 3,
        "step": 12,
        "action": "send 0SEND_F0",
        "axis": "pp",
        "op": "send",
        "payload_bytes": 4096,
        "calls": 1,
    }
    document["accounting"] = {"exact": False, "differences": [row], "lines": ["rank 3: pp send: issued 5, declared 4"]}
    text = markdown(document)
    assert "| rank 3 | 12 | send 0SEND_F0 | pp | send | 4.10 kB | +1 |" in text
    assert "rank 3: pp send: issued 5, declared 4" in text and "differ from those that the plan declares" in text


def test_texts_need_no_matplotlib() -> None:
    code = (
        "import sys, dist_gpt.report.render.text, dist_gpt.report.analysis.compare\n"
        "sys.exit(bool({'matplotlib', 'jinja2', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_commands_in_markdown_can_be_copied() -> None:
    """What is in backticks stands as it is, but for what would end a table's cell, or be HTML."""
    assert _inline("*a* [b] `--set profile.steps=[10,20]` *c*") == r"\*a\* \[b\] `--set profile.steps=[10,20]` \*c\*"
    assert _inline("`a|b` <i> `<i>`") == r"`a\|b` &lt;i> `&lt;i>`"
