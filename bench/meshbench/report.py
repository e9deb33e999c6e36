"""A run for people: the table on a terminal, and a picture.

This module owns how figures look. It is pure: figures in, text out.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from meshbench.model import Figure, Run, Spread

__all__ = ["number", "picture", "table"]

COLUMNS: Final = ("direct", "relay", "envoy", "ours")
COLOURS: Final = {"direct": "#9aa0a6", "relay": "#c5b37a", "envoy": "#d0698a", "ours": "#2f7d6b"}

WIDTH: Final = 860
LABEL_WIDTH: Final = 300
BAR_WIDTH: Final = 400
BAR_HEIGHT: Final = 11
ROW_GAP: Final = 10
HEAD_HEIGHT: Final = 58


def number(value: float) -> str:
    """Return a number with three significant digits, in full where it is larger."""
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def _cell(found: Spread | None) -> str:
    if found is None:
        return "–"
    return f"{number(found.median)} ({number(found.min)} … {number(found.max)})"


def _ratio(figure: Figure) -> str:
    found = figure.spreads.get("ratio")
    return "–" if found is None else f"{_cell(found)} × {figure.against}"


def _target(figure: Figure) -> str:
    if figure.target is None:
        return "–"
    return f"{number(figure.target)} {'met' if figure.met else 'missed'}"


def _rows(figures: Sequence[Figure]) -> list[list[str]]:
    rows = [["figure", "unit", *COLUMNS, "ratio", "target"]]
    for figure in figures:
        cells = [_cell(figure.spreads.get(name)) for name in COLUMNS]
        rows.append([figure.name, figure.unit, *cells, _ratio(figure), _target(figure)])
    return rows


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as aligned columns: median (minimum … maximum)."""
    rows = _rows(figures)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for index, row in enumerate(rows):
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if index == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, text: str, extra: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}"{extra}>{escape(text)}</text>'


def _bars(figure: Figure, top: float) -> list[str]:
    """Return the bars of one figure: each as long as its share of the figure's largest."""
    shown = [(name, figure.spreads[name]) for name in COLUMNS if name in figure.spreads]
    longest = max(found.max for _, found in shown)
    arrow = "▲" if figure.better == "higher" else "▼"
    parts = [
        _text(LABEL_WIDTH - 10, top + 10, f"{figure.name} {arrow}", ' text-anchor="end"'),
    ]
    for index, (name, found) in enumerate(shown):
        y = top + index * BAR_HEIGHT
        scale = BAR_WIDTH / longest if longest > 0 else 0.0
        length = max(found.median * scale, 1.0)
        parts.append(
            f'<rect x="{LABEL_WIDTH}" y="{y:.0f}" width="{length:.1f}" '
            f'height="{BAR_HEIGHT - 2}" fill="{COLOURS[name]}"/>'
        )
        # The thin line goes from the smallest to the largest round.
        least, most = (LABEL_WIDTH + max(value, 0.0) * scale for value in (found.min, found.max))
        middle = y + (BAR_HEIGHT - 2) / 2
        parts.append(
            f'<line x1="{least:.1f}" y1="{middle:.1f}" x2="{most:.1f}" y2="{middle:.1f}" '
            'stroke="#202124" stroke-width="1"/>'
        )
        label = f"{number(found.median)} {figure.unit}"
        parts.append(_text(max(LABEL_WIDTH + length, most) + 5, y + 9, label))
    return parts


def picture(run: Run) -> str:
    """Return an SVG: one group of bars a figure, with lines from minimum to maximum.

    ▲ marks figures where more is better, ▼ those where less is.
    """
    parts: list[str] = [_text(10, 20, f"{run.started}, {run.rounds} rounds, median", ' class="h"')]
    x = 10.0
    for name in COLUMNS:
        parts.append(f'<rect x="{x:.0f}" y="32" width="10" height="10" fill="{COLOURS[name]}"/>')
        parts.append(_text(x + 14, 41, name))
        x += 80
    top = float(HEAD_HEIGHT)
    for figure in run.figures:
        parts += _bars(figure, top)
        bars = sum(1 for name in COLUMNS if name in figure.spreads)
        top += bars * BAR_HEIGHT + ROW_GAP
    style = "text{font:10px sans-serif;fill:#202124}.h{font-weight:bold;font-size:12px}"
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top:.0f}">\n'
        f'<style>{style}</style>\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
