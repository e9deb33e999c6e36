"""Lines of connections that have opened: each once, and none of what is over or not open yet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from support.certificates import NOW
from support.fake_core import carried
from support.mesh_state import identity, ip
from support.tunnel_rig import Rig, chain_of
from ztunnel._core import Listed
from ztunnel.corelike import Kind
from ztunnel.observe import beginnings
from ztunnel.observe.access_log import Line
from ztunnel.observe.beginnings import Beginnings
from ztunnel.observe.listing import Listing

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
