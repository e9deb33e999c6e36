"""AuthorizationPolicy in force: who is let in, by which rule, and what an edit does at once."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from nodeagent.cli import cli
from nodeagent.lab import Lab
from support.e2e import PODS, Mesh, running, spec, spiffe, watched, with_changes
from support.netns import wait_until

FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])

CLIENT, NEAR, FAR = (spiffe(name).removeprefix("spiffe://") for name in ("client", "near", "far"))
CALLERS = "nodeagent.io/callers"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    described = spec(apps=False)
    # Only `near` names its callers by annotation; all others are for the policies of the tests.
    pods = tuple(
        with_changes(pod, annotations={CALLERS: f"{FAR}, set:friends"})
        if pod.name == "near"
        else pod
        for pod in described.pods
    )
    with running(msgspec.structs.replace(described, pods=pods)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


def authorization(
    action: str,
    *rules: dict[str, Any],
    name: str = "tested",
    namespace: str = "shop",
    dry_run: bool = False,
    **found: Any,  # noqa: ANN401 - further fields of the spec
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": namespace}
    if dry_run:
        metadata["annotations"] = {"istio.io/dry-run": "true"}
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": metadata,
        "spec": {"action": action, "rules": list(rules), **found},
    }


def identities(*members: str, name: str = "friends") -> dict[str, Any]:
    return {
        "apiVersion": "nodeagent.io/v1alpha1",
        "kind": "IdentitySet",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"identities": list(members)},
    }


def source(**fields: list[str]) -> dict[str, Any]:
    return {"from": [{"source": fields}]}


def enforce(mesh: Mesh, *documents: dict[str, Any], pod: str = "far", name: str = "tested") -> None:
    """Put documents in force, and wait until the pod is judged by all of its policies."""
    mesh.apply(*documents, name=name)
    wanted = {
        f"AuthorizationPolicy/{each['metadata']['namespace']}/{each['metadata']['name']}"
        for each in documents
        if each["kind"] == "AuthorizationPolicy"
    }

    def applied(state: dict[str, Any]) -> bool:
        row = next(each for each in state["pods"] if each["workload"] == PODS[pod])
        return wanted <= {each["policy"] for each in row["authorizations"]}

    mesh.settled(mesh.node_of(pod), applied)


def accepts(mesh: Mesh, client: str, listener: socket.socket, family: int = 4) -> None:
    mesh.visit(client, "far", family, listener=listener)


def refuses(mesh: Mesh, client: str, listener: socket.socket, family: int = 4) -> None:
    """A reset for the client, and nothing at all for the application."""
    mesh.refuses(client, mesh.address("far", family), listener.getsockname()[1], b"secret")
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.settimeout(15)


@FAMILIES
def test_deny_of_a_principal_refuses_it_and_nobody_else(mesh: Mesh, family: int) -> None:
    enforce(mesh, authorization("DENY", source(principals=[CLIENT])))
    listener = mesh.listen("far")
    refuses(mesh, "client", listener, family)
    line = mesh.line("far", "inbound", listener.getsockname()[1])
    assert line["reason"] == "policy_denied"
    assert line["policy"].startswith("shop/tested rules[0] (")
    assert line["src.identity"] == spiffe("client")
    accepts(mesh, "near", listener, family)
    accepts(mesh, "outsider", listener, family)


def test_allow_of_a_namespace_lets_in_its_identities_only(mesh: Mesh) -> None:
    enforce(mesh, authorization("ALLOW", source(namespaces=["shop"])))
    listener = mesh.listen("far")
    accepts(mesh, "client", listener)
    for client in ("outsider", "legacy"):
        refuses(mesh, client, listener)


def test_default_deny_names_the_policies_that_caused_it(mesh: Mesh) -> None:
    enforce(mesh, authorization("ALLOW", source(principals=[NEAR])))
    listener = mesh.listen("far")
    refuses(mesh, "client", listener)
    line = mesh.line("far", "inbound", listener.getsockname()[1])
    assert line["reason"] == "policy_denied"
    assert "shop/tested" in line["policy"]
    accepts(mesh, "near", listener)


def test_an_allow_without_rules_lets_nobody_in_and_a_deny_wins(mesh: Mesh) -> None:
    enforce(mesh, authorization("ALLOW"))
    listener = mesh.listen("far")
    refuses(mesh, "client", listener)
    refuses(mesh, "outsider", listener)
    enforce(
        mesh,
        authorization("ALLOW", {}, name="all"),
        authorization("DENY", source(principals=[CLIENT]), name="none"),
    )
    refuses(mesh, "client", listener)
    accepts(mesh, "near", listener)


def test_deny_of_who_has_no_identity_refuses_plaintext(mesh: Mesh) -> None:
    enforce(mesh, authorization("DENY", source(notPrincipals=["*"]), namespace="istio-system"))
    listener = mesh.listen("far")
    for client in ("outsider", "legacy"):
        refuses(mesh, client, listener)
    accepts(mesh, "client", listener)


def test_a_selector_spares_the_neighbour_and_a_port_the_other_ports(mesh: Mesh) -> None:
    listener, other = mesh.listen("far"), mesh.listen("far")
    port = str(listener.getsockname()[1])
    enforce(
        mesh,
        authorization(
            "DENY",
            {**source(principals=[CLIENT]), "to": [{"operation": {"ports": [port]}}]},
            selector={"matchLabels": {"app": "far"}},
        ),
    )
    refuses(mesh, "client", listener)
    accepts(mesh, "client", other)


def test_a_new_deny_cuts_what_it_forbids_and_nothing_else(mesh: Mesh) -> None:
    cut, cut_app, port = mesh.call("client", "far")
    kept, kept_app, _ = mesh.call("near", "far")
    plain, plain_app, _ = mesh.call("outsider", "far")
    for sock, app in ((cut, cut_app), (kept, kept_app), (plain, plain_app)):
        mesh.carries(sock, app)
    mesh.apply(authorization("DENY", source(principals=[CLIENT])))
    for sock in (cut, cut_app):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    mesh.carries(kept, kept_app)
    mesh.carries(plain, plain_app)
    assert mesh.line("far", "inbound", port)["reason"] == "policy_changed"


def test_audit_marks_plaintext_callers_and_lets_them_in(mesh: Mesh) -> None:
    """The rollout's AUDIT policy, with parts of layer 7: what is not read is said."""
    rule = {
        **source(notNamespaces=["shop"]),
        "to": [{"operation": {"methods": ["GET"], "paths": ["/*"]}}],
    }
    enforce(mesh, authorization("AUDIT", rule))
    listener = mesh.listen("far")
    accepts(mesh, "outsider", listener)
    accepts(mesh, "client", listener)
    port = listener.getsockname()[1]
    marked = mesh.line("far", "inbound", port, client="without_identity")
    assert marked["audit_rules"].startswith("shop/tested rules[0] (")
    assert marked["audit_rules"].endswith("without methods, paths")
    assert marked["audit_flag"] == "true"
    line = mesh.line("far", "inbound", port, src_workload="client")
    assert (line["audit_flag"], line.get("audit_rules")) == ("false", None)


def test_a_dry_run_says_what_it_would_do_and_does_not(mesh: Mesh) -> None:
    enforce(mesh, authorization("DENY", source(principals=[CLIENT]), dry_run=True))
    listener = mesh.listen("far")
    accepts(mesh, "client", listener)
    line = mesh.line("far", "inbound", listener.getsockname()[1])
    assert line["reason"] == "closed"
    assert line["dry_run"].startswith("denied by shop/tested rules[0] (")


def test_an_identity_set_is_live_and_fails_closed_while_it_is_missing(mesh: Mesh) -> None:
    enforce(mesh, authorization("ALLOW", source(principals=["set:people", NEAR])))
    listener = mesh.listen("far")
    refuses(mesh, "client", listener)
    accepts(mesh, "near", listener)

    def unresolved(state: dict[str, Any]) -> list[dict[str, Any]]:
        return [each for each in state["config"]["unresolved"] if "people" in each["reason"]]

    (problem,) = unresolved(mesh.status("node-2"))
    assert "identity set shop/people does not exist" in problem["reason"]
    assert problem["file"].endswith("tested.yaml")
    assert (problem["line"] > 1, problem["column"] > 1) == (True, True)
    mesh.apply(identities("cluster.local/ns/shop/sa/client", name="people"), name="people")
    mesh.settled("node-2", lambda state: not unresolved(state))
    sock, app, _ = mesh.call("client", "far", listener=listener)
    mesh.carries(sock, app)
    mesh.apply(identities(NEAR, name="people"), name="people")
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    wait_until(lambda: mesh.lines("far", "inbound", reason="policy_changed"), "it is cut and told")
    refuses(mesh, "client", listener)


def test_a_workloads_own_callers_are_let_in_and_nobody_else(mesh: Mesh) -> None:
    mesh.apply(identities("other.example/*"), name="friends")
    mesh.settled("node-1", lambda state: not state["config"]["unresolved"])
    mesh.visit("far", "near")
    listener = mesh.listen("near")
    port = listener.getsockname()[1]
    for client in ("client", "outsider"):
        mesh.refuses(client, mesh.address("near"), port, b"secret")
    assert f"shop/near {CALLERS}" in mesh.line("near", "inbound", port, reason="policy_denied",
                                               src_workload="client")["policy"]  # fmt: skip


def explain(mesh: Mesh, node: str, client: str, port: int) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the answer of a node's agent."""
    asked = ["policy", "explain", PODS[client], f"{PODS['far']}:{port}", "-o", "json"]
    command = [*asked, "--run-dir", str(mesh.lab.layout.run(node))]
    result = CliRunner().invoke(cli, command)
    assert result.stdout, result.stderr
    (answer,) = json.loads(result.stdout)["answers"]
    return result.exit_code, answer


def test_explain_says_what_becomes_of_connections_and_names_the_rule_of_the_log(
    mesh: Mesh,
) -> None:
    enforce(mesh, authorization("ALLOW", source(principals=[NEAR])))
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    for client, judge, reason in (
        ("near", accepts, ""),
        ("client", refuses, "policy_denied"),
        ("legacy", refuses, "policy_denied"),
    ):
        judge(mesh, client, listener)
        # Whichever agent is asked: both have the same documents.
        for node in ("node-1", "node-2"):
            code, answer = explain(mesh, node, client, port)
            assert (code, answer["reason"]) == (1 if reason else 0, reason)
            assert answer["way"] == ("plaintext" if client == "legacy" else "hbone")
            if not reason:
                line = mesh.line("far", "inbound", port)
                assert answer["by"]["text"] == line["policy"]
                assert answer["identity"] == line["src.identity"]
            else:
                assert [each["name"] for each in answer["default_deny"]] == ["shop/tested"]
