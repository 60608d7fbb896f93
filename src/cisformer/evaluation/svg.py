"""Small charts as inline SVG: crisp at any size, coloured by the page's style sheet, with titles to read.

Colours and widths are classes (`c0` is the model, `c1`… the others), so that dark mode and print are
matters of CSS alone. Marks carry a `<title>`, which browsers show as a tooltip.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

Values = Sequence[float | None]

LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 44
_ids = itertools.count(1)


@dataclass(frozen=True)
class Scale:
    """From values to places along an axis."""

    low: float
    high: float
    kind: Literal["linear", "log"] = "linear"

    @classmethod
    def over(cls, values: Iterable[float | None], kind: Literal["linear", "log"] = "linear") -> Scale:
        """Return a scale that holds all of `values` with a little room; None and NaN are passed over."""
        known = [v for v in values if v is not None and math.isfinite(v) and (kind == "linear" or v > 0)]
        low, high = (min(known), max(known)) if known else (0.1, 1.0)
        if kind == "log":
            return cls(low / 1.15, high * 1.15, kind)
        room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        return cls(low - room, high + room, kind)

    def place(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high end."""
        if self.kind == "log":
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Return round values inside the scale."""
        if self.kind == "log":
            return self._log_ticks()
        raw = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(raw))
        step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw)
        first = math.ceil(self.low / step)
        found = [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return found if found or wanted > 50 else self.ticks(wanted + 1)

    def _log_ticks(self) -> list[float]:
        decades = math.log10(self.high / self.low)
        factors = (1,) if decades > 2.5 else (1, 3) if decades > 1.2 else (1, 2, 5)
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        ticks = [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]
        return [tick for tick in ticks if self.low <= tick <= self.high]


@dataclass
class Chart:
    """A chart with two axes, marks added one after the other.

    Attributes
    ----------
    title, description
        Read by screen readers; the description says what the chart shows, with its main numbers.
    x, y
        Scales.
    x_label, y_label
        What the axes are.
    """

    title: str
    description: str
    x: Scale
    y: Scale
    x_label: str = ""
    y_label: str = ""
    width: int = 440
    height: int = 310
    margins: tuple[int, int, int, int] = (TOP, RIGHT, BOTTOM, LEFT)
    marks: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point in the picture, kept inside the frame."""
        top, right, bottom, left = self.margins
        across = left + min(max(self.x.place(x), 0), 1) * (self.width - left - right)
        down = top + (1 - min(max(self.y.place(y), 0), 1)) * (self.height - top - bottom)
        return round(across, 1), round(down, 1)

    def line(self, xs: Values, ys: Values, style: str, *, name: str = "", dots: bool = True) -> None:
        """Draw a line through the points that are defined, with a dot and a tooltip at each."""
        points = _defined(xs, ys)
        path = " ".join(f"{x},{y}" for x, y in (self.at(*p) for p in points))
        self.marks.append(f'<polyline class="line {style}" points="{path}"/>')
        if dots:
            self.dots(xs, ys, style, radius=3.2, name=name)

    def band(self, xs: Values, lows: Values, highs: Values, style: str) -> None:
        """Shade between two lines."""
        lower, upper = _defined(xs, lows), _defined(xs, highs)
        places = [self.at(*p) for p in [*upper, *reversed(lower)]]
        self.marks.append(
            f'<polygon class="band {style}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'
        )

    def dots(self, xs: Values, ys: Values, style: str, *, radius: float = 1.8, name: str = "") -> None:
        """Draw dots; with a name they have tooltips."""
        for x, y in _defined(xs, ys):
            across, down = self.at(x, y)
            tip = f"<title>{escape(name)}: {x:.3g}, {y:.4g}</title>" if name else ""
            self.marks.append(
                f'<circle class="dot {style}" cx="{across}" cy="{down}" r="{radius}">{tip}</circle>'
            )

    def rule(self, start: tuple[float, float], end: tuple[float, float], style: str = "guide") -> None:
        """Draw a straight line between two points given as values."""
        (x1, y1), (x2, y2) = self.at(*start), self.at(*end)
        self.marks.append(f'<line class="{style}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')

    def text(self, x: float, y: float, words: str, style: str = "note", *, anchor: str = "start") -> None:
        """Write at a point given in values."""
        across, down = self.at(x, y)
        self.marks.append(
            f'<text class="{style}" x="{across}" y="{down}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def svg(self, *, x_ticks: int = 5, y_ticks: int = 5) -> str:
        """Return the chart."""
        number = next(_ids)
        head = (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-labelledby="chart{number}-title chart{number}-text">'
            f'<title id="chart{number}-title">{escape(self.title)}</title>'
            f'<desc id="chart{number}-text">{escape(self.description)}</desc>'
        )
        return head + self._axes(x_ticks, y_ticks) + "".join(self.marks) + "</svg>"

    def _axes(self, x_ticks: int, y_ticks: int) -> str:
        top, right, bottom, left = self.margins
        floor, wall = self.height - bottom, self.width - right
        parts = []
        for tick in self.x.ticks(x_ticks) if x_ticks else ():
            across = left + self.x.place(tick) * (wall - left)
            parts.append(f'<line class="grid" x1="{across:.1f}" y1="{top}" x2="{across:.1f}" y2="{floor}"/>')
            parts.append(
                f'<text class="tick" x="{across:.1f}" y="{floor + 16}" text-anchor="middle">{tick:g}</text>'
            )
        for tick in self.y.ticks(y_ticks) if y_ticks else ():
            down = top + (1 - self.y.place(tick)) * (floor - top)
            parts.append(f'<line class="grid" x1="{left}" y1="{down:.1f}" x2="{wall}" y2="{down:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{left - 6}" y="{down + 4:.1f}" text-anchor="end">{tick:g}</text>'
            )
        middle = (left + wall) / 2
        parts.append(
            f'<text class="label" x="{middle}" y="{self.height - 8}" text-anchor="middle">'
            f"{escape(self.x_label)}</text>"
        )
        turn = f"rotate(-90 13 {(top + floor) / 2})"
        parts.append(
            f'<text class="label" x="13" y="{(top + floor) / 2}" transform="{turn}" text-anchor="middle">'
            f"{escape(self.y_label)}</text>"
        )
        return "".join(parts)


def _defined(xs: Values, ys: Values) -> list[tuple[float, float]]:
    pairs = zip(xs, ys, strict=True)
    return [
        (x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)
    ]
