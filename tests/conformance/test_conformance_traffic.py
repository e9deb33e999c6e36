"""A part of the conformance table over real connections: the same policies, the same verdicts.

A lab of two nodes has the pods of mesh.yaml. For each scenario that speaks of no address, its
policies are put in force as they stand in the table, and each of its cases is a connection from pod
to pod: bytes pass both ways, or the caller is reset and the application sees nothing; and the
access log names what decided, as the table does.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import pytest

from nodeagent.lab import Lab, LabSpec, Node, Pod
from support.conformance import Case, Scenario, by, scenarios, unplaced
from support.e2e import Mesh, running, watched
from support.netns import wait_until

pytestmark = pytest.mark.netns

CALLERS: Final = ("foo/sleep", "bar/sleep", "default/sleep", "legacy/sleep", "istio-system/gateway")
CALLED: Final = ("foo/httpbin", "foo/httpbin-v2", "foo/tcp-echo", "bar/httpbin")
LABELS: Final = {
    "foo/httpbin": {"app": "httpbin", "version": "v1"},
    "foo/httpbin-v2": {"app": "httpbin", "version": "v2"},
    "foo/tcp-echo": {"app": "tcp-echo", "version": "v1"},
    "bar/httpbin": {"app": "httpbin", "version": "v1"},
    "istio-system/gateway": {"app": "gateway", "version": "v1"},
}
POLICIES: Final = "conformance"
"""The file's name on the nodes."""

CHOSEN: Final = {
    "peer_levels": (
        "a policy of the root namespace is for the mesh",
        "permissive in the namespace, strict for one workload",
        "a workload policy without a mode inherits from the namespace",
        "DISABLE takes plaintext",
    ),
    "peer_ports": (
        "strict, but one port is left to plaintext",
        "permissive, but one port is strict",
    ),
    "peer_conflicts": ("two that select the same workload are not merged",),
    "authz_order": (
        "an ALLOW policy lets in what matches and nobody else",
        "DENY is asked before ALLOW",
        "one rule of a policy is enough",
    ),
    "authz_empty": (
        "an empty spec lets nobody in",
        "an empty rule lets everybody in",
        "a selector and no rules let nobody in to what is selected",
    ),
    "authz_audit": ("AUDIT is no ALLOW",),
    "authz_dry_run": ("DENY in a dry run denies nothing",),
    "authz_namespaces": ("whoever is not of a namespace",),
    "authz_service_accounts": ("one of several",),
    "authz_ports": ("the ALLOW policy of the TCP task", "not a port"),
    "authz_plaintext": (
        "no positive match of an identity",
        "AUDIT with notNamespaces finds them",
        "a strict workload refuses them before any of its policies is asked",
        "a permissive one lets an ALLOW policy by identity refuse them",
    ),
    "authz_layer7": (
        "the ALLOW policy of the TCP task with methods",
        "DENY with methods and a port denies that port",
    ),
    "authz_scope": ("policies of every scope add up",),
}


def chosen() -> list[Any]:
    return [
        pytest.param(scenario, id=f"{topic}: {scenario.title}")
        for topic, titles in CHOSEN.items()
        for scenario in scenarios()[topic]
        if scenario.title in titles
    ]


def described() -> LabSpec:
    def pod(uid: str, node: str) -> Pod:
        namespace, name = uid.split("/")
        account = name.removesuffix("-v2")
        return Pod(
            name=name,
            namespace=namespace,
            node=node,
            service_account="default" if namespace == "legacy" else account,
            labels=LABELS.get(uid, {"app": name}),
            enrolled=namespace != "legacy",
        )

    pods = (*(pod(uid, "node-1") for uid in CALLERS), *(pod(uid, "node-2") for uid in CALLED))
    return LabSpec(name="conform", nodes=(Node(name="node-1"), Node(name="node-2")), pods=pods)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(described()) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request, {uid: uid for uid in (*CALLERS, *CALLED)}) as made:
        yield made


def put_in_force(mesh: Mesh, scenario: Scenario) -> None:
    # Of a mode of DISABLE the callers' node must know, too.
    nodes = ("node-1", "node-2") if "DISABLE" in scenario.policies else ("node-2",)
    before = {node: mesh.status(node)["ztunnel"]["wanted_version"] for node in nodes}
    mesh.apply(scenario.policies, name=POLICIES)
    for node in nodes:
        mesh.settled(node, partial(is_newer, than=before[node]))


def is_newer(state: dict[str, Any], *, than: int) -> bool:
    wanted: int = state["ztunnel"]["wanted_version"]
    return wanted > than


def connects(mesh: Mesh, case: Case, listener: socket.socket) -> None:
    """Connect as the case says, and see that it becomes of the connection what it says."""
    if case.allow:
        mesh.visit(case.caller, case.to, listener=listener)
        return
    mesh.refuses(case.caller, mesh.address(case.to), case.port, b"secret")
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


def next_line(mesh: Mesh, case: Case, seen: int) -> dict[str, Any]:
    """Return the line after the `seen` ones of this pod and port."""
    (line,) = wait_until(
        lambda: mesh.lines(case.to, "inbound", case.port)[seen:], f"the line of {case}"
    )
    return line


def origins(text: str, path: str) -> str:
    """Return what the log says, with the file's name of the table."""
    return text.replace(f"({path}:", "(policies.yaml:")


@pytest.mark.parametrize("scenario", chosen())
def test_conformance_traffic(mesh: Mesh, scenario: Scenario) -> None:
    cases = [case for case in scenario.cases if case.caller in CALLERS and case.to in CALLED]
    assert cases
    put_in_force(mesh, scenario)
    path = str(mesh.lab.layout.config / f"{POLICIES}.yaml")
    for case in cases:
        # Addresses, which the lab gives, and identities, which its CA does, are not the table's.
        assert case.source is case.destination is case.identity is None
        seen = len(mesh.lines(case.to, "inbound", case.port))
        with mesh.listen(case.to, case.port) as listener:
            connects(mesh, case, listener)
        line = next_line(mesh, case, seen)
        policy = origins(line["policy"], path)
        if case.by:
            assert by(policy, scenario, allow=case.allow) == case.by
        if case.level:
            assert unplaced(policy, scenario) == case.level
        assert line["audit_flag"] == ("true" if case.audit else "false")
        assert all(rule in line["audit_rules"] for rule in case.audit)
        assert ("dry_run" in line) == (case.dry_run is not None)
        identified = case.caller != "legacy/sleep" and case.mode != "DISABLE"
        assert (line["connection_security_policy"] == "mutual_tls") == identified
