"""The pictures: what they place where, and what their words say."""

import doctest
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import ks_2samp

from service.domain.report import RowPoint, Trajectory
from tests.worker.reports import AUDIT, NAN, Page, attack, check, constraint, make, step
from worker import chart, course, pictures, report
from worker.page import render_html


def drawn(trajectory: Trajectory, chosen: int) -> str:
    picture = course.picture(trajectory, 0.75, chosen, released=True)
    assert picture is not None
    return str(picture.svg)


def within_frame(svg: str) -> None:
    width, height = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)[0])
    places = re.findall(r'(?:c?x="|M)(-?[\d.]+)"? (?:c?y=")?(-?[\d.]+)', svg)
    assert places
    for x, y in places:
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height
    assert "nan" not in svg
    assert "inf" not in svg


# --- the course of the run


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot() -> None:
    gone = {"losses": {"forget": NAN, "retain": NAN}, "violation": {"retain": NAN}}
    series = [step(k, **(gone if k in (4, 6) else {})) for k in range(1, 10)]
    svg = drawn(report.trajectory(series, []), 9)
    lengths = [len(points.split()) for points in re.findall(r'points="([^"]*)"', svg)]
    assert lengths == [9, 3, 3, 3, 3, 3, 3]  # dual whole; the other three: steps 1-3, [5], 7-9
    assert svg.count('r="2.5"') == 3


def test_the_picture_is_drawn_within_its_frame() -> None:
    for retains in ([0.7, 0.71], [1e-4, 1e4], [0.75, 0.75], [0.0, 0.0], [1e-300, 1e300], [5.0]):
        series = [
            step(k + 1, losses={"forget": r * 3, "retain": r}, violation={"retain": r - 0.75})
            for k, r in enumerate(retains)
        ]
        svg = drawn(report.trajectory(series, [check(len(retains), retains[-1])]), 1)
        within_frame(svg)


@pytest.mark.parametrize("values", [[0.0], [3.0], [-1.0, 2.0], [1e-9, 2e-9], [0.5, 400.0], [0.017, -0.008, 0.001, 2.3]])
def test_the_scales_place_every_value_and_tick_in_order_within_the_panel(values: list[float]) -> None:
    for make_scale in (chart.linear, chart.positive, chart.either_side):
        scale = make_scale(values)
        places = [scale.place(v) for v in sorted(values)]
        ticks = [scale.place(t) for t in scale.ticks]
        assert places == sorted(places)
        assert ticks == sorted(ticks)
        assert all(-1e-9 <= p <= 1 + 1e-9 for p in places + ticks)
        assert 1 <= len(ticks) <= 9


def test_marks_tell_kept_from_broken_by_their_shape_and_the_picture_has_words() -> None:
    html = render_html(make())
    page = Page(html)
    svg = next(svg for svg in page.all("svg") if svg["class"] == "wide")
    for said, shape in ("over the bound", "path"), ("within the bound", "circle"):
        assert set(re.findall(rf"{said}</title><(\w+)", html)) == {shape}
    assert svg["role"] == "img"
    assert "3 checks on the whole sets, 2 within the bound of 0.75 nats per token" in page.text
    assert "The dual variable began at 51, lay between 51 and 90, and ended at 90." in page.text
    assert page.text.count("check at step 20: over the bound") == 3  # once a panel that has checks
    assert page.text.count("check at step 40: within the bound") == 3


def test_the_bounds_line_parts_the_checks_that_kept_it_from_those_that_broke_it() -> None:
    html = render_html(make())
    course = html[html.index("Retain loss, nats per token") :]
    (level,) = [float(y) for y in re.findall(r'<path d="M[\d.]+ ([\d.]+)H[\d.]+"[^>]*stroke-dasharray="6 4"', course)][
        :1
    ]
    marks = re.findall(
        r"check at step \d+: (over|within)[^<]*</title><(?:path d=\"M[\d.]+ |circle cx=\"[\d.]+\" cy=\")([\d.]+)",
        course,
    )[:3]
    heights = {(said, float(y) + (4 if said == "over" else 0)) for said, y in marks}
    assert {said for said, _ in heights} == {"over", "within"}
    assert all((y < level) == (said == "over") for said, y in heights), "higher up is smaller"


def test_without_a_dual_variable_there_is_no_panel_for_it() -> None:
    made = make([step(k, dual={}) for k in range(1, 41)])
    text = Page(render_html(made)).text
    assert "Dual variable" not in text
    assert "This method has no dual variable." in text


# --- what was measured


def test_the_doctests() -> None:
    assert doctest.testmod(pictures).attempted
    assert not doctest.testmod(pictures).failed


@pytest.mark.parametrize(
    ("before", "upper"), [(0.68, 0.72), (0.68, 0.9), (0.68, 60.0), (0.75, 0.75), (1e-9, 0.2), (0.0, 0.0), (0.68, NAN)]
)
def test_the_bound_stands_between_what_keeps_it_and_what_breaks_it(before: float, upper: float) -> None:
    facts = constraint(upper).model_copy(update={"before": before})
    svg, said = pictures.bound(facts)
    places = {
        words.split()[0]: float(x) for x, words in re.findall(r'<text x="([\d.]+)%"[^>]*>[○● ]*(\w[^<]*)</text>', svg)
    }
    assert all(0 <= place <= 100 for place in places.values())
    assert (places["before"] <= places["bound"]) == (before <= 0.75)
    marks = [float(x) for x in re.findall(r'<circle cx="([\d.]+)%"', svg)]
    assert marks == [places[when] for when in ("before", "after") if when in places], "a mark stands over its words"
    if math.isnan(upper):
        assert "after" not in places
        assert "not measured after" in said
    else:
        assert (places["after"] <= places["bound"]) == (upper <= 0.75)
        assert said.endswith("kept." if upper <= 0.75 else "broken.")


def test_a_scatter_has_every_row_at_its_place_and_names_the_worst() -> None:
    points = [RowPoint(row=7, before=0.5, after=0.0), RowPoint(row=9, before=1.0, after=0.25)]
    picture = pictures.scatter("forget", [*points, RowPoint(row=10, before=None, after=0.9)])
    assert picture is not None
    (path,) = re.findall(r'<path d="((?:M[\d.]+ [\d.]+h0)+)"', picture.svg)
    dots = [tuple(map(float, dot)) for dot in re.findall(r"M([\d.]+) ([\d.]+)h0", path)]
    assert dots == [(216.0, 284.0), (386.0, 221.5)], "the frame is 340 wide from 46 and 250 high above 284"
    assert "The median of 2 rows went from 0.75 to 0.125. 1 fell to a tenth of before or less." in picture.words
    assert "Likeliest after: row 9 with 0.25, row 7 with 0." in picture.words
    assert pictures.scatter("forget", [RowPoint(row=1, before=None, after=0.5)]) is None


UP = [(0.9941, 0.9955), (0.98, 0.99), (0.5, 0.5)]
DOWN = [(0.9, 0.05), (0.9, 0.8), (0.8, 0.9), (0.99404, 0.99401), (0.0, 0.0), (0.7, 0.7)]


@pytest.mark.parametrize(
    ("of", "moved", "says", "never"),
    [
        ("retain", UP, " 0 fell to a tenth of before or less. No row got worse.", "Changed most"),
        (
            "retain",
            [(0.0, 0.0)],
            " 0 fell to a tenth of before or less. No row got worse.",
            "1 fell",
        ),  # from nothing nothing falls
        (
            "retain",
            [(0.9, 0.9)],
            "went from 0.9 to 0.9. 0 fell to a tenth of before or less. No row got worse.",
            "Changed most",
        ),
        # of the rows that fell the three that fell most, and none that rose or stayed; numbers that differ look different
        (
            "retain",
            DOWN,
            " 1 fell to a tenth of before or less. Changed most for the worse: row 1 (0.9 → 0.05), row 2 (0.9 → 0.8), "
            "row 4 (0.99404 → 0.99401).",
            "row 3",
        ),
        ("forget", UP, " 0 fell to a tenth of before or less. 2 rose. Likeliest after: row 1 with 0.9955", "worse"),
        ("forget", [(0.9, 0.05)], " 1 fell to a tenth of before or less. Likeliest after: row 1 with 0.05.", "rose"),
        ("forget", [(0.0, 0.0)], " 0 fell to a tenth of before or less. Likeliest after: row 1 with 0.", "1 fell"),
    ],
)
def test_what_is_said_of_rows_is_true_of_them(of: str, moved: list[tuple[float, float]], says: str, never: str) -> None:
    points = [RowPoint(row=k, before=before, after=after) for k, (before, after) in enumerate(moved, 1)]
    picture = pictures.scatter(of, points)
    assert picture is not None
    assert says in picture.words
    assert never not in picture.words


def test_of_many_rows_a_part_is_drawn_and_all_are_counted() -> None:
    points = [RowPoint(row=k + 1, before=0.5, after=0.5) for k in range(2 * pictures.DOTS_MAX)]
    picture = pictures.scatter("retain", points)
    assert picture is not None
    assert picture.svg.count("h0") == pictures.DOTS_MAX
    assert "1,000 rows" in picture.words
    assert "500 of them are drawn" in picture.words


def test_the_largest_gap_is_the_kolmogorov_smirnov_statistic() -> None:
    random = np.random.default_rng(0)
    for n, m in ((1, 1), (3, 40), (40, 40), (25, 7)):
        one, other = np.sort(random.lognormal(size=n)), np.sort(random.lognormal(0.5, size=m))
        gap, place = pictures.largest_gap(one.tolist(), other.tolist())
        assert gap == pytest.approx(ks_2samp(one, other).statistic, abs=1e-12)
        assert gap == pytest.approx(abs((one <= place).mean() - (other <= place).mean()), abs=1e-12)


def test_distributions_are_drawn_for_what_was_measured_and_say_how_far_they_are_apart() -> None:
    both: Any = {"before": [0.5, None], "after": [1.0, 2.0], "retrained": [2.0, 3.0]}
    picture = pictures.distribution("k", "b", both)
    assert picture is not None
    within_frame(picture.svg)
    assert "at most 0.5 apart" in picture.words
    assert "KS 0.5" in picture.svg
    alone = pictures.distribution("k", "b", {"after": [1.0, 2.0]})
    assert alone is not None
    assert "no retrained model" in alone.words
    assert "KS" not in alone.svg
    assert pictures.distribution("k", "b", {"before": [], "after": [None]}) is None
    within_frame(pictures.distribution("k", "b", {"before": [1e-9], "after": [1e11], "retrained": [0.0]}).svg)  # type: ignore[union-attr]


def test_attacks_are_drawn_from_what_it_was_to_what_it_became() -> None:
    missing = attack("paraphrase", 0.04, None, reason="needs `paraphrased_question`")
    picture = pictures.attacks([*AUDIT, *missing])
    assert picture is not None
    within_frame(picture.svg)
    assert "fine-tuning on a part of the forget set: from 4% to 20%" in picture.words
    spans = re.findall(r'<path d="M([\d.]+) \d+H([\d.]+)" stroke="#a11212"', picture.svg)
    left, width = 16, 370
    assert [tuple(map(float, span)) for span in spans] == [
        (pytest.approx(left + low * width, abs=0.1), pytest.approx(left + high * width, abs=0.1))
        for low, high in ((0.04, 0.2), (0.04, 0.05), (0.04, 0.06))
    ], "the attack that could not be tried has no line"
    discs = [float(x) for x in re.findall(r'<circle cx="([\d.]+)" cy="[\d.]+" r="4" fill="#a11212"', picture.svg)]
    assert discs == [pytest.approx(left + high * width, abs=0.1) for high in (0.2, 0.05, 0.06)]
    assert "retrained" not in picture.svg
    assert "retrained" in str(pictures.attacks(attack("prefix", 0.1, 0.1, retrained=0.2)))
    assert pictures.attacks(missing) is None


def test_shapes_and_words_tell_what_colours_tell() -> None:
    """Each mark of the attacks' picture has a shape of its own, and each curve of the truth ratios its own dashes."""
    with_all = pictures.attacks(attack("prefix", 0.1, 0.3, retrained=0.2))
    assert with_all is not None
    shapes = [re.sub(r"-?[\d.]+", "0", mark) for mark in re.findall(r'd="(M[^"]*(?:z|v16))"', with_all.svg)]
    assert len(set(shapes)) == 2
    curves: Sequence[str] = re.findall(
        r"<polyline[^>]*>",
        pictures.distribution("k", "b", {"before": [1.0], "after": [2.0], "retrained": [3.0]}).svg,  # type: ignore[union-attr]
    )
    assert len({re.sub(r'points="[^"]*"|stroke="[^"]*"', "", curve) for curve in curves}) == 3
