"""Of which time the flows in memory have everything: crashes and lost reports are gaps."""

from __future__ import annotations

import pytest

from nodeagent.flows._heard import MAX_SPANS, Heard
from ztunnel.protocol import Flows

NOW = 1_770_000_000
OLD, NEW = 7, 8


def told(number: int, until: int, since: int = 0, **changes: bool) -> Flows:
    return Flows(flows=(), number=number, since=NOW + since, until=NOW + until, **changes)


@pytest.fixture
def heard() -> Heard:
    return Heard(NOW)


def test_nothing_is_known_before_anything_is_told(heard: Heard) -> None:
    assert heard.since(NOW + 1) is None


def test_reports_one_after_the_other_leave_no_gap(heard: Heard) -> None:
    for number in range(1, 5):
        heard.add(OLD, told(number, 30 * number, 5))
    assert heard.since(NOW + 125) == NOW + 5


def test_a_portion_that_goes_on_covers_nothing_yet(heard: Heard) -> None:
    heard.add(OLD, told(1, 10))
    heard.add(OLD, told(2, 200, more=True))
    assert heard.since(NOW + 200) is None
    heard.add(OLD, told(3, 200))
    assert heard.since(NOW + 200) == NOW


def test_a_tunnel_that_was_there_before_has_told_all_since_then(heard: Heard) -> None:
    heard.add(OLD, told(41, 20, -900))
    assert heard.since(NOW + 25) == NOW


def test_a_crash_is_a_gap(heard: Heard) -> None:
    heard.add(OLD, told(1, 60))
    heard.add(NEW, told(1, 100, 70))
    assert heard.since(NOW + 100) == NOW + 70


def test_an_end_in_good_order_is_none(heard: Heard) -> None:
    heard.add(OLD, told(1, 60, last=True))
    heard.add(NEW, told(1, 100, 70))
    assert heard.since(NOW + 100) == NOW


def test_both_tunnels_of_an_upgrade_are_heard(heard: Heard) -> None:
    heard.add(OLD, told(1, 60))
    heard.add(NEW, told(1, 70, 61))
    heard.add(OLD, told(2, 80))
    heard.add(NEW, told(2, 300))
    assert heard.since(NOW + 300) == NOW + 80 + 90, "the old one ended without a last word"
    heard = Heard(NOW)
    heard.add(OLD, told(1, 60))
    heard.add(NEW, told(1, 70, 61))
    heard.add(OLD, told(2, 80, last=True))
    heard.add(NEW, told(2, 300))
    assert heard.since(NOW + 300) == NOW


def test_a_lost_report_is_a_gap(heard: Heard) -> None:
    heard.add(OLD, told(1, 30))
    heard.add(OLD, told(3, 90))
    assert heard.since(NOW + 95) == NOW + 91


def test_silence_is_a_gap_now(heard: Heard) -> None:
    heard.add(OLD, told(1, 30))
    assert heard.since(NOW + 100) == NOW
    assert heard.since(NOW + 130) is None


def test_a_clock_that_was_ahead_covers_nothing(heard: Heard) -> None:
    heard.add(OLD, told(1, 7200, 3600))
    heard.add(NEW, told(1, 10))
    assert heard.since(NOW + 10) == NOW


def test_a_tunnel_that_crashes_all_the_time_is_held_in_bounds(heard: Heard) -> None:
    for number in range(10 * MAX_SPANS):
        heard.add(number, told(1, 2 * number + 1, 2 * number))
    assert len(heard._spans) == MAX_SPANS
    assert len(heard._numbers) <= MAX_SPANS + 1
    assert heard.since(NOW + 20 * MAX_SPANS) == NOW + 2 * (10 * MAX_SPANS - 1)
