"""Plots as SVG: lines and points on two axes, drawn with nothing but text, the same file from the same numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 28, 46
"""Margins around the axes, in pixels; the legend is above them."""
_CHARACTER, _LINE = 7.0, 12.0
"""About the width of a character and the height of a line, in pixels."""


@dataclass(frozen=True)
class Curve:
    """Points that belong together."""

    label: str
    """In the legend."""
    points: Sequence[tuple[float, float]]
    notes: Sequence[str] = ()
    """A word beside each point, or nothing."""
    line: bool = True
    """Whether a line goes through the points."""
    dots: bool = False
    """Whether each point is a dot."""


@dataclass(frozen=True)
class Axes:
    """From values to pixels."""

    left: float
    right: float
    bottom: float
    top: float
    width: int
    height: int

    def x(self, value: float) -> float:
        """Pixels from the left edge."""
        share = (value - self.left) / (self.right - self.left)
        return _LEFT + share * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the upper edge."""
        share = (value - self.bottom) / (self.top - self.bottom)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)


def plot(curves: Sequence[Curve], x_label: str, y_label: str, width: int = 700, height: int = 320) -> str:
    """Draw curves on common axes; values that are no numbers are left out.

    Args:
        curves: What to draw, the first below.
        x_label: What the horizontal axis shows, with its unit.
        y_label: What the vertical axis shows, with its unit.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.

    Returns:
        An SVG document.

    Raises:
        ValueError: There is no point.
    """
    points = [point for curve in curves for point in curve.points if all(map(math.isfinite, point))]
    if not points:
        raise ValueError("there is nothing to draw: no curve has a point")
    x_low, x_high = _widened([x for x, _ in points])
    y_low, y_high = _widened([y for _, y in points])
    axes = Axes(x_low, x_high, y_low, y_high, width, height)
    parts = [_frame(axes, x_label, y_label)]
    parts += [_curve(curve, COLORS[index % len(COLORS)], axes) for index, curve in enumerate(curves)]
    parts += [_notes(curves, axes), _legend([curve.label for curve in curves])]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(filter(None, parts))
        + "\n</svg>\n"
    )


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers between two, about so many: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _widened(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _frame(axes: Axes, x_label: str, y_label: str) -> str:
    bottom, right = axes.height - _BOTTOM, axes.width - _RIGHT
    lines = []
    for value in ticks(axes.left, axes.right):
        x = axes.x(value)
        lines.append(f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="#ddd"/>')
        lines.append(_text(x, bottom + 16, f"{value:g}", "middle"))
    for value in ticks(axes.bottom, axes.top, 5):
        y = axes.y(value)
        lines.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        lines.append(_text(_LEFT - 6, y + 4, f"{value:g}", "end"))
    lines.append(f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#333"/>')
    lines.append(_text((_LEFT + right) / 2, axes.height - 10, x_label, "middle"))
    middle = (_TOP + bottom) / 2
    lines.append(f'<g transform="rotate(-90 14 {middle:.1f})">{_text(14, middle + 4, y_label, "middle")}</g>')
    return "\n".join(lines)


def _curve(curve: Curve, color: str, axes: Axes) -> str:
    found = [(axes.x(x), axes.y(y)) for x, y in curve.points if math.isfinite(x) and math.isfinite(y)]
    lines = []
    if curve.line and len(found) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in found)
        lines.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.3"/>')
    if curve.dots:
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in found]
    return "\n".join(lines)


def _notes(curves: Sequence[Curve], axes: Axes) -> str:
    """The words beside points, each above or below its point, where no other is yet."""
    taken: list[tuple[float, float, float]] = []  # left, right and baseline of those that are drawn
    lines = []
    for curve in curves:
        for (x, y), note in zip(curve.points, curve.notes, strict=False):
            if not note or not (math.isfinite(x) and math.isfinite(y)):
                continue
            length = _CHARACTER * len(note)
            left = axes.x(x) + 7
            left -= length + 14 if left + length > axes.width - _RIGHT else 0
            free = [
                base
                for offset in (-6, 14, -20, 28, -34, 42)
                if all(
                    left > right or left + length < begin or abs(axes.y(y) + offset - other) > _LINE
                    for begin, right, other in taken
                )
                for base in [axes.y(y) + offset]
            ]
            base = free[0] if free else axes.y(y) - 6
            taken.append((left, left + length, base))
            lines.append(_text(left, base, note, "start"))
    return "\n".join(lines)


def _legend(labels: Sequence[str]) -> str:
    lines, left = [], float(_LEFT)
    for index, label in enumerate(labels):
        if label:
            lines.append(f'<path d="M{left:.1f} 14h14" stroke="{COLORS[index % len(COLORS)]}" stroke-width="3"/>')
            lines.append(_text(left + 20, 18, label, "start"))
            left += 40 + _CHARACTER * len(label)
    return "\n".join(lines)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333">{escape(text)}</text>'
