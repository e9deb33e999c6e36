from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from support.mesh_state import identity, workload
from ztunnel.observe import labels
from ztunnel.observe.access_log import (
    FIELDS,
    AccessLog,
    Form,
    Line,
    certificate,
    json_line,
    text_line,
)
from ztunnel.reasons import Reason

SLEEP = workload("sleep", "10.1.0.1")
HTTPBIN = workload("httpbin", "10.2.0.1")


def line(**fields: Any) -> Line:  # noqa: ANN401 - its fields
    mutual = labels.make(
        labels.SOURCE,
        labels.MUTUAL_TLS,
        SLEEP,
        HTTPBIN,
        None,
        source_principal=identity("sleep"),
        destination_principal=identity("httpbin"),
    )
    values: dict[str, Any] = {
        "start": 1_623_666_479.758,
        "duration_us": 10_400,
        "direction": "outbound",
        "source": "10.1.0.1:4000",
        "destination": "10.2.0.1:15008",
        "hbone_destination": "10.2.0.1:8080",
        "labels": mutual,
        "received": 100,
        "sent": 1100,
        "reason": Reason.CLOSED,
        "error": "",
        "policy": "",
    }
    return Line(**(values | fields))


def plaintext(**fields: Any) -> Line:  # noqa: ANN401 - its fields
    unknown = labels.make(labels.DESTINATION, labels.PLAINTEXT, None, HTTPBIN, None)
    return line(labels=unknown, direction="inbound", hbone_destination="", **fields)


def test_json_has_the_references_keys() -> None:
    assert json.loads(json_line(line(policy="istio-system/default"))) == {
        "time": "2021-06-14T10:27:59.758Z",
        "level": "info",
        "scope": "access",
        "message": "connection complete",
        "src.addr": "10.1.0.1:4000",
        "src.workload": "sleep",
        "src.namespace": "default",
        "src.identity": identity("sleep"),
        "dst.addr": "10.2.0.1:15008",
        "dst.hbone_addr": "10.2.0.1:8080",
        "dst.workload": "httpbin",
        "dst.namespace": "default",
        "dst.identity": identity("httpbin"),
        "direction": "outbound",
        "bytes_sent": 1100,
        "bytes_recv": 100,
        "duration": "10ms",
        "reason": "closed",
        "connection_security_policy": "mutual_tls",
        "policy": "istio-system/default",
    }


@pytest.mark.parametrize("key", ["policy", "client", "audit_rules", "dry_run"])
def test_what_was_judged_stands_in_both_forms_and_forges_nothing(key: str) -> None:
    value = 'shop/a rules[0] (a.yaml:3) without to[0].methods; "x"\n'
    found = line(**{key: value})
    assert json.loads(json_line(found))[key] == value
    assert text_line(found).endswith(f" {key}={json.dumps(value)}")
    assert key not in json.loads(json_line(line()))
    assert f" {key}=" not in text_line(line())


def test_a_failure_is_an_error_with_its_cause() -> None:
    found = json.loads(json_line(line(reason=Reason.CONNECT_TIMEOUT, error="timed out")))
    assert (found["level"], found["reason"], found["error"]) == (
        "error",
        "connect_timeout",
        "timed out",
    )


def test_text_shows_both_ends_of_mutual_tls() -> None:
    found = text_line(line())
    assert found.startswith(
        '[2021-06-14T10:27:59.758Z] "TCP 10.2.0.1:8080" closed - "-" 100 1100 10 '
    )
    assert f'mTLS_Origin: "{identity("sleep")}"' in found
    assert f'mTLS_Destination: "{identity("httpbin")}"' in found
    assert 'dst.addr="10.2.0.1:15008"' in found


KNOWN: Final = re.compile(
    r'\[(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z)\] "(?P<request>[^"]*)" (?P<code>\S+) '
    r'(?P<flags>\S+) "(?P<failure>[^"]*)" (?P<received>\d+) (?P<sent>\d+) (?P<duration>\d+) '
    r'mTLS_Origin: "(?P<origin>[^"]*)" mTLS_Destination: "(?P<destination>[^"]*)"(?: \d+ "[^"]*")? '
    r'cert: "(?P<cert>-|By=[^;"]*;Hash=[0-9a-f]{64};Subject="[^"]*";URI=[^;"]*)" '
    r'audit_flag: "(?P<flag>[^"]*)"'
)
"""Reads the lines of the known exercise. They have two values of layer 7 more, in either place."""

IN_MESH: Final = (
    '[2021-06-14T10:27:59.758Z] "GET / HTTP/1.1" 200 - "-" 0 1100 10 '
    'mTLS_Origin: "spiffe://cluster.local/ns/istioinaction/sa/sleep" '
    'mTLS_Destination: "spiffe://cluster.local/ns/istioinaction/sa/web-api" 10 "-" '
    'cert: "By=spiffe://cluster.local/ns/istioinaction/sa/web-api;'
    "Hash=cdd00c3f7a968b8a48d41d536839485fc8f3c049915794a7688dc595f114e18b;"
    'Subject="";URI=spiffe://cluster.local/ns/istioinaction/sa/sleep" audit_flag: "false"'
)
OUTSIDE: Final = (
    '[2021-06-14T10:29:53.284Z] "GET / HTTP/1.1" 200 - "-" 0 1100 10 10 "-" '
    'mTLS_Origin: "-" mTLS_Destination: "-" cert: "-" audit_flag: "true"'
)


def known(text: str) -> dict[str, str]:
    found = KNOWN.match(text.replace(' 10 10 "-" mTLS', " 10 mTLS"))
    assert found is not None, text
    return found.groupdict()


def inside(name: str) -> str:
    return f"spiffe://cluster.local/ns/istioinaction/sa/{name}"


@pytest.mark.parametrize(
    "printed,fields",
    [
        (
            IN_MESH,
            {
                "start": 1_623_666_479.758,
                "labels": labels.make(
                    labels.DESTINATION,
                    labels.MUTUAL_TLS,
                    None,
                    None,
                    None,
                    source_principal=inside("sleep"),
                    destination_principal=inside("web-api"),
                ),
                "cert": certificate(
                    inside("web-api"),
                    "cdd00c3f7a968b8a48d41d536839485fc8f3c049915794a7688dc595f114e18b",
                    "",
                    inside("sleep"),
                ),
            },
        ),
        (
            OUTSIDE,
            {
                "start": 1_623_666_593.284,
                "labels": labels.make(labels.DESTINATION, labels.PLAINTEXT, None, None, None),
                "audit_rules": "istioinaction/audit-web-api-authpolicy rules[0]",
            },
        ),
    ],
    ids=["mutual TLS", "plaintext, audited"],
)
def test_a_line_is_the_known_one_field_by_field(printed: str, fields: dict[str, Any]) -> None:
    ours = known(
        text_line(line(direction="inbound", received=0, sent=1100, duration_us=10_000, **fields))
    )
    theirs = known(printed)
    # Of layer 7: what was asked, and what was answered.
    assert (ours.pop("request"), ours.pop("code")) == ("TCP 10.2.0.1:8080", "closed")
    assert (theirs.pop("request"), theirs.pop("code")) == ("GET / HTTP/1.1", "200")
    assert ours == theirs


@pytest.mark.parametrize(
    "fields,flag",
    [
        ({"direction": "inbound"}, "false"),
        ({"direction": "inbound", "audit_rules": "a/b rules[0]"}, "true"),
        ({"direction": "outbound"}, None),
        ({"direction": "inbound", "handshake": True}, None),
    ],
)
def test_the_flag_of_a_connection_that_was_judged_is_true_or_false(
    fields: dict[str, Any], flag: str | None
) -> None:
    found = line(**fields)
    assert json.loads(json_line(found)).get("audit_flag") == flag
    assert f' audit_flag: "{flag or "-"}" ' in text_line(found)


def test_a_line_of_the_beginning_has_no_reason_yet() -> None:
    found = json.loads(json_line(line(opened=True)))
    assert (found["level"], found["message"]) == ("info", "connection opened")
    assert "reason" not in found
    assert found["src.identity"] == identity("sleep")
    assert ' "TCP 10.2.0.1:8080" - - "-" 100 1100 10 mTLS_Origin: ' in text_line(line(opened=True))


def test_a_failure_has_the_flag_of_the_metrics() -> None:
    found = line(reason=Reason.POLICY_DENIED, error="denied by policy", flags="DENY")
    assert json.loads(json_line(found))["response_flags"] == "DENY"
    assert ' policy_denied DENY "denied by policy" 100 ' in text_line(found)
    assert "response_flags" not in json.loads(json_line(line()))


@pytest.mark.parametrize(
    "subject", ['CN=a";URI=spiffe://evil/x', 'CN="";URI=spiffe://evil/x', "CN=\\"]
)
def test_a_subject_forges_no_certificate(subject: str) -> None:
    cert = certificate(inside("web-api"), "0" * 64, subject, inside("sleep"))
    assert json.loads(json_line(line(cert=cert)))["cert"] == cert
    text = text_line(line(cert=cert))
    # As Envoy reads it: in quotes a backslash takes the meaning from what follows.
    (quoted,) = re.findall(r' cert: "((?:[^"\\]|\\.)*)" ', text)
    whole = json.loads(f'"{quoted}"')
    (found,) = re.findall(r';Subject="((?:[^"\\]|\\.)*)";URI=(\S+)', whole)
    assert found == (subject.replace("\\", r"\\").replace('"', r"\""), inside("sleep"))


def test_text_shows_that_plaintext_has_neither() -> None:
    found = text_line(plaintext())
    assert (
        'mTLS_Origin: "-" mTLS_Destination: "-" cert: "-" audit_flag: "false" '
        'connection_security_policy="none"'
    ) in found


def test_what_was_joined_on_this_node_is_no_mutual_tls_and_has_both_identities() -> None:
    joined = labels.make(
        labels.SOURCE,
        labels.PLAINTEXT,
        SLEEP,
        HTTPBIN,
        None,
        source_principal=identity("sleep"),
        destination_principal=identity("httpbin"),
    )
    each = line(labels=joined, hbone_destination="")
    found = json.loads(json_line(each))
    assert (found["connection_security_policy"], found["same_node"]) == ("none", "direct")
    assert (found["src.identity"], found["dst.identity"]) == (
        identity("sleep"),
        identity("httpbin"),
    )
    text = text_line(each)
    assert 'mTLS_Origin: "-" mTLS_Destination: "-" cert: "-"' in text
    assert 'connection_security_policy="none"' in text
    assert 'same_node="direct"' in text
    assert "same_node" not in text_line(plaintext()) + json_line(line())


@pytest.mark.parametrize("form", [json_line, text_line])
@pytest.mark.parametrize(
    "evil", ['a"b', "a\nb", "a\rb", "a\x00b", "a\x1b[31mb", "a\x7fb", "a\u2028b", "a\x85b"]
)
def test_no_value_forges_a_line_or_a_field(form: Callable[[Line], str], evil: str) -> None:
    forged = labels.make(
        labels.SOURCE, labels.UNKNOWN, workload(evil, "10.1.0.1", account="a"), None, None
    )
    found = form(line(labels=forged, error=evil, policy=evil))
    assert found.isascii()
    assert found.isprintable()
    assert 'a"b' not in found.replace('\\"', "")


@pytest.mark.parametrize("spell", [json_line, text_line])
def test_a_form_that_is_filled_in_is_the_line(spell: Form, tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "access.log"), spell)
    lines = [line(policy='odd %s "policy"'), plaintext()]
    form = log.form([msgspec.structs.replace(each, start=0, source="") for each in lines])
    values = {
        "time": "2021-06-14T10:27:59.758Z",
        "source": "10.1.0.1:4000",
        "received": "100",
        "sent": "1100",
        "milliseconds": "10",
    }
    assert form.count(b"\n") == len(lines)
    for number, field in enumerate(FIELDS, 1):
        assert form.count(number) == len(lines)
        form = form.replace(bytes([number]), values[field].encode())
    assert form.decode() == "".join(f"{spell(each)}\n" for each in lines)


def _written(path: Path) -> list[str]:
    return path.read_text(encoding="ascii").splitlines()


def test_lines_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(str(path), json_line)
    log.start()
    for _ in range(1200):
        log.write([line()])
    log.put(b"ready\n" * 3, 3)
    log.stop(30)
    assert len(_written(path)) == 1203
    assert _written(path)[-3:] == ["ready"] * 3
    assert (log.written, log.dropped) == (1203, 0)
    assert path.stat().st_mode & 0o077 <= 0o040


def test_a_moved_file_is_reopened_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    moved = tmp_path / "access.log.1"
    log = AccessLog(str(path), json_line)
    path.rename(moved)
    log.reopen()
    log.start()
    log.write([line()])
    log.stop(30)
    assert len(_written(path)) == 1
    assert _written(moved) == []


def test_a_file_that_cannot_be_reopened_stays(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "access.log"
    path.parent.mkdir()
    log = AccessLog(str(path), json_line)
    moved = tmp_path / "gone"
    path.parent.rename(moved)
    log.reopen()
    log.start()
    log.write([line()])
    log.stop(30)
    assert len(_written(moved / "access.log")) == 1


def test_a_disk_that_stands_still_costs_lines_and_never_time(tmp_path: Path) -> None:
    formatting, go_on = threading.Event(), threading.Event()

    def form(given: Line, *_: object) -> str:
        formatting.set()
        go_on.wait(30)
        return json_line(given)

    path = tmp_path / "access.log"
    log = AccessLog(str(path), form, capacity=10)
    log.start()
    log.write([line()])
    assert formatting.wait(30)
    for _ in range(15):
        log.write([line()])
    assert log.dropped == 5
    go_on.set()
    log.stop(30)
    assert len(_written(path)) == 11


def test_a_full_disk_is_counted() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    log = AccessLog("/dev/full", json_line)
    log.start()
    log.write([line()])
    log.stop(30)
    assert (log.written, log.dropped) == (0, 1)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    link = tmp_path / "access.log"
    link.symlink_to(target)
    with pytest.raises(OSError, match=r"symbolic link, .* standard output"):
        AccessLog(str(link), json_line)
