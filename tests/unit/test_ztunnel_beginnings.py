"""Lines of connections that have opened: each once, also of what is over before anybody looks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.certificates import NOW
from support.fake_core import carried
from support.mesh_state import identity, ip
from support.tunnel_rig import Rig, chain_of, ended
from ztunnel._core import Listed
from ztunnel.corelike import Kind
from ztunnel.observe import beginnings
from ztunnel.observe.access_log import Line
from ztunnel.observe.beginnings import Beginnings
from ztunnel.observe.listing import Listing
from ztunnel.reasons import Reason

STATES = ("deciding", "waiting", "connecting", "open")
OPEN = STATES.index("open")


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.start()
    yield made
    made.close()


def listed(rig: Rig, decision: int, **fields: Any) -> Listed:  # noqa: ANN401 - the record's
    values: dict[str, Any] = {
        "kind": Kind.INBOUND_HBONE,
        "state": OPEN,
        "pod": rig.pod,
        "decision": decision,
        "source": ip("10.2.0.1"),
        "destination": ip("10.1.0.1"),
        "started_us": int(rig.now * 1e6) - 3_000_000,
    }
    return carried(**(values | fields))


class Told:
    """What is told at each look at what the core carries."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self._listing = Listing(rig.core, rig.tunnel, STATES, lambda: rig.now, lambda: rig.wall)
        self._beginnings = Beginnings(rig.tunnel.events, rig, OPEN)

    def look(self, *carried: Listed) -> list[Line]:
        self.rig.core.carried = list(carried)
        self.rig.lines.clear()
        asyncio.run(self._beginnings.look(self._listing.look))
        return list(self.rig.lines)


@pytest.fixture
def decision(rig: Rig) -> int:
    number, _ = rig.prove(chain_of("httpbin"))
    return rig.core.answers[rig.inbound("10.2.0.1", number)]


def test_what_has_opened_is_told_once_with_all_that_is_known(rig: Rig, decision: int) -> None:
    told = Told(rig)
    one = listed(rig, decision)
    (line,) = told.look(one)
    assert line.opened
    assert line.cert.endswith(f";URI={identity('httpbin')}")
    assert (line.start, line.duration_us) == (NOW - 3, 3_000_000)
    assert (line.source, line.received, line.sent) == ("10.2.0.1:4000", 10, 20)
    assert line.error == ""
    assert told.look(one) == []
    (other,) = told.look(one, listed(rig, decision, number=2, source_port=4001))
    assert other.source == "10.2.0.1:4001"
    assert told.look() == []


def test_what_is_not_open_is_told_when_it_is(rig: Rig, decision: int) -> None:
    told = Told(rig)
    for state in range(OPEN):
        assert told.look(listed(rig, decision, state=state)) == []
    assert len(told.look(listed(rig, decision))) == 1


def test_what_has_no_decision_has_no_line(rig: Rig) -> None:
    assert Told(rig).look(listed(rig, 0)) == []


def test_what_there_was_no_room_for_is_not_told_again(
    rig: Rig, decision: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told(rig)
    rig.core.missed = 1
    one = listed(rig, decision)
    assert len(told.look(one)) == 1
    assert told.look(listed(rig, decision, number=2)) != []
    # It was among those that found no room.
    assert told.look(one) == []
    monkeypatch.setattr(beginnings, "MAX_TOLD", 1)
    told.look(one)
    assert len(told.look(listed(rig, decision, number=2))) == 1


def end_of(rig: Rig, one: Listed, reason: Reason = Reason.CLOSED, received: int = 10) -> list[Line]:
    """Have the core report the end of what it listed, and return what is told then."""
    rig.lines.clear()
    ended(
        rig,
        one.decision,
        Kind(one.kind),
        reason,
        source=one.source,
        source_port=one.source_port,
        destination=one.destination,
        destination_port=one.destination_port,
        started_us=one.started_us,
        received=received,
        sent=received,
    )
    return list(rig.lines)


def test_what_is_over_before_a_look_has_both_lines(rig: Rig, decision: int) -> None:
    Told(rig)
    begun, last = end_of(rig, listed(rig, decision))
    assert (begun.opened, last.opened) == (True, False)
    assert (begun.received, begun.sent, begun.duration_us) == (0, 0, 0)
    assert (last.received, last.sent) == (10, 10)
    assert (begun.start, begun.source, begun.cert) == (last.start, last.source, last.cert)


def test_what_has_been_told_has_no_further_beginning_at_its_end(rig: Rig, decision: int) -> None:
    told = Told(rig)
    one = listed(rig, decision)
    told.look(one)
    (last,) = end_of(rig, one)
    assert not last.opened


def test_both_lines_have_one_start_whatever_becomes_of_the_clock(rig: Rig, decision: int) -> None:
    """Whoever joins them does it by time and source."""
    told = Told(rig)
    pair = [listed(rig, decision, number=number) for number in (1, 2)]
    (begun,) = told.look(pair[0])
    rig.wall += 0.001
    (twin,) = told.look(*pair)
    rig.wall -= 3600
    (last,), (other,) = (end_of(rig, one) for one in pair)
    assert begun.start == twin.start == last.start == other.start


def test_streams_that_begin_at_once_are_each_told(rig: Rig, decision: int) -> None:
    told = Told(rig)
    pair = [listed(rig, decision, number=number) for number in (1, 2)]
    assert len(told.look(pair[0])) == 1
    assert len(told.look(*pair)) == 1
    assert [len(end_of(rig, one)) for one in pair] == [1, 1]
    # A third that nobody saw.
    assert len(end_of(rig, pair[0])) == 2


def test_what_ends_while_a_look_still_shows_it_is_told_once(rig: Rig, decision: int) -> None:
    made = Beginnings(rig.tunnel.events, rig, OPEN)
    one = listed(rig, decision)

    async def at(take: Callable[[list[Listed]], None]) -> int:
        assert len(end_of(rig, one)) == 2
        rig.lines.clear()
        take([one])
        return 0

    asyncio.run(made.look(at))
    assert rig.lines == []


@pytest.mark.parametrize("reason", [Reason.STRICT_PLAINTEXT, Reason.CLIENT_RESET])
def test_what_never_carried_anything_has_no_beginning(
    rig: Rig, decision: int, reason: Reason
) -> None:
    Told(rig)
    (last,) = end_of(rig, listed(rig, decision), reason, received=0)
    assert not last.opened


def test_what_was_cut_has_a_beginning(rig: Rig, decision: int) -> None:
    Told(rig)
    begun, last = end_of(rig, listed(rig, decision), Reason.POLICY_CHANGED)
    assert begun.opened
    assert (last.reason, last.opened) == (Reason.POLICY_CHANGED, False)


def test_the_core_writes_no_lines_itself_while_beginnings_are_told(rig: Rig) -> None:
    Told(rig)
    rig.described.clear()
    rig.outbound("10.2.0.1")
    assert rig.described == []


def test_ends_that_are_never_reported_are_forgotten(
    rig: Rig, decision: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beginnings, "MAX_TOLD", 1)
    told = Told(rig)
    gone = [listed(rig, decision, number=number, source_port=number) for number in (1, 2)]
    told.look(*gone)
    told.look()
    assert len(end_of(rig, gone[0])) == 2
