from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgspec
import pytest

from support.fake_core import FakeCore, record
from support.mesh_state import SETTINGS, ip, policy, service, workload
from support.tunnel_rig import (
    HTTPBIN,
    LEGACY,
    MESH,
    POD,
    SLEEP,
    Rig,
    chain_of,
    credential,
    run,
)
from ztunnel import decisions as tables
from ztunnel import tunnel
from ztunnel._core import Ended
from ztunnel.corelike import Kind
from ztunnel.observe import labels
from ztunnel.observe.series import SeriesTable
from ztunnel.protocol import (
    PROBE_ADDRESSES,
    PROBE_PORT,
    Deadlines,
    Endpoint,
    Removal,
)
from ztunnel.reasons import Reason

PEER_IDLE = Deadlines().idle + Deadlines().ping_interval + tunnel.PEER_MARGIN


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


# --- outbound ------------------------------------------------------------------------------------


def test_a_tunnel_names_peer_authority_baggage_and_host(rig: Rig) -> None:
    rig.start(service("web", ("10.96.0.1",), (Endpoint(HTTPBIN.uid, ""),)))
    decision = rig.core.answer_to(rig.outbound("10.96.0.1", 80))
    assert decision.action == "tunnel"
    peer, sent_to, baggage, host = decision.arguments
    assert rig.core.peers[peer][:3] == (rig.pod, ip("10.2.0.1"), 15008)
    assert sent_to == "10.2.0.1:8080"
    assert "k8s.namespace.name=default" in baggage
    assert host == "web.default.svc.cluster.local"


def test_one_pool_serves_all_ports_of_a_workload(rig: Rig) -> None:
    rig.start()
    rig.outbound("10.2.0.1", 1)
    rig.outbound("10.2.0.1", 2)
    assert len(rig.core.peers) == 1


@pytest.mark.parametrize(
    "destination, decision",
    [
        ("10.3.0.1", ("forward", (ip("10.3.0.1"), 8080))),
        ("192.0.2.1", ("forward", (b"", 0))),
        ("127.0.0.1", ("refuse", (Reason.SELF_CALL,))),
    ],
)
def test_other_routes_become_their_decisions(
    rig: Rig, destination: str, decision: tuple[str, tuple[object, ...]]
) -> None:
    rig.start()
    found = rig.core.answer_to(rig.outbound(destination))
    assert (found.action, found.arguments) == decision


def test_a_balance_keeps_its_choices_alive_by_itself(rig: Rig) -> None:
    endpoints = (Endpoint(HTTPBIN.uid, "", 2), Endpoint(LEGACY.uid, "", 1))
    rig.start(service("web", ("10.96.0.1",), endpoints))
    found = rig.core.answer_to(rig.outbound("10.96.0.1", 80))
    assert found.action == "balance"
    choices = found.arguments[0]
    assert [weight for _, weight in choices] == [2, 1]
    assert {number for number, _ in choices} <= rig.core.released


def test_a_workload_replaced_behind_an_address_cuts_the_old_ones_connections(rig: Rig) -> None:
    rig.start()
    kept = rig.core.answers[rig.outbound("10.3.0.1")]
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    rig.apply(workload("intruder", "10.2.0.1"), removals=(Removal("workload", HTTPBIN.uid),))
    assert rig.core.killed == {decision: Reason.IDENTITY_MISMATCH}
    assert kept not in rig.core.killed


def test_a_route_that_merely_changes_leaves_open_connections_alone(rig: Rig) -> None:
    web = service("web", ("10.96.0.1",), (Endpoint(HTTPBIN.uid, ""),))
    rig.start(web)
    rig.outbound("10.96.0.1", 80)
    rig.outbound("192.0.2.1")
    rig.apply(service("web", ("10.96.0.1",), ()), workload("found", "192.0.2.1"))
    assert not rig.core.killed


# --- a pod's start -------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["workload", "credential"])
def test_connections_of_a_young_pod_wait_for_its_own_state(rig: Rig, missing: str) -> None:
    without = SLEEP if missing == "workload" else credential()
    rig.apply(*(each for each in MESH if each != without), POD, reset=True)
    number = rig.pod
    upcall = rig.outbound("10.2.0.1")
    assert upcall not in rig.core.answers
    assert rig.tunnel.waiting == 1
    rig.apply(without)
    assert rig.core.answer_to(upcall).action == "tunnel"
    # Nothing was taken down for it.
    assert rig.pod == number
    held = rig.tunnel.pods.get(POD.uid)
    assert held is not None
    assert held.credential in rig.core.credentials


def test_inbound_waits_for_the_policy(rig: Rig) -> None:
    rig.apply(*(each for each in MESH if each != policy(SLEEP.uid)), POD, reset=True)
    upcall = rig.inbound("10.9.9.9")
    assert upcall not in rig.core.answers
    rig.apply(policy(SLEEP.uid))
    assert rig.core.answer_to(upcall).action == "deliver"


def test_they_wait_for_a_bounded_time_and_are_then_refused(rig: Rig) -> None:
    rig.apply(*(each for each in MESH if each != credential()), POD, reset=True)
    upcall = rig.outbound("10.2.0.1")
    rig.now += tunnel.START_WAIT - 1
    rig.tunnel.tick()
    assert upcall not in rig.core.answers
    rig.now += 2
    rig.tunnel.tick()
    assert rig.core.answer_to(upcall).arguments == (Reason.NO_CREDENTIAL,)
    assert rig.tunnel.waited_too_long == 1
    # The pod is young no more: others are refused at once.
    assert rig.core.answer_to(rig.outbound("10.2.0.1", 9)).action == "refuse"


def test_only_so_many_wait(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "MAX_WAITING", 2)
    rig.apply(*(each for each in MESH if each != credential()), POD, reset=True)
    upcalls = [rig.outbound("10.2.0.1", port) for port in (1, 2, 3)]
    assert [upcall in rig.core.answers for upcall in upcalls] == [False, False, True]


def test_what_needs_no_identity_does_not_wait_for_one(rig: Rig) -> None:
    rig.apply(*(each for each in MESH if each != credential()), POD, reset=True)
    assert rig.core.answer_to(rig.outbound("192.0.2.1")).action == "forward"


# --- tables --------------------------------------------------------------------------------------


def test_a_freed_decision_is_forgotten_with_what_it_held(rig: Rig) -> None:
    rig.start()
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    rig.apply(service("x", ("10.96.0.9",), ()))
    assert len(rig.tunnel.decisions) == 1
    rig.core.free(decision)
    rig.tunnel.pump()
    assert len(rig.tunnel.decisions) == 0
    rig.now += PEER_IDLE + 1
    rig.tunnel.tick()
    assert not rig.core.peers


def test_a_pool_is_kept_for_as_long_as_its_connections_may_be_idle() -> None:
    long = msgspec.structs.replace(SETTINGS, deadlines=Deadlines(idle=4000))
    rig = Rig(settings=long)
    rig.start()
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    rig.apply(service("x", ("10.96.0.9",), ()))
    rig.core.free(decision)
    rig.tunnel.pump()
    rig.now += 4000
    rig.tunnel.tick()
    assert rig.core.peers
    rig.now += PEER_IDLE
    rig.tunnel.tick()
    assert not rig.core.peers
    rig.close()


def test_a_pool_in_use_is_not_forgotten(rig: Rig) -> None:
    rig.start()
    rig.outbound("10.2.0.1")
    rig.now += 10 * PEER_IDLE
    rig.tunnel.tick()
    assert len(rig.core.peers) == 1


def test_a_pool_that_gave_way_can_be_cut_until_its_last_decision_is_freed() -> None:
    core = FakeCore()
    core.pods[1] = ()
    peers = tables.Peers(core, tables.Numbers(), limit=1)
    expected = frozenset({"spiffe://x"})
    first = peers.acquire(1, 1, expected, ip("10.2.0.1"), 15008, 0.0)
    second = peers.acquire(1, 1, expected, ip("10.2.0.2"), 15008, 0.0)
    assert peers.evicted_in_use == 1
    assert set(core.peers) == {first.number, second.number}
    assert peers.get(first.number) is first
    again = peers.acquire(1, 1, expected, ip("10.2.0.1"), 15008, 1.0)
    assert again is not first
    peers.release(first, 2.0)
    peers.release(second, 2.0)
    assert set(core.peers) == {again.number}
    assert list(peers) == [again]


def test_one_label_set_has_one_series(rig: Rig) -> None:
    rig.start()
    for port in (1, 2):
        rig.outbound("10.2.0.1", port)
    assert len(rig.tunnel.series) == 1
    # Each port is a flow of its own, which counts for that label set.
    assert len(rig.tunnel.flows) == 2
    rig.outbound("10.3.0.1", 1)
    assert len(rig.tunnel.series) == 2


def test_beyond_the_limit_unused_series_give_way_and_then_all_share_one() -> None:
    core = FakeCore()
    table = SeriesTable(core, tables.Numbers(), lambda: 0.0, limit=2)
    sets = [labels.make("source", str(number), None, None, None) for number in range(4)]
    first, second = table.acquire(sets[0]), table.acquire(sets[1])
    table.release(first)
    third = table.acquire(sets[2])
    assert first.number not in core.series
    assert table.evicted == 1
    fourth = table.acquire(sets[3])
    assert fourth.labels == labels.overflow(sets[3])
    assert table.overflowed == 1
    assert {second.number, third.number, fourth.number} == set(core.series)
    core.close()


def test_the_cache_is_bounded_and_gives_back_what_it_drops(rig: Rig) -> None:
    rig.start()
    rig.tunnel.decisions._limit = 2
    decisions = [rig.core.answers[rig.outbound("192.0.2.1", port)] for port in (1, 2, 3)]
    assert rig.core.released == {decisions[0]}


def test_a_pool_dropped_for_room_while_in_use_advances_the_epoch(rig: Rig) -> None:
    rig.start(workload("a", "10.4.0.1"), workload("b", "10.4.0.2"))
    rig.tunnel.peers._limit = 1
    first = rig.core.answers[rig.outbound("10.4.0.1")]
    epoch = rig.core.epoch
    upcall = rig.outbound("10.4.0.2")
    # The core's table may still name the pool that went.
    assert rig.core.epoch > epoch
    assert rig.core.answer_to(upcall).action == "tunnel"
    # It must still hear when its streams are to be cut.
    assert len(rig.core.peers) == 2
    rig.core.free(first)
    rig.tunnel.pump()
    assert len(rig.core.peers) == 1


def test_an_identity_forgotten_in_use_is_cut(rig: Rig) -> None:
    rig.start()
    rig.tunnel.identities._limit = 1
    first, _ = rig.prove(chain_of("one"))
    rig.inbound("10.9.0.1", first)
    rig.prove(chain_of("two"))
    assert first in rig.core.killed_identities


# --- faults of our own ---------------------------------------------------------------------------


def test_a_failing_judgement_refuses(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.start()

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(tunnel, "route", broken)
    monkeypatch.setattr(tunnel, "authorize", broken)
    assert rig.core.answer_to(rig.outbound("10.2.0.1")).arguments == (Reason.INTERNAL,)
    assert rig.core.answer_to(rig.inbound("10.9.0.1")).arguments == (Reason.INTERNAL,)
    assert rig.tunnel.internal_errors == 2
    assert "internal error" in rig.tunnel.decision_problem()
    rig.now += tunnel.FAILURE_MEMORY + 1
    assert rig.tunnel.decision_problem() == ""


def test_a_question_for_a_pod_that_has_gone_is_refused(rig: Rig) -> None:
    rig.start()
    upcall = rig.core.ask(Kind.OUTBOUND, 424242, destination=ip("10.2.0.1"), port=80)
    rig.tunnel.pump()
    assert rig.core.answer_to(upcall).arguments == (Reason.POD_REMOVED,)


def test_uncollected_questions_are_a_problem(rig: Rig) -> None:
    rig.start()
    assert rig.tunnel.decision_problem() == ""
    rig.core.ask(Kind.OUTBOUND, rig.pod, destination=ip("10.2.0.1"), port=80)
    rig.now += tunnel.STALLED + 1
    assert "uncollected" in rig.tunnel.decision_problem()


def test_the_loop_collects_everything_in_portions(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "UPCALLS_A_TURN", 2)
    rig.start()
    upcalls = [
        rig.core.ask(Kind.OUTBOUND, rig.pod, destination=ip("192.0.2.1"), port=port)
        for port in range(1, 8)
    ]

    async def turn() -> str:
        loop = asyncio.get_running_loop()
        answered = asyncio.Event()
        answer = rig.core.answer

        def counting(upcall: int, epoch: int, decision: int) -> bool:
            done = answer(upcall, epoch, decision)
            if set(upcalls) <= rig.core.answers.keys():
                answered.set()
            return done

        monkeypatch.setattr(rig.core, "answer", counting)
        rig.tunnel.start(loop)
        async with asyncio.timeout(30):
            await answered.wait()
        loop.remove_reader(rig.core.event_fd)
        rig.tunnel._loop = None
        return ""

    run(turn())


# --- probes of the capture -----------------------------------------------------------------------


@pytest.mark.parametrize("destination", PROBE_ADDRESSES)
def test_a_probe_is_refused_and_is_no_connection_in_any_count(rig: Rig, destination: str) -> None:
    rig.start()
    upcall = rig.outbound(destination, PROBE_PORT)
    found = rig.core.answer_to(upcall)
    assert (found.action, found.arguments) == ("refuse", (Reason.SELF_CALL,))
    assert not rig.core.series
    values = (Kind.OUTBOUND, rig.pod, rig.core.answers[upcall], 0, ip("10.1.0.1"), 4000)
    rest = (ip(destination), PROBE_PORT, b"", 0, 1, 1, 0, 0, list(Reason).index(Reason.SELF_CALL))
    rig.core.report(record(Ended, *values, *rest, b"", b"", b"", 0))
    rig.tunnel.pump()
    assert rig.tunnel.events.probes == 1
    assert not rig.tunnel.events.failed
    assert not rig.lines


def test_what_only_looks_like_a_probe_is_a_connection(rig: Rig) -> None:
    rig.start()
    assert rig.core.answer_to(rig.outbound(PROBE_ADDRESSES[0], 80)).action == "forward"
    assert rig.core.answer_to(rig.outbound("192.0.2.1", PROBE_PORT)).action == "forward"
