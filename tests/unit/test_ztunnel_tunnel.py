from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any

import msgspec
import pytest

from support.certificates import NOW, authority
from support.certificates import workload as leaf
from support.fake_core import Decision, FakeCore, record
from support.mesh_state import bundle, change, identity, ip, pod, policy, service, workload
from ztunnel import decisions as tables
from ztunnel import labels, tunnel
from ztunnel._core import Ended, Failed
from ztunnel.access_log import Line
from ztunnel.corelike import Kind
from ztunnel.pods import Pair, PodSockets
from ztunnel.protocol import (
    Credential,
    DataPlane,
    Endpoint,
    Mode,
    Removal,
    Resource,
    TrustBundle,
)
from ztunnel.reasons import Reason
from ztunnel.tls import TlsError

SLEEP = workload("sleep", "10.1.0.1")
HTTPBIN = workload("httpbin", "10.2.0.1")
LEGACY = workload("legacy", "10.3.0.1", plane=DataPlane.TCP)
POD = pod("pod-sleep", SLEEP.uid, "10.1.0.1")
ROOT = authority()
OTHER_ROOT = authority()
FOREIGN_ROOT = authority("elsewhere.test")


def credential(account: str = "sleep", serial: bytes = b"1") -> Credential:
    return Credential(identity(account), (b"chain" + serial,), b"key" + serial, 0, NOW + 3600)


MESH: tuple[Resource, ...] = (
    SLEEP,
    HTTPBIN,
    LEGACY,
    policy(SLEEP.uid, Mode.PERMISSIVE),
    credential(),
    bundle(ROOT.der),
)


def sockets() -> PodSockets:
    return PodSockets(*(socket.socket().detach() for _ in range(4)))


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


class Rig:
    """A tunnel on a fake core, with a clock that a test moves."""

    def __init__(self) -> None:
        self.core = FakeCore()
        self.now = 1000.0
        self.wall = float(NOW)
        self.lines: list[Line] = []
        self.built: list[str] = []
        self.build_error: Exception | None = None
        self.version = 0
        self.tunnel = tunnel.Tunnel(
            self.core, self, lambda: self.now, lambda: self.wall, self._build
        )

    def write(self, line: Line, /) -> None:
        self.lines.append(line)

    def _build(self, credential: Credential, roots: tuple[bytes, ...]) -> Pair:
        if self.build_error is not None:
            raise self.build_error
        self.built.append(credential.uid)
        return Pair(len(self.built) * 10, len(self.built) * 10 + 1, (credential, roots))

    def apply(
        self,
        *resources: Resource,
        removals: tuple[Removal, ...] = (),
        reset: bool = False,
        given: Mapping[str, PodSockets] | None = None,
    ) -> str:
        self.version += 1
        found = change(self.version, *resources, removals=removals, reset=reset)
        if given is None:
            given = {
                each.uid: sockets() for each in resources if each.__struct_config__.tag == "pod"
            }
        return run(self.tunnel.apply(found, given))

    def start(self, *extra: Resource) -> None:
        assert self.apply(*MESH, POD, *extra, reset=True) == ""

    @property
    def pod(self) -> int:
        held = self.tunnel.pods.get(POD.uid)
        assert held is not None
        return held.number

    def outbound(self, destination: str, port: int = 8080) -> int:
        upcall = self.core.ask(Kind.OUTBOUND, self.pod, destination=ip(destination), port=port)
        self.tunnel.pump()
        return upcall

    def inbound(self, source: str, identity_number: int = 0, port: int = 8080) -> int:
        upcall = self.core.ask(
            Kind.INBOUND_HBONE if identity_number else Kind.INBOUND_PLAINTEXT,
            self.pod,
            source=ip(source),
            destination=ip("10.1.0.1"),
            port=port,
            identity=identity_number,
        )
        self.tunnel.pump()
        return upcall

    def prove(self, chain: tuple[bytes, ...]) -> tuple[int, Reason]:
        upcall = self.core.ask(Kind.PEER_CERTIFICATE, self.pod, source=ip("10.2.0.1"), chain=chain)
        self.tunnel.pump()
        return self.core.certificates[upcall]

    def close(self) -> None:
        self.tunnel.stop()
        self.core.close()


def run(work: Coroutine[Any, Any, str]) -> str:
    return asyncio.run(work)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def chain_of(account: str, root: Any = ROOT, **options: Any) -> tuple[bytes, ...]:  # noqa: ANN401
    return (leaf(root, identity(account), **options).der,)


# --- the order of a change -----------------------------------------------------------------------


def test_a_change_is_in_force_and_the_epoch_advanced_before_it_is_acknowledged(rig: Rig) -> None:
    rig.start()
    names = rig.core.names()
    assert names.index("add_pod") < names.index("advance_epoch")
    assert rig.tunnel.committed
    assert rig.tunnel.epoch == rig.core.epoch


def test_connections_are_cut_after_the_epoch_and_before_the_acknowledgement(rig: Rig) -> None:
    rig.start()
    decision = rig.core.answers[rig.inbound("10.9.9.9")]
    rig.core.calls.clear()
    assert rig.apply(policy(SLEEP.uid, Mode.STRICT)) == ""
    assert rig.core.killed == {decision: Reason.POLICY_CHANGED}
    names = rig.core.names()
    assert names.index("advance_epoch") < names.index("kill_decision")


def test_a_decision_that_the_core_has_just_freed_stops_no_change(rig: Rig) -> None:
    rig.start()
    gone = rig.core.answers[rig.inbound("10.9.9.9")]
    kept = rig.core.answers[rig.inbound("10.9.9.8")]
    rig.apply(service("x", ("10.96.0.9",), ()))
    rig.core.free(gone)
    assert rig.apply(policy(SLEEP.uid, Mode.STRICT)) == ""
    assert set(rig.core.killed) == {kept}
    assert rig.tunnel.cut == 1


def test_an_answer_from_an_older_snapshot_is_not_used(rig: Rig) -> None:
    rig.start()
    epoch = rig.tunnel.epoch
    upcall = rig.outbound("10.2.0.1")
    stale = rig.core.answers.pop(upcall)
    rig.apply(workload("new", "10.8.0.1"))
    # What the core promises for such an answer, and what the tunnel would be told.
    assert rig.core.answer(upcall, epoch, stale) is False
    assert upcall not in rig.core.answers
    # The core asks again, and hears the answer of now.
    again = rig.outbound("10.2.0.1")
    assert rig.core.answers[again] != stale


def test_after_a_change_no_answer_is_reused(rig: Rig) -> None:
    rig.start()
    first = rig.core.answers[rig.outbound("10.2.0.1")]
    assert rig.core.answers[rig.outbound("10.2.0.1")] == first
    rig.apply(service("x", ("10.96.0.9",), ()))
    assert first in rig.core.released
    assert rig.core.answers[rig.outbound("10.2.0.1")] != first


@pytest.mark.parametrize("fault", ["state", "contexts", "core", "descriptors"])
def test_a_change_that_cannot_be_made_changes_nothing_and_leaks_nothing(
    rig: Rig, fault: str
) -> None:
    rig.start()
    before, epoch = rig.tunnel.state, rig.core.epoch
    pods = dict(rig.core.pods)
    extra: tuple[Resource, ...] = ()
    given = {"pod-new": sockets()}
    match fault:
        case "state":
            extra = (workload("bad", "not an address"),)
        case "contexts":
            rig.build_error = TlsError("the key is no unencrypted PKCS#8")
            extra = (credential("other"),)
        case "core":
            rig.core.fail_add_pod = OSError(24, "Too many open files")
        case "descriptors":
            extra = (pod("pod-without", SLEEP.uid, "10.1.0.4"),)
    error = rig.apply(pod("pod-new", SLEEP.uid, "10.1.0.3"), *extra, given=given)
    assert error
    assert rig.tunnel.state is before
    assert rig.core.epoch == epoch
    assert rig.core.pods == pods
    assert not any(map(is_open, given["pod-new"]))
    assert "key1" not in error


def test_descriptors_of_a_pod_that_is_held_already_are_closed(rig: Rig) -> None:
    first = sockets()
    assert rig.apply(*MESH, POD, reset=True, given={POD.uid: first}) == ""
    number = rig.pod
    same = PodSockets(*(os.dup(descriptor) for descriptor in first))
    assert rig.apply(*MESH, POD, reset=True, given={POD.uid: same}) == ""
    assert rig.pod == number
    assert not any(map(is_open, same))
    assert all(map(is_open, first))


def test_other_sockets_for_a_held_pod_replace_it(rig: Rig) -> None:
    first, second = sockets(), sockets()
    rig.apply(*MESH, POD, reset=True, given={POD.uid: first})
    number = rig.pod
    rig.apply(POD, given={POD.uid: second})
    assert rig.pod != number
    assert number not in rig.core.pods
    assert not any(map(is_open, first))
    assert all(map(is_open, second))


def test_a_pod_that_leaves_takes_its_pools_and_descriptors_along(rig: Rig) -> None:
    given = sockets()
    rig.apply(*MESH, POD, reset=True, given={POD.uid: given})
    rig.outbound("10.2.0.1")
    assert len(rig.core.peers) == 1
    rig.apply(removals=(Removal("pod", POD.uid),))
    assert not rig.core.pods
    assert not rig.core.peers
    assert not any(map(is_open, given))


def test_a_large_change_is_applied_as_a_small_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "LARGE_CHANGE", 1)
    rig.start()
    assert rig.core.answer_to(rig.outbound("10.2.0.1")).action == "tunnel"


# --- certificates --------------------------------------------------------------------------------


def test_a_rotation_sets_the_new_contexts_and_touches_nothing_else(rig: Rig) -> None:
    rig.start()
    number = rig.pod
    before = dict(rig.core.credentials)
    assert rig.apply(credential(serial=b"2")) == ""
    assert rig.pod == number
    assert rig.core.credentials.keys() == before.keys()
    assert rig.core.credentials != before
    assert not rig.core.killed


def test_contexts_are_built_once_for_the_same_credential(rig: Rig) -> None:
    rig.start()
    assert rig.apply(*MESH, POD, reset=True) == ""
    assert len(rig.built) == 1


def test_new_roots_build_the_contexts_anew(rig: Rig) -> None:
    rig.start()
    rig.apply(bundle(ROOT.der, OTHER_ROOT.der))
    assert len(rig.built) == 2


@pytest.mark.parametrize("how", ["withdrawn", "replaced"])
def test_an_identity_taken_away_is_never_shown_again(rig: Rig, how: str) -> None:
    rig.start()
    number = rig.pod
    if how == "withdrawn":
        rig.apply(removals=(Removal("credential", identity("sleep")),))
    else:
        rig.apply(workload("sleep", "10.1.0.1", account="other"), credential("other"))
    assert rig.pod != number
    assert number not in rig.core.pods
    held = rig.tunnel.pods.get(POD.uid)
    assert held is not None
    assert held.identity == ("" if how == "withdrawn" else identity("other"))


def test_a_verified_chain_has_one_number_and_is_verified_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.start()
    chain = chain_of("httpbin")
    number, reason = rig.prove(chain)
    assert number > 0
    assert reason is Reason.CLOSED
    monkeypatch.setattr("ztunnel.svid.validate", None)
    assert rig.prove(chain) == (number, reason)


@pytest.mark.parametrize(
    "chain, reason",
    [
        ((), Reason.CERT_MISSING),
        ((b"garbage",), Reason.CERT_INVALID),
        (chain_of("x", not_after=NOW - 5), Reason.CERT_EXPIRED),
        (chain_of("x", not_before=NOW + 60), Reason.CERT_NOT_YET_VALID),
        (chain_of("x", OTHER_ROOT), Reason.CERT_UNTRUSTED),
        ((leaf(FOREIGN_ROOT, "spiffe://elsewhere.test/x").der,), Reason.TRUST_DOMAIN),
        (chain_of("x", is_ca=True), Reason.CERT_INVALID),
    ],
    ids=["none", "garbage", "expired", "early", "other root", "foreign domain", "a CA"],
)
def test_a_wrong_certificate_is_refused_with_its_reason(
    rig: Rig, chain: tuple[bytes, ...], reason: Reason
) -> None:
    rig.start()
    assert rig.prove(chain) == (0, reason)


def _server_shows(rig: Rig, chain: tuple[bytes, ...]) -> tuple[int, Reason]:
    peer = next(iter(rig.core.peers))
    upcall = rig.core.ask(
        Kind.SERVER_CERTIFICATE,
        rig.pod,
        destination=ip("10.2.0.1"),
        port=15008,
        peer=peer,
        chain=chain,
    )
    rig.tunnel.pump()
    return rig.core.certificates[upcall]


def test_a_server_must_be_the_workload_that_lives_there(rig: Rig) -> None:
    rig.start()
    rig.outbound("10.2.0.1")
    assert _server_shows(rig, chain_of("httpbin"))[0] > 0
    assert _server_shows(rig, chain_of("sleep")) == (0, Reason.IDENTITY_MISMATCH)


def test_withdrawn_roots_cut_peers_servers_and_decisions(rig: Rig) -> None:
    rig.start()
    rig.outbound("10.2.0.1")
    _server_shows(rig, chain_of("httpbin"))
    caller = chain_of("caller")
    number, _ = rig.prove(caller)
    decision = rig.core.answers[rig.inbound("10.9.0.1", number)]
    rig.apply(bundle(OTHER_ROOT.der))
    assert rig.core.killed_identities[number] is Reason.TRUST_WITHDRAWN
    assert set(rig.core.closed_peers) == set(rig.core.peers)
    # The same number proves nothing any more, and the chain is not accepted anew.
    refused = rig.core.answer_to(rig.inbound("10.9.0.1", number))
    assert refused.arguments == (Reason.TRUST_WITHDRAWN,)
    assert rig.prove(caller) == (0, Reason.CERT_UNTRUSTED)
    assert decision in rig.core.decisions


def test_a_trust_domain_withdrawn_cuts_its_connections(rig: Rig) -> None:
    rig.start(TrustBundle("elsewhere.test", (FOREIGN_ROOT.der,)))
    number, _ = rig.prove((leaf(FOREIGN_ROOT, "spiffe://elsewhere.test/ns/a/sa/b").der,))
    decision = rig.core.answers[rig.inbound("10.9.0.1", number)]
    rig.apply(removals=(Removal("trust_bundle", "elsewhere.test"),))
    assert rig.core.killed_identities[number] is Reason.TRUST_WITHDRAWN
    assert rig.core.killed[decision] is Reason.TRUST_WITHDRAWN


def test_added_roots_cut_nothing(rig: Rig) -> None:
    rig.start()
    number, _ = rig.prove(chain_of("caller"))
    rig.inbound("10.9.0.1", number)
    rig.apply(bundle(ROOT.der, OTHER_ROOT.der))
    assert not rig.core.killed_identities
    assert not rig.core.killed
    assert rig.core.answer_to(rig.inbound("10.9.0.1", number)).action == "deliver"


def test_an_expired_identity_opens_nothing_new_but_keeps_what_it_has(rig: Rig) -> None:
    rig.start()
    number, _ = rig.prove(chain_of("caller", not_after=NOW + 100))
    rig.inbound("10.9.0.1", number)
    epoch = rig.core.epoch
    rig.wall += 101
    rig.tunnel.tick()
    # The core's table must ask again.
    assert rig.core.epoch > epoch
    assert not rig.core.killed_identities
    refused = rig.core.answer_to(rig.inbound("10.9.0.1", number))
    assert refused.arguments == (Reason.CERT_EXPIRED,)


def test_an_identity_number_that_is_not_ours_is_refused(rig: Rig) -> None:
    rig.start()
    assert rig.core.answer_to(rig.inbound("10.9.0.1", 424242)).action == "refuse"


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
    rig.now += tunnel.PEER_IDLE + 1
    rig.tunnel.tick()
    assert not rig.core.peers


def test_a_pool_in_use_is_not_forgotten(rig: Rig) -> None:
    rig.start()
    rig.outbound("10.2.0.1")
    rig.now += 10 * tunnel.PEER_IDLE
    rig.tunnel.tick()
    assert len(rig.core.peers) == 1


def test_one_label_set_has_one_series(rig: Rig) -> None:
    rig.start()
    one = rig.core.answer_to(rig.outbound("10.2.0.1", 1))
    two = rig.core.answer_to(rig.outbound("10.2.0.1", 2))
    assert one.series == two.series
    other = rig.core.answer_to(rig.outbound("10.3.0.1", 1))
    assert other.series != one.series


def test_beyond_the_limit_unused_series_give_way_and_then_all_share_one() -> None:
    core = FakeCore()
    table = tables.SeriesTable(core, tables.Numbers(), limit=2)
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
    rig.outbound("10.4.0.1")
    epoch = rig.core.epoch
    upcall = rig.outbound("10.4.0.2")
    # The core's table may still name the pool that went.
    assert rig.core.epoch > epoch
    assert rig.core.answer_to(upcall).action == "tunnel"
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


# --- what became of connections ------------------------------------------------------------------


def ended(rig: Rig, decision: int, kind: Kind, reason: Reason, **fields: Any) -> Line:  # noqa: ANN401
    values: dict[str, Any] = {
        "kind": kind,
        "pod": rig.pod,
        "decision": decision,
        "identity": 0,
        "source": ip("10.1.0.1"),
        "source_port": 4000,
        "destination": ip("10.2.0.1"),
        "destination_port": 8080,
        "upstream": b"",
        "upstream_port": 0,
        "started_us": int(rig.now * 1e6) - 2_000_000,
        "duration_us": 1_500_000,
        "received": 10,
        "sent": 20,
        "reason": list(Reason).index(reason),
    }
    rig.core.report(record(Ended, *(values | fields).values()))
    rig.tunnel.pump()
    return rig.lines[-1]


def test_a_tunnelled_connection_is_logged_with_both_identities(rig: Rig) -> None:
    rig.start()
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    line = ended(
        rig,
        decision,
        Kind.OUTBOUND,
        Reason.CLOSED,
        upstream=ip("10.2.0.1"),
        upstream_port=15008,
    )
    assert line.direction == "outbound"
    assert line.source == "10.1.0.1:4000"
    assert line.destination == "10.2.0.1:15008"
    assert line.hbone_destination == "10.2.0.1:8080"
    assert labels.value(line.labels, "source_principal") == identity("sleep")
    assert labels.value(line.labels, "destination_principal") == identity("httpbin")
    assert labels.value(line.labels, "connection_security_policy") == "mutual_tls"
    assert line.start == pytest.approx(rig.wall - 2)
    assert line.error == ""


def test_a_refused_plaintext_connection_names_the_policy(rig: Rig) -> None:
    rig.start()
    rig.apply(policy(SLEEP.uid, Mode.STRICT))
    decision = rig.core.answers[rig.inbound("10.3.0.1")]
    line = ended(
        rig,
        decision,
        Kind.INBOUND_PLAINTEXT,
        Reason.STRICT_PLAINTEXT,
        source=ip("10.3.0.1"),
        destination=ip("10.1.0.1"),
    )
    assert line.policy == "istio-system/default"
    assert "STRICT" in line.error
    assert labels.value(line.labels, "source_workload") == "legacy"
    assert labels.value(line.labels, "source_principal") == ""


def test_a_connection_that_was_cut_names_the_policy_that_cut_it(rig: Rig) -> None:
    rig.start()
    decision = rig.core.answers[rig.inbound("10.3.0.1")]
    strict = msgspec.structs.replace(policy(SLEEP.uid, Mode.STRICT), origin="default/strict")
    rig.apply(strict)
    line = ended(rig, decision, Kind.INBOUND_PLAINTEXT, Reason.POLICY_CHANGED)
    assert line.policy == "default/strict"


def test_a_peer_is_named_by_its_proof_and_not_by_its_address(rig: Rig) -> None:
    rig.start()
    number, _ = rig.prove(chain_of("someone-else"))
    decision = rig.core.answers[rig.inbound("10.2.0.1", number)]
    line = ended(rig, decision, Kind.INBOUND_HBONE, Reason.CLOSED, destination=ip("10.1.0.1"))
    assert labels.value(line.labels, "source_principal") == identity("someone-else")
    assert labels.value(line.labels, "source_workload") == ""
    assert labels.value(line.labels, "source_workload_namespace") == "default"
    assert line.destination == "10.1.0.1:15008"
    assert line.hbone_destination == "10.1.0.1:8080"


def test_a_connection_without_a_decision_is_logged_and_counted(rig: Rig) -> None:
    rig.start()
    line = ended(rig, 0, Kind.OUTBOUND, Reason.DECISION_TIMEOUT)
    assert line.reason is Reason.DECISION_TIMEOUT
    assert labels.value(line.labels, "source_workload") == "sleep"
    assert rig.tunnel.events.early[line.labels, "CONNECT"] == 1
    ended(rig, 0, Kind.OUTBOUND, Reason.CLIENT_RESET)
    assert sum(rig.tunnel.events.early.values()) == 1


def test_a_failed_handshake_is_logged_with_what_was_wrong(rig: Rig) -> None:
    rig.start()
    rig.outbound("10.2.0.1")
    _server_shows(rig, chain_of("sleep"))
    failed = record(
        Failed,
        Kind.SERVER_CERTIFICATE,
        rig.pod,
        next(iter(rig.core.peers)),
        ip("10.2.0.1"),
        15008,
        list(Reason).index(Reason.IDENTITY_MISMATCH),
        "",
    )
    rig.core.report(failed)
    rig.tunnel.pump()
    line = rig.lines[-1]
    assert line.handshake
    assert line.direction == "outbound"
    assert identity("httpbin") in line.error
    assert identity("sleep") in line.error
    assert rig.tunnel.events.handshake_failures["client", Reason.IDENTITY_MISMATCH] == 1


def test_a_dial_that_times_out_names_port_15008(rig: Rig) -> None:
    rig.start()
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    line = ended(
        rig,
        decision,
        Kind.OUTBOUND,
        Reason.CONNECT_TIMEOUT,
        upstream=ip("10.2.0.1"),
        upstream_port=15008,
    )
    assert "15008" in line.error


def test_inbound_names_the_service_that_has_this_endpoint(rig: Rig) -> None:
    rig.start(service("sleep", ("10.96.0.5",), (Endpoint(SLEEP.uid, ""),)))
    decision = rig.core.answers[rig.inbound("10.3.0.1")]
    made = rig.tunnel.decisions.get(decision)
    assert made is not None
    assert labels.value(made.labels, "destination_service_name") == "sleep"
    assert rig.core.decisions[decision] == Decision("deliver", rig.core.decisions[decision].series)
