from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from support.fake_core import BOUNDS_US, FakeCore, record
from support.mesh_state import policy, workload
from support.tunnel_rig import HTTPBIN, SLEEP, Rig, chain_of
from ztunnel._core import SeriesCounters
from ztunnel.observe import labels, stats
from ztunnel.observe.counted import LOOK_SECONDS, OTHER, ByPolicy, Counted, Plaintext
from ztunnel.observe.series import MAX_SERIES
from ztunnel.observe.tallies import EXPIRY_SECONDS, Tally
from ztunnel.protocol import Arrival, FlowKey, Mode, Removal
from ztunnel.reasons import Reason

ACCESS_LOG: Any = SimpleNamespace(written=0, dropped=0)
CONTROL: Any = SimpleNamespace(connected=True, version=1)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def take(rig: Rig) -> stats.Picture:
    deadlines = ("connect", "idle")
    return asyncio.run(
        stats.take(rig.tunnel, rig.core, CONTROL, ACCESS_LOG, lambda: rig.now, BOUNDS_US, deadlines)
    )


def count(core: FakeCore, series: int, opened: int, **failed: int) -> None:
    by_reason = tuple(failed.get(reason.name, 0) for reason in Reason)
    core.series[series] = record(SeriesCounters, opened, 0, by_reason, 0, 0)


def opened(picture: stats.Picture) -> dict[str, int]:
    names = [labels.value(each.labels, "source_workload") for each in picture.rows.series]
    return dict(zip(names, picture.rows.opened, strict=True))


# --- a tally ------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_finds_no_room_is_counted_for_the_rest_and_how_often() -> None:
    tally: Tally[str] = Tally(Clock(), 2, lambda _: "rest")
    for key in ("a", "b", "c", "a", "d"):
        tally.add(key, 2)
    assert dict(tally.items()) == {"a": 4, "b": 2, "rest": 4}
    assert (tally.overflowed, tally.expired) == (4, 0)


def test_keys_of_a_tally_that_nothing_has_counted_for_long_give_way() -> None:
    clock = Clock()
    tally: Tally[str] = Tally(clock, 2, lambda _: "rest")
    tally.add("a")
    tally.add("b")
    clock.now += EXPIRY_SECONDS
    tally.add("b")
    tally.add("c")
    assert dict(tally.items()) == {"b": 2, "c": 1}
    assert (tally.overflowed, tally.expired) == (0, 1)


def test_only_what_is_gone_and_idle_expires() -> None:
    clock = Clock()
    tally: Tally[str] = Tally(clock, 9, lambda _: "rest")
    tally.add("gone")
    tally.add("here")
    tally.add("gone, but busy")
    clock.now += EXPIRY_SECONDS + 1
    tally.add("gone, but busy")
    tally.expire(lambda key: key.startswith("gone"))
    assert dict(tally.items()) == {"here": 1, "gone, but busy": 2}
    assert tally.expired == 1


# --- the tunnel's counts ------------------------------------------------------------------------


def test_label_sets_of_gone_workloads_expire_and_others_stay(rig: Rig) -> None:
    rig.start()
    upcalls = [rig.inbound("203.0.113.7"), rig.inbound("10.3.0.1"), rig.inbound("10.2.0.1")]
    numbers = [rig.core.answers[each] for each in upcalls]
    assert set(opened(take(rig))) == {"", "legacy", "httpbin"}
    rig.apply(removals=(Removal("workload", "default/legacy"),))
    rig.tunnel.decisions.drop_cache()
    for number in numbers:
        rig.core.free(number)
    rig.tunnel.pump()
    rig.now += EXPIRY_SECONDS - 1
    rig.tunnel.tick()
    assert set(opened(take(rig))) == {"", "legacy", "httpbin"}
    rig.now += LOOK_SECONDS + 1
    rig.tunnel.tick()
    found = take(rig)
    assert set(opened(found)) == {"", "httpbin"}
    assert found.expired["istio_tcp_connections"] == 1
    assert len(rig.core.series) == len(found.rows)


def test_a_label_set_that_is_in_use_does_not_expire(rig: Rig) -> None:
    rig.start()
    rig.inbound("10.3.0.1")
    rig.apply(removals=(Removal("workload", "default/legacy"),))
    rig.now += EXPIRY_SECONDS + LOOK_SECONDS
    rig.tunnel.tick()
    assert "legacy" in opened(take(rig))


def test_a_series_is_the_sum_of_its_flows_those_that_have_ended_too(rig: Rig) -> None:
    rig.start()
    first, second = (rig.inbound("203.0.113.7", port=port) for port in (81, 82))
    for upcall, number in ((first, 3), (second, 4)):
        count(rig.core, rig.core.answer_to(upcall).series, number, CONNECT_REFUSED=number)
    found = take(rig)
    assert opened(found) == {"": 7}
    assert list(found.rows.failed.values()) == [7]
    decision = rig.core.answers[first]
    rig.tunnel.decisions.drop_cache()
    rig.core.free(decision)
    rig.tunnel.pump()
    found = take(rig)
    assert opened(found) == {"": 7}
    assert list(found.rows.failed.values()) == [7]


def test_what_comes_and_goes_while_the_copy_is_made_does_no_harm(rig: Rig) -> None:
    rig.start()
    upcalls = [rig.inbound(f"203.0.113.{last}") for last in range(3)]
    decided = [rig.core.answers[each] for each in upcalls]
    table = rig.tunnel.series
    sets = [labels.make("source", str(number), None, None, None) for number in range(300)]
    held = [table.acquire(each) for each in sets]

    async def meanwhile() -> stats.Picture:
        copying = asyncio.ensure_future(
            stats.take(
                rig.tunnel, rig.core, CONTROL, ACCESS_LOG, lambda: rig.now, BOUNDS_US, ("a", "b")
            )
        )
        await asyncio.sleep(0)
        for series in held:
            table.release(series)
        table._limit = 1
        table.acquire(labels.make("source", "new", None, None, None))
        rig.tunnel.decisions.drop_cache()
        for number in decided:
            rig.core.free(number)
        rig.tunnel.pump()
        return await copying

    found = asyncio.run(meanwhile())
    assert len(found.rows) >= stats.PORTION
    assert len(found.rows) == len(found.rows.sent)


def test_the_loop_turns_while_a_large_copy_is_made(rig: Rig) -> None:
    rig.start()
    for number in range(4 * stats.PORTION):
        rig.tunnel.series.acquire(labels.make("source", str(number), None, None, None))

    async def turns() -> int:
        copying = asyncio.ensure_future(
            stats.take(
                rig.tunnel, rig.core, CONTROL, ACCESS_LOG, lambda: rig.now, BOUNDS_US, ("a", "b")
            )
        )
        turned = 0
        while not copying.done():
            await asyncio.sleep(0)
            turned += 1
        return turned

    assert asyncio.run(turns()) >= 4


def test_plaintext_is_counted_by_who_called_whom_once(rig: Rig) -> None:
    rig.start()
    stranger, legacy = rig.inbound("203.0.113.7"), rig.inbound("10.3.0.1")
    count(rig.core, rig.core.answer_to(stranger).series, 2)
    count(rig.core, rig.core.answer_to(legacy).series, 3)
    for _ in range(2):
        asyncio.run(rig.tunnel.flows.collect())
    assert take(rig).plaintext == {
        Plaintext("", SLEEP.uid, allow=True): 2,
        Plaintext("default/legacy", SLEEP.uid, allow=True): 3,
    }


def test_connections_are_counted_by_what_decided(rig: Rig) -> None:
    rig.start(policy(SLEEP.uid, Mode.STRICT))
    number, _ = rig.prove(chain_of("httpbin"))
    refused, allowed = rig.inbound("203.0.113.7"), rig.inbound("10.2.0.1", number)
    strict = tuple(4 if reason is Reason.STRICT_PLAINTEXT else 0 for reason in Reason)
    series = rig.core.answer_to(refused).series
    rig.core.series[series] = record(SeriesCounters, 0, 0, strict, 0, 0)
    count(rig.core, rig.core.answer_to(allowed).series, 3)
    for _ in range(2):
        asyncio.run(rig.tunnel.flows.collect())
    found = {(by.rule, by.allow): number for by, number in take(rig).by_policy.items()}
    assert sorted(number for number in found.values()) == [3, 4]
    assert {allow: number for (_, allow), number in found.items()} == {False: 4, True: 3}
    assert all("yaml:" not in rule for rule, _ in found)


def test_what_found_no_room_is_no_rules() -> None:
    counted = Counted(Clock())
    key = FlowKey("", "10.9.0.1", "", Arrival.PLAINTEXT, SLEEP.uid, "10.1.0.1", 80, allowed=True)
    counted.came_in(key, 2)
    counted.came_in(key.folded(), 3)
    missing = msgspec.structs.replace(key, allowed=False, reason="policy_missing")
    counted.came_in(missing, 4)
    assert dict(counted.by_policy.items()) == {
        ByPolicy("", "", allow=True): 2,
        ByPolicy(OTHER, "", allow=True): 3,
        ByPolicy("", "policy_missing", allow=False): 4,
    }


def test_a_label_set_costs_no_more_than_is_said() -> None:
    assert MAX_SERIES * 5 >= 50_000
    assert len(labels.LABEL_NAMES) + 1 == 27
    assert HTTPBIN.uid in set(
        labels.workloads(labels.make("source", "none", workload("a", "10.0.0.1"), HTTPBIN, None))
    )


def calls_of_a_scrape(rig: Rig) -> int:
    """Return how many functions a scrape calls, C's and Python's, once the labels are spelled."""
    calls = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    def scrape() -> None:
        for _ in stats.render(take(rig), "")[1]:
            pass

    scrape()
    sys.setprofile(profile)
    try:
        scrape()
    finally:
        sys.setprofile(None)
    return calls


def test_a_label_set_adds_few_steps_to_a_scrape(rig: Rig) -> None:
    """Ten thousand are to take a tenth of a second: their cost is bounded by what is called."""
    rig.start()
    counts: list[int] = []
    for size in (1000, 2000):
        while len(rig.tunnel.series) < size:
            number = len(rig.tunnel.series)
            rig.tunnel.series.acquire(labels.make("source", f"{number}", None, None, None))
        counts.append(calls_of_a_scrape(rig))
    # To read and copy it, nine; for each of its four lines, one.
    assert (counts[1] - counts[0]) / 1000 <= 16
