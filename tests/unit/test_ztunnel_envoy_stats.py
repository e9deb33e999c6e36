"""/stats: Envoy's names, what they count here, and that no connection is counted twice or lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from support.fake_core import REASONS, FakeCore, record
from support.mesh_state import ip
from support.tunnel_rig import POD, SLEEP, Rig, chain_of, credential, ended
from ztunnel._core import Failed, SeriesCounters
from ztunnel.corelike import Kind
from ztunnel.observe.arrivals import Arrivals, Arrived, whole
from ztunnel.observe.envoy_stats import MAX_FILTER, QueryError, Stat, parse, render, statistics
from ztunnel.protocol import Arrival, Removal
from ztunnel.reasons import Reason

PLAINTEXT = "listener.0.0.0.0_15006"
HBONE = "listener.0.0.0.0_15008"
DIRECT = "listener.envoy_internal_same_node"


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.start()
    yield made
    made.close()


def values(arrived: Arrived, handshaking: int = 0) -> dict[str, int]:
    return {stat.name: stat.value for stat in statistics(arrived, handshaking)}


def seen(rig: Rig, workload: str | None = SLEEP.uid) -> dict[str, int]:
    """Return what is not 0."""
    arrived = asyncio.run(whole(rig.tunnel.arrivals, rig.tunnel.flows, workload))
    return {name: value for name, value in values(arrived).items() if value}


def count(core: FakeCore, series: int, opened: int = 0, closed: int = 0, **failed: int) -> None:
    reasons = tuple(failed.get(reason.name, 0) for reason in REASONS)
    core.series[series] = record(SeriesCounters, opened, closed, reasons, 0, 0)


def handshake_failed(rig: Rig, reason: Reason) -> None:
    number = list(Reason).index(reason)
    event = record(Failed, Kind.PEER_CERTIFICATE, rig.pod, 0, ip("10.9.0.1"), 4000, number, "")
    rig.core.report(event)
    rig.tunnel.pump()


# --- the names ------------------------------------------------------------------------------------


def test_every_name_of_the_exercise_is_there_and_nothing_has_happened() -> None:
    found = values(Arrived())
    assert set(found.values()) == {0}
    assert list(found) == sorted(found)
    wanted = {
        f"tls_inspector.{name}"
        for name in (
            *("alpn_found", "alpn_not_found", "client_hello_too_large", "connection_closed"),
            *("read_error", "sni_found", "sni_not_found", "tls_found", "tls_not_found"),
        )
    }
    assert {name for name in found if name.startswith("tls_inspector.")} == wanted
    for name in (
        *("active", "destroy", "overflow", "total"),
        *("overload_reject", "transport_socket_connect_timeout"),
    ):
        for listener in (PLAINTEXT, HBONE, DIRECT):
            assert f"{listener}.downstream_cx_{name}" in found
    for name in (
        "no_filter_chain_match",
        "server_ssl_socket_factory.downstream_context_secrets_not_ready",
        "server_ssl_socket_factory.ssl_context_update_by_sds",
        "server_ssl_socket_factory.upstream_context_secrets_not_ready",
        *(
            f"ssl.{each}"
            for each in (
                *("connection_error", "fail_verify_cert_hash", "fail_verify_error"),
                *("fail_verify_no_cert", "fail_verify_san", "handshake", "no_certificate"),
                *("ocsp_staple_failed", "ocsp_staple_omitted", "ocsp_staple_requests"),
                *("ocsp_staple_responses", "session_reused"),
            )
        ),
    ):
        assert f"{PLAINTEXT}.{name}" in found
        assert f"{HBONE}.{name}" in found


# --- what is counted ------------------------------------------------------------------------------


def test_a_plaintext_connection_is_counted_once_and_without_a_handshake(rig: Rig) -> None:
    upcall = rig.inbound("10.9.0.1")
    count(rig.core, rig.core.answer_to(upcall).series, opened=1)
    before = seen(rig)
    assert before == {
        f"{HBONE}.server_ssl_socket_factory.ssl_context_update_by_sds": 1,
        f"{PLAINTEXT}.downstream_cx_active": 1,
        f"{PLAINTEXT}.downstream_cx_total": 1,
        "tls_inspector.tls_not_found": 1,
    }
    count(rig.core, rig.core.answer_to(upcall).series, opened=1, closed=1)
    del before[f"{PLAINTEXT}.downstream_cx_active"]
    assert seen(rig) == before | {f"{PLAINTEXT}.downstream_cx_destroy": 1}


def test_connections_that_share_a_handshake_are_counted_each(rig: Rig) -> None:
    number, _ = rig.prove(chain_of("httpbin"))
    upcall = rig.inbound("10.2.0.1", number)
    count(rig.core, rig.core.answer_to(upcall).series, opened=3, closed=2)
    found = seen(rig)
    assert found[f"{HBONE}.downstream_cx_total"] == found["tls_inspector.tls_found"] == 3
    assert found[f"{HBONE}.downstream_cx_active"] == 1
    assert found[f"{HBONE}.ssl.handshake"] == found[f"{HBONE}.ssl.versions.TLSv1.3"] == 1
    assert "tls_inspector.tls_not_found" not in found
    assert not any(name.startswith(PLAINTEXT) for name in found)


def test_nothing_is_lost_when_decisions_flows_and_pods_go(rig: Rig) -> None:
    upcall = rig.inbound("10.9.0.1")
    number = rig.core.answers[upcall]
    count(rig.core, rig.core.answer_to(upcall).series, opened=5, closed=5, CONNECT_REFUSED=2)
    before = seen(rig)
    assert before["tls_inspector.tls_not_found"] == 7
    assert rig.apply(credential(serial=b"2")) == ""
    rig.core.free(number)
    rig.tunnel.pump()
    assert len(rig.tunnel.flows) == 0
    rotated = {f"{HBONE}.server_ssl_socket_factory.ssl_context_update_by_sds": 2}
    assert seen(rig) == before | rotated
    assert rig.apply(removals=(Removal("pod", POD.uid),)) == ""
    assert seen(rig) == seen(rig, None) == before | rotated


def test_a_flow_that_goes_while_others_are_read_is_counted_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    upcall = rig.inbound("10.9.0.1")
    number = rig.core.answers[upcall]
    count(rig.core, rig.core.answer_to(upcall).series, opened=4, closed=4)
    arrived = rig.tunnel.arrivals.of

    def meanwhile(workload: str | None) -> Arrived:
        rig.tunnel.decisions.drop_cache()
        rig.core.free(number)
        rig.tunnel.pump()
        assert len(rig.tunnel.flows) == 0
        return arrived(workload)

    monkeypatch.setattr(rig.tunnel.arrivals, "of", meanwhile)
    assert seen(rig)["tls_inspector.tls_not_found"] == 4


@pytest.mark.parametrize(
    "kind,reason,listener,inspected,refused",
    [
        (Kind.INBOUND_PLAINTEXT, Reason.SELF_CALL, PLAINTEXT, "tls_not_found", {}),
        (
            *(Kind.INBOUND_PLAINTEXT, Reason.POD_CONNECTIONS, PLAINTEXT, "tls_not_found"),
            {f"{PLAINTEXT}.downstream_cx_overflow": 1},
        ),
        (
            *(Kind.INBOUND_PLAINTEXT, Reason.NO_DESCRIPTORS, PLAINTEXT, "tls_not_found"),
            {f"{PLAINTEXT}.downstream_global_cx_overflow": 1},
        ),
        (
            *(Kind.INBOUND_HBONE, Reason.POD_QUESTIONS, HBONE, "tls_found"),
            {
                f"{HBONE}.downstream_cx_overload_reject": 1,
                "tls_inspector.alpn_found": 1,
                "tls_inspector.sni_not_found": 1,
            },
        ),
    ],
)
def test_who_is_turned_away_before_a_decision_is_counted(
    rig: Rig, kind: Kind, reason: Reason, listener: str, inspected: str, refused: dict[str, int]
) -> None:
    ended(rig, 0, kind, reason)
    found = seen(rig)
    del found[f"{HBONE}.server_ssl_socket_factory.ssl_context_update_by_sds"]
    assert found == {
        f"{listener}.downstream_cx_destroy": 1,
        f"{listener}.downstream_cx_total": 1,
        f"tls_inspector.{inspected}": 1,
        **refused,
    }


def test_an_outbound_connection_is_none_that_came_in(rig: Rig) -> None:
    ended(rig, 0, Kind.OUTBOUND, Reason.SELF_CALL)
    assert list(seen(rig)) == [f"{HBONE}.server_ssl_socket_factory.ssl_context_update_by_sds"]


@pytest.mark.parametrize(
    "reason,names",
    [
        (Reason.CERT_MISSING, ["ssl.fail_verify_no_cert"]),
        (Reason.CERT_EXPIRED, ["ssl.fail_verify_error"]),
        (Reason.CERT_UNTRUSTED, ["ssl.fail_verify_error"]),
        (Reason.TRUST_DOMAIN, ["ssl.fail_verify_san"]),
        (Reason.TLS_FAILED, ["ssl.connection_error"]),
        (
            Reason.TLS_TIMEOUT,
            ["downstream_cx_transport_socket_connect_timeout", "ssl.connection_error"],
        ),
        (Reason.FIRST_BYTE_TIMEOUT, ["downstream_pre_cx_timeout", "ssl.connection_error"]),
        (Reason.POD_HANDSHAKES, ["downstream_cx_overload_reject"]),
        (
            Reason.NO_CREDENTIAL,
            ["server_ssl_socket_factory.downstream_context_secrets_not_ready"],
        ),
        (
            Reason.PEER_LOST,
            [
                "downstream_listener_filter_remote_close",
                "ssl.connection_error",
                "tls_inspector.connection_closed",
            ],
        ),
        # It broke later: no handshake failed.
        (Reason.KEEPALIVE_TIMEOUT, []),
    ],
)
def test_handshakes_that_fail_by_their_cause(rig: Rig, reason: Reason, names: list[str]) -> None:
    before = seen(rig)
    handshake_failed(rig, reason)
    full = (name if name.startswith("tls_") else f"{HBONE}.{name}" for name in names)
    assert seen(rig) == before | dict.fromkeys(full, 1)


def test_strict_has_no_filter_chain_for_plaintext() -> None:
    arrived = Arrived()
    arrived.failed[Arrival.PLAINTEXT, Reason.STRICT_PLAINTEXT] = 3
    arrived.failed[Arrival.PLAINTEXT, Reason.POLICY_DENIED] = 1
    found = values(arrived)
    assert found[f"{PLAINTEXT}.no_filter_chain_match"] == 3
    assert found[f"{PLAINTEXT}.downstream_cx_total"] == 4


def test_what_a_neighbour_hands_over_is_neither_tls_nor_without() -> None:
    arrived = Arrived()
    arrived.opened[Arrival.DIRECT] = 2
    found = {name: value for name, value in values(arrived).items() if value}
    assert found == {f"{DIRECT}.downstream_cx_active": 2, f"{DIRECT}.downstream_cx_total": 2}


def test_every_connection_is_in_one_listener_and_inspected_once() -> None:
    arrived = Arrived()
    for number, reason in enumerate(Reason, start=1):
        for arrival in Arrival:
            arrived.failed[arrival, reason] = number
            arrived.opened[arrival] += number
    found = values(arrived)
    inspected = found["tls_inspector.tls_found"] + found["tls_inspector.tls_not_found"]
    network = sum(found[f"{each}.downstream_cx_total"] for each in (PLAINTEXT, HBONE))
    assert inspected == network == 4 * sum(range(1, len(Reason) + 1))


def test_workloads_without_counts_of_their_own_stay_in_the_sum() -> None:
    arrivals = Arrivals(limit=2)
    for workload in ("a/a", "b/b", "a/a", "c/c", "d/d"):
        arrivals.undecided(workload, Arrival.PLAINTEXT, Reason.SELF_CALL)
    assert [name in arrivals for name in ("a/a", "b/b", "c/c", "d/d")] == [False, False, True, True]
    assert sum(arrivals.of(None).failed.values()) == 5
    assert sum(arrivals.of("a/a").failed.values()) == 0


# --- how it is asked for --------------------------------------------------------------------------

STATS = [
    Stat("listener.a.downstream_cx_active", 0, gauge=True, used=True),
    Stat("listener.a.downstream_cx_total", 3, used=True),
    Stat("tls_inspector.tls_found", 0),
]
TEXT = b"""\
listener.a.downstream_cx_active: 0
listener.a.downstream_cx_total: 3
tls_inspector.tls_found: 0
"""


@pytest.mark.parametrize(
    "query,kept",
    [
        ("", [0, 1, 2]),
        ("format=text", [0, 1, 2]),
        ("filter=cx_", [0, 1]),
        ("filter=%5Etls_.*found%24", [2]),
        ("filter=total%7Cfound", [1, 2]),
        ("filter=nothing", []),
        ("usedonly", [0, 1]),
        ("usedonly&filter=active", [0]),
        ("type=Gauges", [0]),
        ("type=Counters", [1, 2]),
        ("workload=a/b", [0, 1, 2]),
    ],
)
def test_what_is_wanted_is_kept_in_its_order(query: str, kept: list[int]) -> None:
    lines = TEXT.splitlines(keepends=True)
    assert render(parse(query), STATS) == b"".join(lines[number] for number in kept)


def test_json_has_the_shape_of_envoys() -> None:
    found = json.loads(render(parse("format=json&usedonly&filter=total"), STATS))
    assert found == {"stats": [{"name": "listener.a.downstream_cx_total", "value": 3}]}


def test_a_workload_is_named_as_it_is_written() -> None:
    assert parse("workload=shop%2Fdb").workload == "shop/db"
    assert parse("").workload is None


@pytest.mark.parametrize(
    "query,said",
    [
        ("filter=(", "missing )"),
        ("filter=" + "a" * (MAX_FILTER + 1), "at most"),
        ("filter=((a{100}){100}){100}", "filter: "),
        (r"filter=(a)\1", "filter: "),
        ("format=prometheus", "/metrics"),
        ("type=Histograms", "Counters"),
        ("useonly", "usedonly"),
        ("&".join(["usedonly"] * 20), "too many"),
    ],
)
def test_what_cannot_be_answered_says_what_can(query: str, said: str) -> None:
    with pytest.raises(QueryError) as caught:
        parse(query)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "filter_of_seconds",
    [
        "((((.?)(.?)(.?)){30}){30})\\bz",
        "((((.?)|(.?)|(.?)|(.?)|(.?)){30}){30})\\bz",
        "(([a-z_.]?[a-z_.]?[a-z_.]?){30}){30}\\bz",
        "(([a-z_.]?){30}){30}\\bz",
        "((.?){30}){32}\\bz",
        "(.?){156}z",
    ],
)
def test_a_filter_that_would_hold_the_loop_is_refused(filter_of_seconds: str) -> None:
    """Time linear in the text is still times the filter's size: each took up to 2.5 s."""
    with pytest.raises(QueryError, match=r"filter: .*too large"):
        parse("filter=" + quote(filter_of_seconds))


@pytest.mark.parametrize(
    "of_a_person",
    [
        "^(cluster|listener|http|tls_inspector|server)\\..*(cx|rq)_(total|active|destroy)[a-z_]*$",
        "(?i)TLS.*found$",
        "listener\\.\\d+\\.\\d+\\.\\d+\\.\\d+_\\d+\\..*",
        "\\w{1,63}\\.\\w{1,63}",
    ],
)
def test_a_filter_of_a_person_is_not_too_large(of_a_person: str) -> None:
    assert render(parse("filter=" + quote(of_a_person)), statistics(Arrived(), 0))


def test_no_filter_takes_exponential_time() -> None:
    query = parse("filter=" + "(%5B%5C.a-z_0-9%5D%2B)%2B%23")
    assert query.matches("x#")
    names = [Stat("listener.0.0.0.0_15008." + "downstream_cx_" * 20, 1) for _ in range(100)]
    # Backtracking would not end before the test's own deadline.
    assert render(query, names) == b""
