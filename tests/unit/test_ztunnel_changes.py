from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from random import Random

import msgspec
import pytest

from support.mesh_state import (
    SETTINGS,
    authorization,
    bundle,
    pod,
    policy,
    principals,
    service,
    source,
    workload,
)
from support.tunnel_rig import (
    HTTPBIN,
    MESH,
    OTHER_ROOT,
    POD,
    ROOT,
    SLEEP,
    Rig,
    chain_of,
    credential,
    is_open,
    run,
    sockets,
)
from ztunnel import _core, recheck, state
from ztunnel.decisions import Record
from ztunnel.judge import Cut, still_allowed
from ztunnel.pods import Pods, PodSockets
from ztunnel.protocol import (
    Action,
    Authorization,
    Deadlines,
    Limits,
    Mode,
    Removal,
    Resource,
    Rule,
)
from ztunnel.reasons import Reason
from ztunnel.state import Change, State
from ztunnel.tls import TlsError


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


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


HTTPBINS = principals("cluster.local/ns/default/sa/httpbin")


@pytest.mark.parametrize(
    "denied",
    [
        authorization("default/no", Action.DENY, source(HTTPBINS)),
        authorization("istio-system/no", Action.ALLOW, source(principals("*/sa/other"))),
        authorization("default/no", Action.DENY, source(HTTPBINS), workloads=(SLEEP.uid,)),
    ],
)
def test_an_authorization_cuts_whom_it_denies_and_nobody_else(
    rig: Rig, denied: Authorization
) -> None:
    rig.start()
    proven, _ = rig.prove(chain_of("httpbin"))
    other, _ = rig.prove(chain_of("other"))
    cut = rig.core.answers[rig.inbound("10.2.0.1", proven)]
    kept = rig.core.answers[rig.inbound("10.4.0.1", other)]
    rig.core.calls.clear()
    assert rig.apply(denied) == ""
    assert rig.core.killed == {cut: Reason.POLICY_CHANGED}
    names = rig.core.names()
    assert names.index("advance_epoch") < names.index("kill_decision")
    # What is asked now is judged anew, and refused.
    refused = rig.core.answer_to(rig.inbound("10.2.0.1", proven))
    assert (refused.action, refused.arguments) == ("refuse", (Reason.POLICY_DENIED,))
    assert rig.core.answers[rig.inbound("10.4.0.1", other)] != kept
    assert rig.core.answer_to(rig.inbound("10.4.0.1", other)).action == "deliver"


@pytest.mark.parametrize(
    "harmless",
    [
        authorization("default/x", Action.DENY, source(principals("*/sa/somebody"))),
        authorization("default/x", Action.DENY, source(HTTPBINS), workloads=(HTTPBIN.uid,)),
        authorization("elsewhere/x", Action.DENY, source(HTTPBINS)),
        authorization("default/x", Action.AUDIT, source(HTTPBINS)),
        authorization("default/x", Action.DENY, source(HTTPBINS), dry_run=True),
        authorization("default/x", Action.ALLOW, source(HTTPBINS)),
    ],
)
def test_an_authorization_that_still_allows_cuts_nothing(rig: Rig, harmless: Authorization) -> None:
    rig.start()
    proven, _ = rig.prove(chain_of("httpbin"))
    rig.inbound("10.2.0.1", proven)
    assert rig.apply(harmless) == ""
    assert not rig.core.killed


def test_a_policy_that_stops_allowing_cuts(rig: Rig) -> None:
    rig.start(authorization("default/x", Action.ALLOW, source(HTTPBINS)))
    proven, _ = rig.prove(chain_of("httpbin"))
    decision = rig.core.answers[rig.inbound("10.2.0.1", proven)]
    assert rig.apply(authorization("default/x", Action.ALLOW)) == ""
    assert rig.core.killed == {decision: Reason.POLICY_CHANGED}
    # Open again once nothing is said.
    gone = Removal("authorization", "AuthorizationPolicy/default/x")
    assert rig.apply(removals=(gone,)) == ""
    assert rig.core.answer_to(rig.inbound("10.2.0.1", proven)).action == "deliver"


def test_a_selector_that_comes_to_select_cuts(rig: Rig) -> None:
    denied = authorization("default/x", Action.DENY, source(HTTPBINS), workloads=())
    rig.start(denied)
    proven, _ = rig.prove(chain_of("httpbin"))
    decision = rig.core.answers[rig.inbound("10.2.0.1", proven)]
    assert rig.apply(msgspec.structs.replace(denied, workloads=(SLEEP.uid,))) == ""
    assert rig.core.killed == {decision: Reason.POLICY_CHANGED}


def test_an_authorization_that_cannot_be_read_leaves_all_as_it_was(rig: Rig) -> None:
    rig.start(authorization("default/x", Action.ALLOW, source(HTTPBINS)))
    before = rig.tunnel.state
    bad = authorization("default/y", Action.DENY, source(principals("a*b")))
    gone = Removal("authorization", "AuthorizationPolicy/default/x")
    assert "is no pattern" in rig.apply(bad, removals=(gone,))
    assert rig.tunnel.state is before


def test_a_decision_that_the_core_has_just_freed_stops_no_change(rig: Rig) -> None:
    rig.start()
    gone = rig.core.answers[rig.inbound("10.9.9.9")]
    kept = rig.core.answers[rig.inbound("10.9.9.8")]
    rig.apply(service("x", ("10.96.0.9",), ()))
    rig.core.free(gone)
    assert rig.apply(policy(SLEEP.uid, Mode.STRICT)) == ""
    assert set(rig.core.killed) == {kept}
    assert rig.tunnel.recheck.cut == 1


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
    monkeypatch.setattr(state, "LARGE", 1)
    rig.start()
    assert rig.core.answer_to(rig.outbound("10.2.0.1")).action == "tunnel"


def test_a_change_is_large_by_what_must_be_compiled() -> None:
    def asks(*rules: Rule) -> Change:
        resources = (authorization("default/x", Action.ALLOW, *rules),)
        return Change(version=1, reset=False, upserts=resources)

    many = tuple(f"cluster.local/ns/n/sa/a{number}" for number in range(state.LARGE))
    small = source(principals(*many[:100]))
    assert not state.is_large(asks(small, small))
    assert state.is_large(asks(source(principals(*many))))
    assert state.is_large(asks(*[small] * (state.LARGE // 100)))
    removals = tuple(Removal("workload", uid) for uid in many)
    assert not state.is_large(Change(version=1, reset=False, removals=removals))
    assert state.is_large(Change(version=1, reset=False, removals=(*removals, *removals)))


def judged_anew(rig: Rig, monkeypatch: pytest.MonkeyPatch, *resources: Resource) -> set[int]:
    """Apply a change; return the decisions that are looked at for it."""
    looked: set[int] = set()

    def look(now: State, pods: Pods, record: Record) -> Cut | None:
        looked.add(record.number)
        return still_allowed(now, pods, record)

    with monkeypatch.context() as patch:
        patch.setattr(recheck, "still_allowed", look)
        assert rig.apply(*resources) == ""
    return looked


def test_only_what_a_change_concerns_is_judged_anew(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.start()
    proven, _ = rig.prove(chain_of("httpbin"))
    inbound = rig.core.answers[rig.inbound("10.2.0.1", proven)]
    outbound = rig.core.answers[rig.outbound("10.2.0.1")]
    # The core refers to both still, as it does while connections live.
    fresh = workload("fresh", "10.6.0.1")
    assert judged_anew(rig, monkeypatch, fresh) == {outbound}
    assert judged_anew(rig, monkeypatch, policy(HTTPBIN.uid, Mode.STRICT)) == set()
    elsewhere = authorization("elsewhere/x", Action.DENY, source(HTTPBINS))
    assert judged_anew(rig, monkeypatch, elsewhere) == set()
    assert judged_anew(rig, monkeypatch, policy(SLEEP.uid, Mode.STRICT)) == {inbound, outbound}
    here = authorization("default/x", Action.AUDIT, source(HTTPBINS))
    assert judged_anew(rig, monkeypatch, here) == {inbound, outbound}
    assert judged_anew(rig, monkeypatch, bundle(OTHER_ROOT.der, domain="new.test")) == {
        inbound,
        outbound,
    }


def _any_change(random: Random) -> tuple[tuple[Resource, ...], tuple[Removal, ...]]:
    """Return a change out of a small world: what may live is different after each."""
    account = random.choice(("httpbin", "sleep", "other"))
    selected = random.choice((None, (SLEEP.uid,), (HTTPBIN.uid,), ()))
    rule = source(principals(random.choice(("*/sa/httpbin", "*/sa/other", "*"))))
    upserts: tuple[Resource, ...] = (
        workload("httpbin", random.choice(("10.2.0.1", "10.2.0.2"))),
        workload("other", random.choice(("10.2.0.1", "10.4.0.1"))),
        policy(random.choice((SLEEP.uid, HTTPBIN.uid)), random.choice(tuple(Mode))),
        authorization(
            f"{random.choice(('default', 'istio-system'))}/{account}",
            random.choice(tuple(Action)),
            rule,
            workloads=selected,
            dry_run=not random.randrange(4),
        ),
        random.choice((bundle(ROOT.der), bundle(ROOT.der, OTHER_ROOT.der))),
    )
    removals = (
        Removal("authorization", f"AuthorizationPolicy/default/{account}"),
        Removal("workload", f"default/{account}"),
    )
    chosen = random.randrange(len(upserts) + len(removals))
    if chosen < len(upserts):
        return (upserts[chosen],), ()
    return (), (removals[chosen - len(upserts)],)


def test_what_lives_after_a_change_is_what_the_new_state_allows(rig: Rig) -> None:
    """Looking only at what a change concerns cuts what looking at everything would cut."""
    random = Random("changes")  # noqa: S311 - a test's cases, the same each time
    rig.start()
    proven = [rig.prove(chain_of(account))[0] for account in ("httpbin", "other")]
    cut = 0
    for _ in range(300):
        for number in (0, *proven):
            rig.inbound(random.choice(("10.2.0.1", "10.4.0.1")), number)
        for address in ("10.2.0.1", "10.2.0.2", "10.3.0.1"):
            rig.outbound(address)
        upserts, removals = _any_change(random)
        assert rig.apply(*upserts, removals=removals) == ""
        for record in rig.tunnel.decisions:
            if not record.killed:
                assert still_allowed(rig.tunnel.state, rig.tunnel.pods, record) is None
        cut = rig.tunnel.recheck.cut
    assert cut > 50


def test_the_deadlines_of_new_settings_are_the_cores(rig: Rig) -> None:
    rig.start()
    assert rig.core.deadlines == _core.DEADLINES
    settings = msgspec.structs.replace(SETTINGS, deadlines=Deadlines(connect=3))
    rig.version += 1
    assert (
        run(
            rig.tunnel.apply(
                Change(rig.version, reset=False, upserts=(), removals=(), settings=settings), {}
            )
        )
        == ""
    )
    assert rig.core.deadlines == {**_core.DEADLINES, "connect": 3_000_000}


def test_the_pools_of_a_workload_that_left_are_asked_for_an_answer_once(rig: Rig) -> None:
    rig.start()
    rig.outbound("10.2.0.1")
    (peer,) = rig.core.peers
    gone = Removal("workload", HTTPBIN.uid)
    rig.apply(removals=(gone,))
    rig.apply(workload("new", "10.8.0.1"))
    assert [call for call in rig.core.calls if call[0] == "suspect_peer"] == [
        ("suspect_peer", (peer,))
    ]
    rig.apply(HTTPBIN)
    rig.apply(removals=(gone,))
    assert rig.core.names().count("suspect_peer") == 2


def test_a_pool_that_is_forgotten_while_others_are_looked_at_is_no_trouble(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = workload("other", "10.8.0.1")
    rig.start(other)
    rig.outbound("10.2.0.1")
    rig.outbound("10.8.0.1")
    monkeypatch.setattr(recheck, "PORTION", 1)
    _, last = rig.tunnel.peers
    gone = (Removal("workload", HTTPBIN.uid), Removal("workload", other.uid))

    async def forgotten_meanwhile() -> str:
        turn = asyncio.get_running_loop().call_soon
        turn(rig.tunnel.peers.remove, last)
        return await rig.tunnel.apply(Change(9, reset=False, removals=gone), {})

    assert run(forgotten_meanwhile()) == ""
    assert last.number not in rig.core.peers


def test_what_a_failed_look_has_left_out_is_looked_at_with_the_next_change(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.start()
    rig.inbound("10.2.0.1")
    strict = policy(SLEEP.uid, Mode.STRICT)

    def broken(*_arguments: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(recheck, "still_allowed", broken)
        assert "internal error" in rig.apply(strict)
    assert rig.tunnel.recheck.cut == 0
    # As nodeagent does then: the same once more.
    assert rig.apply(strict) == ""
    assert rig.tunnel.recheck.cut == 1


def test_the_limits_of_new_settings_are_the_cores(rig: Rig) -> None:
    rig.start()
    assert rig.core.limits == _core.LIMITS
    settings = msgspec.structs.replace(SETTINGS, limits=Limits(dials=7, failure_lines=3))
    rig.version += 1
    change = Change(rig.version, reset=False, upserts=(), removals=(), settings=settings)
    assert run(rig.tunnel.apply(change, {})) == ""
    assert rig.core.limits == {**_core.LIMITS, "dials": 7}
    assert rig.tunnel.events.failure_lines.most == 3
