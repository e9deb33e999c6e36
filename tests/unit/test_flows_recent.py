"""The last hour of flows: windows to the slice, what is open, and what gives way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.flows import Recorder, _recent, _recorder
from nodeagent.flows._recent import RECENT_SECONDS, SLICE_SECONDS, Recent
from nodeagent.settings.flows import Keep
from ztunnel.protocol import Arrival, Flow, FlowKey, Flows

NOW = 1_700_000_000 // 3600 * 3600
KEY = FlowKey("", "10.0.0.9", "shop/web", Arrival.PLAINTEXT, "shop/db", "10.0.0.1", 80, True)


def told(at: int, connections: int = 1, *, carried: int = 0, is_open: int = 0, **key: Any) -> Flow:  # noqa: ANN401 - fields of a key
    return Flow(msgspec.structs.replace(KEY, **key), at, at, connections, is_open, 10, 20, carried)


def heard(*flows: Flow) -> Recent:
    recent = Recent(NOW)
    for flow in flows:
        recent.add([flow], flow.last)
    return recent


def numbers(recent: Recent, now: int, age: int) -> list[tuple[int, int]]:
    return [(each.connections, each.carried) for each in recent.read(now, age).flows]


def test_a_window_has_what_was_told_in_it() -> None:
    recent = heard(told(NOW, 4), told(NOW + 100, 2), told(NOW + 105, 3))
    assert numbers(recent, NOW + 110, 60) == [(5, 0)]
    assert numbers(recent, NOW + 110, 3600) == [(9, 0)]
    assert numbers(recent, NOW + 300, 60) == []
    (found,) = recent.read(NOW + 110, 60).flows
    assert (found.first.timestamp(), found.last.timestamp()) == (NOW + 100, NOW + 105)
    assert (found.received, found.sent, found.source) == (20, 40, "10.0.0.9")


def test_what_was_open_when_the_window_began_is_counted_once() -> None:
    recent = heard(
        told(NOW, 5, is_open=5),
        told(NOW + 60, 1, carried=5, is_open=6),
        told(NOW + 120, 2, carried=6),
    )
    assert numbers(recent, NOW + 130, 3600) == [(8, 0)]
    assert numbers(recent, NOW + 130, 75) == [(3, 5)]
    assert numbers(recent, NOW + 130, 15) == [(2, 6)]


def test_what_is_open_and_still_is_counts_in_a_window_in_which_nothing_was_told() -> None:
    recent = heard(told(NOW, 5, is_open=2))
    assert numbers(recent, NOW + 100, 30) == [(0, 2)]
    # Its tunnel would have said so again: it has gone.
    assert numbers(recent, NOW + 400, 30) == []
    closed = heard(told(NOW, 5, is_open=2), told(NOW + 20, 0, carried=2, is_open=0))
    assert numbers(closed, NOW + 100, 30) == []


def test_what_is_told_late_is_of_its_own_time() -> None:
    recent = Recent(NOW)
    recent.add([told(NOW - 900)], NOW)
    assert numbers(recent, NOW, 60) == []
    assert recent.read(NOW, 60).flows == ()


def test_it_says_from_when_on_it_has_heard() -> None:
    recent = heard(told(NOW + 10))
    assert not recent.read(NOW + 100, 300).whole
    assert recent.read(NOW + 100, 60).whole


def test_a_window_in_the_slice_in_which_it_began_is_whole() -> None:
    recent = Recent(NOW + 5)
    recent.add([told(NOW + 6)], NOW + 6)
    window = recent.read(NOW + 9, 2)
    assert (window.since, window.whole) == (NOW + 5, True)
    assert not recent.read(NOW + 9, 5).whole


def test_a_clock_that_is_put_back_begins_anew() -> None:
    recent = heard(told(NOW + 7200), told(NOW))
    window = recent.read(NOW + 60, 3600)
    assert [each.connections for each in window.flows] == [1]
    assert window.began == NOW


def test_the_oldest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recent, "MAX_ENTRIES", 3)
    recent = heard(*(told(NOW + n * SLICE_SECONDS, port=n + 1) for n in range(6)))
    window = recent.read(NOW + 6 * SLICE_SECONDS, 3600)
    assert sorted(each.port for each in window.flows) == [4, 5, 6]
    assert window.began == NOW + 3 * SLICE_SECONDS
    assert len(recent._keys) == 3


def test_an_hour_is_kept_and_no_more() -> None:
    recent = heard(*(told(NOW + at, port=80 + at % 7) for at in range(0, 5 * RECENT_SECONDS, 3)))
    now = NOW + 5 * RECENT_SECONDS
    assert recent.read(now, RECENT_SECONDS).whole
    slices = [*recent._coarse, *recent._fine]
    assert len(slices) < 130
    assert recent._entries == sum(len(each.sums) for each in slices)
    assert set(recent._keys) <= {key for each in slices for key in each.sums}
    counted = sum(each.connections for each in recent.read(now, 1800).flows)
    assert 600 <= counted <= 620


def test_seconds_are_told_of_the_last_minutes_and_minutes_of_the_last_hour() -> None:
    recent = heard(*(told(NOW + at) for at in range(0, 3600, 5)))
    now = NOW + 3600
    for age, most in ((7, 5), (290, 5), (1790, 60)):
        window = recent.read(now, age)
        assert age <= now - window.since < age + most
        assert numbers(recent, now, age) == [((now - window.since) // 5, 0)]


steps = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40
)


@given(steps, st.integers(0, 1800))
def test_each_connection_that_was_open_in_a_window_is_counted_once(
    reports: list[tuple[int, int, int]], age: int
) -> None:
    """Against a list of connections, with when each began and ended."""
    recent, at, is_open = Recent(NOW), NOW, 0
    born: list[list[int]] = []
    for wait, begin, end in reports:
        at += wait
        before = is_open
        born += [[at, 2**40] for _ in range(begin)]
        alive = [each for each in born if each[1] > at]
        for each in alive[:end]:
            each[1] = at
        is_open = sum(each[1] > at for each in born)
        if begin or end or is_open:
            recent.add([told(at, begin, carried=before, is_open=is_open)], at)
    window = recent.read(at, age)
    expected = sum(begin >= window.since or end >= window.since for begin, end in born)
    assert sum(each.connections + each.carried for each in window.flows) == expected


# --- as it is asked for ---------------------------------------------------------------------------


def recorder(tmp_path: Path, clock: list[int], **keep: int) -> Recorder:
    return Recorder(tmp_path / "flows.db", Keep(**keep), lambda: clock[0], lambda: clock[0])


def test_a_short_window_is_told_from_memory_and_a_long_one_from_the_file(tmp_path: Path) -> None:
    clock = [NOW + 10]
    first = recorder(tmp_path, clock)
    first.start()
    first.put(
        1,
        Flows(
            (
                told(NOW + 10, 4),
                told(NOW + 10, 1, outbound=True),
            ),
            1,
            NOW,
            NOW,
        ),
    )
    first.stop(10)
    clock[0] = NOW + 3000
    again = recorder(tmp_path, clock)
    again.start()
    again.put(1, Flows((told(NOW + 3000, 2),), 1, NOW, NOW))
    try:
        short = again.seen("n", 300)
        assert [each.connections for each in short.flows] == [2]
        assert short.oldest is not None
        assert short.oldest.timestamp() == NOW + 3000
        long = again.seen("n", 3000)
        assert sorted(each.connections for each in long.flows) == [1, 6]
        # Whole hours: it says so.
        assert long.since.timestamp() == NOW
    finally:
        again.stop(10)


def test_what_the_file_does_not_know_of_either_is_told_from_memory(tmp_path: Path) -> None:
    clock = [NOW + 1200]
    kept = recorder(tmp_path, clock)
    kept.start()
    kept.put(1, Flows((told(NOW + 1200, 2),), 1, NOW + 1200, NOW + 1200))
    clock[0] = NOW + 1260
    try:
        found = kept.seen("n", 3600)
        assert [each.connections for each in found.flows] == [2]
        assert found.since.timestamp() == NOW + 1260 - 3600
        # It has heard everything since then and no longer.
        assert found.complete is not None
        assert found.complete.timestamp() == NOW + 1200
    finally:
        kept.stop(10)


def test_a_tunnel_that_says_nothing_any_more_leaves_a_gap(tmp_path: Path) -> None:
    clock = [NOW]
    kept = recorder(tmp_path, clock)
    kept.put(1, Flows((), 1, NOW, NOW))
    clock[0] = NOW + 60
    assert kept.seen("n", 45).complete is not None
    clock[0] = NOW + 600
    assert kept.seen("n", 45).complete is None


def test_where_nothing_is_to_be_recorded_nothing_is_kept(tmp_path: Path) -> None:
    quiet = recorder(tmp_path, [NOW], retention_hours=0)
    quiet.put(1, Flows((told(NOW),), 1, NOW, NOW))
    found = quiet.seen("n", 60)
    assert (found.flows, found.problem) == ((), _recorder.OFF)
