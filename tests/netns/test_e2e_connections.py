"""What is open on two nodes, as `nodeagent connections` and `/connections` say it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from nodeagent.cli import cli
from nodeagent.lab import Lab
from support.e2e import Mesh, authority, running, spec, spiffe, watched
from support.netns import wait_until

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(apps=False)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


def connections(mesh: Mesh, node: str, *arguments: str) -> list[dict[str, Any]]:
    run_dir = str(mesh.lab.layout.run(node))
    arguments = ("--run-dir", run_dir, "-o", "json", *arguments)
    result = CliRunner().invoke(cli, ["connections", *arguments])
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)["connections"]
    return found


def at_port(mesh: Mesh, node: str, port: int, *arguments: str) -> list[dict[str, Any]]:
    found = connections(mesh, node, "--interval", "0", *arguments)
    return [each for each in found if each["destination"].endswith(f":{port}")]


def test_a_tunnel_is_seen_from_both_nodes(mesh: Mesh) -> None:
    sock, app, port = mesh.call("client", "far")
    mesh.carries(sock, app)
    (out,) = at_port(mesh, "node-1", port)
    (inside,) = at_port(mesh, "node-2", port)
    for each in (out, inside):
        assert each["state"] == "open"
        assert each["security"] == "mutual_tls"
        assert each["source"].rpartition(":")[0] == mesh.address("client")
        assert each["destination"] == authority(mesh.address("far"), port)
        assert each["source_workload"] == "shop/client"
        assert each["destination_workload"] == "shop/far"
        assert each["source_identity"] == spiffe("client")
        assert each["destination_identity"] == spiffe("far")
        assert each["tls_version"] == "TLSv1.3"
        assert each["key_exchange"] == "X25519MLKEM768"
        assert (each["received"], each["sent"]) == (4, 4)
    # The other node sees the connection that HBONE shares.
    assert out["source"] == authority(*sock.getsockname()[:2])
    assert (out["pod"], out["direction"], out["policy"]) == ("shop/client", "outbound", "")
    assert (inside["pod"], inside["direction"]) == ("shop/far", "inbound")
    assert inside["policy"] == "default:allow"
    sock.close()
    app.close()
    wait_until(lambda: not at_port(mesh, "node-1", port), "it is no longer listed")


def test_plaintext_says_so_and_filters_find_it(mesh: Mesh) -> None:
    near, app, port = mesh.call("legacy", "far")
    mesh.carries(near, app)
    (found,) = at_port(mesh, "node-2", port, "--security", "plaintext", "--pod", "shop/far")
    assert (found["source_workload"], found["source_identity"]) == ("shop/legacy", "")
    assert found["tls_version"] == found["cipher"] == found["key_exchange"] == ""
    assert at_port(mesh, "node-2", port, "--security", "mutual_tls") == []
    assert at_port(mesh, "node-2", port, "--direction", "outbound") == []
    assert at_port(mesh, "node-2", port, "--identity", spiffe("client")) == []
    assert at_port(mesh, "node-2", port, "--pod", "shop/near") == []


def test_both_sides_of_one_node_are_listed(mesh: Mesh) -> None:
    sock, app, port = mesh.call("client", "near")
    mesh.carries(sock, app)
    found = at_port(mesh, "node-1", port, "--identity", "sa/near")
    assert {each["direction"] for each in found} == {"inbound", "outbound"}
    assert {each["security"] for each in found} == {"mutual_tls"}
    assert len({each["id"] for each in found}) == 2


def test_a_service_is_named_and_so_is_what_goes_outside(mesh: Mesh) -> None:
    listener = mesh.listen("far", 8080)
    sock = mesh.connect("client", mesh.vip("far"), 80)
    app, _ = mesh.accept(listener)
    mesh.carries(sock, app)
    (served,) = at_port(mesh, "node-1", 8080)
    assert served["service"] == "far.shop.svc.cluster.local"
    outside = mesh.listen("outsider")
    port = outside.getsockname()[1]
    sock = mesh.connect("client", mesh.address("outsider"), port)
    mesh.accept(outside)
    (found,) = at_port(mesh, "node-1", port)
    assert (found["security"], found["destination_workload"]) == ("passthrough", "")


def test_the_admin_port_refuses_what_it_does_not_understand(mesh: Mesh) -> None:
    node = mesh.lab.node("node-1")
    assert node.get("/connections?limit=few", 15000)[0] == 400
    assert node.get("/connections?colour=red", 15000)[0] == 400
    status, body = node.get("/connections?limit=1", 15000)
    assert (status, json.loads(body)["schema"]) == (200, 1)
