"""report.html and its figures as text: complete, self-contained, escaped, true to the numbers, robust."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest

from dist_gpt.report.render import bars, canvas, page, palette
from dist_gpt.report.render.elements import budget_rows, clean
from dist_gpt.report.render.sections import SECTIONS, sections
from dist_gpt.report.render.text import markdown, terminal
from tests.unit import report_document, report_parts

IDS = ["identity", "headline", "budget", "collectives", "overlap", "stragglers", "pipeline", "memory", "predicted",
       "roofline", "critical-path", "torch-kernels", "device-samples", "accounting", "appendix"]  # fmt: skip
DOCUMENTS = {"full": report_document.full, "large": report_document.large, "poor": report_document.poor}
MATHEMATICS = "$\\frac{1}$"
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=1>',
    MATHEMATICS,
    "]]>--><!--\x00\ud800\u202e",
    "漢字" * 40,
)
VOID = {"meta", "link", "img", "br", "input"}


@cache
def document(name: str) -> dict[str, Any]:
    return DOCUMENTS[name]()


@cache
def drawn(name: str) -> dict[str, str]:
    return bars.figures(document(name))


@cache
def rendered(name: str) -> str:
    return page.render(document(name), report_document.comparison(), drawn(name))


class Reader(HTMLParser):
    """Tags with their attributes, and where one is left open or closed twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def values(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


# --- the page ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_section_is_there_in_order_and_says_something(name: str) -> None:
    html = rendered(name)
    assert re.findall(r'<section id="([\w-]+)">', html) == ["compare", *IDS]
    assert len(SECTIONS) == len(IDS)
    for body in re.findall(r"<section id.*?</section>", html, re.S):
        words = re.sub(r"<svg.*?</svg>|<[^>]*>", " ", body[body.index("</h2>") :], flags=re.S).split()
        assert len(words) > 3, body[:200]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_page_is_well_formed_and_asks_for_nothing(name: str) -> None:
    reader = Reader(rendered(name))
    assert reader.open == []
    ids = reader.values("id")
    assert len(ids) == len(set(ids))
    for target in reader.values("href") + reader.values("xlink:href") + reader.values("src"):
        assert target.startswith(("#", "data:")), target
        assert not target.startswith("#") or target[1:] in ids
    assert set(re.findall(r"url\(#([\w.-]+)\)", rendered(name))) <= set(ids)
    assert "@import" not in rendered(name) and not re.search(r"url\((?!#)", rendered(name))
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert not [key for _, attrs in reader.tags for key in attrs if key.startswith("on")]


def test_verdict_card() -> None:
    html = rendered("full")
    card = html[html.index('<header id="verdict">') : html.index("</header>")]
    for said in ("bound by waiting in the tensor-parallel axis", "Try next", "412 records per step",
                 "at 2.13\u00a0µs each", "64\u00a0% computing", "21\u00a0% idle in the pipeline bubble",
                 "accounting exact", "339 ms"):  # fmt: skip
        assert said in card, said
    assert "the file of rank 3 is missing" in rendered("poor")
    assert "accounting exact" not in rendered("poor")
    widths = [float(w) for w in re.findall(r"flex-grow:([\d.]+)", card)]
    assert sum(widths) == pytest.approx(1000, abs=0.5)


def test_large_page_is_small() -> None:
    assert len(rendered("large").encode()) < 6e6
    assert all(len(svg) < 1e6 for svg in drawn("large").values())


def test_comparison_leads_and_is_left_out_without_one() -> None:
    html = rendered("full")
    assert html.index('id="compare"') < html.index('id="identity"')
    for said in ("Compared with demo-zero3", "optim.sharding", '<td class="text good">better', "+34 %", "-67 %"):
        assert said in html
    assert 'id="compare"' not in page.render(document("poor"))


@pytest.mark.parametrize(
    "bad",
    [" ".join(HOSTILE), *(pytest.param(e, marks=[] if e == MATHEMATICS else [pytest.mark.all_cells]) for e in HOSTILE)],
)
def test_hostile_names_stay_text(bad: str) -> None:
    html = page.render(report_document.hostile(bad), {"other": {"name": bad}, "rows": [{"what": bad, "verdict": bad}]})
    html.encode()
    reader = Reader(html)
    assert reader.open == []
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("script") == 1 and "img" not in tags
    assert not [key for _, attrs in reader.tags for key in attrs if key.startswith("on")]
    if MATHEMATICS in bad:
        assert MATHEMATICS in html  # as text


def test_policy_names_the_one_script() -> None:
    import base64
    import hashlib

    html = rendered("poor")
    script = html[html.index("<script>") + 8 : html.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html and "default-src 'none'" in html


def test_mesh_names_every_rank_up_to_a_size_then_groups() -> None:
    html = rendered("full")
    assert re.findall(r'<span class="rank([^"]*)"[^>]*><b>(\d+)</b>', html) == [
        (" culprit" if rank == report_parts.SLOW else "", str(rank)) for rank in range(8)
    ]
    large = rendered("large")
    assert large.count('<span class="rank') == 8 * 16 and "<b>1016–1023</b>" in large
    wide = copy.deepcopy(document("large"))
    wide["identity"]["layout"] = {"pp": 64, "dp": 10**9, "cp": 1, "tp": 10**9}
    assert "16 of 64 stages" in page.render({"identity": wide["identity"]})


# --- robustness --------------------------------------------------------------------------------------


def paths(value: Any, depth: int, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a document can be damaged: every key, and the first item of every list."""
    if at:
        yield at
    if depth:
        items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
        for key, inner in items:
            yield from paths(inner, depth - 1, (*at, key))


def damaged(at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """What of the full document `at` lies in, and what other parts lean on, with `value` at that place."""
    kept = {key: document("full")[key] for key in {at[0], "headline", "verdict", "identity", "budget_s"}}
    result = json.loads(json.dumps(kept))
    inner = result
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return result


VALUES = (None, float("nan"), [[1, 2], [3]], "x", 1e300, [], {}, -1, [None], True)


def assert_texts_bear(at: tuple[Any, ...], value: Any) -> None:
    broken = damaged(at, value)
    assert markdown(broken, {"rows": [{"this": value, "unit": value}]})
    assert terminal(broken).count("\n") <= 40


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.all_cells) for n in range(1, len(VALUES)))])
def test_no_damage_crashes_the_texts(first: int) -> None:
    """At every place one of VALUES, in turn; by `make test-all` each of them."""
    for number, at in enumerate(paths(document("full"), 4), first):
        assert_texts_bear(at, VALUES[number % len(VALUES)])


MORE_DAMAGE = [(1e300, 2), ([], 2), (-1, 2), ("x", 2), ("x", 3)]


@pytest.mark.parametrize(
    ("value", "depth"),
    [(None, 2), *(pytest.param(*more, marks=pytest.mark.all_cells) for more in MORE_DAMAGE)],
)
def test_no_damage_crashes_the_figures(value: Any, depth: int) -> None:
    for at in paths(document("full"), depth):
        for svg in bars.figures({at[0]: damaged(at, value)[at[0]]}).values():
            ET.fromstring(svg)


def test_an_empty_document_makes_a_page() -> None:
    html = page.render({})
    assert re.findall(r'<section id="([\w-]+)">', html) == IDS
    assert html.count('class="note missing"') >= len(IDS) - 1
    assert "<svg" not in html


# --- figures -----------------------------------------------------------------------------------------


def test_every_figure_is_drawn_and_is_svg() -> None:
    assert list(drawn("full")) == list(bars.FIGURES)
    for name, svg in {**drawn("full"), **drawn("large")}.items():
        root = ET.fromstring(svg)
        assert root.tag.endswith("svg"), name
        assert "<text" in svg and "Date" not in svg and "<metadata" not in svg


def test_figures_are_the_same_every_time() -> None:
    assert bars.figures(document("full")) == drawn("full")


@pytest.mark.parametrize("name", ["full", "large", "poor"])
def test_pictures_of_the_texts_are_those_that_are_drawn(name: str) -> None:
    linked = re.findall(r"\(figures/(\w+)\.svg\)", markdown(document(name)))
    assert sorted(linked) == sorted(drawn(name))


def test_axes_carry_units() -> None:
    for name, unit in {"budget": "(ms)", "waterfall": "(ms)", "memory": "(MB)", "overlap": "(ms)", "timeline": "(ms)",
                       "pipeline": "(ms)", "bubble": "(%)", "traffic": "(MB)", "culprits": "(ms)", "sizes": "(bytes",
                       "busbw": "(bytes)", "clocks": "(µs)", "samples": "(W)", "critical": "(ms)"}.items():  # fmt: skip
        assert unit in drawn("full")[name], name


def boxes(svg: str) -> dict[str, tuple[float, float, str]]:
    """Left and right end, and fill, of every rectangle with a tip."""
    found = {}
    for tip, path, fill in re.findall(r'<title>(.*?)</title>\s*<path d="([^"]*)"[^>]*style="fill: ([^";]*)', svg):
        xs = [float(x) for x in re.findall(r"[ML](-?[\d.]+) ", path)]
        found[tip] = (min(xs), max(xs), fill)
    return found


def test_budget_bars_are_as_long_as_their_seconds() -> None:
    found = boxes(drawn("full")["budget"])
    wait = document("full")["budget_by_rank"][4]["wait.tp"]
    forward = document("full")["budget_by_rank"][0]["forward"]
    first = found[f"rank 0: forward {1e3 * forward:.1f} ms"]
    second = found[f"rank 4: tp wait {1e3 * wait:.1f} ms"]
    assert (second[1] - second[0]) / (first[1] - first[0]) == pytest.approx(wait / forward, rel=2e-3)
    assert first[2] == palette.colour("forward") and second[2].startswith("url(#")


def test_budget_of_many_ranks_is_drawn_in_blocks_that_keep_the_sum() -> None:
    bars = budget_rows(document("large"))
    assert len(bars) == 33 and bars[1][0] == "0–31"
    blocks = sum(sum(parts.values()) for _, parts in bars[1:]) / 32
    assert blocks == pytest.approx(sum(document("large")["budget_s"].values()))


def test_measured_and_ideal_pipeline_share_colours_and_axis() -> None:
    svg, part = drawn("full")["pipeline"], document("full")["pipeline"]
    ends = {}
    for chart in ("measured", "ideal"):
        rows = {
            tip.split(": ")[1].split(",")[0]: box
            for tip, box in boxes(svg).items()
            if tip.startswith(f"{chart}, stage 1")
        }
        assert len(rows) == 8
        start, end, _ = next(row for row in part[chart][1] if row[2] == "1F0")
        left, right, fill = rows["1F0"]
        assert fill == palette.colour("forward")
        ends[chart] = ((right - left) / (end - start), left - start * (right - left) / (end - start))
    assert ends["measured"] == pytest.approx(ends["ideal"], rel=5e-3, abs=0.5)


def test_straggler_matrix_shows_the_planted_wait() -> None:
    assert "comes last: rank 5, waits: rank 4: 66.8 ms" in drawn("full")["culprits"]
    assert re.search(r">67</text>", drawn("full")["culprits"])


def test_large_matrices_are_images() -> None:
    for name in ("traffic", "culprits", "heat"):
        assert drawn("large")[name].count("<image") == 2, name
        assert drawn("large")[name].count("<path") < 60


def test_matrix_of_1024_ranks_is_pooled() -> None:
    grid = [[0.0] * 1024 for _ in range(1024)]
    grid[5][4] = 0.07
    svg = bars.figures({"stragglers": {"matrix_s": grid, "ranks": list(range(1024))}})["culprits"]
    assert len(svg) < 100_000 and "0–7" in svg


def test_one_slow_rank_among_many_is_not_lost_in_the_heat_map() -> None:
    import base64
    import io

    from matplotlib.image import imread

    svg = drawn("large")["heat"]
    images = [imread(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([\w+/=\s]+)", svg)]
    image = next(image for image in images if image.shape[1] == 20)
    assert len(image) == 128  # blocks of eight ranks
    assert image[0, :, 3].min() > 0.6 and image[70:, :, 3].max() < 0.3  # rank 5; no other


def test_themed_figures_follow_the_page() -> None:
    for name, svg in drawn("full").items():
        shown = canvas.themed(svg, name)
        assert not [colour for colour in canvas.VARIABLES if colour in shown], name
        assert "var(--ink)" in shown or "var(--muted)" in shown
        assert shown.startswith('<svg class="plot" viewBox="0 0') and "<style" not in shown


def test_colours_differ_and_waiting_is_striped() -> None:
    categories = [*palette.COMPUTE, *(f"transfer.{axis}" for axis in palette.AXES), "bubble", "data", "checkpoint",
                  "descheduled", "unexplained"]  # fmt: skip
    assert len({palette.colour(c) for c in categories}) == len(categories)
    for axis in palette.AXES:
        assert palette.colour(f"wait.{axis}") == palette.colour(f"transfer.{axis}")
        assert palette.is_striped(f"wait.{axis}") and not palette.is_striped(f"transfer.{axis}")
    assert set(palette.ordered(categories)) == set(categories)


def test_sections_leave_the_document_alone() -> None:
    before = json.dumps(document("full"))
    sections(clean(document("full")))
    bars.figures(document("full"))
    assert json.dumps(document("full")) == before
