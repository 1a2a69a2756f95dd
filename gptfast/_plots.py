"""Curves as text: braille dots, eight to a character, or ASCII where a terminal has no braille."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Points = Sequence[tuple[float, float]]
_BARS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row][column] of a braille character


def braille_plot(
    curves: Sequence[Points], width: int, height: int, ascii_only: bool = False
) -> tuple[list[list[tuple[str, int]]], tuple[float, float, float, float]]:
    """Draw curves over each other.

    Args:
        curves: (x, y) of each; the points of a curve are joined. Later ones lie above earlier ones.
        width, height: in characters, >= 1.
        ascii_only: draw with * and . instead of braille.
    Returns:
        The lines, each a list of (character, index of the curve that it shows, or -1), and the smallest and largest x and y.
    Raises:
        ValueError: no curve has a point.
    """
    points = [point for curve in curves for point in curve]
    if not points:
        raise ValueError("braille_plot: the curves have no point")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    bounds = (min(xs), max(xs), min(ys), max(ys))
    dots, owners = [[0] * width for _ in range(height)], [[-1] * width for _ in range(height)]
    for n, curve in enumerate(curves):
        for column, row in _line([_at(point, bounds, 2 * width, 4 * height) for point in curve]):
            dots[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
            owners[row // 4][column // 2] = n
    signs = [[_sign(dots[r][c], owners[r][c], ascii_only) for c in range(width)] for r in range(height)]
    return [list(zip(*pair, strict=True)) for pair in zip(signs, owners, strict=True)], bounds


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as bars in one line of at most `width` characters, each the mean of its part; "" for none."""
    if not values:
        return ""
    count = min(width, len(values))
    parts = [values[n * len(values) // count : (n + 1) * len(values) // count] for n in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(_BARS[round((mean - low) / (high - low) * 7) if high > low else 3] for mean in means)


def _sign(dots: int, owner: int, ascii_only: bool) -> str:
    if not dots:
        return " "
    return ".*"[min(owner, 1)] if ascii_only else chr(0x2800 + dots)


def _at(
    point: tuple[float, float], bounds: tuple[float, float, float, float], columns: int, rows: int
) -> tuple[int, int]:
    """(column, row) of a point; the largest y is row 0."""
    left, right, low, high = bounds
    x = (point[0] - left) / (right - left) if right > left else 0.0
    y = (point[1] - low) / (high - low) if high > low else 0.5
    return round(x * (columns - 1)), round((1 - y) * (rows - 1))


def _line(points: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """The dots of the lines between points."""
    found = set(points[:1])
    for (c0, r0), (c1, r1) in pairwise(points):
        steps = max(abs(c1 - c0), abs(r1 - r0), 1)
        found |= {(round(c0 + (c1 - c0) * n / steps), round(r0 + (r1 - r0) * n / steps)) for n in range(steps + 1)}
    return found
