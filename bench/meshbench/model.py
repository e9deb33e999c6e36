"""What a run consists of, as values.

This module owns the form of a run's file. It promises plain data that survives JSON unchanged, that
files of earlier forms are still read, and it touches nothing.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

__all__ = ["BOUND", "SCHEMA", "SUBJECTS", "Figure", "Run", "Sample", "Spread", "decode"]

SUBJECTS: Final = ("direct", "ours", "envoy", "relay")
"""No mesh; both our daemons on each node; an Envoy in each pod; plaintext relays."""
BOUND: Final = "bound"
"""Not measured but derived: what the relays would do if they also enciphered (`figures`)."""

SCHEMA: Final = 2
"""2 added `target_of` and `bound` to figures. Fields that a file lacks take their defaults."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario on one subject in one round; rounds count from 1.

    `busy` is the share of all processors (0 to 1) that others used just before.
    """

    round: int
    subject: str
    scenario: str
    values: dict[str, float]
    busy: float


class Spread(msgspec.Struct, frozen=True):
    """What the rounds gave."""

    min: float
    median: float
    max: float


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table: medians over the rounds, None where a subject was not measured.

    `ratio` is ours over `against`, the median of the ratios within each round. `target` bounds what
    `target_of` names: "ratio", or "ours" in the figure's unit; to be reached or exceeded when
    higher is `better`, else not to be exceeded. `spreads` has the same keys as the medians, with
    the minimum and maximum beside them.
    """

    name: str
    unit: str
    better: str
    ours: float | None
    envoy: float | None
    direct: float | None
    relay: float | None
    bound: float | None = None
    against: str
    ratio: float | None
    target: float | None
    target_of: str | None = None
    met: bool | None
    spreads: dict[str, Spread]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run. `started` is UTC, as in the file's name.

    `unmeasured` names figures that have a target and no value: they were asked for and failed.
    """

    schema: int = SCHEMA
    started: str
    seconds: float
    rounds: int
    host: dict[str, Any]
    method: dict[str, Any]
    notes: list[str]
    figures: list[Figure]
    unmeasured: list[str] = []
    samples: list[Sample]


def decode(data: bytes) -> Run:
    """Return the run of a file of this form or an earlier one. Raises msgspec.MsgspecError."""
    return msgspec.json.decode(data, type=Run)
