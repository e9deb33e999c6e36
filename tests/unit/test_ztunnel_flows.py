"""Who called, in numbers: what ztunnel counts by caller, port and verdict, and how it tells it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from support.certificates import NOW
from support.fake_core import REASONS, FakeCore, record
from support.mesh_state import identity, policy
from support.tunnel_rig import HTTPBIN, SLEEP, Rig, chain_of
from ztunnel._core import SeriesCounters
from ztunnel.decisions import Numbers
from ztunnel.flow_messages import MAX_NAME
from ztunnel.observe import flow_keys, labels
from ztunnel.observe import flows as tables
from ztunnel.observe.series import SeriesTable
from ztunnel.protocol import (
    Arrival,
    Endpoint,
    Flow,
    FlowKey,
    Flows,
    Mode,
    Service,
    ServicePort,
)
from ztunnel.reasons import Reason

CALLER = identity("httpbin")
POD = SLEEP.uid


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.start()
    yield made
    made.close()


def count(
    core: FakeCore,
    series: int,
    *,
    opened: int = 0,
    closed: int = 0,
    received: int = 0,
    sent: int = 0,
    **failed: int,
) -> None:
    """Say what the core has counted; `failed` by the reasons' names."""
    reasons = tuple(failed.get(reason.name, 0) for reason in REASONS)
    core.series[series] = record(SeriesCounters, opened, closed, reasons, received, sent)


def told(table: tables.FlowTable, *, heard: bool = True) -> list[Flow]:
    """Report once; return what was told."""
    found: list[Flow] = []

    async def tell(message: Flows) -> bool:
        found.extend(message.flows)
        return heard

    asyncio.run(table.report(tell))
    return found


def proven(rig: Rig) -> int:
    number, _ = rig.prove(chain_of("httpbin"))
    return number


# --- what is a flow -----------------------------------------------------------------------------


def test_a_caller_with_identity_is_known_by_it_its_address_and_workload(rig: Rig) -> None:
    upcall = rig.inbound("10.2.0.1", proven(rig))
    count(rig.core, rig.core.answer_to(upcall).series, opened=3, closed=2, received=10, sent=20)
    assert told(rig.tunnel.flows) == [
        Flow(
            FlowKey(
                CALLER,
                "10.2.0.1",
                HTTPBIN.uid,
                Arrival.HBONE,
                POD,
                "10.1.0.1",
                8080,
                allowed=True,
                policy="istio-system/default",
            ),
            NOW,
            NOW,
            connections=3,
            open=1,
            received=10,
            sent=20,
        )
    ]


def test_an_identity_at_anothers_address_is_believed_and_the_address_is_not(rig: Rig) -> None:
    upcall = rig.inbound("10.3.0.1", proven(rig))
    count(rig.core, rig.core.answer_to(upcall).series, opened=1)
    (found,) = told(rig.tunnel.flows)
    assert (found.key.identity, found.key.source) == (CALLER, "10.3.0.1")
    assert found.key.workload == ""


def test_a_refusal_has_its_reason(rig: Rig) -> None:
    rig.apply(policy(SLEEP.uid, Mode.STRICT))
    upcall = rig.inbound("203.0.113.7")
    answer = rig.core.answer_to(upcall)
    assert answer.action == "refuse"
    count(rig.core, answer.series, STRICT_PLAINTEXT=4)
    (found,) = told(rig.tunnel.flows)
    assert found.key == FlowKey(
        "",
        "203.0.113.7",
        "",
        Arrival.PLAINTEXT,
        POD,
        "10.1.0.1",
        8080,
        allowed=False,
        reason=Reason.STRICT_PLAINTEXT.value,
        policy="istio-system/default",
    )
    assert (found.connections, found.open) == (4, 0)


def test_what_was_let_in_and_met_no_application_is_told_apart_by_reason(rig: Rig) -> None:
    upcall = rig.inbound("203.0.113.7")
    series = rig.core.answer_to(upcall).series
    count(rig.core, series, opened=1, closed=1, CONNECT_REFUSED=2)
    found = told(rig.tunnel.flows)
    assert all(flow.key.allowed for flow in found)
    assert {flow.key.reason: flow.connections for flow in found} == {"": 1, "connect_refused": 2}
    count(rig.core, series, opened=1, closed=1, CONNECT_REFUSED=3, CLIENT_RESET=1)
    found = told(rig.tunnel.flows)
    # Nothing was carried since.
    assert {flow.key.reason: flow.connections for flow in found} == {
        "connect_refused": 1,
        "client_reset": 1,
    }


def test_a_call_of_the_pod_is_told_with_whom_it_called_and_how(rig: Rig) -> None:
    upcall = rig.outbound("10.2.0.1", 80)
    count(rig.core, rig.core.answer_to(upcall).series, opened=3, closed=2, received=1, sent=2)
    (found,) = told(rig.tunnel.flows)
    assert found.key == FlowKey(
        identity("sleep"),
        "",
        POD,
        Arrival.HBONE,
        HTTPBIN.uid,
        "10.2.0.1",
        80,
        allowed=True,
        outbound=True,
    )
    assert (found.connections, found.open, found.received, found.sent) == (3, 1, 1, 2)


def test_a_call_in_plaintext_names_the_policy_that_asks_for_it(rig: Rig) -> None:
    rig.apply(policy(HTTPBIN.uid, Mode.DISABLE))
    count(rig.core, rig.core.answer_to(rig.outbound("10.2.0.1", 80)).series, opened=1)
    (found,) = told(rig.tunnel.flows)
    assert (found.key.arrival, found.key.destination) == (Arrival.PLAINTEXT, HTTPBIN.uid)
    assert (found.key.identity, found.key.policy) == ("", "istio-system/default")


def test_a_call_out_of_the_mesh_is_told_by_its_address(rig: Rig) -> None:
    count(rig.core, rig.core.answer_to(rig.outbound("203.0.113.9", 443)).series, opened=1)
    (found,) = told(rig.tunnel.flows)
    assert (found.key.destination, found.key.address, found.key.port) == ("", "203.0.113.9", 443)
    assert found.key.arrival is Arrival.PLAINTEXT


def test_a_call_through_a_service_has_the_port_of_its_workload(rig: Rig) -> None:
    port = ServicePort(80, 8000)
    endpoint = Endpoint(HTTPBIN.uid, "10.2.0.1")
    rig.apply(
        Service("default/web", "web.example", "default", ("10.96.0.9",), (port,), (endpoint,))
    )
    count(rig.core, rig.core.answer_to(rig.outbound("10.96.0.9", 80)).series, opened=1)
    (found,) = told(rig.tunnel.flows)
    assert (found.key.service, found.key.address, found.key.port) == (
        "web.example",
        "10.2.0.1",
        8000,
    )


def test_a_call_that_is_refused_here_has_its_reason(rig: Rig) -> None:
    answer = rig.core.answer_to(rig.outbound("127.0.0.1", 80))
    count(rig.core, answer.series, SELF_CALL=2)
    (found,) = told(rig.tunnel.flows)
    assert (found.key.allowed, found.key.reason, found.connections) == (False, "self_call", 2)


def test_what_the_caller_alone_knows_is_told_by_reason(rig: Rig) -> None:
    upcall = rig.outbound("10.2.0.1", 80)
    count(rig.core, rig.core.answer_to(upcall).series, CONNECT_TIMEOUT=4, TLS_ALERT=1)
    found = {flow.key.reason: flow.connections for flow in told(rig.tunnel.flows)}
    assert found == {"connect_timeout": 4, "tls_alert": 1}


def test_calls_of_the_pod_to_itself_are_no_flows(rig: Rig) -> None:
    rig.outbound("10.1.0.1", 80)
    assert len(rig.tunnel.flows) == 0


@pytest.mark.parametrize(
    "origin,name",
    [
        ("shop/web rules[0] (mesh.d/a (old).yaml:12)", "shop/web rules[0]"),
        ("istio-system/default", "istio-system/default"),
        ("settings (node_plaintext)", "settings (node_plaintext)"),
        ("", ""),
    ],
)
def test_a_policy_is_named_without_its_place(origin: str, name: str) -> None:
    assert flow_keys.policy(origin) == name


def test_a_name_is_made_harmless() -> None:
    said = flow_keys.printable("a/b\n\x1b[2J\udcff")
    assert said.isprintable()
    assert said.startswith("a/b")
    assert len(flow_keys.printable("x" * 5000)) == MAX_NAME


def test_ports_differ_where_label_sets_do_not(rig: Rig) -> None:
    one = rig.core.answer_to(rig.inbound("10.2.0.1", port=80)).series
    two = rig.core.answer_to(rig.inbound("10.2.0.1", port=81)).series
    count(rig.core, one, opened=1, closed=1)
    count(rig.core, two, opened=5, closed=5)
    assert {flow.key.port: flow.connections for flow in told(rig.tunnel.flows)} == {80: 1, 81: 5}


# --- what is told, and when ---------------------------------------------------------------------


def test_nothing_is_told_twice(rig: Rig) -> None:
    series = rig.core.answer_to(rig.inbound("203.0.113.7")).series
    assert told(rig.tunnel.flows) == []
    count(rig.core, series, opened=2, closed=2, received=7)
    assert [flow.connections for flow in told(rig.tunnel.flows)] == [2]
    assert told(rig.tunnel.flows) == []
    count(rig.core, series, opened=3, closed=3, received=9)
    assert [(flow.connections, flow.received) for flow in told(rig.tunnel.flows)] == [(1, 2)]


def test_what_could_not_be_told_is_told_later_with_what_came_since(rig: Rig) -> None:
    series = rig.core.answer_to(rig.inbound("203.0.113.7")).series
    count(rig.core, series, opened=2, closed=2)
    told(rig.tunnel.flows, heard=False)
    rig.wall += 10
    count(rig.core, series, opened=5, closed=4)
    (found,) = told(rig.tunnel.flows)
    assert (found.first, found.last) == (NOW, NOW + 10)
    assert (found.connections, found.open) == (5, 1)


def test_an_open_connection_is_told_of_every_minute(rig: Rig) -> None:
    series = rig.core.answer_to(rig.inbound("203.0.113.7")).series
    count(rig.core, series, opened=1)
    assert len(told(rig.tunnel.flows)) == 1
    rig.wall += tables.STILL_OPEN_SECONDS - 1
    assert told(rig.tunnel.flows) == []
    rig.wall += 1
    (found,) = told(rig.tunnel.flows)
    assert (found.connections, found.open, found.last) == (0, 1, int(rig.wall))
    # Also by a clock that was put back.
    rig.wall -= 3600
    assert [flow.open for flow in told(rig.tunnel.flows)] == [1]
    assert told(rig.tunnel.flows) == []


def test_what_was_open_when_it_was_told_before_is_said_once(rig: Rig) -> None:
    series = rig.core.answer_to(rig.inbound("203.0.113.7")).series
    count(rig.core, series, opened=3, closed=1)
    assert [(flow.connections, flow.carried) for flow in told(rig.tunnel.flows)] == [(3, 0)]
    count(rig.core, series, opened=4, closed=2)
    assert [(flow.connections, flow.carried) for flow in told(rig.tunnel.flows)] == [(1, 2)]


def test_what_began_and_was_told_in_vain_was_not_open_before(rig: Rig) -> None:
    series = rig.core.answer_to(rig.inbound("203.0.113.7")).series
    count(rig.core, series, opened=1)
    told(rig.tunnel.flows)
    count(rig.core, series, opened=3)
    told(rig.tunnel.flows, heard=False)
    count(rig.core, series, opened=4)
    (found,) = told(rig.tunnel.flows)
    assert (found.connections, found.carried, found.open) == (3, 1, 4)


def test_what_a_decision_counted_outlives_it(rig: Rig) -> None:
    upcall = rig.inbound("203.0.113.7")
    decision, series = rig.core.answers[upcall], rig.core.answer_to(upcall).series
    count(rig.core, series, opened=6, closed=6, sent=60)
    rig.tunnel.decisions.drop_cache()
    rig.core.free(decision)
    rig.tunnel.pump()
    assert len(rig.tunnel.flows) == 0
    assert series not in rig.core.series
    assert [flow.connections for flow in told(rig.tunnel.flows)] == [6]
    # And its label set goes on from there.
    again = rig.core.answer_to(rig.inbound("203.0.113.7")).series
    count(rig.core, again, opened=1, sent=1)
    read = [rig.tunnel.series.read(each) for each in rig.tunnel.series]
    assert [found.opened for found in read if found is not None] == [7]


def test_one_caller_under_two_label_sets_is_one_flow(rig: Rig) -> None:
    core, table = rig.core, rig.tunnel.flows
    key = FlowKey("", "10.9.9.9", "", Arrival.PLAINTEXT, POD, "10.1.0.1", 80, allowed=True)
    sets = [
        rig.tunnel.series.acquire(labels.make("destination", name, None, None, None))
        for name in ("a", "b")
    ]
    for series, opened in zip(sets, (2, 3), strict=True):
        count(core, table.acquire(key, series).number, opened=opened)
    (found,) = told(table)
    assert (found.connections, found.open) == (5, 5)


def test_reports_come_in_portions(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_TOLD", 2)
    monkeypatch.setattr(tables, "PORTION", 2)
    for last in range(1, 6):
        count(rig.core, rig.core.answer_to(rig.inbound(f"203.0.113.{last}")).series, opened=1)
    sizes: list[int] = []

    async def tell(message: Flows) -> bool:
        sizes.append(len(message.flows))
        return True

    asyncio.run(rig.tunnel.flows.report(tell))
    assert sizes == [2, 2, 1]


# --- limits -------------------------------------------------------------------------------------


def make(
    core: FakeCore, limit: int = tables.MAX_FLOWS, limit_of_pod: int = tables.MAX_OF_POD
) -> tuple[tables.FlowTable, SeriesTable]:
    numbers = Numbers()
    return (
        tables.FlowTable(core, numbers, lambda: float(NOW), limit=limit, limit_of_pod=limit_of_pod),
        SeriesTable(core, numbers, lambda: 0.0),
    )


def call(pod: str, last: int, *, allowed: bool = True) -> FlowKey:
    return FlowKey("", f"10.9.0.{last}", "", Arrival.PLAINTEXT, pod, "10.1.0.1", 80, allowed)


def test_one_pod_does_not_take_the_others_places() -> None:
    core = FakeCore()
    table, sets = make(core, limit=10, limit_of_pod=2)
    series = sets.acquire(labels.make("destination", "none", None, None, None))
    for last in range(5):
        count(core, table.acquire(call("a/scanned", last), series).number, opened=last + 1)
    count(core, table.acquire(call("a/quiet", 0), series).number, opened=1)
    assert {(flow.key.destination, flow.key.source): flow.connections for flow in told(table)} == {
        ("a/scanned", "10.9.0.0"): 1,
        ("a/scanned", "10.9.0.1"): 2,
        # One for all that found no room: the last count that the core was told.
        ("a/scanned", ""): 5,
        ("a/quiet", "10.9.0.0"): 1,
    }
    assert table.folded == 3
    core.close()


def test_what_waits_to_be_told_is_bounded_and_no_connection_is_lost() -> None:
    core = FakeCore()
    table, sets = make(core, limit=2, limit_of_pod=2)
    series = sets.acquire(labels.make("destination", "none", None, None, None))
    for last in range(6):
        flow = table.acquire(call("a/b", last), series)
        count(core, flow.number, opened=1, closed=1)
        # Gone before anybody has looked: nodeagent is away, decisions come and go.
        table.release(flow)
    found = {flow.key.source: flow.connections for flow in told(table)}
    assert found == {"10.9.0.0": 1, "10.9.0.1": 1, "": 4}
    assert series.retired.opened == 6
    core.close()


def test_one_pod_does_not_take_the_others_places_while_nobody_is_told() -> None:
    """Nodeagent is away; decisions come and go."""
    core = FakeCore()
    table, sets = make(core, limit=10, limit_of_pod=2)
    series = sets.acquire(labels.make("destination", "none", None, None, None))

    def called(key: FlowKey) -> None:
        flow = table.acquire(key, series)
        count(core, flow.number, opened=1, closed=1)
        table.release(flow)

    for last in range(20):
        called(call("a/scanned", last))
    called(call("a/quiet", 0))
    found = {(flow.key.destination, flow.key.source): flow.connections for flow in told(table)}
    assert found == {
        ("a/scanned", "10.9.0.0"): 1,
        ("a/scanned", "10.9.0.1"): 1,
        ("a/scanned", ""): 18,
        ("a/quiet", "10.9.0.0"): 1,
    }
    # What has been told makes room again.
    called(call("a/scanned", 30))
    assert [flow.key.source for flow in told(table)] == ["10.9.0.30"]
    core.close()


def test_places_are_given_back() -> None:
    core = FakeCore()
    table, sets = make(core, limit=1, limit_of_pod=1)
    series = sets.acquire(labels.make("destination", "none", None, None, None))
    for last in range(3):
        table.release(table.acquire(call("a/b", last), series))
    assert (len(table), table.folded) == (0, 0)
    assert set(core.series) == {series.number}
    core.close()


# --- what is known to have been told ------------------------------------------------------------


def messages(table: tables.FlowTable, *, heard: bool = True, **how: bool) -> list[Flows]:
    found: list[Flows] = []

    async def tell(message: Flows) -> bool:
        found.append(message)
        return heard

    asyncio.run(table.report(tell, **how))
    return found


def test_reports_are_numbered_and_say_until_when_all_has_been_told(rig: Rig) -> None:
    table = rig.tunnel.flows
    series = rig.core.answer_to(rig.inbound("203.0.113.7")).series
    (first,) = messages(table)
    assert (first.number, first.since, first.until, first.flows) == (1, NOW, NOW, ())
    rig.wall += 5
    count(rig.core, series, opened=1, closed=1)
    # What did not get through keeps its number.
    (lost,) = messages(table, heard=False)
    (again,) = messages(table)
    assert (lost.number, again.number) == (2, 2)
    assert (again.since, again.until, again.more, again.last) == (NOW, NOW + 5, False, False)
    assert len(again.flows) == 1


def test_while_nobody_calls_it_is_said_so_now_and_then_and_when_asked(rig: Rig) -> None:
    table = rig.tunnel.flows
    assert len(messages(table)) == 1
    rig.wall += tables.QUIET_SECONDS - 1
    assert messages(table) == []
    assert [each.until for each in messages(table, asked=True)] == [NOW + tables.QUIET_SECONDS - 1]
    rig.wall += tables.QUIET_SECONDS
    assert len(messages(table)) == 1
    # Also by a clock that was put back.
    rig.wall -= 3600
    assert len(messages(table)) == 1


def test_only_the_last_portion_says_that_all_has_been_told(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_TOLD", 2)
    for last in range(1, 5):
        count(rig.core, rig.core.answer_to(rig.inbound(f"203.0.113.{last}")).series, opened=1)
    found = messages(rig.tunnel.flows, last=True)
    assert [(each.number, each.more, each.last) for each in found] == [
        (1, True, False),
        (2, False, True),
    ]


def test_nothing_is_told_behind_the_last_word(rig: Rig) -> None:
    table = rig.tunnel.flows
    assert [each.last for each in messages(table, last=True, heard=False)] == [True]
    assert [(each.number, each.last) for each in messages(table, last=True)] == [(1, True)]
    rig.wall += 3600
    assert messages(table, asked=True) == []
