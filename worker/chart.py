"""The picture of a run as inline SVG: dual variable, violation and losses over the same steps, with the checks marked."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from markupsafe import Markup, escape

from service.domain.report import CheckPoint, Trajectory

WIDTH, PANEL, GAP, LEFT, RIGHT, TOP, BOTTOM = 860, 140, 44, 68, 22, 62, 42
INK, SOFT, GRID = "#1c1c1e", "#55555c", "#e4e4e9"
DUAL, FORGET, RETAIN, GOOD, BAD = "#6b2fa0", "#b3471b", "#0b6aa8", "#14663a", "#a11212"
TICKS = 4
SPREAD = 20.0  # a series that spans more than this ratio is drawn on a logarithmic axis


class Scale(NamedTuple):
    place: Callable[[float], float]  # a value to 0 (bottom) .. 1 (top)
    ticks: list[float]
    note: str = ""  # for the title, where the axis is not linear


class Panel(NamedTuple):
    title: str
    color: str
    points: list[tuple[int, float | None]]  # None: not finite, a gap in the line
    marks: list[tuple[CheckPoint, float | None]]  # a check, and at what value it stands
    bound: tuple[float, str] | None  # a level, and its name
    scale: Callable[[Sequence[float]], Scale]


def picture(trajectory: Trajectory, epsilon: float, chosen: int, *, released: bool) -> Markup:
    """Empty where no step was taken. `chosen` is the step that was released or, if none was, that the figures describe."""
    if not trajectory.steps:
        return Markup("")
    panels = _panels(trajectory, epsilon)
    height = TOP + len(panels) * (PANEL + GAP) - GAP + BOTTOM
    x = linear([0.0, float(max(trajectory.steps[-1].step, 2))], padding=0.0)
    what = "the step that was released" if released else "the step measured after (not released)"
    drawn = "".join(_panel(panel, TOP + i * (PANEL + GAP), x, chosen) for i, panel in enumerate(panels))
    return Markup(  # noqa: S704  only numbers and our own words go into it
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="picture-title picture-desc" '
        'font-family="inherit" font-size="12">'
        f'<title id="picture-title">The course of the run</title><desc id="picture-desc">{words(trajectory, epsilon)}</desc>'
        f"{_legend(what, trajectory)}{drawn}{_x_axis(x, height - BOTTOM)}</svg>"
    )


def words(trajectory: Trajectory, epsilon: float) -> str:
    """The picture for who cannot see it."""
    steps, told = trajectory.steps, []
    told.append(
        f"{trajectory.steps_total} steps; {trajectory.checks_total} checks on the whole sets, "
        f"{trajectory.feasible_checks} within the bound of {epsilon:.4g} nats per token."
    )
    for name, series in (
        ("dual variable", [s.dual for s in steps]),
        ("retain loss of a step's batch", [s.retain_loss for s in steps]),
        ("forget loss of a step's batch", [s.forget_loss for s in steps]),
    ):
        values = [value for value in series if value is not None]
        if values:
            told.append(
                f"The {name} began at {values[0]:.4g}, lay between {min(values):.4g} and {max(values):.4g}, "
                f"and ended at {values[-1]:.4g}."
            )
    return " ".join(told)


def _panels(trajectory: Trajectory, epsilon: float) -> list[Panel]:
    """The multiplier above what moves it, then the losses."""
    steps, checks = trajectory.steps, trajectory.checks
    panels = [
        Panel(
            "Violation of the bound: retain loss − ε, nats per token",
            RETAIN,
            [(s.step, s.violation) for s in steps],
            [(c, None if c.retain_upper is None else c.retain_upper - epsilon) for c in checks],
            (0.0, "on the bound"),
            either_side,
        ),
        Panel(
            "Retain loss, nats per token",
            RETAIN,
            [(s.step, s.retain_loss) for s in steps],
            [(c, c.retain_upper) for c in checks],
            (epsilon, f"ε = {epsilon:.4g}"),
            positive,
        ),
        Panel(
            "Forget loss, in the method’s own unit",
            FORGET,
            [(s.step, s.forget_loss) for s in steps],
            [(c, c.forget_objective) for c in checks],
            None,
            positive,
        ),
    ]
    if any(s.dual is not None for s in steps):
        dual = Panel(
            "Dual variable λ: the weight of the retain loss", DUAL, [(s.step, s.dual) for s in steps], [], None, linear
        )
        panels.insert(0, dual)
    return panels


# --- scales


def linear(values: Sequence[float], padding: float = 0.08) -> Scale:
    low, high = min(values), max(values)
    margin = (high - low) * padding or (0.0 if high > low else abs(high) * 0.5 or 1.0)
    low, high = low - margin if low < 0 or low > margin else 0.0, high + margin
    raw = (high - low) / TICKS
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw) * magnitude
    ticks = [round(k * step, 12) + 0.0 for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Scale(lambda v: (v - low) / (high - low), ticks)


def positive(values: Sequence[float]) -> Scale:
    """Logarithmic where the values are positive and span orders of magnitude, else linear."""
    if min(values) <= 0 or max(values) <= SPREAD * min(values):
        return linear(values)
    inner = linear([math.log10(v) for v in values])
    decades = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1)
    ticks = [10.0**k for k in decades if 0 <= inner.place(k) <= 1]
    return Scale(lambda v: inner.place(math.log10(v)), _every(ticks), " (logarithmic)")


def either_side(values: Sequence[float]) -> Scale:
    """Logarithmic on both sides of zero where a few values dwarf the rest, else linear."""
    sizes = sorted(abs(v) for v in values if v != 0)
    if not sizes or sizes[-1] <= SPREAD * sizes[len(sizes) // 2]:
        return linear(values)
    unit = 10.0 ** math.floor(math.log10(sizes[len(sizes) // 2]))  # about linear below it
    inner = linear([math.asinh(v / unit) for v in values])
    powers = [unit * 10.0**k for k in range(math.ceil(math.log10(sizes[-1] / unit)) + 1)]
    sides = [[-p for p in powers], powers]
    zero = inner.place(0.0)
    shown = [
        _every([p for p in side if 0 <= (y := inner.place(math.asinh(p / unit))) <= 1 and abs(y - zero) > 0.1])
        for side in sides
    ]
    return Scale(lambda v: inner.place(math.asinh(v / unit)), [*reversed(shown[0]), 0.0, *shown[1]], " (logarithmic)")


def _every(ticks: list[float]) -> list[float]:
    return ticks[:: math.ceil(len(ticks) / TICKS) or 1]


# --- drawing


def _panel(panel: Panel, top: float, x: Scale, chosen: int) -> str:
    values = [v for _, v in [*panel.points, *panel.marks] if v is not None] or [1.0]
    scale = panel.scale([*values, panel.bound[0]] if panel.bound else values)

    def at(step: float, value: float) -> tuple[float, float]:
        return _x(x, step), top + PANEL * (1 - scale.place(value))

    parts = [
        f'<text x="{LEFT}" y="{top - 10}" font-weight="600" fill="{INK}">{escape(panel.title + scale.note)}</text>'
    ]
    for tick in scale.ticks:
        y = at(0, tick)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end" fill="{SOFT}">{_tick(tick)}</text>')
    parts.append(f'<path d="M{LEFT} {top}V{top + PANEL}H{WIDTH - RIGHT}" fill="none" stroke="{SOFT}"/>')
    parts.append(f'<path d="M{_x(x, chosen):.1f} {top}v{PANEL}" stroke="{SOFT}" stroke-dasharray="1 3"/>')
    if panel.bound:
        level, name = panel.bound
        y = at(0, level)[1]
        parts.append(
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{INK}" stroke-width="1.4" stroke-dasharray="6 4"/>'
        )
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{top - 10}" text-anchor="end" fill="{INK}">dashed: {escape(name)}</text>'
        )
    parts += [_line([at(*point) for point in run], panel.color) for run in _runs(panel.points)]
    parts += [_mark(*at(c.step, v), c, ring=c.step == chosen) for c, v in panel.marks if v is not None]
    return "".join(parts)


def _runs(points: Sequence[tuple[int, float | None]]) -> Iterator[list[tuple[int, float]]]:
    for finite, run in groupby(points, key=lambda point: point[1] is not None):
        if finite:
            yield [(step, value) for step, value in run if value is not None]


def _line(points: Sequence[tuple[float, float]], color: str) -> str:
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2.5" fill="{color}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.7" stroke-linejoin="round"/>'


def _mark(x: float, y: float, check: CheckPoint, *, ring: bool) -> str:
    what = "within the bound" if check.feasible else "over the bound"
    around = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="{INK}" stroke-width="1.8"/>' if ring else ""
    return f"<g><title>check at step {check.step}: {what}</title>{_symbol(x, y, good=check.feasible)}{around}</g>"


def _symbol(x: float, y: float, *, good: bool) -> str:
    if good:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{GOOD}" stroke="#fff" stroke-width="1"/>'
    return f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" stroke="{BAD}" stroke-width="2.2" fill="none"/>'


def _legend(chosen: str, trajectory: Trajectory) -> str:
    """In one row above the panels: what the marks say by their shape."""
    entries = [
        (f'<path d="M{LEFT} 12h22" stroke="{RETAIN}" stroke-width="1.7"/>', LEFT + 28, "a step, on its own batch")
    ]
    if trajectory.checks:
        entries += [
            (_symbol(LEFT + 208, 12, good=True), LEFT + 218, "check: bound kept"),
            (_symbol(LEFT + 358, 12, good=False), LEFT + 368, "check: bound broken"),
        ]
    entries.append(
        (
            f'<circle cx="{LEFT + 520}" cy="12" r="8" fill="none" stroke="{INK}" stroke-width="1.8"/>',
            LEFT + 534,
            chosen,
        )
    )
    return "".join(f'{mark}<text x="{at}" y="16" fill="{INK}">{text}</text>' for mark, at, text in entries)


def _x_axis(x: Scale, bottom: float) -> str:
    parts = []
    for tick in x.ticks:
        if tick == round(tick):
            at = _x(x, tick)
            parts.append(f'<path d="M{at:.1f} {bottom}v5" stroke="{SOFT}"/>')
            parts.append(
                f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle" fill="{SOFT}">{_tick(tick)}</text>'
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    return "".join(
        [*parts, f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle" fill="{INK}">optimizer step</text>']
    )


def _x(x: Scale, step: float) -> float:
    return LEFT + x.place(step) * (WIDTH - LEFT - RIGHT)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
