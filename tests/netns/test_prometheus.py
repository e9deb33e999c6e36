"""Real Prometheus scrapes two nodes: what it answers to Kiali's questions, and which alerts fire.

The queries are this test's own, written from what Kiali is documented to ask of its Prometheus to
draw a namespace: edges from the bytes that sources report, callers that nobody knows from the bytes
that destinations report, and padlocks from the share of `mutual_tls` in the latter, joined by
cluster, namespace, workload, canonical service and revision of both ends.
"""

from __future__ import annotations

import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from nodeagent.lab import Lab
from support.e2e import (
    HTTP_PORT,
    Mesh,
    authority,
    peer_authentication,
    running,
    spec,
    spiffe,
    strict,
    watched,
)
from support.expositions import described, every_series
from support.netns import DEADLINE, wait_until
from support.prometheus import DEPLOY, TARGETS, Server, check_metrics

WINDOW: Final = "30s"
SECONDS: Final = 4 * DEADLINE
"""For what takes several scrapes and evaluations."""
UNKNOWN: Final = "unknown"
ENDS: Final = tuple(
    f"{side}_{name}"
    for side in ("source", "destination")
    for name in (
        "cluster",
        "workload_namespace",
        "workload",
        "canonical_service",
        "canonical_revision",
    )
)
SERVICE: Final = ("destination_service_namespace", "destination_service_name")
BYTES: Final = "istio_tcp_sent_bytes_total"

Edge = tuple[str, ...]
Row = dict[str, str]


def quick(text: str) -> str:
    """Return the rules with windows that a test can wait for, and no patience."""
    text = re.sub(r"^( +for:) .*$", r"\1 0s", text, flags=re.MULTILINE)
    return re.sub(r"(\[|offset )(?:5|10|15)m", rf"\g<1>{WINDOW}", text)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    # Nobody is there to take the traces: a scrape has their ids all the same.
    traced = {"traces": {"endpoint": "http://127.0.0.1:4318", "sample_one_in": 1}}
    with running(spec(settings=traced)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


@pytest.fixture(scope="module")
def prometheus(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    rules = quick((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    with Server.start(lab, tmp_path_factory.mktemp("prometheus"), rules) as started:
        wait_until(
            lambda: len(started.query("up == 1")) == len(TARGETS), "all targets are up", SECONDS
        )
        yield started


def rates(server: Server, selector: str, *group: str) -> list[Row]:
    """Return the edges with bytes in the window."""
    by = ", ".join((*ENDS, *SERVICE, *group))
    rows = server.query(f"sum(rate({BYTES}{{{selector}}}[{WINDOW}])) by ({by}) > 0")
    return [labels for labels, _ in rows]


def between(rows: list[Row], source: str, destination: str) -> list[Row]:
    return [
        row
        for row in rows
        if (row["source_workload"], row["destination_workload"]) == (source, destination)
    ]


def edge(row: Row) -> Edge:
    return tuple(row[name] for name in (*ENDS, *SERVICE))


def padlock(server: Server, wanted: Edge) -> float | None:
    """Return the share of an edge's bytes that came by mutual TLS, None without an edge."""
    by = ", ".join((*ENDS, *SERVICE, "connection_security_policy"))
    rows = server.query(f'sum(rate({BYTES}{{reporter="destination"}}[{WINDOW}])) by ({by}) > 0')
    shares = {
        labels["connection_security_policy"]: value
        for labels, value in rows
        if edge(labels) == wanted
    }
    return shares.get("mutual_tls", 0) / sum(shares.values()) if shares else None


def is_bad(row: Row) -> bool:
    """A row that Kiali drops: an end that has a namespace, and no name or no cluster."""
    source = row["source_workload_namespace"] != UNKNOWN and (
        row["source_cluster"] == UNKNOWN
        or (row["source_workload"], row["source_canonical_service"]) == (UNKNOWN, UNKNOWN)
    )
    return source or (
        row["destination_service_namespace"] != UNKNOWN and row["destination_cluster"] == UNKNOWN
    )


def seen(call: Callable[[], object], look: Callable[[], list[Row]], what: str) -> list[Row]:
    """Call until Prometheus has an increase to show: a series begins with its first call."""

    def once() -> list[Row]:
        call()
        return look()

    return wait_until(once, what, SECONDS)


def test_every_target_is_scraped_by_the_format_it_asked_for(prometheus: Server) -> None:
    def answering() -> set[tuple[str, str]]:
        return {
            (each["labels"]["job"], each["labels"]["instance"])
            for each in prometheus.api("targets")["activeTargets"]
            if each["lastError"] == ""
        }

    every = {(target.job, target.node) for target in TARGETS}
    wait_until(lambda: answering() == every, "every target answers", SECONDS)
    kinds = {each["metric"]: each["type"] for each in prometheus.api("targets/metadata")}
    assert kinds["ztunnel_decision_duration_seconds"] == "histogram"
    # OpenMetrics has a type of its own for it: that is what Prometheus asks for, and got.
    assert kinds["ztunnel_build"] == "info"


@pytest.mark.parametrize("daemon", ["nodeagent", "ztunnel"])
def test_what_the_daemons_say_is_what_is_documented(
    mesh: Mesh, prometheus: Server, lab: Lab, daemon: str
) -> None:
    for caller in ("client", "legacy", "outsider"):
        mesh.curl(caller, f"http://{mesh.address('far')}:{HTTP_PORT}/get")
    mesh.refuses("client", mesh.address("legacy"), 1)
    for node in lab.nodes:
        text = node.metrics(daemon)
        check_metrics(text)
        found = described(text)
        assert found.keys() <= every_series().keys()
        assert len(found) > 30


def test_a_call_by_mutual_tls_has_a_padlock_between_named_ends(
    mesh: Mesh, prometheus: Server
) -> None:
    url = f"http://{mesh.vip('far')}:{HTTP_PORT}/get"
    selector = 'reporter="source",source_workload_namespace="shop",destination_service_name="far"'
    (row,) = seen(
        lambda: mesh.curl("client", url),
        lambda: between(rates(prometheus, selector), "client", "far"),
        "the edge from client to far",
    )
    assert not is_bad(row)
    assert wait_until(lambda: padlock(prometheus, edge(row)), "its padlock", SECONDS) == 1.0
    (proven,) = between(
        rates(
            prometheus,
            'reporter="destination",source_workload_namespace="shop"',
            "source_principal",
            "destination_principal",
        ),
        "client",
        "far",
    )
    assert proven["source_principal"] == spiffe("client")
    assert proven["destination_principal"] == spiffe("far")


def test_a_trace_is_found_from_the_connections_of_an_edge(mesh: Mesh, prometheus: Server) -> None:
    mesh.curl("client", f"http://{mesh.vip('far')}:{HTTP_PORT}/get")
    query = (
        'istio_tcp_connections_closed_total{source_workload="client",destination_workload="far"}'
    )
    asked = urllib.parse.urlencode(
        {"query": query, "start": int(time.time()) - 300, "end": int(time.time()) + 300}
    )

    def traces() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for series in prometheus.api(f"query_exemplars?{asked}"):
            for exemplar in series["exemplars"]:
                found.setdefault(series["seriesLabels"]["reporter"], set()).add(
                    exemplar["labels"]["trace_id"]
                )
        return found

    def both() -> set[str]:
        found = traces()
        return set.intersection(*found.values()) if len(found) > 1 else set()

    # Both nodes tell of the same trace, each of its half.
    shared = wait_until(both, "one trace of both halves", SECONDS)
    assert all(re.fullmatch("[0-9a-f]{32}", trace) for trace in shared)


def test_a_known_caller_in_plaintext_has_an_edge_and_no_padlock(
    mesh: Mesh, prometheus: Server
) -> None:
    url = f"http://{mesh.address('far')}:{HTTP_PORT}/get"
    (row,) = seen(
        lambda: mesh.curl("legacy", url),
        lambda: between(
            rates(prometheus, 'reporter="destination",source_workload_namespace="shop"'),
            "legacy",
            "far",
        ),
        "the edge from legacy to far",
    )
    assert not is_bad(row)
    assert padlock(prometheus, edge(row)) == 0.0


def test_a_caller_from_outside_is_unknown_and_has_no_padlock(
    mesh: Mesh, prometheus: Server
) -> None:
    url = f"http://{mesh.address('far')}:{HTTP_PORT}/get"
    selector = (
        f'reporter="destination",source_workload="{UNKNOWN}",destination_workload_namespace="shop"'
    )
    (row,) = seen(
        lambda: mesh.curl("outsider", url),
        lambda: between(rates(prometheus, selector), UNKNOWN, "far"),
        "the edge from outside to far",
    )
    assert not is_bad(row)
    assert padlock(prometheus, edge(row)) == 0.0


def test_a_caller_with_an_identity_at_an_unknown_address_has_a_padlock(
    mesh: Mesh, prometheus: Server
) -> None:
    """As a gateway or a peer of another cluster: Kiali must not drop the edge."""

    def call() -> None:
        client = mesh.hbone("outsider", "far", mesh.shown(spiffe("gateway")))
        stream = client.connect(authority(mesh.address("far"), HTTP_PORT))
        assert client.status(stream) == 200
        client.send(stream, b"GET / HTTP/1.0\r\n\r\n")
        client.receive(stream, 12)
        client.close()

    selector = 'reporter="destination",connection_security_policy="mutual_tls"'
    (row,) = seen(
        call,
        lambda: between(rates(prometheus, selector, "source_principal"), UNKNOWN, "far"),
        "the edge from the gateway to far",
    )
    assert row["source_principal"] == spiffe("gateway")
    assert not is_bad(row)


def firing(server: Server, alert: str, **labels: str) -> str:
    """Return the summary of an alert with these labels, once it fires."""

    def found() -> str:
        for each in server.api("alerts")["alerts"]:
            if each["state"] == "firing" and (
                {"alertname": alert, **labels}.items() <= each["labels"].items()
            ):
                return str(each["annotations"]["summary"])
        return ""

    return wait_until(found, f"{alert} fires", SECONDS)


def test_plaintext_raises_an_alert_that_names_caller_and_called(
    mesh: Mesh, prometheus: Server
) -> None:
    mesh.curl("legacy", f"http://{mesh.address('near')}:{HTTP_PORT}/get")
    said = firing(prometheus, "PlaintextWouldBreak", workload="shop/near")
    assert said == "shop/legacy calls shop/near in plaintext"
    mesh.policy("far", strict("far"), mode="STRICT")
    mesh.refuses("legacy", mesh.address("far"), HTTP_PORT)
    said = firing(prometheus, "PlaintextToStrict", workload="shop/far")
    assert said == "shop/legacy calls shop/far in plaintext, which is STRICT"


def test_a_port_that_is_an_exception_raises_one_too(mesh: Mesh, prometheus: Server) -> None:
    document = peer_authentication("STRICT", app="near", ports={HTTP_PORT: "PERMISSIVE"})
    mesh.policy("near", document, mode="STRICT")
    wait_until(
        lambda: prometheus.query(
            'nodeagent_workload_mtls_mode{workload="shop/near",mode="STRICT"}'
        ),
        "Prometheus knows the mode",
        SECONDS,
    )
    mesh.curl("legacy", f"http://{mesh.address('near')}:{HTTP_PORT}/get")
    said = firing(prometheus, "PlaintextIntoStrict", workload="shop/near")
    assert said == "shop/near is STRICT and lets plaintext of shop/legacy in"


def test_a_policy_that_refers_to_nothing_is_told(mesh: Mesh, prometheus: Server) -> None:
    mesh.apply("kind: Nonsense\n", name="refused")
    assert "documents on node-" in firing(prometheus, "ConfigurationRefused")


def test_an_agent_that_is_away_is_told(mesh: Mesh, prometheus: Server, lab: Lab) -> None:
    node = lab.node("node-2")
    node.stop("nodeagent")
    mesh.defer(lambda: node.restart("nodeagent"))
    said = firing(prometheus, "NodeAgentDown", instance="node-2")
    assert said == "nodeagent on node-2 cannot be scraped"
