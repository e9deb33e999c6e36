"""The access log as text, of connections that two daemons carry: at their beginning and end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.lab import Lab
from support.e2e import Mesh, running, spec, spiffe, watched
from support.netns import wait_until

pytestmark = pytest.mark.netns

OPTIONS = ("--log-format", "text", "--access-log-starts")

LINE = re.compile(
    r'\[(?P<time>[^\]]+Z)\] "TCP (?P<called>\S+)" (?P<reason>\S+) (?P<flags>\S+) '
    r'"(?P<error>[^"]*)" (?P<received>\d+) (?P<sent>\d+) \d+ mTLS_Origin: "(?P<origin>[^"]*)" '
    r'mTLS_Destination: "(?P<destination>[^"]*)" cert: "(?P<cert>-|By=.*?;URI=[^"]*)" '
    r'audit_flag: "(?P<flag>[^"]*)" connection_security_policy="(?P<security>\w+)" (?P<rest>.*)'
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(apps=False, pods=("client", "far", "outsider"), arguments=OPTIONS)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


def lines(mesh: Mesh, port: int) -> list[dict[str, str]]:
    """Return the lines of connections to a port of `far`, each of which must be of the form."""
    path: Path = mesh.lab.layout.access_log("node-2")
    found = []
    for line in path.read_text().splitlines():
        match = LINE.fullmatch(line)
        assert match is not None, line
        if match["called"].endswith(f":{port}"):
            found.append(match.groupdict())
    return found


def digest(mesh: Mesh, identity: str) -> str:
    """Return the SHA-256 of the certificate that node-1 has for an identity."""
    status, body = mesh.lab.node("node-1").get("/config_dump", 15000)
    assert status == 200
    shown = {
        each["uid"]: each["chain_sha256"][0] for each in json.loads(body)["resources"]["credential"]
    }
    return str(shown[identity])


def test_a_connection_of_the_mesh_has_a_line_when_it_is_open_and_one_at_its_end(
    mesh: Mesh,
) -> None:
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    near, far, _ = mesh.call("client", "far", listener=listener)
    mesh.carries(near, far)
    (opened,) = wait_until(lambda: lines(mesh, port), "a line of what is open")
    assert (opened["reason"], opened["flags"], opened["error"]) == ("-", "-", "-")
    near.close()
    far.close()
    wait_until(lambda: len(lines(mesh, port)) == 2, "a line of the end")
    first, last = lines(mesh, port)
    assert first == opened
    assert (last["reason"], last["flags"], last["error"]) == ("closed", "-", "-")
    uri, by = spiffe("client"), spiffe("far")
    for said in (first, last):
        assert (said["origin"], said["destination"]) == (uri, by)
        assert said["cert"] == f'By={by};Hash={digest(mesh, uri)};Subject="";URI={uri}'
        assert (said["flag"], said["security"]) == ("false", "mutual_tls")
        assert 'direction="inbound"' in said["rest"]
    assert first["rest"] == last["rest"]
    assert int(last["received"]) > 0


def test_a_call_in_plaintext_has_neither_identity_nor_certificate(mesh: Mesh) -> None:
    port = mesh.visit("outsider", "far")
    wait_until(lambda: len(lines(mesh, port)) == 2, "both lines of the call")
    for found in lines(mesh, port):
        assert (found["origin"], found["destination"], found["cert"]) == ("-", "-", "-")
        assert (found["flag"], found["security"]) == ("false", "none")


@pytest.mark.parametrize("client", ["client", "outsider"])
def test_however_short_a_connection_is_it_has_both_lines(mesh: Mesh, client: str) -> None:
    """Calls that share a decision, the first of which has asked for it."""
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    for done in range(1, 6):
        near, far, _ = mesh.call(client, "far", listener=listener)
        mesh.carries(near, far)
        near.close()
        far.close()
        wait_until(lambda: len(lines(mesh, port)) == 2 * done, "both lines")  # noqa: B023 - at once
    found = lines(mesh, port)
    assert [line["reason"] for line in found] == ["-", "closed"] * 5
    for begun, last in zip(found[::2], found[1::2], strict=True):
        assert (begun["time"], begun["rest"]) == (last["time"], last["rest"])


def test_the_other_node_has_no_line_of_a_beginning(mesh: Mesh) -> None:
    """Nobody asked its tunnel for them."""
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    near, far, _ = mesh.call("client", "far", listener=listener)
    wait_until(lambda: lines(mesh, port), "the called node's line of what is open")
    assert mesh.lines("client", "outbound", port) == []
    near.close()
    far.close()
    (line,) = wait_until(lambda: mesh.lines("client", "outbound", port), "a line of the end")
    assert line["message"] == "connection complete"
