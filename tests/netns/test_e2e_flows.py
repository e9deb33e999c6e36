"""Who has called, recorded by both daemons: each way in, each verdict, across restarts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nodeagent.cli import cli
from nodeagent.lab import Lab
from support.e2e import Mesh, running, spec, spiffe, strict, watched
from support.netns import wait_until

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(settings={"same_node": "direct"}, apps=False)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


def flows(mesh: Mesh, pod: str, port: int) -> Found:
    """Return what the pod's node has recorded of a port in the last hour."""
    status, body = mesh.lab.node(mesh.node_of(pod)).get("/flows?seconds=3600", 15000)
    assert status == 200
    found = json.loads(body)
    assert found["problem"] == ""
    return [flow for flow in found["flows"] if flow["port"] == port]


def recorded(mesh: Mesh, pod: str, port: int, done: Callable[[Found], bool]) -> Found:
    """Wait until what is recorded is as `done` says."""
    wait_until(lambda: done(flows(mesh, pod, port)), f"flows to port {port}")
    return flows(mesh, pod, port)


def has(connections: int) -> Callable[[Found], bool]:
    return lambda found: sum(flow["connections"] for flow in found) >= connections


def test_every_way_in_is_recorded_with_who_came(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    for caller in ("client", "client", "legacy", "outsider"):
        mesh.visit(caller, "far", listener=listener)
    found = {flow["source"]: flow for flow in recorded(mesh, "far", port, has(4))}
    assert {
        source: (flow["identity"], flow["workload"], flow["arrival"], flow["connections"])
        for source, flow in found.items()
    } == {
        mesh.address("client"): (spiffe("client"), "shop/client", "hbone", 2),
        mesh.address("legacy"): ("", "shop/legacy", "plaintext", 1),
        mesh.address("outsider"): ("", "", "plaintext", 1),
    }
    for flow in found.values():
        assert (flow["destination"], flow["address"]) == ("shop/far", mesh.address("far"))
        assert (flow["allowed"], flow["reason"]) == (True, "")
        assert (flow["received"], flow["sent"]) == (4 * flow["connections"],) * 2


def test_two_pods_of_one_node_are_recorded_by_their_identities(mesh: Mesh) -> None:
    port = mesh.visit("client", "near")
    (flow,) = recorded(mesh, "near", port, has(1))
    assert (flow["identity"], flow["workload"]) == (spiffe("client"), "shop/client")
    assert (flow["source"], flow["arrival"]) == (mesh.address("client"), "direct")
    assert (flow["destination"], flow["connections"]) == ("shop/near", 1)


def test_refusals_are_recorded_with_their_reason(mesh: Mesh) -> None:
    mesh.policy("far", strict(), mode="STRICT")
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    for _ in range(3):
        mesh.refuses("outsider", mesh.address("far"), port)
    mesh.visit("client", "far", listener=listener)
    found = recorded(mesh, "far", port, has(4))
    assert {(flow["source"], flow["reason"]): flow["connections"] for flow in found} == {
        (mesh.address("outsider"), "strict_requires_mtls"): 3,
        (mesh.address("client"), ""): 1,
    }


def test_what_was_recorded_outlives_both_daemons_and_counts_go_on(mesh: Mesh, lab: Lab) -> None:
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    mesh.visit("client", "far", listener=listener)
    recorded(mesh, "far", port, has(1))
    node = mesh.node_of("far")
    for daemon in ("nodeagent", "ztunnel"):
        lab.node(node).restart(daemon)
    assert has(1)(flows(mesh, "far", port))
    mesh.visit("client", "far", listener=listener)
    (flow,) = recorded(mesh, "far", port, has(2))
    assert flow["connections"] == 2


def test_an_open_connection_is_known_before_it_ends(mesh: Mesh) -> None:
    sock, app, port = mesh.call("client", "far")
    mesh.carries(sock, app)
    (flow,) = recorded(mesh, "far", port, has(1))
    assert (flow["connections"], flow["most_open"]) == (1, 1)


def test_metrics_of_one_label_set_are_the_sums_of_its_callers_ports(mesh: Mesh) -> None:
    labels = {"reporter": "destination", "source_workload": "legacy", "destination_workload": "far"}
    metric = "istio_tcp_connections_opened_total"
    before = mesh.count("far", metric, **labels)
    for _ in range(3):
        mesh.visit("legacy", "far")
    mesh.counted("far", metric, before + 3, **labels)
    assert mesh.count("far", metric, **labels) == before + 3


# --- what would a change break? -----------------------------------------------------------------


def proposed(mesh: Mesh, folder: Path, *documents: dict[str, Any]) -> Path:
    """Return a directory of the configuration in force with these documents besides."""
    shutil.copytree(mesh.lab.layout.config, folder)
    # JSON is YAML too.
    text = "\n---\n".join(json.dumps(document) for document in documents)
    (folder / "proposed.yaml").write_text(text)
    return folder


def foretold(mesh: Mesh, node: str, new: Path) -> tuple[int, Found]:
    """Ask the node's agent what would break; return the exit code and the callers."""
    run = mesh.lab.layout.run(node)
    command = ["policy", "diff", "--running", str(new), "--flows", "--since", "1h"]
    result = CliRunner().invoke(cli, [*command, "--run-dir", str(run), "-o", "json"])
    assert result.stdout, result.output
    report = json.loads(result.stdout)
    assert report["breaks"] is bool(result.exit_code)
    return result.exit_code, report["flows"]["breaks"]


def authorization(*rules: dict[str, Any], action: str = "ALLOW", app: str) -> dict[str, Any]:
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": f"for-{app}", "namespace": "shop"},
        "spec": {
            "selector": {"matchLabels": {"app": app}},
            "action": action,
            "rules": list(rules),
        },
    }


def called_by(*callers: str) -> dict[str, Any]:
    principals = [spiffe(caller).removeprefix("spiffe://") for caller in callers]
    return {"from": [{"source": {"principals": principals}}]}


def test_who_is_foretold_to_break_breaks_and_nobody_else(mesh: Mesh, tmp_path: Path) -> None:
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    for caller in ("client", "legacy", "outsider"):
        mesh.visit(caller, "far", listener=listener)
    node = mesh.node_of("far")
    change = (strict("far"), authorization(called_by("near"), app="far"))
    code, breaks = foretold(mesh, node, proposed(mesh, tmp_path / "new", *change))
    assert code == 1
    mine = [each for each in breaks if each["port"] == port]
    # `client` by the policy, both others by the mode that comes first.
    assert {(each["workload"], each["new"]["reason"]) for each in mine} == {
        ("shop/client", "policy_denied"),
        ("shop/legacy", "strict_requires_mtls"),
        ("", "strict_requires_mtls"),
    }
    assert all("proposed.yaml:" in each["new"]["origin"] for each in mine)
    mesh.apply(*change, name="proposed")
    mesh.settled(node, lambda state: "for-far" in json.dumps(state["pods"]))
    mesh.settled(node, lambda state: "strict-far" in json.dumps(state["pods"]))
    for caller in ("client", "legacy", "outsider"):
        mesh.refuses(caller, mesh.address("far"), port, b"?")


def test_what_is_foretold_to_break_nobody_breaks_nobody(mesh: Mesh, tmp_path: Path) -> None:
    # A workload of its own: what others have recorded of `far` is not this test's.
    listener = mesh.listen("near")
    for _ in range(2):
        mesh.visit("client", "near", listener=listener)
    node = mesh.node_of("near")
    change = (strict("near"), authorization(called_by("client", "far"), app="near"))
    code, breaks = foretold(mesh, node, proposed(mesh, tmp_path / "new", *change))
    assert (code, breaks) == (0, [])
    mesh.apply(*change, name="proposed")
    mesh.settled(node, lambda state: "for-near" in json.dumps(state["pods"]))
    mesh.settled(node, lambda state: "strict-near" in json.dumps(state["pods"]))
    mesh.visit("client", "near", listener=listener)
    # And it does keep others out.
    mesh.refuses("outsider", mesh.address("near"), listener.getsockname()[1], b"?")
