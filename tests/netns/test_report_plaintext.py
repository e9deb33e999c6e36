"""The plaintext report, proved: what it says of STRICT is what happens under STRICT."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nodeagent.cli import cli
from nodeagent.lab import Lab, namespaces
from support.e2e import PODS, Mesh, running, spec, strict, watched
from support.netns import wait_until

Found = dict[str, Any]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(apps=False)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        # A quick machine would call before there is a time since which all is known.
        for pod in ("client", "near", "far"):
            covered(made, pod)
        yield made


def asked(mesh: Mesh, pod: str, *options: str) -> Result:
    run = mesh.lab.layout.run(mesh.node_of(pod))
    command = ["report", "plaintext", PODS[pod], "--run-dir", str(run)]
    return CliRunner().invoke(cli, [*command, *options])


def reported(mesh: Mesh, pod: str, **counts: int) -> tuple[int, Found]:
    """Return exit code and report on a pod, of all the time that is recorded of it.

    Waits until it has these counts: they are on the disk a moment later.
    """
    since = covered(mesh, pod)

    def look() -> tuple[int, Found] | None:
        result = asked(mesh, pod, "-o", "json", "--since", since.isoformat())
        report = json.loads(result.stdout)
        (workload,) = report["workloads"]
        there = all(workload[name] >= count for name, count in counts.items())
        return (result.exit_code, report) if there else None

    found = wait_until(look, f"{counts} of {pod}")
    assert found is not None
    return found


def recorded_since(mesh: Mesh, pod: str) -> datetime | None:
    """Return since when all of a pod's callers are recorded, once that is some seconds ago."""
    report = json.loads(asked(mesh, pod, "-o", "json", "--since", "1h").stdout)
    (workload,) = report["workloads"]
    if workload["since"] is None:
        return None
    since = datetime.fromisoformat(workload["since"]) + timedelta(seconds=2)
    return since if since < datetime.fromisoformat(report["time"]) else None


def covered(mesh: Mesh, pod: str) -> datetime:
    since = wait_until(lambda: recorded_since(mesh, pod), f"{pod} is recorded")
    assert since is not None
    return since


def breaking(report: Found) -> set[tuple[str, str, int]]:
    (workload,) = report["workloads"]
    return {
        (caller["kind"], caller["source"], caller["port"])
        for caller in workload["callers"]
        if caller["effect"] == "breaks"
    }


def from_node(mesh: Mesh, node: str, pod: str, port: int) -> socket.socket:
    sock = mesh.keep(namespaces.run_in(mesh.lab.node(node).space, socket.socket))
    sock.connect((mesh.address(pod), port))
    return sock


def test_safe_is_proved_by_switching_and_every_recorded_caller_still_works(mesh: Mesh) -> None:
    listener = mesh.listen("near")
    callers = ("client", "far")
    for caller in callers:
        mesh.visit(caller, "near", listener=listener)
    code, report = reported(mesh, "near", with_identity=2)
    assert (code, report["verdict"], report["complete"] is not None) == (0, "safe", True)
    (workload,) = report["workloads"]
    assert (workload["with_identity"], workload["without_identity"]) == (2, 0)
    mesh.policy("near", strict("near"), mode="STRICT")
    for caller in callers:
        mesh.visit(caller, "near", listener=listener)
    # And it does lock out who did not call.
    mesh.refuses("outsider", mesh.address("near"), listener.getsockname()[1], b"?")
    assert reported(mesh, "near")[0] == 0


def test_not_safe_is_proved_by_those_breaking_whom_it_names_and_nobody_else(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    node = mesh.node_of("far")
    for caller in ("client", "near", "legacy", "outsider"):
        mesh.visit(caller, "far", listener=listener)
    sock = from_node(mesh, node, "far", port)
    app, own = mesh.accept(listener)
    mesh.carries(sock, app)
    sock.close()
    app.close()
    code, report = reported(mesh, "far", with_identity=2, without_identity=3)
    assert (code, report["verdict"]) == (1, "not safe")
    assert breaking(report) == {
        ("pod", mesh.address("legacy"), port),
        ("outside", mesh.address("outsider"), port),
        ("node", own, port),
    }
    mesh.policy("far", strict("far"), mode="STRICT")
    for caller in ("client", "near"):
        mesh.visit(caller, "far", listener=listener)
    for caller in ("legacy", "outsider"):
        mesh.refuses(caller, mesh.address("far"), port, b"?")
    with pytest.raises(ConnectionResetError):
        from_node(mesh, node, "far", port).recv(1)
    # What happened since is refused already, and breaks nobody.
    code, report = reported(mesh, "far", refused=2)
    (workload,) = report["workloads"]
    assert (code, workload["reasons"]) == (0, ["it is STRICT already"])


def test_what_the_recording_does_not_cover_is_not_known_and_it_says_since_when(mesh: Mesh) -> None:
    since = covered(mesh, "client")
    result = asked(mesh, "client", "--since", "7d")
    assert result.exit_code == 1
    assert "NOT KNOWN whether STRICT is safe" in result.stdout
    said = since.astimezone().replace(microsecond=0).isoformat()
    assert f"ask for what is known: --since {said}" in result.stdout
    code, report = reported(mesh, "client")
    assert (code, report["verdict"], report["workloads"][0]["reasons"]) == (
        0,
        "safe",
        ["nobody has called without identity"],
    )


def test_a_workload_of_another_node_is_no_answer(mesh: Mesh) -> None:
    run = mesh.lab.layout.run(mesh.node_of("near"))
    result = CliRunner().invoke(cli, ["report", "plaintext", PODS["far"], "--run-dir", str(run)])
    assert result.exit_code == 2
    assert "is no workload of this node" in result.stderr


def test_each_callers_part_in_the_score_is_told(mesh: Mesh) -> None:
    """A pod of its own: what others have called is not this test's."""
    listener = mesh.listen("client")
    for caller in ("far", "far", "far", "outsider"):
        mesh.visit(caller, "client", listener=listener)
    run = mesh.lab.layout.run(mesh.node_of("client"))
    command = ["report", "asdex", PODS["client"], "--run-dir", str(run), "--since", "10m"]
    result = CliRunner().invoke(cli, [*command, "-o", "json", "--least", "0.5"])
    (found,) = json.loads(result.stdout)["workloads"]
    # Three with identity (50), encrypted and by a short-lived certificate (10), and one without.
    assert (found["connections"], found["points"], found["score"]) == (4, 180, 0.45)
    assert result.exit_code == 1
    assert [(each["check"], each["cost"]) for each in found["losses"]] == [
        ("identity", 0.25),
        ("policy", 0.225),
        ("exact", 0.0375),
        ("strict", 0.0375),
    ]
    assert found["losses"][0]["caller"] == mesh.address("outsider")
    status, body = mesh.lab.node(mesh.node_of("client")).get("/graph?seconds=600", 15000)
    assert status == 200
    scores = {each["id"]: each["asdex"] for each in json.loads(body)["vertices"]}
    assert scores[PODS["client"]] == 0.45
    text = mesh.lab.node(mesh.node_of("client")).metrics("nodeagent")
    assert 'nodeagent_asdex{namespace="shop",workload="shop/client"} 0.45' in text


def test_who_is_connected_since_before_the_capture_is_a_caller_and_breaks(mesh: Mesh) -> None:
    """Nobody has let it in, and STRICT ends it: a pool of connections that lives for weeks."""
    listener = mesh.listen("twin")
    sock, app, port = mesh.call("outsider", "twin", listener=listener)
    mesh.lab.enrol(PODS["twin"])
    mesh.defer(lambda: mesh.lab.enrol(PODS["twin"], enrolled=False))

    def look() -> tuple[int, Found] | None:
        result = asked(mesh, "twin", "-o", "json", "--since", "1s")
        if result.exit_code == 2:
            return None  # not of this node yet
        report = json.loads(result.stdout)
        return (result.exit_code, report) if breaking(report) else None

    code, report = wait_until(look, "the caller is in the report") or (0, {})
    assert (code, report["verdict"]) == (1, "not safe")
    assert breaking(report) == {("outside", mesh.address("outsider"), port)}
    mesh.carries(sock, app)
    mesh.policy("twin", strict("twin"), mode="STRICT")
    with pytest.raises(ConnectionError):
        sock.recv(1)
    mesh.refuses("outsider", mesh.address("twin"), port, b"?")
