"""The scenario `policy`: what a decision costs, and how long an edit takes to its effect.

This module owns the names of its values. It is ours alone; nobody else decides as we do.
"""

from __future__ import annotations

from pathlib import Path

from meshbench import decisions, edit

__all__ = ["measure"]


def measure(tools: Path) -> dict[str, float]:
    """Return what `decisions` says of each count, by key and count, and what `edit` says."""
    values = {
        f"{key}_{count}": value
        for count in decisions.COUNTS
        for key, value in decisions.measure(count).items()
    }
    return values | edit.measure(tools)
