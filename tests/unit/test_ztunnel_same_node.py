"""Same node, direct: who is handed over, what is reported of it, and what ends it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from support.certificates import NOW, authority
from support.certificates import workload as leaf
from support.fake_core import Decision
from support.mesh_state import (
    SETTINGS,
    authorization,
    bundle,
    identity,
    ip,
    pod,
    policy,
    principals,
    service,
    source,
    workload,
)
from support.tunnel_rig import ROOT, Rig, ended, sockets
from ztunnel.corelike import Kind
from ztunnel.observe.labels import value
from ztunnel.protocol import (
    Action,
    Attribute,
    Authorization,
    Condition,
    Credential,
    Endpoint,
    Mode,
    Removal,
    Resource,
    SameNode,
    Workload,
)
from ztunnel.reasons import Reason

SLEEP = workload("sleep", "10.1.0.1", "fd00::1")
NEAR = workload("near", "10.1.0.2", "fd00::2")
OTHER = workload("other", "10.1.0.3")
FAR = workload("far", "10.2.0.1")
DIRECT = msgspec.structs.replace(SETTINGS, same_node=SameNode.DIRECT)

CLIENT = pod("pod-sleep", SLEEP.uid, *SLEEP.addresses)
SERVER = pod("pod-near", NEAR.uid, *NEAR.addresses)


def certified(account: str, root: Any = ROOT, **options: Any) -> Credential:  # noqa: ANN401 - `leaf`'s
    made = leaf(root, identity(account), **options)
    return Credential(identity(account), (made.der,), made.key_der, NOW - 60, NOW + 3600)


def mesh(**parts: Resource) -> dict[str, Resource]:
    """Return a mesh in which `sleep` may be handed over to `near`; `parts` replace or add."""
    whole: dict[str, Resource] = {
        "sleep": SLEEP,
        "near": NEAR,
        "far": FAR,
        "sleep_policy": policy(SLEEP.uid),
        "near_policy": policy(NEAR.uid, Mode.STRICT),
        "sleep_credential": certified("sleep"),
        "near_credential": certified("near"),
        "bundle": bundle(ROOT.der),
        "client": CLIENT,
        "server": SERVER,
    }
    return whole | parts


class Node(Rig):
    """A rig with the pods of `mesh`."""

    def begin(self, parts: dict[str, Resource]) -> None:
        assert self.apply(*parts.values(), reset=True) == ""

    @property
    def pod(self) -> int:
        return self.number(CLIENT.uid)

    def number(self, uid: str) -> int:
        held = self.tunnel.pods.get(uid)
        assert held is not None
        return held.number

    def ask(self, destination: str = "10.1.0.2", port: int = 8080) -> Decision:
        return self.core.answer_to(self.outbound(destination, port))

    def restart(self, same_node: SameNode) -> None:
        """Connect another nodeagent, with another setting and nothing else."""
        self.settings = msgspec.structs.replace(SETTINGS, same_node=same_node)
        assert self.apply(*self.parts.values(), reset=True, given={}) == ""

    parts: dict[str, Resource]


@pytest.fixture
def rig() -> Iterator[Node]:
    made = Node(DIRECT)
    made.parts = mesh()
    yield made
    made.close()


# --- who is handed over ---


def test_two_captured_pods_of_this_node_are_joined(rig: Node) -> None:
    rig.begin(rig.parts)
    decision = rig.ask()
    assert decision.action == "hand_over"
    assert decision.arguments[1:] == (rig.number(SERVER.uid), ip("10.1.0.2"), 8080)


def test_each_family_is_joined(rig: Node) -> None:
    rig.begin(rig.parts)
    assert rig.ask("fd00::2").arguments[2] == ip("fd00::2")


def test_by_default_nothing_is_joined() -> None:
    rig = Node()
    rig.begin(mesh())
    assert rig.ask().action == "tunnel"
    rig.close()


def test_another_nodes_workload_is_tunnelled(rig: Node) -> None:
    rig.begin(rig.parts)
    assert rig.ask("10.2.0.1").action == "tunnel"


def test_a_pod_without_an_address_of_the_targets_family_is_tunnelled(rig: Node) -> None:
    """The application could not be shown the client's address."""
    rig.begin(mesh(client=pod("pod-sleep", SLEEP.uid, "10.1.0.1")))
    assert rig.ask("fd00::2").action == "tunnel"
    assert rig.ask("10.1.0.2").action == "hand_over"


def test_a_service_leads_to_a_hand_over(rig: Node) -> None:
    front = service("near", ("10.96.0.1",), (Endpoint(NEAR.uid, ""),))
    rig.begin(mesh(service=front))
    decision = rig.ask("10.96.0.1", 80)
    assert decision.action == "hand_over"
    assert decision.arguments[2:] == (ip("10.1.0.2"), 8080)


def test_a_service_balances_over_both_ways(rig: Node) -> None:
    front = service("both", ("10.96.0.1",), (Endpoint(NEAR.uid, "", 3), Endpoint(FAR.uid, "")))
    rig.begin(mesh(service=front))
    decision = rig.ask("10.96.0.1", 80)
    assert decision.action == "balance"
    (pairs,) = decision.arguments
    chosen = {rig.core.decisions[number].action: weight for number, weight in pairs}
    assert chosen == {"hand_over": 3, "tunnel": 1}


@pytest.mark.parametrize("mode", [Mode.STRICT, Mode.PERMISSIVE])
def test_every_mode_with_identities_lets_a_proved_one_in(rig: Node, mode: Mode) -> None:
    rig.begin(mesh(near_policy=policy(NEAR.uid, mode)))
    assert rig.ask().action == "hand_over"


def test_disable_hands_nothing_over_as_it_tunnels_nothing(rig: Node) -> None:
    """A caller would be known by its place otherwise: here, and not on another node."""
    rig.begin(mesh(near_policy=policy(NEAR.uid, Mode.DISABLE)))
    assert rig.ask().action == "forward"


@pytest.mark.parametrize("port", [15001, 15006, 15008])
def test_the_tunnels_own_ports_are_refused(rig: Node, port: int) -> None:
    rig.begin(rig.parts)
    assert rig.ask("10.1.0.2", port) == Decision("refuse", rig_series(rig), (Reason.SELF_CALL,))


def rig_series(rig: Node) -> int:
    return next(iter(rig.core.decisions.values())).series


# What HBONE would wait for, refuse and report is left to it.


def without(*names: str) -> dict[str, Resource]:
    return {name: part for name, part in mesh().items() if name not in names}


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(without("near_credential"), id="server-without-certificate"),
        pytest.param(without("near_policy"), id="no-policy"),
        pytest.param(mesh(near_credential=certified("other")), id="server-of-another-identity"),
        pytest.param(
            mesh(near_credential=certified("near", authority())), id="server-of-another-root"
        ),
        pytest.param(
            mesh(sleep_credential=certified("sleep", authority())), id="client-of-another-root"
        ),
        pytest.param(
            mesh(sleep_credential=certified("sleep", not_before=NOW - 60, not_after=NOW - 1)),
            id="client-expired",
        ),
        pytest.param(
            mesh(near_credential=certified("near", not_before=NOW - 60, not_after=NOW - 1)),
            id="server-expired",
        ),
        pytest.param(
            mesh(sleep_credential=certified("sleep", not_before=NOW + 60)), id="client-not-yet"
        ),
        pytest.param(without("server"), id="server-not-captured"),
        pytest.param(
            mesh(server=pod("pod-near", OTHER.uid, "10.1.0.2"), other=OTHER),
            id="address-of-another-workloads-pod",
        ),
    ],
)
def test_what_lacks_anything_goes_by_hbone(rig: Node, parts: dict[str, Resource]) -> None:
    rig.begin(parts)
    assert rig.ask().action == "tunnel"


def test_a_client_without_a_certificate_is_refused(rig: Node) -> None:
    rig.begin(without("sleep_credential"))
    rig.now += 60.0
    assert rig.ask().arguments == (Reason.NO_CREDENTIAL,)


def test_a_certificate_that_ends_ends_hand_overs_for_new_connections(rig: Node) -> None:
    rig.begin(rig.parts)
    assert rig.ask().action == "hand_over"
    rig.wall = NOW + 3600.0
    epoch = rig.core.epoch
    rig.tunnel.tick()
    assert rig.core.epoch > epoch
    assert rig.ask().action == "tunnel"
    assert not rig.core.killed


def test_a_young_pod_is_joined_once_it_has_its_certificate(rig: Node) -> None:
    rig.begin(without("near_credential"))
    assert rig.ask().action == "tunnel"
    rig.apply(rig.parts["near_credential"])
    assert rig.ask().action == "hand_over"


# --- what ends it ---


@pytest.fixture
def joined(rig: Node) -> int:
    """The number of a hand-over's decision."""
    rig.begin(rig.parts)
    upcall = rig.outbound("10.1.0.2")
    assert rig.core.answer_to(upcall).action == "hand_over"
    return rig.core.answers[upcall]


def test_the_server_removed_is_removed_from_the_core_and_called_no_more(
    rig: Node, joined: int
) -> None:
    number = rig.number(SERVER.uid)
    rig.apply(removals=(Removal("pod", SERVER.uid),))
    assert number not in rig.core.pods
    assert rig.ask().action == "tunnel"
    assert not rig.core.killed


def test_a_policy_that_is_withdrawn_cuts_it(rig: Node, joined: int) -> None:
    rig.apply(removals=(Removal("workload_policy", NEAR.uid),))
    assert rig.core.killed == {joined: Reason.POLICY_CHANGED}
    assert rig.ask().action == "tunnel"


def test_a_change_of_mode_that_still_allows_it_leaves_it_alone(rig: Node, joined: int) -> None:
    rig.apply(policy(NEAR.uid, Mode.DISABLE))
    assert not rig.core.killed


SLEEPS = principals("cluster.local/ns/default/sa/sleep")
FROM_NOWHERE_ELSE = Condition(Attribute.SOURCE_IP, (), ("10.1.0.1", "fd00::1"))


@pytest.mark.parametrize(
    "denied",
    [
        authorization("default/near", Action.DENY, source(SLEEPS), workloads=(NEAR.uid,)),
        authorization("default/near", Action.ALLOW, workloads=(NEAR.uid,)),
        authorization("istio-system/all", Action.ALLOW, source(FROM_NOWHERE_ELSE)),
    ],
)
def test_an_authorization_keeps_out_and_cuts_as_it_does_in_the_tunnel(
    rig: Node, joined: int, denied: Authorization
) -> None:
    rig.apply(denied)
    assert rig.core.killed == {joined: Reason.POLICY_CHANGED}
    # HBONE is refused by the pod's own judgement, and reports it.
    assert rig.ask().action == "tunnel"
    rig.apply(removals=(Removal("authorization", denied.uid),))
    assert rig.ask().action == "hand_over"


def test_an_authorization_of_the_client_or_one_that_allows_leaves_it_alone(
    rig: Node, joined: int
) -> None:
    rig.apply(
        authorization("default/sleep", Action.ALLOW, workloads=(SLEEP.uid,)),
        authorization("default/near", Action.ALLOW, source(SLEEPS), workloads=(NEAR.uid,)),
    )
    assert not rig.core.killed
    assert rig.ask().action == "hand_over"


def test_a_client_whose_addresses_are_judged_differently_is_tunnelled() -> None:
    two = workload("sleep", "10.1.0.1", "10.1.0.9")
    rig = Node(DIRECT)
    parts = mesh(sleep=two, client=pod("pod-sleep", two.uid, *two.addresses))
    rig.begin(parts)
    assert rig.ask().action == "hand_over"
    of_one = source(Condition(Attribute.SOURCE_IP, ("10.1.0.9",)))
    rig.apply(authorization("default/near", Action.AUDIT, of_one, workloads=(NEAR.uid,)))
    assert rig.ask().action == "tunnel"
    rig.close()


@pytest.mark.parametrize("side", ["sleep", "near"])
def test_trust_that_is_withdrawn_cuts_it(side: str) -> None:
    """Each side's chain hangs on a root of its own."""
    second = authority()
    rig = Node(DIRECT)
    rig.begin(
        mesh(bundle=bundle(ROOT.der, second.der), **{f"{side}_credential": certified(side, second)})
    )
    upcall = rig.outbound("10.1.0.2")
    assert rig.core.answer_to(upcall).action == "hand_over"
    rig.apply(bundle(ROOT.der))
    assert rig.core.killed == {rig.core.answers[upcall]: Reason.TRUST_WITHDRAWN}
    assert rig.ask().action == "tunnel"
    rig.close()


@pytest.mark.parametrize("side", ["sleep", "near"])
def test_an_identity_taken_from_a_pod_ends_its_connections(
    rig: Node, joined: int, side: str
) -> None:
    """The pod leaves the core with them, and comes back without a certificate."""
    uid = {"sleep": CLIENT.uid, "near": SERVER.uid}[side]
    number = rig.number(uid)
    rig.apply(removals=(Removal("credential", identity(side)),))
    assert number not in rig.core.pods
    assert rig.number(uid) in rig.core.pods


def test_a_rotation_leaves_it_alone(rig: Node, joined: int) -> None:
    rig.apply(certified("sleep"), certified("near"))
    assert not rig.core.killed
    assert rig.ask().action == "hand_over"


def test_an_address_that_moves_to_another_identity_cuts_it(rig: Node, joined: int) -> None:
    taker: Workload = msgspec.structs.replace(OTHER, addresses=("10.1.0.2",))
    rig.apply(taker)
    assert rig.core.killed == {joined: Reason.IDENTITY_MISMATCH}
    # `near`'s pod is not `other`'s: HBONE finds out who is there.
    assert rig.ask().action == "tunnel"


def test_a_pod_that_takes_over_the_address_is_a_new_question(rig: Node, joined: int) -> None:
    taker: Workload = msgspec.structs.replace(OTHER, addresses=("10.1.0.2",))
    new = pod("pod-other", OTHER.uid, "10.1.0.2", cookie=2)
    rig.apply(
        taker,
        policy(OTHER.uid),
        certified("other"),
        new,
        removals=(Removal("pod", SERVER.uid), Removal("workload", NEAR.uid)),
        given={new.uid: sockets()},
    )
    decision = rig.ask()
    assert decision.action == "hand_over"
    assert decision.arguments[1] == rig.number(new.uid)


def test_the_setting_taken_back_cuts_it(rig: Node, joined: int) -> None:
    rig.restart(SameNode.HBONE)
    assert rig.core.killed == {joined: Reason.POLICY_CHANGED}
    assert rig.ask().action == "tunnel"


def test_the_setting_kept_leaves_it_alone(rig: Node, joined: int) -> None:
    rig.restart(SameNode.DIRECT)
    assert not rig.core.killed


def test_an_identity_that_is_forgotten_cuts_it(rig: Node, joined: int) -> None:
    record = rig.tunnel.decisions.get(joined)
    assert record is not None
    rig.tunnel.recheck.evicted(record.proofs[1])
    assert rig.core.killed == {joined: Reason.TRUST_WITHDRAWN}


def test_nothing_is_held_once_the_core_has_freed_it(rig: Node, joined: int) -> None:
    record = rig.tunnel.decisions.get(joined)
    assert record is not None
    series = (record.series, record.mirror)
    assert [proven.refs for proven in record.proofs] == [1, 1]
    rig.apply(FAR, workload("new", "10.9.0.1"))
    rig.core.free(joined)
    rig.tunnel.pump()
    assert [proven.refs for proven in record.proofs] == [0, 0]
    assert [each.refs for each in series if each is not None] == [0, 0]


# --- what is reported ---


def test_both_sides_report_what_it_is(rig: Node, joined: int) -> None:
    ended(
        rig,
        joined,
        Kind.OUTBOUND,
        Reason.CLOSED,
        destination=ip("10.1.0.2"),
        upstream=ip("10.1.0.2"),
        upstream_port=8080,
    )
    source, destination = rig.lines
    assert (source.direction, destination.direction) == ("outbound", "inbound")
    for line in (source, destination):
        assert line.source == "10.1.0.1:4000"
        assert line.destination == "10.1.0.2:8080"
        assert line.hbone_destination == ""
        assert (line.received, line.sent) == (10, 20)
        assert value(line.labels, "connection_security_policy") == "none"
        assert value(line.labels, "source_principal") == identity("sleep")
        assert value(line.labels, "destination_principal") == identity("near")
    assert value(source.labels, "reporter") == "source"
    assert value(destination.labels, "reporter") == "destination"
    assert (source.policy, destination.policy) == ("", "istio-system/default")
    # And so the core was told, for ends that are no failures.
    assert rig.core.forms[joined] == b"2 lines"
    assert rig.described[-1] == [
        msgspec.structs.replace(each, start=0, duration_us=0, source="", received=0, sent=0)
        for each in (source, destination)
    ]


def test_the_servers_side_reports_what_was_audited_there(rig: Node) -> None:
    audit = authorization("default/near", Action.AUDIT, source(SLEEPS), workloads=(NEAR.uid,))
    rig.begin(mesh(audit=audit))
    decision = rig.core.answers[rig.outbound("10.1.0.2")]
    ended(rig, decision, Kind.OUTBOUND, Reason.CLOSED, destination=ip("10.1.0.2"))
    there, here = rig.lines
    assert (there.audit_rules, there.client) == ("", "")
    assert here.audit_rules == "default/near rules[0] (policy.yaml:1)"
    assert here.client == "identity_allowed"


def test_the_audit_log_has_the_called_side_of_it(rig: Node, joined: int) -> None:
    deny = authorization("default/no", Action.DENY, source(SLEEPS), workloads=(NEAR.uid,))
    rig.apply(deny)
    ended(rig, joined, Kind.OUTBOUND, Reason.POLICY_CHANGED, destination=ip("10.1.0.2"))
    said = [(each["event"], each["verdict"], each["policy"]) for each in rig.audited]
    assert said == [
        ("caller", "AUTHORIZED", "default"),
        ("connection", "UNAUTHORIZED", "no"),
    ]
    for each in rig.audited:
        assert each["identity"] == identity("sleep")
        assert (each["dst.addr"], each["dst.workload"]) == ("10.1.0.2:8080", "near")
        assert each["connection_security_policy"] == "none"


def test_a_cut_names_the_policy_at_both_sides(rig: Node, joined: int) -> None:
    rig.apply(removals=(Removal("workload_policy", NEAR.uid),))
    ended(rig, joined, Kind.OUTBOUND, Reason.POLICY_CHANGED, destination=ip("10.1.0.2"))
    assert [line.reason for line in rig.lines] == [Reason.POLICY_CHANGED] * 2


def test_both_series_are_told_to_the_core(rig: Node, joined: int) -> None:
    record = rig.tunnel.decisions.get(joined)
    assert record is not None
    assert record.series is not None
    assert record.mirror is not None
    assert record.flow is not None
    # What the destination reports is counted by its caller, and so for its label set too.
    assert record.flow.series is record.mirror
    decision = rig.core.decisions[joined]
    assert (decision.series, decision.arguments[0]) == (record.series.number, record.flow.number)
    assert record.series.labels == record.labels
    assert record.mirror.labels == record.mirror_labels
