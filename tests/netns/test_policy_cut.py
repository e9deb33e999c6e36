"""A change that forbids what is under way ends it, soon and with a reason; neighbours run on.

Bulk flows are iperf3's own, several at once between the same pods: what a new policy forbids stops,
and all others carry every byte. `same_node: direct` is set, so that a pair of pods on one node is
joined without a tunnel; all other flows take the ways that they always take.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import msgspec
import pytest

from nodeagent.lab import Lab
from nodeagent.lab.documents import replace_file
from support.e2e import PODS, Mesh, running, spec, spiffe, watched
from support.netns import wait_until

pytestmark = pytest.mark.netns

CUT_SECONDS: Final = 5.0
"""From the edit of the file to the end of the program that was cut: it takes about 0.3 s, and one
second is promised. The rest is for a machine that does other things meanwhile."""

BYTES: Final = 24 * 1024 * 1024
UNDER_WAY: Final = 1024 * 1024
"""What iperf3's server does not count: it stops when the control connection says so, which passes
what is still on its way on the other."""

RATE: Final = "16M"
"""Bits a second: so that what is allowed goes on for 12 s, in which on a slow machine too all flows
begin and some are cut, and the machine has little to do."""

_ports = itertools.count(24000)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    described = spec(settings={"same_node": "direct"}, apps=False)
    # With one worker all streams of a pod to one peer share one HBONE connection.
    nodes = tuple(
        msgspec.structs.replace(node, ztunnel_arguments=("--workers", "1"))
        for node in described.nodes
    )
    with running(msgspec.structs.replace(described, nodes=nodes)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


class Flow:
    """An iperf3 between two pods, of BYTES, or endless."""

    def __init__(self, mesh: Mesh, client: str, server: str, *, endless: bool = False) -> None:
        self.mesh, self.client, self.server = mesh, client, server
        self.port = next(_ports)
        listens = ("iperf3", "-s", "-1", "-p", str(self.port))
        self._server = mesh.popen(server, *listens, stdout=subprocess.DEVNULL)
        wait_until(lambda: f":{self.port} " in mesh.run(server, "ss", "-tln").stdout, "a server")
        amount = ("-t", "600") if endless else ("-n", str(BYTES))
        where = ("-c", mesh.address(server), "-p", str(self.port))
        self._client = mesh.popen(
            client, "iperf3", "--json", *where, "-b", RATE, *amount, stdout=subprocess.PIPE
        )

    def flows(self) -> bool:
        """Return whether both its connections stand: the one for control, and that with data."""
        found = self.mesh.run(self.client, "ss", "-tnH", "state", "established",
                              "dport", "=", f":{self.port}")  # fmt: skip
        return len(found.stdout.splitlines()) == 2

    def runs(self) -> bool:
        return self._client.poll() is None

    def ended(self) -> dict[str, Any]:
        """Wait for the end and return what iperf3 says of it."""
        said, _ = self._client.communicate(timeout=60)
        found: dict[str, Any] = json.loads(said)
        return found

    def lines(self, reason: str) -> list[dict[str, Any]]:
        """Return the lines of the called pod's side."""
        return self.mesh.lines(self.server, "inbound", self.port, reason=reason)


def deny(*flows: Flow) -> dict[str, Any]:
    return authorization("cut", "DENY", [{"to": [{"operation": {
        "ports": [str(flow.port) for flow in flows]}}]}])  # fmt: skip


def authorization(name: str, action: str, rules: list[Any], **found: Any) -> dict[str, Any]:  # noqa: ANN401 - further fields of the spec
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"action": action, "rules": rules, **found},
    }


def test_bulk_that_a_new_deny_forbids_ends_and_its_neighbours_run_on(
    mesh: Mesh,
) -> None:
    ways = (("client", "far"), ("outsider", "far"), ("client", "near"))
    """By HBONE, in plaintext, and straight across the node."""
    victims = [Flow(mesh, *way, endless=True) for way in ways]
    neighbours = [Flow(mesh, *way) for way in (*ways, ("near", "far"))]
    for flow in (*victims, *neighbours):
        wait_until(flow.flows, "the flow is under way")
    # The victim and its neighbour of the same pod are streams of one connection: one for each
    # calling pod, and none for those on one node.
    assert mesh.count("client", "ztunnel_hbone_connections") == 2
    failed = {pod: mesh.count(pod, "ztunnel_connections_failed_total", reason="policy_changed")
              for pod in ("near", "far")}  # fmt: skip
    begun = time.monotonic()
    mesh.apply(deny(*victims))
    wait_until(lambda: not any(flow.runs() for flow in victims), "the victims end", CUT_SECONDS)
    took = time.monotonic() - begun
    assert all(flow.runs() for flow in neighbours)
    assert took < CUT_SECONDS
    for flow in victims:
        assert "error" in flow.ended()
        lines = wait_until(partial(cut, flow), f"{flow.server} tells of both connections")
        assert all(line["policy"].startswith("shop/cut rules[0] (") for line in lines)
        assert max(line["bytes_recv"] for line in lines) > 0
    ways_seen = [flow.lines("policy_changed")[0] for flow in victims]
    assert [line["connection_security_policy"] for line in ways_seen] == [
        "mutual_tls",
        "none",
        "none",
    ]
    assert [line.get("same_node") for line in ways_seen] == [None, None, "direct"]
    for flow in neighbours:
        end = flow.ended()["end"]
        assert end["sum_sent"]["bytes"] >= BYTES
        assert end["sum_received"]["bytes"] >= BYTES - UNDER_WAY
        wait_until(partial(told, flow), "both ends are told")
        assert not flow.lines("policy_changed")
    mesh.counted("far", "ztunnel_connections_failed_total", failed["far"] + 4,
                 reason="policy_changed")  # fmt: skip
    mesh.counted("near", "ztunnel_connections_failed_total", failed["near"] + 2,
                 reason="policy_changed")  # fmt: skip


def cut(flow: Flow) -> list[dict[str, Any]]:
    """Return the lines of both connections, or none while one is missing."""
    lines = flow.lines("policy_changed")
    return lines if len(lines) == 2 else []


def told(flow: Flow) -> bool:
    """Return whether there is a line for each of the two connections, however it ended."""
    return len(flow.mesh.lines(flow.server, "inbound", flow.port)) == 2


# --- other changes that forbid, one connection each -----------------------------------------------

PEOPLE: Final = {"principals": ["set:people"]}
CLIENT, NEAR = (spiffe(name).removeprefix("spiffe://") for name in ("client", "near"))


def identities(name: str, *members: str) -> dict[str, Any]:
    return {
        "apiVersion": "nodeagent.io/v1alpha1",
        "kind": "IdentitySet",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"identities": list(members)},
    }


def allow(*sources: dict[str, Any]) -> dict[str, Any]:
    return authorization("people", "ALLOW", [{"from": [{"source": each} for each in sources]}])


def relabel(mesh: Mesh, pod: str, **labels: str) -> None:
    """Give a pod further labels until the end of the test."""
    path = mesh.lab.layout.config / f"workload.{PODS[pod].replace('/', '.')}.yaml"
    text = path.read_text()
    mesh.defer(lambda: replace_file(path, text))
    added = "".join(f'\n    {key}: "{value}"' for key, value in labels.items())
    changed = text.replace("  labels:", f"  labels:{added}", 1)
    assert changed != text
    replace_file(path, changed)


def a_set_that_lost_a_member(mesh: Mesh) -> None:
    mesh.apply(identities("people", NEAR), name="cut-people")


def a_set_that_has_gone(mesh: Mesh) -> None:
    mesh.withdraw("cut-people")


def a_set_in_a_circle(mesh: Mesh) -> None:
    mesh.apply(identities("people", CLIENT, NEAR, "set:others"),
               identities("others", "set:people"), name="cut-people")  # fmt: skip


def a_label_that_is_selected(mesh: Mesh) -> None:
    selector = {"matchLabels": {"closed": "yes"}}
    rules = [{"from": [{"source": {"principals": [CLIENT]}}]}]
    mesh.apply(authorization("closed", "DENY", rules, selector=selector), name="cut-closed")
    relabel(mesh, "far", closed="yes")


def a_selector_that_selects_more(mesh: Mesh) -> None:
    rules = [{"from": [{"source": {"principals": [CLIENT]}}]}]
    for app in ("near", "far"):
        selector = {"matchLabels": {"app": app}}
        mesh.apply(authorization("closed", "DENY", rules, selector=selector), name="cut-closed")
        mesh.settled("node-1", partial(is_for_near, expected=app == "near"))


def is_for_near(state: dict[str, Any], *, expected: bool) -> bool:
    """Return whether the policy of the selector is for `near`, as expected."""
    row = next(each for each in state["pods"] if each["workload"] == PODS["near"])
    return expected is any(each["policy"].endswith("/closed") for each in row["authorizations"])


Change = Callable[[Mesh], None]

CHANGES: Final[dict[Change, tuple[str, str]]] = {
    a_set_that_lost_a_member: ("default deny: no rule matches of shop/people (", ""),
    a_set_that_has_gone: (
        "default deny: no rule matches of shop/people (", "identity set shop/people does not exist"
    ),
    a_set_in_a_circle: (
        "default deny: no rule matches of shop/people (", "in a circle: shop/others → shop/people"
    ),
    a_label_that_is_selected: ("shop/closed rules[0] (", ""),
    a_selector_that_selects_more: ("shop/closed rules[0] (", ""),
}  # fmt: skip
"""By the change: what the log names, and what `nodeagent status` has as unresolved."""


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_the_change_is_its_victim_is_cut_and_a_neighbour_is_not(
    mesh: Mesh, change: Change
) -> None:
    origin, unresolved = CHANGES[change]
    mesh.apply(identities("people", CLIENT, NEAR), name="cut-people")
    mesh.apply(allow(PEOPLE, {"principals": [NEAR]}), name="cut-rules")
    mesh.settled("node-2", lambda state: "AuthorizationPolicy/shop/people" in json.dumps(state)
                 and not state["config"]["unresolved"])  # fmt: skip
    victim, victim_app, port = mesh.call("client", "far")
    neighbour, neighbour_app, _ = mesh.call("near", "far")
    mesh.carries(victim, victim_app)
    mesh.carries(neighbour, neighbour_app)
    victim.settimeout(CUT_SECONDS)
    change(mesh)
    for sock in (victim, victim_app):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    mesh.carries(neighbour, neighbour_app)
    line = mesh.line("far", "inbound", port)
    assert line["reason"] == "policy_changed"
    assert line["policy"].startswith(origin)
    said = json.dumps(mesh.status("node-2")["config"]["unresolved"], ensure_ascii=False)
    assert unresolved in said if unresolved else said == "[]"
    # Whoever comes now meets the same.
    listener = mesh.listen("far")
    mesh.refuses("client", mesh.address("far"), listener.getsockname()[1])
    mesh.visit("near", "far", listener=listener)
