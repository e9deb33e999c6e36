"""Which lines of failures the access log gets when there are very many of the same kind.

This module owns the count of each kind of failure (pod, direction and reason) within a window of
time. It promises that the first of each kind are all written, that what is left out is counted and
said in one line once the window ends, and that its memory is bounded. It may not write, and knows
nothing of what the lines say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from ztunnel.observe.access_log import Line
from ztunnel.protocol import Limits

__all__ = ["WINDOW", "FailureLines", "Kind"]

WINDOW: Final = 10.0
"""Seconds: an operator who looks sees the failure within them, and at most so late how often."""

MAX_KINDS: Final = 4096
"""Kinds within one window, far more than pods fail in ways at once. Beyond it all are one kind."""

Kind = tuple[int, int, int]
"""Pod, kind of connection, and reason, as the core numbers them."""

_OTHERS: Final[Kind] = (0, 0, 0)


@dataclass(slots=True)
class _Window:
    began: float
    seen: int = 0
    left_out: int = 0
    sample: list[Line] | None = None


class FailureLines:
    """Admits lines. `clock` is monotonic, seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.most = Limits().failure_lines
        """Lines of one kind in one window; 0 is no limit."""
        self.left_out = 0
        """Lines that were not written, since the start."""
        self._clock = clock
        self._windows: dict[Kind, _Window] = {}

    def admit(self, kind: Kind, make: Callable[[], list[Line]]) -> list[Line]:
        """Return the lines of one failure that `make` makes, or none to leave them out."""
        window = self._windows.get(kind)
        if window is None:
            if len(self._windows) >= MAX_KINDS:
                kind = _OTHERS
            window = self._windows.setdefault(kind, _Window(self._clock()))
        window.seen += 1
        if not self.most or window.seen <= self.most:
            return make()
        if window.sample is None:
            window.sample = make()
            return []
        window.left_out += 1
        self.left_out += 1
        return []

    def due(self, *, all_of_them: bool = False) -> list[Line]:
        """Return a line for each kind of which lines were left out and whose window has ended."""
        now = self._clock()
        lines: list[Line] = []
        for kind, window in list(self._windows.items()):
            if not all_of_them and now < window.began + WINDOW:
                continue
            del self._windows[kind]
            if window.sample is not None:
                lines += [_with_count(line, window.left_out) for line in window.sample]
        return lines


def _with_count(line: Line, left_out: int) -> Line:
    if not left_out or line.opened:
        return line
    said = f"{line.error} [{left_out} more lines of this kind were left out]".strip()
    return msgspec.structs.replace(line, error=said)
