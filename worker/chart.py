"""The picture of a run as inline SVG: the dual variable, the losses against epsilon, the violation, over the same steps."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from service.domain.report import CheckPoint, StepPoint, Trajectory

WIDTH, PANEL, GAP, LEFT, RIGHT, TOP, BOTTOM = 860, 150, 46, 64, 12, 30, 40
DUAL, FORGET, RETAIN, BOUND, VIOLATION = "#6b2fa0", "#b3471b", "#0b6aa8", "#222222", "#0b6aa8"
TICKS = 4


class Line(NamedTuple):
    label: str
    color: str
    points: Sequence[tuple[float, float]]
    dash: str = ""


class Panel(NamedTuple):
    title: str
    lines: list[Line]
    checks: list[tuple[CheckPoint, float]]  # and at what height
    log: bool = False


def picture(trajectory: Trajectory, epsilon: float, released_step: int) -> Markup:
    """Nothing where no step was taken."""
    steps = trajectory.steps
    if not steps:
        return Markup("")
    ends = (1.0, float(max(steps[-1].step, 2)))
    panels = _panels(trajectory, epsilon)
    height = TOP + len(panels) * (PANEL + GAP) - GAP + BOTTOM
    parts = [
        _panel(panel, TOP + i * (PANEL + GAP), ends, released_step, last=i == len(panels) - 1)
        for i, panel in enumerate(panels)
    ]
    return Markup(  # noqa: S704  only numbers and our own words go into it
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-labelledby="picture-title picture-desc" font-family="inherit" font-size="12">'
        f'<title id="picture-title">The course of the run</title><desc id="picture-desc">{_words(trajectory, epsilon)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def _panels(trajectory: Trajectory, epsilon: float) -> list[Panel]:
    steps, checks = trajectory.steps, trajectory.checks
    ends = [(steps[0].step, epsilon), (steps[-1].step, epsilon)]
    zero = [(steps[0].step, 0.0), (steps[-1].step, 0.0)]
    retain = Panel(
        "Retain loss, nats per token",
        [
            Line("of the step's batch", RETAIN, _series(steps, lambda s: s.retain_loss)),
            Line("epsilon", BOUND, ends, "6 4"),
        ],
        [(check, check.retain_upper) for check in checks],
    )
    violation = Panel(
        "Constraint violation, nats per token",
        [
            Line("retain loss - epsilon", VIOLATION, _series(steps, lambda s: s.violation)),
            Line("zero: on the bound", BOUND, zero, "6 4"),
        ],
        [(check, check.retain_upper - epsilon) for check in checks],
    )
    forget = Panel(
        "Forget loss (logarithmic)",
        [Line("of the step's batch", FORGET, _series(steps, lambda s: s.forget_loss))],
        [(check, check.forget_objective) for check in checks],
        log=True,
    )
    dual = _series(steps, lambda s: s.dual)
    panels = [Panel("Dual variable", [Line("multiplier of the bound", DUAL, dual)], [])] if dual else []
    return [*panels, violation, retain, forget]


def _series(steps: Sequence[StepPoint], value: Callable[[StepPoint], float | None]) -> list[tuple[float, float]]:
    return [(step.step, y) for step in steps if (y := value(step)) is not None]


def _panel(panel: Panel, top: float, x_ends: tuple[float, float], released_step: int, *, last: bool) -> str:
    values = [y for line in panel.lines for _, y in line.points] + [y for _, y in panel.checks]
    log = panel.log and min(values, default=0.0) > 0
    y_ends = _padded([math.log10(v) for v in values] if log else values)

    def x_at(step: float) -> float:
        return LEFT + (step - x_ends[0]) / (x_ends[1] - x_ends[0]) * (WIDTH - LEFT - RIGHT)

    def y_at(value: float) -> float:
        at = math.log10(value) if log else value
        return top + PANEL - (at - y_ends[0]) / (y_ends[1] - y_ends[0]) * PANEL

    bottom = top + PANEL
    parts = [f'<text x="{LEFT}" y="{top - 10}" font-weight="600" fill="#222">{escape(panel.title)}</text>']
    for tick in _ticks(y_ends):
        y = top + PANEL - (tick - y_ends[0]) / (y_ends[1] - y_ends[0]) * PANEL
        label = f"{10**tick:.3g}" if log else f"{tick:.4g}"
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{label}</text>')
    for tick in _ticks(x_ends):
        if tick != round(tick):
            continue
        parts.append(f'<path d="M{x_at(tick):.1f} {bottom}v4" stroke="#444"/>')
        if last:
            parts.append(
                f'<text x="{x_at(tick):.1f}" y="{bottom + 18}" text-anchor="middle" fill="#444">{tick:g}</text>'
            )
    parts.append(f'<path d="M{LEFT} {top}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="#444"/>')
    parts += [_polyline([(x_at(x), y_at(y)) for x, y in line.points], line) for line in panel.lines]
    parts += [_mark(x_at(c.step), y_at(y), c, c.step == released_step) for c, y in panel.checks]
    parts.append(_legend(panel, top - 10))
    if last:
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle" fill="#222">optimizer step</text>')
    return "".join(parts)


def _polyline(points: Sequence[tuple[float, float]], line: Line) -> str:
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2.5" fill="{line.color}"/>'
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    return f'<polyline points="{at}" fill="none" stroke="{line.color}" stroke-width="1.6"{dash}/>'


def _mark(x: float, y: float, check: CheckPoint, released: bool) -> str:
    """A check: a filled circle kept the bound, a cross did not; the ring is what was released."""
    what = "within the bound" if check.feasible else "over the bound"
    title = f"<title>check at step {check.step}: retain loss {check.retain_upper:.4g}, {what}</title>"
    if not check.feasible:
        arms = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
        return f'<g>{title}<path d="{arms}" stroke="#a11212" stroke-width="2.2" fill="none"/></g>'
    ring = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="#14663a" stroke-width="2"/>' if released else ""
    )
    return f'<g>{title}<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#14663a"/>{ring}</g>'


def _legend(panel: Panel, y: float) -> str:
    """To the right of the title, from the right edge leftwards."""
    parts, x = [], float(WIDTH - RIGHT)
    for line in reversed(panel.lines):
        x -= 6.6 * len(line.label)
        parts.append(f'<text x="{x:.0f}" y="{y}" fill="#222">{escape(line.label)}</text>')
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        parts.append(f'<path d="M{x - 30:.0f} {y - 4}h24" stroke="{line.color}" stroke-width="2"{dash}/>')
        x -= 46
    return "".join(parts)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _ticks(ends: tuple[float, float]) -> list[float]:
    """Round numbers within the ends, about TICKS of them."""
    raw = (ends[1] - ends[0]) / TICKS
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw) * magnitude
    first = math.ceil(ends[0] / step)
    return [round(k * step, 12) + 0.0 for k in range(first, math.floor(ends[1] / step) + 1)]


def _words(trajectory: Trajectory, epsilon: float) -> str:
    """The same for who cannot see it."""
    first, last = trajectory.steps[0], trajectory.steps[-1]
    told = [
        f"{trajectory.steps_total} steps; {len(trajectory.checks)} checks, {trajectory.feasible_checks} within the bound."
    ]
    duals = [step.dual for step in trajectory.steps if step.dual is not None]
    if duals:
        told.append(
            f"The dual variable began at {duals[0]:.4g}, was at most {max(duals):.4g}, and ended at {duals[-1]:.4g}."
        )
    for name, old, new in (
        ("forget", first.forget_loss, last.forget_loss),
        ("retain", first.retain_loss, last.retain_loss),
    ):
        if old is not None and new is not None:
            told.append(f"The {name} loss of the first batch was {old:.4g}, of the last {new:.4g}.")
    told.append(f"Epsilon is {epsilon:.4g} nats per token.")
    return " ".join(told)
