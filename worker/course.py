"""The picture of a run: dual variable, violation and losses over the same steps, with the checks marked."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from service.domain.report import CheckPoint, Trajectory
from worker.chart import (
    BAD,
    DUAL,
    FORGET,
    GOOD,
    INK,
    RETAIN,
    SOFT,
    Frame,
    Picture,
    Scale,
    counted,
    cross,
    disc,
    either_side,
    floor_axis,
    level_axis,
    line,
    linear,
    positive,
    ring,
    runs,
    svg,
    text,
)

WIDTH, PANEL, GAP, LEFT, RIGHT, TOP, BOTTOM = 860, 140, 44, 68, 22, 62, 42


class Panel(NamedTuple):
    title: str
    color: str
    points: Sequence[tuple[int, float | None]]  # None: not finite, a gap in the line
    marks: Sequence[tuple[CheckPoint, float | None]]  # a check, and at what value it stands
    bound: tuple[float, str] | None  # a level, and its name
    scale: Callable[[Sequence[float]], Scale]


def picture(trajectory: Trajectory, epsilon: float, chosen: int, *, released: bool) -> Picture | None:
    """None where no step was taken. `chosen` is the step that was released or, if none was, that the figures describe."""
    if not trajectory.steps:
        return None
    panels = _panels(trajectory, epsilon)
    height = TOP + len(panels) * (PANEL + GAP) - GAP + BOTTOM
    x, size = counted(trajectory.steps[-1].step), WIDTH - LEFT - RIGHT
    what = "the step that was released" if released else "the step measured after (not released)"
    drawn = [_panel(panel, LEFT, TOP + i * (PANEL + GAP), size, x, chosen) for i, panel in enumerate(panels)]
    axis = floor_axis(Frame(LEFT, height - BOTTOM - PANEL, size, PANEL, x, x), "optimizer step")
    said = words(trajectory, epsilon)
    title = "The course of the run"
    return Picture(
        svg("course", WIDTH, height, title, said, _legend(what, trajectory), *drawn, *axis, kind="wide"), said
    )


def words(trajectory: Trajectory, epsilon: float) -> str:
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
    if trajectory.resumed:
        told.append(f"Attempts went on from checkpoints after step {', '.join(map(str, trajectory.resumed))}.")
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


def _panel(panel: Panel, left: float, top: float, width: float, x: Scale, chosen: int) -> str:
    values = [v for _, v in [*panel.points, *panel.marks] if v is not None] or [1.0]
    frame = Frame(left, top, width, PANEL, x, panel.scale([*values, panel.bound[0]] if panel.bound else values))
    parts = [*level_axis(frame, panel.title)]
    at = frame.left + x.place(chosen) * frame.width
    parts.append(f'<path d="M{at:.1f} {top}v{PANEL}" stroke="{SOFT}" stroke-dasharray="1 3"/>')
    if panel.bound:
        level, name = panel.bound
        y = frame.at(0, level)[1]
        dashed = f'stroke="{INK}" stroke-width="1.4" stroke-dasharray="6 4"'
        parts.append(f'<path d="M{frame.left} {y:.1f}H{frame.right}" {dashed}/>')
        parts.append(text(frame.right, top - 10, f"dashed: {name}", "end"))
    parts += [line([frame.at(*point) for point in run], panel.color) for run in runs(panel.points)]
    parts += [_mark(*frame.at(c.step, v), c, chosen=c.step == chosen) for c, v in panel.marks if v is not None]
    return "".join(parts)


def _mark(x: float, y: float, check: CheckPoint, *, chosen: bool) -> str:
    what = "within the bound" if check.feasible else "over the bound"
    around = ring(x, y) if chosen else ""
    return f"<g><title>check at step {check.step}: {what}</title>{_symbol(x, y, good=check.feasible)}{around}</g>"


def _symbol(x: float, y: float, *, good: bool) -> str:
    return disc(x, y, GOOD) if good else cross(x, y, BAD)


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
    entries.append((ring(LEFT + 520, 12), LEFT + 534, chosen))
    return "".join(mark + text(at, 16, said) for mark, at, said in entries)
