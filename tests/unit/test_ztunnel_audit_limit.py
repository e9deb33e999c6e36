"""How many audit lines there may be: by the second, and by source."""

from __future__ import annotations

import pytest

from ztunnel.audit import limit
from ztunnel.audit.limit import SHARE, Bucket

ONE, OTHER = b"one", b"other"


def bucket(rate: int, now: float = 100.0) -> Bucket:
    made = Bucket(now)
    made.limit(rate)
    return made


def admitted(of: Bucket, source: bytes, tries: int, now: float) -> int:
    return sum(of.admit(source, now) for _ in range(tries))


def sources(number: int) -> list[bytes]:
    return [b"%d" % each for each in range(number)]


def test_a_second_has_so_many_lines_and_the_rest_is_counted() -> None:
    found = bucket(100)
    assert sum(found.admit(source, 100.0) for source in sources(250)) == 100
    assert found.left_out == 150
    assert sum(found.admit(source, 100.5) for source in sources(250)) == 50
    assert sum(found.admit(source, 200.0) for source in sources(250)) == 100


def test_who_floods_the_log_hides_nobody_else() -> None:
    found = bucket(100)
    assert admitted(found, ONE, 10_000, 100.0) == 100 // SHARE
    assert found.admit(OTHER, 100.0)
    assert admitted(found, ONE, 10_000, 101.0) == 100 // SHARE
    assert found.left_out == 2 * (10_000 - 100 // SHARE)


def test_a_low_rate_still_has_a_line_for_each_source() -> None:
    found = bucket(1)
    assert found.admit(ONE, 100.0)
    assert not found.admit(ONE, 100.0)
    assert found.admit(ONE, 101.0)


def test_without_a_limit_all_are_written() -> None:
    assert admitted(bucket(0), ONE, 10_000, 100.0) == 10_000


def test_a_clock_that_stands_or_runs_backwards_gives_nothing() -> None:
    found = bucket(4)
    assert sum(found.admit(source, 100.0) for source in sources(9)) == 4
    assert sum(found.admit(source, 99.0) for source in sources(9)) == 0


def test_its_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "MAX_SOURCES", 3)
    found = bucket(1000)
    written = sum(found.admit(source, 100.0) for source in sources(1000))
    # Three, and all others as one.
    assert written == 3 + 1000 // SHARE
    assert len(found._sources) <= 4


def test_a_rate_that_is_told_again_is_no_new_second() -> None:
    found = bucket(4)
    assert sum(found.admit(source, 100.0) for source in sources(9)) == 4
    found.limit(4)
    assert not found.admit(ONE, 100.0)
    found.limit(8)
    assert found.admit(ONE, 100.0)
