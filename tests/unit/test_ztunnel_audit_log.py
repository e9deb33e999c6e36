"""Which judgements have an audit line: asked of the tunnel, on a core that only remembers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from support.fake_core import record
from support.mesh_state import SETTINGS, authorization, identity, ip, policy, principals, source
from support.tunnel_rig import SLEEP, Rig, chain_of, ended
from ztunnel import tunnel
from ztunnel._core import Failed
from ztunnel.audit import log
from ztunnel.corelike import Kind
from ztunnel.protocol import Action, Mode
from ztunnel.reasons import Reason
from ztunnel.settings import AuditSettings, Authorized

HERE = ip("10.1.0.1")


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(settings(**getattr(request, "param", {})))
    made.start()
    yield made
    made.close()


def settings(**audit: Any) -> Any:  # noqa: ANN401 - the fields of the audit log's settings
    return msgspec.structs.replace(SETTINGS, audit=AuditSettings(**audit))


def with_settings(**audit: Any) -> pytest.MarkDecorator:  # noqa: ANN401 - as above
    return pytest.mark.parametrize("rig", [audit], indirect=True)


def plain(rig: Rig, source_address: str = "10.3.0.1", reason: Reason = Reason.CLOSED) -> int:
    """A plaintext connection, from its begin to its end; return its decision."""
    decision = rig.core.answers[rig.inbound(source_address)]
    end(rig, decision, Kind.INBOUND_PLAINTEXT, reason, source_address)
    return decision


def end(
    rig: Rig, decision: int, kind: Kind, reason: Reason, source_address: str = "10.3.0.1"
) -> None:
    if reason is Reason.CLOSED and decision in rig.core.forms:
        return  # the core says so by itself
    ended(rig, decision, kind, reason, source=ip(source_address), destination=HERE)


def verdicts(rig: Rig) -> list[tuple[str, str, str]]:
    return [(each["event"], each["verdict"], each["policy"]) for each in rig.audited]


def strict(rig: Rig) -> None:
    made = policy(SLEEP.uid, Mode.STRICT)
    rig.apply(msgspec.structs.replace(made, origin="default/strict (mesh.yaml:1)"))


def test_who_is_refused_has_a_line_each_time(rig: Rig) -> None:
    strict(rig)
    for _ in range(3):
        plain(rig, reason=Reason.STRICT_PLAINTEXT)
    assert verdicts(rig) == [("connection", "UNAUTHORIZED", "strict")] * 3
    assert rig.audited[0]["message"] == "Unknown Identity UNAUTHORIZED policy=strict"
    assert rig.audited[0]["client"] == "without_identity"
    assert rig.audited[0]["src.workload"] == "legacy"
    assert rig.audited[0]["mode"] == "STRICT"


def test_who_is_refused_by_name_has_a_line_with_its_identity(rig: Rig) -> None:
    denied = principals(identity("httpbin").removeprefix("spiffe://"))
    rig.apply(authorization("default/no", Action.DENY, source(denied)))
    number, _ = rig.prove(chain_of("httpbin"))
    decision = rig.core.answers[rig.inbound("10.2.0.1", number)]
    end(rig, decision, Kind.INBOUND_HBONE, Reason.POLICY_DENIED, "10.2.0.1")
    assert [each["message"] for each in rig.audited] == [
        f'SPIFFE "{identity("httpbin")}" UNAUTHORIZED policy=no'
    ]
    assert rig.audited[0]["rule"] == "default/no rules[0] (policy.yaml:1)"
    assert rig.audited[0]["client"] == "identity_not_allowed"


def test_a_default_deny_is_named_as_such_with_the_policies_behind_it(rig: Rig) -> None:
    rig.apply(authorization("default/web", Action.ALLOW, source(principals("x/y"))))
    plain(rig, reason=Reason.POLICY_DENIED)
    assert verdicts(rig) == [("connection", "UNAUTHORIZED", "default:deny")]
    assert "default/web (policy.yaml:1)" in rig.audited[0]["rule"]


def test_who_is_let_in_is_named_when_it_begins_and_not_again(rig: Rig) -> None:
    number, _ = rig.prove(chain_of("httpbin"))
    rig.core.answers[rig.inbound("10.2.0.1", number)]
    assert verdicts(rig) == [("caller", "AUTHORIZED", "default")]
    assert rig.audited[0]["message"] == f'SPIFFE "{identity("httpbin")}" AUTHORIZED policy=default'
    assert rig.audited[0]["src.addr"] == "10.2.0.1"
    assert rig.audited[0]["dst.addr"] == "10.1.0.1:8080"
    # Every change of state empties the decision table: the same caller is no news.
    rig.apply(policy("default/other"))
    rig.inbound("10.2.0.1", number)
    assert len(rig.audited) == 1
    rig.now += log.CALLER_SECONDS
    rig.apply()
    rig.inbound("10.2.0.1", number)
    assert len(rig.audited) == 2


def test_another_policy_that_lets_in_is_news(rig: Rig) -> None:
    plain(rig)
    rig.apply(authorization("default/all", Action.ALLOW, source()))
    plain(rig)
    assert verdicts(rig) == [
        ("caller", "AUTHORIZED", "default"),
        ("caller", "AUTHORIZED", "all"),
    ]


def test_who_asks_anew_is_another_caller(rig: Rig) -> None:
    plain(rig)
    plain(rig, "10.9.0.1")
    rig.inbound("10.3.0.1", port=9090)
    assert len(rig.audited) == 3


def test_what_an_audit_rule_marks_has_a_line_at_its_end_each_time(rig: Rig) -> None:
    rig.apply(
        authorization("default/who", Action.AUDIT, source(unread=("to[0].operation.methods",)))
    )
    decision = plain(rig)
    assert decision not in rig.core.forms
    end(rig, decision, Kind.INBOUND_PLAINTEXT, Reason.CLOSED)
    assert [each["event"] for each in rig.audited] == ["caller", "connection", "connection"]
    for each in rig.audited:
        assert (each["verdict"], each["audit_flag"]) == ("AUTHORIZED", "true")
        assert each["audit_rules"] == ["default/who rules[0] (policy.yaml:1)"]
        assert each["audit_without"] == ["to[0].operation.methods"]
        assert each["level"] == "notice"


@with_settings(authorized=Authorized.CONNECTIONS)
def test_every_connection_has_a_line_if_the_settings_say_so(rig: Rig) -> None:
    decision = plain(rig)
    end(rig, decision, Kind.INBOUND_PLAINTEXT, Reason.CLOSED)
    assert [each["event"] for each in rig.audited] == ["caller", "connection", "connection"]
    assert {each["audit_flag"] for each in rig.audited} == {"false"}
    # The access log has its lines as ever.
    assert len(rig.lines) == 2


@with_settings(authorized=Authorized.NONE)
def test_without_those_who_are_let_in(rig: Rig) -> None:
    decision = plain(rig)
    assert not rig.audited
    assert decision in rig.core.forms
    rig.apply(authorization("default/who", Action.AUDIT, source()))
    plain(rig)
    strict(rig)
    plain(rig, reason=Reason.STRICT_PLAINTEXT)
    assert [each["verdict"] for each in rig.audited] == ["AUTHORIZED", "AUTHORIZED", "UNAUTHORIZED"]


@with_settings(stdout=False)
def test_without_sinks_nothing_is_made(rig: Rig) -> None:
    rig.apply(authorization("default/who", Action.AUDIT, source()))
    assert plain(rig) in rig.core.forms
    assert not rig.audited


def test_what_was_let_in_and_is_cut_is_unauthorized_by_who_cut_it(rig: Rig) -> None:
    decision = rig.core.answers[rig.inbound("10.3.0.1")]
    strict(rig)
    end(rig, decision, Kind.INBOUND_PLAINTEXT, Reason.POLICY_CHANGED)
    assert verdicts(rig) == [
        ("caller", "AUTHORIZED", "default"),
        ("connection", "UNAUTHORIZED", "strict"),
    ]
    assert rig.audited[1]["reason"] == "policy_changed"


def test_what_ends_by_itself_after_a_change_was_authorized(rig: Rig) -> None:
    rig.apply(authorization("default/who", Action.AUDIT, source()))
    decision = rig.core.answers[rig.inbound("10.3.0.1")]
    strict(rig)
    end(rig, decision, Kind.INBOUND_PLAINTEXT, Reason.CLIENT_RESET)
    assert verdicts(rig)[-1] == ("connection", "AUTHORIZED", "default")


def test_a_withdrawn_root_is_named_as_the_agents_own_reason(rig: Rig) -> None:
    number, _ = rig.prove(chain_of("httpbin"))
    decision = rig.core.answers[rig.inbound("10.2.0.1", number)]
    end(rig, decision, Kind.INBOUND_HBONE, Reason.TRUST_WITHDRAWN, "10.2.0.1")
    assert verdicts(rig)[-1] == ("connection", "UNAUTHORIZED", "agent:trust_withdrawn")


def test_a_refused_certificate_has_a_line_and_a_broken_handshake_has_none(rig: Rig) -> None:
    for reason in (Reason.CERT_UNTRUSTED, Reason.TLS_TIMEOUT, Reason.CERT_EXPIRED):
        number = list(Reason).index(reason)
        for kind in (Kind.PEER_CERTIFICATE, Kind.SERVER_CERTIFICATE):
            rig.core.report(record(Failed, kind, rig.pod, 0, ip("10.2.0.1"), 4000, number, "why"))
    rig.tunnel.pump()
    assert verdicts(rig) == [
        ("handshake", "UNAUTHORIZED", "agent:certificate_untrusted"),
        ("handshake", "UNAUTHORIZED", "agent:certificate_expired"),
    ]
    assert rig.audited[0]["message"] == (
        "Unknown Identity UNAUTHORIZED policy=agent:certificate_untrusted"
    )
    assert "why" in rig.audited[0]["error"]


def test_what_goes_out_is_judged_elsewhere(rig: Rig) -> None:
    rig.outbound("10.2.0.1")
    decision = rig.core.answers[rig.outbound("10.3.0.1")]
    ended(rig, decision, Kind.OUTBOUND, Reason.CONNECT_REFUSED, destination=ip("10.3.0.1"))
    assert not rig.audited


def test_a_failing_judgement_is_audited_of_what_comes_in_only(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(tunnel, "route", broken)
    monkeypatch.setattr(tunnel, "authorize", broken)
    decision = rig.core.answers[rig.outbound("10.2.0.1")]
    ended(rig, decision, Kind.OUTBOUND, Reason.INTERNAL, destination=ip("10.2.0.1"))
    assert not rig.audited
    plain(rig, reason=Reason.INTERNAL)
    assert verdicts(rig) == [("connection", "UNAUTHORIZED", "agent:internal_error")]


@with_settings(lines_per_second=20)
def test_a_flood_is_limited_counted_and_said_and_hides_nobody(rig: Rig) -> None:
    strict(rig)
    decision = rig.core.answers[rig.inbound("10.3.0.1")]
    for _ in range(500):
        end(rig, decision, Kind.INBOUND_PLAINTEXT, Reason.STRICT_PLAINTEXT)
    end(rig, decision, Kind.INBOUND_PLAINTEXT, Reason.STRICT_PLAINTEXT, "10.9.0.1")
    # A quarter of twenty for one source, and its neighbour has its own.
    assert [each["src.addr"] for each in rig.audited] == ["10.3.0.1:4000"] * 5 + ["10.9.0.1:4000"]
    assert rig.tunnel.audit.counts().left_out == {("all", "rate"): 495}
    rig.tunnel.tick()
    assert len(rig.audited) == 6
    rig.now += log.LEFT_OUT_SECONDS
    rig.tunnel.tick()
    assert rig.audited[-1]["message"] == "495 UNAUTHORIZED lines left out"
    assert (rig.audited[-1]["cause"], rig.audited[-1]["lines"]) == ("rate", 495)
    rig.now += log.LEFT_OUT_SECONDS
    rig.tunnel.tick()
    assert len(rig.audited) == 7


@with_settings(lines_per_second=1)
def test_the_end_says_what_is_due(rig: Rig) -> None:
    strict(rig)
    for _ in range(3):
        plain(rig, reason=Reason.STRICT_PLAINTEXT)
    rig.tunnel.events.tick(last=True)
    assert rig.audited[-1]["message"] == "2 UNAUTHORIZED lines left out"


def test_callers_that_are_remembered_are_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MAX_CALLERS", 2)
    for last in (1, 2, 3, 3, 1):
        rig.apply()
        plain(rig, f"10.3.0.{last}")
    assert [each["src.addr"] for each in rig.audited] == [f"10.3.0.{last}" for last in (1, 2, 3, 1)]
