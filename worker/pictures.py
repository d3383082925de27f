"""The pictures of what was measured: the bound, rows before and after, truth ratios, attacks."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from markupsafe import Markup, escape

from service.domain.report import AuditEntry, ConstraintFacts, RowPoint
from worker import chart
from worker.chart import BAD, DUAL, FORGET, GOOD, GRID, INK, RETAIN, SOFT, Frame, Picture, Scale
from worker.words import ATTACKS, number, pair, percents

WIDTH, LEFT, RIGHT = 400, 46, 14  # of a picture that a phone shows whole
DOTS_MAX = 500  # in a scatter; of more rows, these are drawn, evenly spread over the file
WORST = 3  # rows that a scatter's words name


# --- the bound


def bound(facts: ConstraintFacts) -> Picture:
    """Where the retain loss lies before and after, against the bound. Places are per cent, so that words keep their size."""
    known = [v for v in (facts.before, facts.upper, facts.epsilon) if v is not None]
    scale = chart.positive(known, padding=0.3)
    [before], (bound, after) = pair(facts.before), pair(facts.epsilon, facts.upper)
    loss = (
        "Retain loss, which is how badly the model predicts what it must keep (nats per token, lower is better): "
        f"{before} before, {after} after; the bound is {bound}"
    )
    if facts.upper is None:
        said = f"{loss}. Why: {facts.reason}."
    else:
        said = f"{loss}, which is {'kept' if facts.upper <= facts.epsilon else 'broken'}."

    def x(value: float) -> float:
        return 4 + 92 * scale.place(value)

    def label(value: float, y: float, words: str) -> str:
        at = x(value)
        anchor = "start" if at < 25 else "end" if at > 75 else "middle"
        return f'<text x="{at:.1f}%" y="{y}" text-anchor="{anchor}" fill="{INK}">{escape(words)}</text>'

    edge = x(facts.epsilon)
    parts = [
        f'<rect x="{edge:.1f}%" y="26" width="{100 - edge:.1f}%" height="54" fill="#fbe9e7"/>',
        f'<text x="99%" y="40" text-anchor="end" fill="{BAD}">over →</text>',
        f'<text x="1%" y="40" fill="{GOOD}">← within</text>',
        f'<line x1="0" x2="100%" y1="64" y2="64" stroke="{SOFT}"/>',
        f'<line x1="{edge:.1f}%" x2="{edge:.1f}%" y1="22" y2="80" stroke="{INK}" stroke-width="2" stroke-dasharray="6 3"/>',
        label(facts.epsilon, 16, f"bound ε {bound}"),
        f'<circle cx="{x(facts.before):.1f}%" cy="64" r="6" fill="#fff" stroke="{INK}" stroke-width="2"/>',
        label(facts.before, 96, f"○ before {before}"),
    ]
    if facts.upper is not None:
        color = GOOD if facts.upper <= facts.epsilon else BAD
        parts.append(
            f'<circle cx="{x(facts.upper):.1f}%" cy="64" r="7" fill="{color}" stroke="#fff" stroke-width="1"/>'
        )
        parts.append(label(facts.upper, 114, f"● after {after}"))
    svg = Markup(  # noqa: S704  only numbers and our own words go into it
        f'<svg class="fixed" width="100%" height="120" role="img" aria-labelledby="bound-title bound-desc" font-size="13" '
        f'font-family="inherit"><title id="bound-title">The retain loss against its bound{scale.note}</title>'
        f'<desc id="bound-desc">{escape(said)}</desc>{"".join(parts)}</svg>'
    )
    return Picture(svg, said)


# --- each row before and after


def scatter(of: str, points: Sequence[RowPoint]) -> Picture | None:
    """The probability of each row's answer, before against after. None where no row has both."""
    both = [(p.row, p.before, p.after) for p in points if p.before is not None and p.after is not None]
    if not both:
        return None
    frame = Frame(LEFT, 34, WIDTH - LEFT - RIGHT, 250, chart.share(), chart.share())
    shown = [both[k * len(both) // DOTS_MAX] for k in range(DOTS_MAX)] if len(both) > DOTS_MAX else both
    dots = "".join("M{:.1f} {:.1f}h0".format(*frame.at(before, after)) for _, before, after in shown)
    color = FORGET if of == "forget" else RETAIN
    (x, y), (far, top) = frame.at(0, 0), frame.at(1, 1)
    parts = [
        *chart.level_axis(frame, f"{of.capitalize()} set: probability after"),
        *chart.floor_axis(frame, "probability before"),
        f'<path d="M{x:.1f} {y:.1f}L{far:.1f} {top:.1f}" stroke="{SOFT}" stroke-dasharray="5 4"/>',
        chart.text(frame.at(0.5, 0)[0], frame.at(0, 0.57)[1], "dashed: unchanged", "end", SOFT),
        f'<path d="{dots}" stroke="{color}" stroke-width="5.5" stroke-linecap="round" stroke-opacity="0.55" fill="none"/>',
    ]
    said = _moved(of, both, len(shown))
    return Picture(chart.svg(f"scatter-{of}", WIDTH, 328, f"Rows of the {of} set", said, *parts), said)


def _moved(of: str, both: Sequence[tuple[int, float, float]], shown: int) -> str:
    middle = pair(*(_median([row[k] for row in both]) for k in (1, 2)))
    fell = sum(after <= 0.1 * before for _, before, after in both if after < before)
    told = f"The median of {len(both):,} rows went from {middle[0]} to {middle[1]}. {fell:,} fell to a tenth of before or less."
    if of == "forget":
        rose = sum(after > before for _, before, after in both)
        likeliest = sorted(both, key=lambda row: -row[2])[:WORST]
        told += f" {rose:,} rose." if rose else ""
        told += f" Likeliest after: {', '.join(f'row {row} with {number(after)}' for row, _, after in likeliest)}."
    else:
        worse = sorted((row for row in both if row[2] < row[1]), key=lambda row: row[2] - row[1])[:WORST]
        named = ("row {} ({} → {})".format(row, *pair(before, after)) for row, before, after in worse)
        told += f" Changed most for the worse: {', '.join(named)}." if worse else " No row got worse."
    return told + (f" {shown} of them are drawn." if shown < len(both) else "")


def _median(values: Sequence[float]) -> float:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


# --- truth ratios


Who = Literal["before", "after", "retrained"]


class Curve(NamedTuple):
    name: str
    values: list[float]  # sorted
    color: str
    dashes: str


def distribution(key: str, name: str, ratios: Mapping[Who, Sequence[float | None]]) -> Picture | None:
    """The distribution function of the forget rows' truth ratios in each model, and how far the last two are apart.

    `key` is the picture's id on its page, `name` the benchmark's.
    """
    style: dict[Who, tuple[str, str]] = {"before": (SOFT, "2 3"), "after": (FORGET, ""), "retrained": (RETAIN, "7 4")}
    found = {who: sorted(v for v in ratios.get(who, ()) if v is not None) for who in style}
    curves = [Curve(who, values, *style[who]) for who, values in found.items() if values]
    if not curves:
        return None
    scale = chart.positive([value for curve in curves for value in curve.values])
    frame = Frame(LEFT, 52, WIDTH - LEFT - RIGHT, 220, scale, chart.share())
    parts = [*chart.level_axis(frame, "Share of forget rows at or below"), *chart.floor_axis(frame, "truth ratio")]
    parts += [chart.line(_steps(curve.values, frame), curve.color, curve.dashes) for curve in curves]
    for k, curve in enumerate(curves):
        at = LEFT + 118 * k
        parts.append(
            chart.line([(at, 12), (at + 30, 12)], curve.color, curve.dashes) + chart.text(at + 36, 16, curve.name)
        )
    told = [f"Median truth ratio: {', '.join(f'{number(_median(c.values))} {c.name}' for c in curves)}."]
    if found["after"] and found["retrained"]:
        gap, place = largest_gap(found["after"], found["retrained"])
        low, high = (frame.at(place, _below(values, place)) for values in (found["after"], found["retrained"]))
        parts.append(f'<path d="M{low[0]:.1f} {low[1]:.1f}V{high[1]:.1f}" stroke="{INK}" stroke-width="3"/>')
        parts.append(_gap_label(frame, low[0], (low[1] + high[1]) / 2, f"KS {gap:.3g}"))
        told.append(
            f"After unlearning and retrained, the two distributions are at most {gap:.3g} apart (the Kolmogorov-Smirnov "
            f"statistic, drawn at {number(place)}); 0 would be the same."
        )
    else:
        told.append("There is no retrained model to compare with.")
    said = " ".join(told)
    return Picture(chart.svg(key, WIDTH, 316, f"Truth ratios of {name}", said, *parts), said)


def largest_gap(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The largest distance between two empirical distribution functions, and the first value where it is; both sorted.

    >>> largest_gap([1.0, 2.0], [2.0, 3.0])
    (0.5, 1.0)
    """
    gaps = [(abs(_below(one, value) - _below(other, value)), value) for value in sorted({*one, *other})]
    return max(gaps, key=lambda gap: gap[0])


def _below(values: Sequence[float], place: float) -> float:
    return bisect_right(values, place) / len(values)


def _steps(values: Sequence[float], frame: Frame) -> list[chart.Point]:
    """From the left edge at 0 to the right edge at 1, a step up at each value."""
    points = [(frame.left, frame.bottom)]
    for k, value in enumerate(values):
        x = frame.at(value, 0)[0]
        points += [(x, frame.at(value, k / len(values))[1]), (x, frame.at(value, (k + 1) / len(values))[1])]
    return [*points, (frame.right, frame.top)]


def _gap_label(frame: Frame, x: float, y: float, words: str) -> str:
    leftwards = x > (frame.left + frame.right) / 2
    return chart.text(x - 6 if leftwards else x + 6, y + 4, words, "end" if leftwards else "start", weight=600)


# --- attacks


def attacks(audit: Sequence[AuditEntry]) -> Picture | None:
    """Each attack a line: the probability of the answers to forget before it, under it, and of the models beside."""
    tried = [entry for entry in audit if entry.metric == "probability" and entry.attacked is not None]
    if not tried:
        return None
    top, line = 62, 46
    frame = Frame(
        LEFT - 30, top, WIDTH - LEFT + 30 - RIGHT, line * len(tried), chart.share(), Scale(lambda v: 1 - v, [])
    )
    parts = [_key(chart.ring(frame.left + 8, 12, INK, 5), "before the attack", frame.left + 20, 12)]
    parts.append(_key(chart.disc(frame.left + 198, 12, BAD, 6), "under the attack", frame.left + 210, 12))
    parts.append(_key(chart.bar(frame.left + 8, 34, SOFT), "base model under it", frame.left + 20, 34))
    if any(entry.retrained is not None for entry in tried):
        parts.append(_key(chart.diamond(frame.left + 198, 34, DUAL), "retrained under it", frame.left + 210, 34))
    for tick in frame.x.ticks:
        x = frame.at(tick, 0)[0]
        parts.append(f'<path d="M{x:.1f} {frame.top}V{frame.bottom}" stroke="{GRID}"/>')
    parts += chart.floor_axis(frame, "probability of the answers to forget")
    for k, entry in enumerate(tried):
        y = top + line * k + 30
        parts.append(chart.text(frame.left, y - 14, ATTACKS.get(entry.attack, entry.attack)))
        ends = [frame.at(v, 0)[0] for v in (entry.released, entry.attacked) if v is not None]
        parts.append(f'<path d="M{min(ends):.1f} {y}H{max(ends):.1f}" stroke="{BAD}" stroke-width="2"/>')
        marks = (("base", chart.bar, SOFT), ("retrained", chart.diamond, DUAL), ("attacked", chart.disc, BAD))
        for who, mark, color in marks:
            value = getattr(entry, who)
            parts += [mark(frame.at(value, 0)[0], y, color)] if value is not None else []
        parts += [chart.ring(frame.at(entry.released, 0)[0], y, INK, 5)] if entry.released is not None else []
    told = [
        "{}: from {} to {}".format(ATTACKS.get(e.attack, e.attack), *percents(e.released, e.attacked)) for e in tried
    ]
    said = f"Probability of the answers to forget without the attack and under it: {'; '.join(told)}."
    return Picture(chart.svg("attacks", WIDTH, frame.bottom + 44, "What each attack brings back", said, *parts), said)


def _key(mark: str, words: str, x: float, y: float) -> str:
    return mark + chart.text(x, y + 4, words)
