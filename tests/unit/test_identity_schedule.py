"""When SVIDs are renewed, retried and given up, under clocks that jump."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.identity import _schedule as schedule
from nodeagent.identity._schedule import Now

chances = st.floats(min_value=0, max_value=1, exclude_max=True)


@given(chances)
def test_renewal_falls_around_two_thirds(chance: float) -> None:
    timing = schedule.plan(1000, 4600, Now(1000, 7), chance)
    assert 0.60 * 3600 <= timing.renew_wall - 1000 <= 0.70 * 3600
    assert timing.renew_monotonic - 7 == timing.renew_wall - 1000
    assert timing.ends_monotonic == 7 + 3600


def test_different_chances_spread_the_renewals() -> None:
    moments = {schedule.plan(0, 3600, Now(0, 0), n / 10).renew_wall for n in range(10)}
    assert len(moments) == 10


@given(chances, st.floats(min_value=0, max_value=3599))
def test_an_svid_is_due_before_it_ends_however_old_it_comes(chance: float, age: float) -> None:
    timing = schedule.plan(0, 3600, Now(age, 0), chance)
    assert timing.renew_wall >= age + 1
    assert timing.renew_wall <= 3600 or 3600 - age < 4


def test_either_clock_makes_it_due_and_ends_it() -> None:
    timing = schedule.plan(0, 3600, Now(100, 100), 0.5)
    assert not timing.due(Now(100, 100))
    assert timing.due(Now(3000, 101)), "the wall clock jumped forward"
    assert timing.due(Now(50, 3000)), "the wall clock was turned back"
    assert timing.due(Now(-1, 101)), "before its beginning"
    assert not timing.expired(Now(3599, 3599))
    assert timing.expired(Now(3600, 101))
    assert timing.expired(Now(50, 3600))


def test_the_next_change_is_the_nearest_in_the_future() -> None:
    timing = schedule.plan(0, 3600, Now(0, 0), 0)
    assert timing.next_change(Now(0, 0)) == timing.renew_wall
    assert timing.next_change(Now(3000, 3000)) == 600
    assert timing.next_change(Now(3600, 3600)) == 0


@given(st.integers(min_value=1, max_value=10**6), chances)
def test_backoff_grows_and_is_bounded(failures: int, chance: float) -> None:
    delay = schedule.backoff(failures, chance, retryable=True)
    assert 0.5 <= delay <= 60
    assert schedule.backoff(failures + 1, chance, retryable=True) >= delay
    assert 30 <= schedule.backoff(failures, chance, retryable=False) <= 60


def test_backoff_doubles_with_jitter() -> None:
    assert [schedule.backoff(n, 0, retryable=True) for n in (1, 2, 3)] == [0.5, 1, 2]
    assert schedule.backoff(1, 0.5, retryable=True) == 0.75
