"""A run for people: the table on a terminal, the last word, and a picture.

This module owns how figures look. It is pure: figures in, text out. The picture is drawn with the
reader's own colours, light or dark, and says nothing by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from meshbench.model import Figure, Run, Spread

__all__ = ["number", "picture", "table", "verdict"]

PLAIN: Final = ("direct", "relay", "bound")
"""Shown by their medians alone: they are there to compare with."""
SPREAD: Final = ("envoy", "ours")
COLUMNS: Final = (*PLAIN, *SPREAD)
LEFT: Final = 2
"""Columns of text; those after them are numbers, and end at the same place."""

WIDTH: Final = 960
LABEL_WIDTH: Final = 330
BAR_WIDTH: Final = 330
VERDICT_AT: Final = 790
BAR_HEIGHT: Final = 12
ROW_GAP: Final = 12
HEAD_HEIGHT: Final = 62
SECTION_HEIGHT: Final = 26
LEGEND_STEP: Final = 110

STYLE: Final = """
text{font:11px sans-serif;fill:#202124}.f{fill:#5f6368}.m{fill:#b3261e}
.h{font-weight:bold;font-size:13px}.e{text-anchor:end}.l{stroke:#202124}
.t{stroke:#202124;stroke-width:2}.d{fill:#202124}.paper{fill:#fff}
.direct{fill:#9aa0a6}.relay{fill:#c9b458}.bound{fill:#7b6fb0}.envoy{fill:#d0698a}.ours{fill:#2f7d6b}
@media(prefers-color-scheme:dark){text{fill:#e8eaed}.f{fill:#9aa0a6}.m{fill:#f28b82}
.l,.t{stroke:#e8eaed}.d{fill:#e8eaed}.paper{fill:#16181c}
.direct{fill:#80868b}.relay{fill:#a8933a}.bound{fill:#9d92d6}.ours{fill:#4db396}}
""".replace("\n", "")
"""Plain classes, without variables: not every program that shows an SVG knows those."""


def number(value: float) -> str:
    """Return a number with three significant digits, in full where it is larger."""
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def _cell(found: Spread | None) -> str:
    if found is None:
        return "–"
    return f"{number(found.median)} ({number(found.min)} … {number(found.max)})"


def _ratio(figure: Figure) -> str:
    found = figure.spreads.get("ratio")
    return "–" if found is None else f"{_cell(found)} × {figure.against}"


def _target(figure: Figure) -> str:
    """Return a target as a bound: at least or at most, times the other subject or in our unit."""
    if figure.target is None:
        return ""
    sign = "≥" if figure.better == "higher" else "≤"
    unit = f" × {figure.against}" if figure.target_of != "ours" else f" {figure.unit}".rstrip()
    return f"{sign} {number(figure.target)}{unit}"


def _word(figure: Figure) -> str:
    return {True: "met", False: "MISSED", None: ""}[figure.met]


def _rows(figures: Sequence[Figure]) -> list[list[str]]:
    rows = [["figure", "unit", *COLUMNS, "ratio", "target", ""]]
    for figure in figures:
        plain = [
            number(found.median) if (found := figure.spreads.get(name)) else "–" for name in PLAIN
        ]
        spread = [_cell(figure.spreads.get(name)) for name in SPREAD]
        verdict = [_ratio(figure), _target(figure), _word(figure)]
        rows.append([figure.name, figure.unit, *plain, *spread, *verdict])
    return rows


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as aligned columns: median (minimum … maximum)."""
    rows = _rows(figures)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for index, row in enumerate(rows):
        cells = [
            cell.ljust(width) if column < LEFT or column == len(row) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if index == 0:
            lines.append("  ".join("-" * width for width in widths).rstrip())
    return "\n".join(lines) + "\n"


def verdict(run: Run) -> str:
    """Return the last line: how many targets are met, and which are not."""
    judged = [figure for figure in run.figures if figure.met is not None]
    missed = [f"{figure.name} ({_reached(figure)})" for figure in judged if not figure.met]
    met = len(judged) - len(missed)
    parts = [f"targets: {met} of {len(judged) + len(run.unmeasured)} met"]
    if missed:
        parts.append("missed: " + "; ".join(missed))
    if run.unmeasured:
        parts.append("not measured: " + "; ".join(run.unmeasured))
    return ". ".join(parts)


def _reached(figure: Figure) -> str:
    value = figure.ours if figure.target_of == "ours" else figure.ratio
    return f"{'–' if value is None else number(value)}, target {_target(figure)}"


# --- the picture -------------------------------------------------------------------------------


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    extra = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{extra}>{escape(text)}</text>'


def _bar(x: float, y: float, width: float, name: str, height: float) -> str:
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.1f}" height="{height:.0f}" class="{name}"/>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _goal(figure: Figure) -> float | None:
    """Return where the target lies, in the figure's unit."""
    if figure.target is None:
        return None
    if figure.target_of == "ours":
        return figure.target
    other = figure.spreads.get(figure.against)
    return None if other is None else figure.target * other.median


def _shown(figure: Figure) -> list[tuple[str, Spread]]:
    return [(name, figure.spreads[name]) for name in COLUMNS if name in figure.spreads]


def _height(figure: Figure) -> float:
    return max(len(_shown(figure)), 1 + (figure.target is not None)) * BAR_HEIGHT + ROW_GAP


def _group(figure: Figure, top: float) -> list[str]:
    """Return one figure: bars as long as their share of its largest, the target, the verdict."""
    shown, goal = _shown(figure), _goal(figure)
    longest = max([found.max for _, found in shown] + [goal or 0.0])
    scale = BAR_WIDTH / longest if longest > 0 else 0.0
    arrow = "▲" if figure.better == "higher" else "▼"
    parts = [_text(LABEL_WIDTH - 10, top + 10, f"{figure.name} {arrow}", "e")]
    for index, (name, found) in enumerate(shown):
        y = top + index * BAR_HEIGHT
        length = max(found.median * scale, 1.0)
        parts.append(_bar(LABEL_WIDTH, y, length, name, BAR_HEIGHT - 2))
        # The thin line goes from the smallest to the largest round.
        least, most = (LABEL_WIDTH + max(value, 0.0) * scale for value in (found.min, found.max))
        middle = y + (BAR_HEIGHT - 2) / 2
        parts.append(_line(least, middle, most, middle, "l"))
        end = max(LABEL_WIDTH + length, most, LABEL_WIDTH + (goal or 0.0) * scale) + 8
        parts.append(_text(end, y + 9, f"{number(found.median)} {figure.unit}".rstrip()))
    if goal is not None:
        x, bottom = LABEL_WIDTH + goal * scale, top + len(shown) * BAR_HEIGHT
        parts.append(_line(x, top - 2, x, bottom, "t"))
        parts.append(f'<path d="M{x - 4:.1f} {top - 6:.1f}h8l-4 5z" class="d"/>')
    if figure.target is not None:
        mark = {True: "✓ met", False: "✗ missed", None: "? not known"}[figure.met]
        reached = figure.ratio if figure.target_of != "ours" else figure.ours
        value = "" if reached is None else f": {number(reached)}"
        kind = "m" if figure.met is False else ""
        parts.append(_text(VERDICT_AT, top + 9, f"{mark}{value}", kind))
        parts.append(_text(VERDICT_AT, top + 9 + BAR_HEIGHT, f"target {_target(figure)}", "f"))
    elif figure.ratio is not None:
        text = f"{number(figure.ratio)} × {figure.against}"
        parts.append(_text(VERDICT_AT, top + 9, text, "f"))
    return parts


def picture(run: Run) -> str:
    """Return an SVG: one group of bars a figure, with lines from minimum to maximum, and a mark
    where the target is. ▲ stands by figures where more is better, ▼ where less is.
    """
    parts = [_text(10, 20, f"{run.started}: medians of {run.rounds} rounds", "h")]
    for index, name in enumerate(COLUMNS):
        x = 10.0 + index * LEGEND_STEP
        parts.append(_bar(x, 32, 10, name, 10))
        words = {"direct": "no mesh", "relay": "plain relays", "bound": "relays + cipher"}
        parts.append(_text(x + 14, 41, words.get(name, name)))
    x = 10.0 + len(COLUMNS) * LEGEND_STEP
    parts.append(f'<path d="M{x:.0f} 33h8l-4 5z" class="d"/>')
    parts.append(_text(x + 14, 41, "target"))
    top = float(HEAD_HEIGHT)
    aimed = [figure for figure in run.figures if figure.target is not None]
    rest = [figure for figure in run.figures if figure.target is None]
    for title, figures in (("With a target", aimed), ("Without a target", rest)):
        if not figures:
            continue
        parts.append(_text(10, top + 10, title, "h"))
        top += SECTION_HEIGHT
        for figure in figures:
            parts += _group(figure, top)
            top += _height(figure)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" '
        f'width="{WIDTH}" height="{top:.0f}">\n<style>{STYLE}</style>\n'
        '<rect width="100%" height="100%" class="paper"/>\n'
        f"{body}\n</svg>\n"
    )
