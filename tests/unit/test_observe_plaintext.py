"""The plaintext report: is STRICT safe, who would break, and what is not known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from nodeagent import whatif
from nodeagent.admin.model import OlderReport, PodReport, PodState, PortMode
from nodeagent.flows import SCHEMA, Gap, Recorded, Recording
from nodeagent.observe import plaintext
from nodeagent.observe.plaintext_model import (
    Effect,
    Origin,
    PlaintextReport,
    PlaintextWorkload,
    Verdict,
)
from nodeagent.offline import Offline
from nodeagent.settings import Settings
from support.whatif import configuration, entry, mesh, policy, strict, web
from support.whatif import flow as recorded_flow

NOW = datetime(2026, 1, 20, 12, tzinfo=UTC)
SINCE = NOW - timedelta(days=7)
BEFORE = SINCE - timedelta(days=1)
NODE = "10.1.0.99"


def flow(**changes: Any) -> Recorded:  # noqa: ANN401 - fields of a flow
    first, last = NOW - timedelta(hours=2), NOW - timedelta(minutes=5)
    return recorded_flow(first, last, **({"connections": 3} | changes))


def clear(source: str = "10.9.9.9", **changes: Any) -> Recorded:  # noqa: ANN401 - as above
    values = {"identity": "", "workload": "", "source": source, "arrival": "plaintext"}
    return flow(**(values | changes))


def pod(uid: str, off: Offline, state: PodState = PodState.ENROLLED) -> PodReport:
    found = off.state.policies[uid]
    return PodReport(
        workload=uid,
        identity=off.workloads[uid].identity,
        netns="x",
        state=state,
        since=BEFORE,
        mode=found.mode.value,
        mode_origin=found.origin,
        port_modes=tuple(
            PortMode(port=port, mode=mode.value, origin=found.port_origins[port])
            for port, mode in found.port_modes.items()
        ),
    )


def build(
    documents: list[str],
    *flows: Recorded,
    settings: Settings | None = None,
    state: PodState = PodState.ENROLLED,
    older: tuple[OlderReport, ...] = (),
    **changes: Any,  # noqa: ANN401 - fields of a recording
) -> PlaintextReport:
    off = configuration(*documents, settings=settings)
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "node": "n1",
        "time": NOW,
        "since": SINCE,
        "oldest": BEFORE,
        "flows": flows,
        "complete": BEFORE,
        "watched": {"shop/pay": BEFORE, "shop/web": BEFORE},
    }
    called = msgspec.structs.replace(pod("shop/pay", off, state), older=older)
    pods = [called, pod("shop/web", off)]
    return plaintext.build(Recording(**(values | changes)), pods, {NODE}, off)


def pay(report: PlaintextReport) -> PlaintextWorkload:
    return next(each for each in report.workloads if each.workload == "shop/pay")


def test_where_everybody_has_an_identity_strict_is_safe() -> None:
    found = build(mesh(), flow(), flow(arrival="direct", connections=4))
    assert found.verdict is Verdict.SAFE
    assert pay(found).reasons == ("nobody has called without identity",)
    assert (pay(found).with_identity, pay(found).without_identity, pay(found).last) == (7, 0, None)
    assert [(each.namespace, each.verdict, each.safe) for each in found.namespaces] == [
        ("shop", Verdict.SAFE, 2)
    ]


def test_a_caller_without_identity_would_break_and_is_named() -> None:
    found = build(mesh(), flow(), clear(connections=7))
    assert found.verdict is Verdict.NOT_SAFE
    assert [each.verdict for each in found.workloads] == [Verdict.NOT_SAFE, Verdict.SAFE]
    (caller,) = pay(found).callers
    assert (caller.kind, caller.source, caller.port) == (Origin.OUTSIDE, "10.9.9.9", 8080)
    assert (caller.effect, caller.reason) == (Effect.BREAKS, "strict_requires_mtls")
    assert (caller.connections, pay(found).last) == (7, NOW - timedelta(minutes=5))


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"workload": "ops/probe", "source": "10.1.0.4"}, Origin.POD),
        ({"source": NODE}, Origin.NODE),
        ({"source": "192.0.2.7"}, Origin.OUTSIDE),
    ],
)
def test_it_is_said_where_a_caller_is(changes: dict[str, str], kind: Origin) -> None:
    outside = entry("ops/probe", 4, mesh=False)
    (caller,) = pay(build(mesh(probe=outside), clear(**changes))).callers
    assert (caller.kind, caller.effect) == (kind, Effect.BREAKS)


def test_the_nodes_own_calls_stay_where_the_settings_let_them_pass() -> None:
    settings = Settings(node="n1", node_plaintext=True, node_addresses=(NODE,))
    found = build(mesh(), clear(NODE), settings=settings)
    (caller,) = pay(found).callers
    assert (caller.effect, caller.policy) == (Effect.STAYS, "settings (node_plaintext)")
    assert found.verdict is Verdict.SAFE


def test_a_port_with_a_mode_of_its_own_keeps_it() -> None:
    ports = ", portLevelMtls: {8080: {mode: PERMISSIVE}}, selector: {matchLabels: {app: pay}}"
    documents = [*mesh(), strict("shop", "PERMISSIVE", ports)]
    found = build(documents, clear())
    (caller,) = pay(found).callers
    assert (caller.effect, caller.reason) == (Effect.STAYS, "port 8080 keeps PERMISSIVE")
    assert found.verdict is Verdict.SAFE
    assert [(each.port, each.mode) for each in pay(found).port_modes] == [(8080, "PERMISSIVE")]
    assert build(documents, clear(port=9090)).verdict is Verdict.NOT_SAFE


def test_what_is_refused_already_is_no_break() -> None:
    deny = policy('[{from: [{source: {ipBlocks: ["10.9.9.9"]}}]}]', action="DENY")
    refused = clear(allowed=False, reason="policy_denied", policy="shop/callers")
    # Let in when it was recorded, and refused by what is in force since.
    found = build([*mesh(), deny], refused, clear(connections=2, port=81))
    assert {each.effect for each in pay(found).callers} == {Effect.REFUSED}
    assert (found.verdict, pay(found).refused, pay(found).without_identity) == (
        Verdict.SAFE,
        5,
        2,
    )


def test_what_is_strict_already_is_safe_whatever_is_recorded() -> None:
    refused = clear(allowed=False, reason="strict_requires_mtls")
    found = build([*mesh(), strict()], refused, complete=None)
    assert (found.verdict, pay(found).reasons) == (Verdict.SAFE, ("it is STRICT already",))


def test_under_disable_nobody_was_asked_for_an_identity() -> None:
    documents = [*mesh(), strict(mode="DISABLE")]
    known = clear("10.1.0.2", workload="shop/web")
    found = build(documents, known)
    (caller,) = pay(found).callers
    assert (caller.effect, found.verdict) == (Effect.NOT_KNOWN, Verdict.NOT_KNOWN)
    assert "DISABLE" in caller.reason
    # A stranger has none for certain, and where nobody calls nobody breaks.
    assert build(documents, clear()).verdict is Verdict.NOT_SAFE
    assert build(documents).verdict is Verdict.SAFE


def test_callers_that_are_not_known_one_by_one_are_not_known() -> None:
    folded = clear("", address="", port=0)
    found = build(mesh(), folded)
    assert found.verdict is Verdict.NOT_KNOWN
    assert pay(found).reasons == ("callers that were not recorded one by one",)
    # With an identity it does not matter who it was.
    assert build(mesh(), flow(identity="", source="", address="", port=0)).verdict is Verdict.SAFE


def test_of_what_is_gone_the_callers_may_call_its_successor() -> None:
    found = build(mesh(), clear(destination="shop/old-pay"))
    gone = next(each for each in found.workloads if each.workload == "shop/old-pay")
    assert (gone.verdict, gone.state, found.verdict) == (
        Verdict.NOT_KNOWN,
        "",
        Verdict.NOT_KNOWN,
    )
    # Who called it with an identity does not matter.
    assert len(build(mesh(), flow(destination="shop/old-pay")).workloads) == 2


def older(source: str, port: int = 8080) -> OlderReport:
    return OlderReport(source=source, port=port, connections=2)


@pytest.mark.parametrize(
    "source, effect",
    [
        ("10.9.9.9", Effect.BREAKS),
        # A workload of the mesh has an identity, and may show it when it calls again.
        ("10.1.0.2", Effect.NOT_KNOWN),
        ("", Effect.NOT_KNOWN),
    ],
)
def test_who_is_connected_since_before_the_capture_is_a_caller(source: str, effect: Effect) -> None:
    found = build(mesh(), older=(older(source, 8080 if source else 0),))
    (caller,) = pay(found).callers
    assert (caller.effect, caller.connections, caller.last) == (effect, 2, NOW)
    assert found.verdict is (Verdict.NOT_SAFE if effect is Effect.BREAKS else Verdict.NOT_KNOWN)


def test_on_a_port_that_stays_permissive_older_connections_stay() -> None:
    ports = ", portLevelMtls: {8080: {mode: PERMISSIVE}}, selector: {matchLabels: {app: pay}}"
    documents = [*mesh(), strict("shop", "PERMISSIVE", ports)]
    found = build(documents, older=(older("10.9.9.9"),))
    assert [each.effect for each in pay(found).callers] == [Effect.STAYS]
    assert build(documents, older=(older("10.9.9.9", 9090),)).verdict is Verdict.NOT_SAFE


# --- what is not known --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"complete": None},
        {"complete": SINCE + timedelta(seconds=1)},
        {"watched": {"shop/web": BEFORE}},
        {"watched": {"shop/web": BEFORE, "shop/pay": SINCE + timedelta(seconds=1)}},
        {"problem": "no room"},
        {"truncated": True},
        {"state": PodState.FAILED},
        {"state": PodState.ENROLLING},
    ],
)
def test_without_the_whole_time_it_is_not_known(changes: dict[str, Any]) -> None:
    found = build(mesh(), flow(), **changes)
    assert (pay(found).verdict, found.verdict) == (Verdict.NOT_KNOWN, Verdict.NOT_KNOWN)
    assert pay(found).reasons
    # Who is known to break does so all the same.
    assert build(mesh(), clear(), **changes).verdict is Verdict.NOT_SAFE


def test_it_is_said_since_when_it_is_known() -> None:
    enrolled = NOW - timedelta(days=2)
    gap = Gap(begin=BEFORE, until=NOW - timedelta(days=3), cause="a crash")
    found = build(
        mesh(),
        complete=gap.until,
        gaps=(gap,),
        watched={"shop/web": BEFORE, "shop/pay": enrolled},
    )
    assert [each.since for each in found.workloads] == [enrolled, gap.until]
    assert (found.complete, found.gaps) == (gap.until, (gap,))


# --- it agrees with policy diff -----------------------------------------------------------------


@pytest.mark.parametrize(
    "documents",
    [
        mesh(),
        [*mesh(), strict(mode="PERMISSIVE")],
        [*mesh(), policy('[{from: [{source: {principals: ["*"]}}]}]')],
        [*mesh(), policy('[{from: [{source: {notNamespaces: ["x"]}}]}]', action="ALLOW")],
        [*mesh(), policy('[{to: [{operation: {ports: ["8080"]}}]}]', action="DENY")],
        [*mesh(), strict("shop")],
    ],
)
def test_who_breaks_is_who_breaks_by_policy_diff(documents: list[str]) -> None:
    flows = (
        flow(),
        clear(),
        clear(port=9090, source="10.9.9.10"),
        clear(source="10.1.0.4", workload="ops/probe"),
        clear(allowed=False, reason="policy_denied", port=7000),
        flow(identity=web("other"), workload="", source="10.1.0.77"),
    )
    found = build(documents, *flows)
    recording = Recording(
        schema=SCHEMA, node="n1", time=NOW, since=SINCE, oldest=BEFORE, flows=flows
    )
    # STRICT for the namespace, in the place of any PeerAuthentication there.
    after = [each for each in documents if "name: strict" not in each]
    diff = whatif.replay(
        configuration(*documents), configuration(*after, strict("shop")), recording, "a test"
    )
    ours = {
        (caller.source, caller.port, caller.connections)
        for caller in pay(found).callers
        if caller.effect is Effect.BREAKS
    }
    assert ours == {(each.sources[0], each.port, each.connections) for each in diff.breaks}
