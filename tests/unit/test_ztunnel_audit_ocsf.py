"""Audit lines for a SIEM: events that the published schema of OCSF takes, and nothing is lost."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any, Final

import jsonschema
import msgspec
import pytest
from ocsf_json_schema import OcsfJsonSchemaEmbedded

from support.audit_lines import ALLOWED, REFUSED, TIME, entry, line
from support.mesh_state import identity
from ztunnel.audit.entry import Event, of_handshake
from ztunnel.audit.forms import LeftOut, Line, fields
from ztunnel.audit.ocsf import SCHEMA, ocsf_line
from ztunnel.policy import DryRun, Match
from ztunnel.reasons import Reason

NODE: Final = "worker-1"
CLASSES: Final = {0: "base_event", 4001: "network_activity"}


@functools.cache
def published() -> dict[str, Any]:
    """Return the schema of the version that events claim, as its authors export it."""
    folder = importlib.resources.files("ocsf_json_schema") / "ocsf"
    found: dict[str, Any] = json.loads((folder / f"{SCHEMA}.json").read_text("utf-8"))
    return found


@functools.cache
def validator(name: str, profiles: tuple[str, ...]) -> jsonschema.Draft202012Validator:
    made = OcsfJsonSchemaEmbedded(published()).get_class_schema(name, list(profiles))
    return jsonschema.Draft202012Validator(made)


def event(of: Line, node: str = NODE) -> dict[str, Any]:
    """Return the event, once the schema has nothing to say against it."""
    text = ocsf_line(of, node)
    assert text.isascii()
    assert text.isprintable()
    found: dict[str, Any] = json.loads(text)
    profiles = tuple(found["metadata"]["profiles"])
    problems = validator(CLASSES[found["class_uid"]], profiles).iter_errors(found)
    assert [(error.json_path, error.message) for error in problems] == []
    return found


def test_the_schema_does_refuse() -> None:
    found = event(entry())
    check = validator("network_activity", ("security_control", "host"))
    for broken in (
        {key: value for key, value in found.items() if key != "severity_id"},
        found | {"activity_id": 44},
        found | {"nonsense": 1},
        found | {"src_endpoint": {"ip": 7}},
    ):
        assert not check.is_valid(broken)


def test_a_connection_has_both_ends_their_identities_and_what_was_decided() -> None:
    found = event(entry())
    assert (found["class_uid"], found["type_uid"]) == (4001, 400102)
    assert found["time"] == round(TIME * 1000)
    assert (found["action"], found["disposition"]) == ("Allowed", "Allowed")
    assert (found["status"], found["status_code"]) == ("Success", "closed")
    assert found["src_endpoint"] == {
        "ip": "10.1.0.1",
        "port": 4000,
        "name": "default/sleep",
        "owner": {"uid": identity("sleep")},
    }
    assert found["dst_endpoint"] == {
        "ip": "10.2.0.1",
        "port": 8080,
        "name": "bookstore/books",
        "owner": {"uid": identity("books", "bookstore")},
    }
    assert found["policy"] == {
        "name": "strict",
        "uid": "bookstore/strict",
        "desc": ALLOWED.origin,
        "is_applied": True,
    }
    assert found["traffic"] == {"bytes_in": 1100, "bytes_out": 100, "bytes": 1200}
    assert found["duration"] == 1000
    assert found["device"]["hostname"] == NODE
    assert found["message"].startswith('SPIFFE "spiffe://')


@pytest.mark.parametrize(
    "of,activity,disposition,severity",
    [
        (entry(event=Event.CALLER, source="10.1.0.1"), "Open", "Allowed", "Informational"),
        (entry(), "Close", "Allowed", "Informational"),
        (entry(reason=Reason.CLIENT_RESET), "Reset", "Allowed", "Informational"),
        (entry(reason=Reason.CONNECT_REFUSED), "Fail", "Allowed", "Informational"),
        (entry(REFUSED), "Refuse", "Blocked", "Medium"),
        (entry(REFUSED, reason=Reason.POLICY_CHANGED), "Reset", "Access Revoked", "Medium"),
        (
            of_handshake(TIME, line("", reason=Reason.CERT_EXPIRED, handshake=True)),
            *("Fail", "Blocked", "Medium"),
        ),
    ],
)
def test_what_happened_in_the_schemas_words(
    of: Line, activity: str, disposition: str, severity: str
) -> None:
    found = event(of)
    assert found["activity_name"] == activity
    assert found["type_uid"] == 400100 + found["activity_id"]
    assert (found["disposition"], found["severity"]) == (disposition, severity)


def test_every_reason_is_an_event() -> None:
    for reason in Reason:
        for verdict in (ALLOWED, REFUSED):
            assert event(entry(verdict, reason=reason))["status_code"] == reason.value


def test_a_caller_without_identity_has_no_account() -> None:
    found = event(entry(REFUSED, ""))
    assert "owner" not in found["src_endpoint"]
    assert found["message"].startswith("Unknown Identity UNAUTHORIZED")


@pytest.mark.parametrize("source", ["[fd00::1]:4000", "[fd00::1]"])
def test_addresses_of_the_other_family(source: str) -> None:
    endpoint = event(entry(source=source))["src_endpoint"]
    assert endpoint["ip"] == "fd00::1"
    assert endpoint.get("port", 0) in (0, 4000)


def test_nothing_that_is_known_is_lost() -> None:
    audits = (Match("bookstore/audit rules[0] (mesh.yaml:3)", ("methods",)),)
    judged = msgspec.structs.replace(
        ALLOWED,
        audits=audits,
        dry_run=DryRun(allow=False, origin="bookstore/tried rules[0] (mesh.yaml:9)", audits=audits),
    )
    of = entry(judged, reason=Reason.CLIENT_RESET, error="the client reset the connection")
    found = event(of)
    said = json.dumps(found)
    for key, value in fields(of):
        if key not in ("event", "verdict", "duration_us", "src.addr", "dst.addr"):
            for each in value if isinstance(value, tuple) else (value,):
                assert json.dumps(each).strip('"') in said, key
    assert found["unmapped"]["audit_flag"] == "true"
    assert found["severity"] == "Low"


def test_lines_that_were_left_out_are_an_event_too() -> None:
    found = event(LeftOut(TIME, 512, "rate", "UNAUTHORIZED"))
    assert (found["class_uid"], found["type_uid"]) == (0, 99)
    assert found["message"] == "512 UNAUTHORIZED lines left out"
    assert found["unmapped"] == {"cause": "rate", "lines": 512}


def test_a_node_without_a_name_is_left_out() -> None:
    assert "device" not in event(entry(), node="")


@pytest.mark.parametrize("evil", ['a"b', "a\nb", "a\x1b[31mb", "a\x7fb", "a\u2028b", "x" * 5000])
def test_no_value_forges_an_event(evil: str) -> None:
    found = event(entry(REFUSED, error=evil))
    assert found["status_detail"].startswith(evil[:900])
    assert found["disposition"] == "Blocked"
