"""How audit lines are spelled: beside the well-known form, and by the grammar of each protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import rfc5424
from support.audit_lines import ALLOWED, REFUSED, TIME, entry, journal_fields, line
from support.mesh_state import identity
from ztunnel.audit import forms, journal, syslog
from ztunnel.audit.entry import Entry, Event, of_handshake, policy_of
from ztunnel.audit.forms import LeftOut, Severity, json_line, text_line
from ztunnel.authorize import NODE_PLAINTEXT, Verdict
from ztunnel.observe import labels
from ztunnel.policy import DEFAULT_DENY, DryRun, Match
from ztunnel.reasons import Reason
from ztunnel.settings import Facility

NODE = "worker-1"

KNOWN = """\
16:35:00 [[QM]] WARN SPIFFE "spiffe://cluster.local/ns/teamRed-NS/sa/team-Red-clientapp-R" \
UNAUTHORIZED policy=default
16:35:01 [[QM]] WARN SPIFFE "spiffe://cluster.local/ns/teamC-NS/sa/team-C-clientapp-Z" \
AUTHORIZED policy=strict
16:35:01 [[QM]] WARN Unknown Identity UNAUTHORIZED policy=default
"""
"""The lines that collectors know, as their documentation shows them."""

READER = re.compile(
    r"(?P<time>\S+) \[\[(?P<who>[^\]]+)\]\] (?P<level>[A-Z]+) "
    r'(?:SPIFFE "(?P<identity>[^"]+)"|Unknown Identity) '
    r"(?P<verdict>AUTHORIZED|UNAUTHORIZED) policy=(?P<policy>\S+)(?P<rest>.*)"
)
"""A collector's expression: it reads the known lines, and has to read ours."""

PLAINTEXT = msgspec.structs.replace(REFUSED, reason=Reason.STRICT_PLAINTEXT, origin="shop/default")


def named(verdict: Verdict, name: str) -> Verdict:
    return msgspec.structs.replace(verdict, origin=f"bookstore/{name} rules[0] (mesh.yaml:3)")


KNOWN_CASES = [
    entry(named(REFUSED, "default"), identity("team-Red-clientapp-R", "teamRed-NS")),
    entry(named(ALLOWED, "strict"), identity("team-C-clientapp-Z", "teamC-NS")),
    entry(PLAINTEXT, ""),
]


@pytest.mark.parametrize("number", range(3))
def test_text_has_each_field_of_the_known_lines_in_its_place(number: int) -> None:
    known = READER.fullmatch(KNOWN.splitlines()[number])
    ours = READER.fullmatch(text_line(KNOWN_CASES[number], NODE))
    assert known is not None
    assert ours is not None
    for field in ("level", "identity", "verdict", "policy"):
        assert ours[field] == known[field], field
    assert ours["time"] == "2021-06-14T10:27:59.758123Z"
    assert ours["who"] == NODE
    assert known["rest"] == ""


@pytest.mark.parametrize(
    "audits, flag", [((), "false"), ((Match("shop/audit rules[0] (a.yaml:9)"),), "true")]
)
def test_audit_flag_is_what_the_known_access_log_has(audits: tuple[Match, ...], flag: str) -> None:
    """`… cert: "-" audit_flag: "true"`, of a plaintext call that an AUDIT policy is about."""
    verdict = msgspec.structs.replace(ALLOWED, audits=audits)
    said = entry(verdict, "")
    assert re.search(r' audit_flag: "(true|false)"', text_line(said, NODE))[1] == flag  # type: ignore[index]  # a match, or the test fails here
    assert json.loads(json_line(said, NODE))["audit_flag"] == flag


def test_json_says_all_that_is_known() -> None:
    verdict = msgspec.structs.replace(
        REFUSED,
        audits=(Match("shop/audit rules[0] (a.yaml:9)", ("to[0].methods", "to[0].paths")),),
        dry_run=DryRun(True, "shop/tried rules[0] (t.yaml:1)", (Match("shop/x rules[0] (x:1)"),)),
    )
    said = entry(verdict, error="an AuthorizationPolicy refuses")
    assert json.loads(json_line(said, NODE)) == {
        "time": "2021-06-14T10:27:59.758123Z",
        "level": "warning",
        "message": f'SPIFFE "{identity("sleep")}" UNAUTHORIZED policy=default',
        "node": "worker-1",
        "audit_version": 1,
        "audit_flag": "true",
        "event": "connection",
        "verdict": "UNAUTHORIZED",
        "identity": identity("sleep"),
        "client": "identity_not_allowed",
        "policy": "default",
        "policy_namespace": "bookstore",
        "rule": "bookstore/default rules[1] (mesh.yaml:30)",
        "mode": "PERMISSIVE",
        "audit_rules": ["shop/audit rules[0] (a.yaml:9)"],
        "audit_without": ["to[0].methods", "to[0].paths"],
        "dry_run": "AUTHORIZED",
        "dry_run_rule": "shop/tried rules[0] (t.yaml:1)",
        "dry_run_audit_rules": ["shop/x rules[0] (x:1)"],
        "src.addr": "10.1.0.1:4000",
        "src.workload": "sleep",
        "src.namespace": "default",
        "dst.addr": "10.2.0.1:8080",
        "dst.workload": "books",
        "dst.namespace": "bookstore",
        "dst.identity": identity("books", "bookstore"),
        "connection_security_policy": "mutual_tls",
        "reason": "policy_denied",
        "error": "an AuthorizationPolicy refuses",
        "duration_us": 1_000_000,
        "bytes_recv": 100,
        "bytes_sent": 1100,
    }


def test_a_caller_whose_connection_has_just_begun_has_no_end() -> None:
    found = json.loads(json_line(entry(event=Event.CALLER, source="10.1.0.1"), NODE))
    assert (found["event"], found["src.addr"]) == ("caller", "10.1.0.1")
    assert not {"reason", "duration_us", "bytes_recv", "bytes_sent"} & found.keys()


@pytest.mark.parametrize(
    "verdict, principal, client",
    [
        (ALLOWED, "", "without_identity"),
        (PLAINTEXT, "", "without_identity"),
        (REFUSED, identity("sleep"), "identity_not_allowed"),
        (ALLOWED, identity("sleep"), "identity_allowed"),
    ],
)
def test_each_line_says_the_class_of_its_client(
    verdict: Verdict, principal: str, client: str
) -> None:
    assert json.loads(json_line(entry(verdict, principal), NODE))["client"] == client


def test_a_refused_certificate_is_an_unknown_identity() -> None:
    said = of_handshake(TIME, line("", reason=Reason.CERT_UNTRUSTED, handshake=True))
    found = READER.fullmatch(text_line(said, NODE))
    assert found is not None
    assert (found["identity"], found["verdict"]) == (None, "UNAUTHORIZED")
    assert found["policy"] == "agent:certificate_untrusted"
    assert 'event="handshake"' in found["rest"]


@pytest.mark.parametrize(
    "origin, refused, name, namespace",
    [
        ("shop/web rules[2] (a b/mesh.yaml:7)", None, "web", "shop"),
        ("shop/strict (mesh.yaml:7)", Reason.STRICT_PLAINTEXT, "strict", "shop"),
        ("shop/web nodeagent.io/callers (mesh.yaml:7)", None, "web", "shop"),
        (f"{DEFAULT_DENY}shop/a (a:1), shop/b (b:1)", Reason.POLICY_DENIED, "default:deny", ""),
        (NODE_PLAINTEXT, None, "settings:node_plaintext", ""),
        ("default", None, "default:allow", ""),
        ("", Reason.TRUST_WITHDRAWN, "agent:trust_withdrawn", ""),
    ],
)
def test_the_policy_that_decided_is_named(
    origin: str, refused: Reason | None, name: str, namespace: str
) -> None:
    found = policy_of(origin, refused)
    assert (found.name, found.namespace) == (name, namespace)
    assert found.origin in (origin, "")


@pytest.mark.parametrize(
    "verdict, severity",
    [
        (REFUSED, Severity.WARNING),
        (ALLOWED, Severity.INFO),
        (msgspec.structs.replace(ALLOWED, audits=(Match("a"),)), Severity.NOTICE),
    ],
)
def test_severity_is_in_each_form_that_has_one(verdict: Verdict, severity: Severity) -> None:
    said = entry(verdict)
    assert json.loads(json_line(said, NODE))["level"] == severity.name.lower()
    assert rfc5424.parse(syslog_of(said)).severity == severity
    assert dict(journal_of(said))["PRIORITY"] == b"%d" % severity


def test_what_was_left_out_is_counted_in_each_form() -> None:
    said = LeftOut(TIME, 512, "rate", "UNAUTHORIZED")
    assert text_line(said, NODE) == (
        "2021-06-14T10:27:59.758123Z [[worker-1]] WARN 512 UNAUTHORIZED lines left out "
        'event="left_out" cause="rate"'
    )
    found = json.loads(json_line(said, NODE))
    assert (found["event"], found["cause"], found["lines"]) == ("left_out", "rate", 512)
    message = rfc5424.parse(syslog_of(said))
    assert (message.what, message.severity) == ("left_out", Severity.WARNING)
    assert dict(message.elements["audit@32473"])["lines"] == "512"
    assert dict(journal_of(said))["AUDIT_LINES"] == b"512"
    assert READER.fullmatch(text_line(said, NODE)) is None


# --- syslog and the journal ----------------------------------------------------------------------


def syslog_of(said: forms.Line, facility: Facility = Facility.AUTHPRIV) -> bytes:
    return syslog.spell(said, forms.message(said), facility, NODE, 4242)


def journal_of(said: forms.Line) -> list[tuple[str, bytes]]:
    return journal_fields(journal.spell(said, Facility.AUTHPRIV))


def test_a_syslog_message_has_every_part_where_rfc_5424_wants_it() -> None:
    said = entry(REFUSED)
    found = rfc5424.parse(syslog_of(said))
    assert (found.facility, found.severity) == (10, 4)
    assert found.time.isoformat() == "2021-06-14T10:27:59.758123+00:00"
    assert found[3:7] == ("worker-1", "ztunnel", "4242", "connection")
    assert found.text == f'SPIFFE "{identity("sleep")}" UNAUTHORIZED policy=default'
    parameters = found.elements["audit@32473"]
    assert found.elements.keys() == {"audit@32473"}
    assert parameters == [
        (key, each)
        for key, value in forms.fields(said)
        for each in (value if isinstance(value, tuple) else (str(value),))
    ]


@pytest.mark.parametrize("facility", Facility)
def test_facilities_are_those_of_rfc_5424(facility: Facility) -> None:
    table = {"user": 1, "daemon": 3, "auth": 4, "authpriv": 10, "audit": 13}
    number = table.get(facility.value)
    if number is None:
        number = 16 + int(facility.value.removeprefix("local"))
    assert rfc5424.parse(syslog_of(entry(), facility)).facility == number


def test_a_stream_of_messages_is_counted() -> None:
    messages = [syslog_of(said) for said in KNOWN_CASES]
    stream = b"".join(map(syslog.framed, messages))
    assert rfc5424.unframe(stream) == (messages, b"")
    assert rfc5424.unframe(stream[:-1])[0] == messages[:-1]


def test_the_journal_gets_every_field_by_a_name_of_its_own() -> None:
    found = journal_of(entry(REFUSED))
    assert dict(found)["MESSAGE"] == (
        f'SPIFFE "{identity("sleep")}" UNAUTHORIZED policy=default'.encode()
    )
    assert dict(found)["SYSLOG_FACILITY"] == b"10"
    assert dict(found)["SYSLOG_IDENTIFIER"] == b"ztunnel"
    assert dict(found)["AUDIT_FLAG"] == b"false"
    assert dict(found)["AUDIT_SRC_ADDR"] == b"10.1.0.1:4000"
    assert dict(found)["AUDIT_POLICY_NAMESPACE"] == b"bookstore"
    # journald drops fields whose names begin with an underscore.
    assert all(not name.startswith("_") for name, _ in found)


# --- nobody forges a line ------------------------------------------------------------------------

EVIL = st.text(
    st.one_of(
        st.sampled_from('"\\]=[ \n\r\t\x00\x1b\x7f\x85\u2028\ufeff\ud800é💥'),
        st.characters(),
    ),
    max_size=40,
)


def hostile(evil: str) -> Entry:
    """An entry with `evil` wherever a value comes from outside of this program."""
    verdict = msgspec.structs.replace(
        REFUSED,
        origin=f"shop/{evil} rules[0] ({evil}:1)",
        audits=(Match(evil, (evil,)), Match(f"{evil}2")),
        dry_run=DryRun(allow=False, origin=evil),
    )
    values: Any = line(error=evil, source=evil, destination=evil)
    forged = list(values.labels)
    position = labels.LABEL_NAMES.index
    for name in ("source_principal", "source_workload", "destination_service"):
        forged[position(name)] = evil
    values = msgspec.structs.replace(values, labels=tuple(forged), hbone_destination="")
    return Entry(
        TIME,
        Event.CONNECTION,
        allow=False,
        identity=evil,
        policy=policy_of(verdict.origin),
        client=REFUSED.client,  # type: ignore[arg-type]  # it has one
        verdict=verdict,
        line=values,
    )


def printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


QUOTED = r'"(?:[^"\\]|\\.)*"'
WHOLE = re.compile(
    rf"\S+ \[\[{NODE}\]\] WARN (?:SPIFFE {QUOTED}|Unknown Identity) UNAUTHORIZED "
    rf"policy=(?:{QUOTED}|[A-Za-z0-9._:-]+) audit_flag: {QUOTED}"
    rf"(?P<rest>(?: [a-z._]+=(?:{QUOTED}|[0-9]+))*)"
)
"""A line and nothing else: whatever is not ours stands in quotes."""


@given(EVIL)
def test_no_value_forges_a_line_or_a_field_of_text(evil: str) -> None:
    text = text_line(hostile(evil), NODE)
    assert printable(text)
    found = WHOLE.fullmatch(text)
    assert found is not None
    keys = re.findall(r" ([a-z._]+)=", re.sub(QUOTED, '""', found["rest"]))
    assert len(keys) == len(set(keys))
    assert set(keys) <= {key for key, _ in forms.fields(hostile("x"))}


@given(EVIL)
def test_no_value_forges_a_field_of_json(evil: str) -> None:
    text = json_line(hostile(evil), NODE)
    assert printable(text)
    found = json.loads(text)
    assert found.keys() <= json.loads(json_line(hostile("x"), NODE)).keys()
    assert (found["verdict"], found["event"]) == ("UNAUTHORIZED", "connection")
    assert found.get("identity", "") == evil


@given(EVIL)
def test_no_value_forges_a_syslog_message_or_parameter(evil: str) -> None:
    data = syslog_of(hostile(evil))
    assert printable(data.decode("ascii"))
    found = rfc5424.parse(data)
    parameters = found.elements["audit@32473"]
    wanted = rfc5424.parse(syslog_of(hostile("x"))).elements["audit@32473"]
    assert {key for key, _ in parameters} <= {key for key, _ in wanted}
    assert dict(parameters)["verdict"] == "UNAUTHORIZED"


@given(EVIL)
def test_no_value_forges_a_field_of_the_journal(evil: str) -> None:
    found = journal_of(hostile(evil))
    assert {name for name, _ in found} <= {name for name, _ in journal_of(hostile("x"))}
    assert dict(found)["AUDIT_VERDICT"] == b"UNAUTHORIZED"
    assert dict(found).get("AUDIT_IDENTITY", b"") == evil.encode("utf-8", "replace")


@pytest.mark.parametrize("spell", [text_line, json_line])
def test_a_line_is_bounded(spell: Callable[[Entry, str], str]) -> None:
    """Eight rules at most are named, with origins of 8,192 characters at most."""
    long = "x" * 8192
    matches = tuple(Match(f"{number}{long}", (long,)) for number in range(8))
    verdict = msgspec.structs.replace(
        REFUSED,
        origin=long,
        audits=matches,
        dry_run=DryRun(allow=True, origin=long, audits=matches),
    )
    said = entry(verdict, error=long)
    assert len(spell(said, NODE)) < 64_000
    # Of UDP, the smallest: RFC 5426, 3.2.
    assert len(syslog_of(said)) < 65_507
