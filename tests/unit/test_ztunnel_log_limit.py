"""Failures in masses: the first lines are written, the rest counted and said once."""

from __future__ import annotations

import pytest

from ztunnel.observe import log_limit
from ztunnel.observe.access_log import Line
from ztunnel.observe.log_limit import WINDOW, FailureLines
from ztunnel.reasons import Reason

KIND = (1, 1, 3)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limit(clock: Clock) -> FailureLines:
    made = FailureLines(clock)
    made.most = 3
    return made


def line(error: str = "why") -> list[Line]:
    return [Line(0.0, 1, "outbound", "a", "b", "", (), 0, 0, Reason.CONNECT_REFUSED, error, "")]


def admitted(limit: FailureLines, count: int, kind: log_limit.Kind = KIND) -> int:
    return sum(bool(limit.admit(kind, line)) for _ in range(count))


def test_the_first_lines_are_written_and_the_rest_is_counted(
    limit: FailureLines, clock: Clock
) -> None:
    assert admitted(limit, 50) == 3
    assert limit.due() == []
    clock.now += WINDOW
    (said,) = limit.due()
    # 50 = 3 written, this one, and those left out.
    assert said.error == "why [46 more lines of this kind were left out]"
    assert limit.left_out == 46
    assert limit.due() == []


def test_every_window_begins_anew(limit: FailureLines, clock: Clock) -> None:
    assert admitted(limit, 3) == 3
    clock.now += WINDOW
    assert limit.due() == []
    assert admitted(limit, 3) == 3


def test_one_line_too_many_is_only_late(limit: FailureLines, clock: Clock) -> None:
    assert admitted(limit, 4) == 3
    clock.now += WINDOW
    assert [each.error for each in limit.due()] == ["why"]
    assert limit.left_out == 0


def test_kinds_do_not_share_a_limit(limit: FailureLines) -> None:
    assert admitted(limit, 9) == 3
    assert admitted(limit, 9, (2, 1, 3)) == 3
    assert admitted(limit, 9, (1, 1, 4)) == 3


def test_lines_are_not_made_in_vain(limit: FailureLines) -> None:
    made: list[list[Line]] = []

    def make() -> list[Line]:
        made.append(line())
        return made[-1]

    for _ in range(1000):
        limit.admit(KIND, make)
    assert len(made) == 4


def test_the_end_says_what_is_due(limit: FailureLines) -> None:
    assert admitted(limit, 6) == 3
    assert len(limit.due(all_of_them=True)) == 1


def test_without_a_limit_all_are_written(limit: FailureLines) -> None:
    limit.most = 0
    assert admitted(limit, 500) == 500


def test_its_memory_is_bounded(limit: FailureLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_limit, "MAX_KINDS", 2)
    written = sum(admitted(limit, 1, (pod, 1, 1)) for pod in range(100))
    # Two kinds, and all others as one.
    assert written == 2 + 3
