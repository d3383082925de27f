"""What the pictures of a report are drawn with: scales, a frame with axes, lines and marks, as inline SVG."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from markupsafe import Markup, escape

INK, SOFT, GRID = "#1c1c1e", "#55555c", "#e4e4e9"
DUAL, FORGET, RETAIN, GOOD, BAD = "#6b2fa0", "#b3471b", "#0b6aa8", "#14663a", "#a11212"
TICKS = 4
SPREAD = 20.0  # a series that spans more than this ratio is drawn on a logarithmic axis

Point = tuple[float, float]


class Picture(NamedTuple):
    svg: Markup
    words: str  # for who cannot see it, and for who would rather read


class Scale(NamedTuple):
    place: Callable[[float], float]  # a value to 0 (bottom, left) .. 1 (top, right)
    ticks: list[float]
    note: str = ""  # for the title, where the axis is not linear


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


def positive(values: Sequence[float], padding: float = 0.08) -> Scale:
    """Logarithmic where the values are positive and span orders of magnitude, else linear."""
    if min(values) <= 0 or max(values) <= SPREAD * min(values):
        return linear(values, padding)
    inner = linear([math.log10(v) for v in values], padding)
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


def share() -> Scale:
    """Of what lies between 0 and 1."""
    return Scale(lambda v: v, [0.0, 0.25, 0.5, 0.75, 1.0])


def counted(most: float) -> Scale:
    """Of whole numbers from 0."""
    scale = linear([0.0, max(most, 2.0)], padding=0.0)
    return scale._replace(ticks=[tick for tick in scale.ticks if tick == round(tick)])


def _every(ticks: list[float]) -> list[float]:
    return ticks[:: math.ceil(len(ticks) / TICKS) or 1]


# --- a frame


class Frame(NamedTuple):
    """A place to draw in, in the units of the picture's view box."""

    left: float
    top: float
    width: float
    height: float
    x: Scale
    y: Scale

    def at(self, x: float, y: float) -> Point:
        return self.left + self.x.place(x) * self.width, self.top + self.height * (1 - self.y.place(y))

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height


def svg(name: str, width: float, height: float, title: str, words: str, *parts: str, kind: str = "") -> Markup:
    """`name` is our own word, which no other picture of the page has; `parts` are escaped already."""
    return Markup(  # noqa: S704  only numbers and what was escaped go into it
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title {name}-desc" '
        f'class="{kind}" font-family="inherit" font-size="12">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(words)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def level_axis(frame: Frame, title: str) -> Iterator[str]:
    """The vertical axis with its grid, the frame's two sides, and the title above."""
    yield text(frame.left, frame.top - 10, title + frame.y.note, weight=600)
    for tick in frame.y.ticks:
        y = frame.at(frame.x.ticks[0] if frame.x.ticks else 0.0, tick)[1]
        yield f'<path d="M{frame.left} {y:.1f}H{frame.right}" stroke="{GRID}"/>'
        yield text(frame.left - 7, y + 4, ticked(tick), "end", SOFT)
    yield f'<path d="M{frame.left} {frame.top}V{frame.bottom}H{frame.right}" fill="none" stroke="{SOFT}"/>'


def floor_axis(frame: Frame, title: str) -> Iterator[str]:
    """The horizontal axis: ticks below the frame, and the title below them."""
    for tick in frame.x.ticks:
        x = frame.left + frame.x.place(tick) * frame.width
        yield f'<path d="M{x:.1f} {frame.bottom}v5" stroke="{SOFT}"/>'
        yield text(x, frame.bottom + 18, ticked(tick), "middle", SOFT)
    yield text((frame.left + frame.right) / 2, frame.bottom + 36, title + frame.x.note, "middle")


# --- lines, marks, words


def text(x: float, y: float, words: str, anchor: str = "start", color: str = INK, weight: int = 400) -> str:
    bold = f' font-weight="{weight}"' if weight != 400 else ""
    at = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {at} text-anchor="{anchor}" fill="{color}"{bold}>{escape(words)}</text>'


def line(points: Sequence[Point], color: str, dashes: str = "") -> str:
    """A lone point is a dot."""
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2.5" fill="{color}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.7" stroke-linejoin="round"{dashed}/>'
    )


def runs(points: Sequence[tuple[float, float | None]]) -> Iterator[list[Point]]:
    """The stretches between values that are missing: a gap breaks the line."""
    for finite, run in groupby(points, key=lambda point: point[1] is not None):
        if finite:
            yield [(x, value) for x, value in run if value is not None]


def disc(x: float, y: float, color: str, radius: float = 4) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{color}" stroke="#fff" stroke-width="1"/>'


def ring(x: float, y: float, color: str = INK, radius: float = 8) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="none" stroke="{color}" stroke-width="1.8"/>'


def cross(x: float, y: float, color: str) -> str:
    return f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" stroke="{color}" stroke-width="2.2" fill="none"/>'


def bar(x: float, y: float, color: str) -> str:
    return f'<path d="M{x:.1f} {y - 8:.1f}v16" stroke="{color}" stroke-width="2.6"/>'


def diamond(x: float, y: float, color: str) -> str:
    return f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z" stroke="{color}" stroke-width="1.8" fill="#fff"/>'


def ticked(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
