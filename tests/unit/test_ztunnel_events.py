from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import msgspec
import pytest

from support.fake_core import Decision, record
from support.mesh_state import authorization, identity, ip, policy, principals, service, source
from support.tunnel_rig import (
    SLEEP,
    Rig,
    chain_of,
    ended,
    server_shows,
)
from ztunnel import _core
from ztunnel._core import Failed
from ztunnel.authorize import Client
from ztunnel.corelike import Kind
from ztunnel.observe import labels
from ztunnel.observe.access_log import Line, json_line
from ztunnel.observe.counted import Judged
from ztunnel.protocol import (
    Action,
    Endpoint,
    Mode,
)
from ztunnel.reasons import NO_FLAG, RESPONSE_FLAGS, Reason


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


# --- what became of connections ------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "way, upstream, upstream_port",
    [("10.2.0.1", "10.2.0.1", 15008), ("10.3.0.1", "10.3.0.1", 8080), ("1.2.3.4", "1.2.3.4", 8080)],
)
def test_the_core_is_told_the_line_that_an_end_would_get(
    rig: Rig, way: str, upstream: str, upstream_port: int
) -> None:
    rig.start()
    decision = rig.core.answers[rig.outbound(way)]
    said = ended(
        rig,
        decision,
        Kind.OUTBOUND,
        Reason.CLOSED,
        destination=ip(way),
        upstream=ip(upstream),
        upstream_port=upstream_port,
    )
    assert rig.core.forms[decision] == b"1 lines"
    assert rig.described == [[constant(said)]]


def test_the_core_is_told_the_line_of_what_comes_in(rig: Rig) -> None:
    rig.start()
    number, _ = rig.prove(chain_of("httpbin"))
    proven = rig.core.answers[rig.inbound("10.2.0.1", number)]
    told = ended(rig, proven, Kind.INBOUND_HBONE, Reason.CLOSED, destination=ip("10.1.0.1"))
    plain = rig.core.answers[rig.inbound("10.3.0.1")]
    said = ended(rig, plain, Kind.INBOUND_PLAINTEXT, Reason.CLOSED, destination=ip("10.1.0.1"))
    assert rig.described == [[constant(told)], [constant(said)]]


def test_the_certificate_is_the_one_that_was_shown_after_a_rotation_too(rig: Rig) -> None:
    rig.start()
    shown = [chain_of("httpbin"), chain_of("httpbin")]
    assert shown[0] != shown[1]
    for chain in shown:
        number, _ = rig.prove(chain)
        decision = rig.core.answers[rig.inbound("10.2.0.1", number)]
        line = ended(rig, decision, Kind.INBOUND_HBONE, Reason.CLOSED, identity=number)
        digest = hashlib.sha256(chain[0]).hexdigest()
        assert line.cert == (
            f'By={identity("sleep")};Hash={digest};Subject="";URI={identity("httpbin")}'
        )
        assert [told.cert for told in rig.described[-1]] == [line.cert]
        # Who is turned away before a decision has shown it all the same.
        early = ended(rig, 0, Kind.INBOUND_HBONE, Reason.POD_QUESTIONS, identity=number)
        assert early.cert == line.cert


def test_what_goes_out_and_what_shows_nothing_has_no_certificate(rig: Rig) -> None:
    rig.start()
    out = rig.core.answers[rig.outbound("10.2.0.1")]
    plain = rig.core.answers[rig.inbound("10.3.0.1")]
    assert ended(rig, out, Kind.OUTBOUND, Reason.CLOSED).cert == ""
    assert ended(rig, plain, Kind.INBOUND_PLAINTEXT, Reason.CLOSED).cert == ""


def test_a_refusal_has_no_line_beforehand(rig: Rig) -> None:
    rig.start()
    rig.apply(policy(SLEEP.uid, Mode.STRICT))
    rig.inbound("10.3.0.1")
    assert rig.described == []


def test_lines_that_are_ready_pass_to_the_log(rig: Rig) -> None:
    rig.start()
    rig.core.ready = (b"a\nb\n", 2)
    rig.tunnel.pump()
    assert rig.ready == [(b"a\nb\n", 2)]


def constant(line: Line) -> Line:
    return msgspec.structs.replace(line, start=0, duration_us=0, source="", received=0, sent=0)


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


def test_lines_of_a_policy_say_what_was_decided_audited_and_tried(rig: Rig) -> None:
    rig.start()
    unread = tuple(f"to[{number}].methods" for number in range(5))
    rig.apply(
        authorization("default/all", Action.ALLOW, source()),
        authorization(
            "default/audit",
            Action.AUDIT,
            source(unread=unread),
        ),
        authorization("istio-system/audit", Action.AUDIT, source()),
        authorization("default/tried", Action.DENY, source(principals("*")), dry_run=True),
    )
    plain = rig.core.answers[rig.inbound("10.3.0.1")]
    line = ended(rig, plain, Kind.INBOUND_PLAINTEXT, Reason.CLOSED, destination=ip("10.1.0.1"))
    assert line.policy == "default/all rules[0] (policy.yaml:1)"
    assert line.client == "without_identity"
    assert line.audit_rules == (
        "default/audit rules[0] (policy.yaml:1) "
        "without to[0].methods, to[1].methods, to[2].methods and 2 more; "
        "istio-system/audit rules[0] (policy.yaml:1)"
    )
    assert line.dry_run == "allowed by default/all rules[0] (policy.yaml:1)"
    assert rig.tunnel.counted.judged == {
        Judged(Client.WITHOUT_IDENTITY, allow=True, audited=True, would=True): 1
    }
    # So the core says it of every good end, and Python of none.
    assert rig.described == [[constant(line)]]
    number, _ = rig.prove(chain_of("httpbin"))
    proven = rig.core.answers[rig.inbound("10.2.0.1", number)]
    line = ended(rig, proven, Kind.INBOUND_HBONE, Reason.CLOSED, destination=ip("10.1.0.1"))
    assert line.client == "identity_allowed"
    assert line.dry_run == "denied by default/tried rules[0] (policy.yaml:1)"
    assert (
        rig.tunnel.counted.judged[Judged(Client.ALLOWED, allow=True, audited=True, would=False)]
        == 1
    )


def test_a_refusal_by_default_names_the_policies_behind_it(rig: Rig) -> None:
    rig.start()
    rig.apply(authorization("default/none", Action.ALLOW))
    number, _ = rig.prove(chain_of("httpbin"))
    decision = rig.core.answers[rig.inbound("10.2.0.1", number)]
    line = ended(rig, decision, Kind.INBOUND_HBONE, Reason.POLICY_DENIED)
    assert line.policy == "default deny: no rule matches of default/none (policy.yaml:1)"
    assert line.client == "identity_not_allowed"


def test_a_peer_is_named_by_its_proof_and_not_by_its_address(rig: Rig) -> None:
    rig.start()
    number, _ = rig.prove(chain_of("someone-else"))
    decision = rig.core.answers[rig.inbound("10.2.0.1", number)]
    line = ended(rig, decision, Kind.INBOUND_HBONE, Reason.CLOSED, destination=ip("10.1.0.1"))
    assert labels.value(line.labels, "source_principal") == identity("someone-else")
    # Kiali drops an edge whose source has a namespace and no workload.
    assert labels.value(line.labels, "source_workload") == ""
    assert labels.value(line.labels, "source_workload_namespace") == ""
    assert labels.value(line.labels, "source_cluster") == ""
    assert line.destination == "10.1.0.1:15008"
    assert line.hbone_destination == "10.1.0.1:8080"


def test_a_connection_without_a_decision_is_logged_and_counted(rig: Rig) -> None:
    rig.start()
    line = ended(rig, 0, Kind.OUTBOUND, Reason.DECISION_TIMEOUT)
    assert line.reason is Reason.DECISION_TIMEOUT
    assert labels.value(line.labels, "source_workload") == "sleep"
    assert dict(rig.tunnel.events.early.items()) == {(line.labels, "CONNECT"): 1}
    ended(rig, 0, Kind.OUTBOUND, Reason.CLIENT_RESET)
    assert dict(rig.tunnel.events.early.items()) == {(line.labels, "CONNECT"): 1}


def test_a_failed_handshake_is_logged_with_what_was_wrong(rig: Rig) -> None:
    rig.start()
    rig.outbound("10.2.0.1")
    server_shows(rig, chain_of("sleep"))
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


def refused_by_server(rig: Rig, reason: Reason, address: str) -> None:
    """A client's handshake with a pod of this node has failed."""
    number = list(Reason).index(reason)
    failed = record(Failed, Kind.PEER_CERTIFICATE, rig.pod, 0, ip(address), 40000, number, "")
    rig.core.report(failed)
    rig.tunnel.pump()


def test_a_client_whose_handshake_failed_is_a_connection_that_failed(rig: Rig) -> None:
    rig.start()
    refused_by_server(rig, Reason.CERT_EXPIRED, "10.2.0.1")
    refused_by_server(rig, Reason.CERT_MISSING, "10.9.0.1")
    refused_by_server(rig, Reason.CERT_MISSING, "10.9.0.2")
    counted = {
        (
            labels.value(found, "reporter"),
            labels.value(found, "source_workload"),
            labels.value(found, "source_principal"),
            labels.value(found, "destination_workload"),
            labels.value(found, "connection_security_policy"),
            flag,
        ): number
        for (found, flag), number in rig.tunnel.events.early.items()
    }
    assert counted == {
        # By its address, for it has proved nothing.
        ("destination", "httpbin", "", "sleep", "", "IDENTITY_ERROR"): 1,
        ("destination", "", "", "sleep", "", "TLS_FAILURE"): 2,
    }
    assert rig.lines[-1].labels in {found for (found, _), _ in rig.tunnel.events.early.items()}


@pytest.mark.parametrize(
    "reason",
    [
        Reason.H2_LIMIT,
        Reason.KEEPALIVE_TIMEOUT,
        Reason.TRUST_WITHDRAWN,
        Reason.SHUTDOWN,
        Reason.PEER_LOST,
    ],
)
def test_an_hbone_connection_that_ends_later_or_was_a_probe_is_no_failure(
    rig: Rig, reason: Reason
) -> None:
    rig.start()
    refused_by_server(rig, reason, "10.2.0.1")
    assert dict(rig.tunnel.events.early.items()) == {}


def test_a_handshake_that_was_broken_off_is_not_said_to_have_carried_anything(rig: Rig) -> None:
    rig.start()
    refused_by_server(rig, Reason.PEER_LOST, "10.9.0.1")
    assert "port scan" in rig.lines[-1].error
    assert "carried" not in rig.lines[-1].error


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


def test_log_and_metrics_have_the_same_reasons_and_flags(rig: Rig) -> None:
    rig.start()
    told = [json.loads(json_line(ended(rig, 0, Kind.INBOUND_PLAINTEXT, each))) for each in Reason]
    assert [line["reason"] for line in told] == list(_core.REASONS)
    failures = {line["reason"] for line in told if "response_flags" in line}
    assert {reason.value for reason in rig.tunnel.events.failed} == failures
    assert failures == {each.value for each in Reason if RESPONSE_FLAGS[each] != NO_FLAG}
    assert all(
        each.get("response_flags", NO_FLAG) == RESPONSE_FLAGS[Reason(each["reason"])]
        for each in told
    )
