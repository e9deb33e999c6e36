from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from support.certificates import NOW
from support.expositions import ACCEPTED, HTTPBIN, RULE, by_reason, picture, rows, ztunnel_text
from support.fake_core import FakeCore
from support.mesh_state import identity, service, workload
from support.prometheus import check_metrics
from ztunnel.observe import istio_text, labels
from ztunnel.observe.counted import Plaintext
from ztunnel.observe.labels import Labels
from ztunnel.observe.series import Counters
from ztunnel.observe.stats import render
from ztunnel.observe.traces import Exemplar


@pytest.fixture
def core() -> Iterator[FakeCore]:
    made = FakeCore()
    yield made
    made.close()


def samples(core: FakeCore) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(ztunnel_text(picture(core))):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def test_istios_series_have_its_names_and_all_its_labels(core: FakeCore) -> None:
    found = samples(core)
    assert {name for name in found if name.startswith("istio_")} == {
        "istio_tcp_connections_opened_total",
        "istio_tcp_connections_closed_total",
        "istio_tcp_connections_failed_total",
        "istio_tcp_sent_bytes_total",
        "istio_tcp_received_bytes_total",
    }
    sample = found["istio_tcp_sent_bytes_total"][0]
    assert sample.value == 200
    assert sample.labels == {
        "reporter": "source",
        "request_protocol": "tcp",
        "response_flags": "-",
        "connection_security_policy": "mutual_tls",
        "source_workload": "sleep",
        "source_workload_namespace": "default",
        "source_canonical_service": "sleep",
        "source_canonical_revision": "v1",
        "source_principal": identity("sleep"),
        "source_app": "sleep",
        "source_version": "v1",
        "source_cluster": "Kubernetes",
        "source_region": "eu",
        "source_zone": "eu-1",
        "destination_workload": "httpbin",
        "destination_workload_namespace": "default",
        "destination_canonical_service": "httpbin",
        "destination_canonical_revision": "v1",
        "destination_principal": identity("httpbin"),
        "destination_app": "httpbin",
        "destination_version": "v1",
        "destination_cluster": "Kubernetes",
        "destination_region": "unknown",
        "destination_zone": "unknown",
        "destination_service": "web.default.svc.cluster.local",
        "destination_service_name": "web",
        "destination_service_namespace": "default",
    }


def test_bytes_are_named_as_the_client_sees_request_and_response(core: FakeCore) -> None:
    found = samples(core)
    assert found["istio_tcp_received_bytes_total"][0].value == 100
    assert found["istio_tcp_connections_opened_total"][0].value == 7
    assert found["istio_tcp_connections_closed_total"][0].value == 6


def test_failures_come_by_flag_early_ones_included(core: FakeCore) -> None:
    found = {
        (sample.labels["reporter"], sample.labels["response_flags"]): sample.value
        for sample in samples(core)["istio_tcp_connections_failed_total"]
    }
    assert found == {
        # A timeout towards 15008, and a reset by the application, which is no failure.
        ("source", "NETWORK_POLICY"): 2,
        ("source", "CONNECT"): 1,
        ("destination", "DENY"): 6,
        ("destination", "CONNECT"): 2,
    }


def test_histograms_are_cumulative_and_in_seconds(core: FakeCore) -> None:
    found = samples(core)
    buckets = [
        (sample.labels["le"], sample.value)
        for sample in found["ztunnel_tls_handshake_duration_seconds_bucket"]
        if sample.labels["side"] == "client"
    ]
    assert buckets == [("0.0001", 1), ("0.001", 2), ("0.01", 3), ("+Inf", 4)]
    assert found["ztunnel_tls_handshake_duration_seconds_sum"][0].value == pytest.approx(0.005)
    assert found["ztunnel_decision_duration_seconds_count"][0].value == 4


def test_the_tunnels_own_metrics_are_there(core: FakeCore) -> None:
    found = samples(core)
    assert found["ztunnel_pods"][0].value == 4
    assert found["ztunnel_internal_errors_total"][0].value == 4
    assert found["ztunnel_events_lost_total"][0].value == 0
    assert found["ztunnel_worker_accepted_total"][0].labels == {"worker": "0"}
    assert found["ztunnel_svid_expiry_timestamp_seconds"][0].value == NOW
    assert found["ztunnel_svid_not_before_timestamp_seconds"][0].value == NOW - 60
    assert found["ztunnel_worker_last_turn_seconds"][0].value == 2.5
    assert found["process_resident_memory_bytes"][0].value > 0
    assert "version" in found["ztunnel_build_info"][0].labels
    (failed,) = found["ztunnel_connections_failed_total"]
    assert (failed.labels, failed.value) == ({"reason": "policy_changed"}, 4)
    (reported,) = found["ztunnel_tls_handshake_failures_reported_total"]
    assert reported.labels == {"side": "client", "reason": "certificate_expired"}


def test_verdicts_are_counted_by_caller_and_those_that_were_noted_besides(core: FakeCore) -> None:
    found = samples(core)

    def counts(name: str) -> dict[tuple[str, str], float]:
        return {
            (each.labels["client"], each.labels["verdict"]): each.value
            for each in found.get(f"ztunnel_{name}_total", ())
        }

    assert counts("verdicts") == {
        ("identity_allowed", "allow"): 6,
        ("without_identity", "deny"): 1,
    }
    assert counts("verdicts_audited") == {
        ("identity_allowed", "allow"): 2,
        ("without_identity", "deny"): 1,
    }
    assert counts("verdicts_dry_run_differs") == {("identity_allowed", "allow"): 2}


def test_what_a_pod_takes_and_was_refused(core: FakeCore) -> None:
    found = samples(core)
    assert [each.value for each in found["ztunnel_descriptors"]] == [5]
    assert [each.value for each in found["ztunnel_descriptors_limit"]] == [1000]
    # A pod that takes nothing has no sample.
    taken = {name: [(each.labels, each.value) for each in found[name]] for name in found}
    web = {"pod": "default/web"}
    assert taken["ztunnel_pod_connections"] == [(web, 4)]
    assert taken["ztunnel_pod_descriptors"] == [(web, 7)]
    assert taken["ztunnel_pod_dials"] == [(web, 1)]
    assert taken["ztunnel_pod_handshakes"] == [(web, 2)]
    assert taken["ztunnel_pod_held_bytes"] == [(web, 65536)]
    assert taken["ztunnel_pod_refusals_total"] == [
        (web | {"reason": "pod_connection_limit"}, 9),
        (web | {"reason": "pod_dial_limit"}, 3),
    ]


def test_values_that_peers_influence_are_escaped(core: FakeCore) -> None:
    evil = workload('a"b\nc\\d', "10.1.0.1", account="a")
    shown = rows(
        (labels.make("source", "none", evil, None, None), Counters(1, 0, by_reason(), 0, 0))
    )
    families = text_string_to_metric_families(
        ztunnel_text(msgspec.structs.replace(picture(core), rows=shown))
    )
    names = {
        sample.labels["source_workload"]
        for family in families
        for sample in family.samples
        if "source_workload" in sample.labels
    }
    assert 'a"b\nc\\d' in names


def test_a_service_outside_the_cluster_keeps_its_hostname() -> None:
    outside = service("web", ("10.96.0.1",), ())
    assert labels.service_name(outside) == "web"
    renamed = type(outside)("default/api.example.com", "api.example.com", "default", (), (), ())
    assert labels.service_name(renamed) == "api.example.com"


def test_the_audit_log_is_counted_by_sink_and_cause(core: FakeCore) -> None:
    found = samples(core)
    assert [(each.labels, each.value) for each in found["ztunnel_audit_lines_total"]] == [
        ({"sink": "file"}, 7)
    ]
    assert [(each.labels, each.value) for each in found["ztunnel_audit_left_out_total"]] == [
        ({"sink": "all", "cause": "rate"}, 3),
        ({"sink": "file", "cause": "slow"}, 2),
    ]
    assert [(each.labels, each.value) for each in found["ztunnel_audit_sink_up"]] == [
        ({"sink": "file"}, 1),
        ({"sink": "journal"}, 0),
    ]


def test_openmetrics_is_given_to_who_asks_for_it_and_says_the_same(core: FakeCore) -> None:
    shown = picture(core)
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    media, portions = render(shown, accept)
    assert media.startswith("application/openmetrics-text; version=1.0.0")
    said = b"".join(portions).decode()
    assert said.endswith("# EOF\n")

    def values(families: Iterable[Metric]) -> dict[tuple[str, str], float]:
        return {
            (sample.name, repr(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
            if not sample.name.startswith("process_")
        }

    plain, _ = render(shown, "text/plain;version=0.0.4")
    assert plain.startswith("text/plain; version=0.0.4")
    assert values(
        openmetrics_families(said)  # type: ignore[no-untyped-call]  # not annotated there
    ) == values(text_string_to_metric_families(ztunnel_text(shown)))


@pytest.mark.parametrize(
    "accept", ["", "*/*", "nonsense", "," * 100_000, "application/openmetrics-text;version=x"]
)
def test_an_accept_header_that_says_nothing_gets_an_answer(core: FakeCore, accept: str) -> None:
    media, portions = render(picture(core), accept)
    assert b"ztunnel_build_info" in b"".join(portions)
    assert media


@pytest.mark.parametrize("accept, openmetrics", ACCEPTED.items())
def test_what_is_preferred_is_given(core: FakeCore, accept: str, openmetrics: bool) -> None:
    media, _ = render(picture(core), accept)
    assert media.startswith("application/openmetrics-text") == openmetrics


def test_promtool_has_nothing_to_say(core: FakeCore) -> None:
    check_metrics(ztunnel_text(picture(core)))


def test_verdicts_by_rule(core: FakeCore) -> None:
    found = {
        tuple(
            each.labels[name] for name in ("policy", "policy_namespace", "rule", "verdict")
        ): each.value
        for each in samples(core)["ztunnel_policy_verdicts_total"]
    }
    assert found == {
        ("httpbin", "default", RULE, "deny"): 5,
        ("agent:policy_missing", "", "", "deny"): 1,
        ("default:allow", "", "", "allow"): 2,
        ("other", "", "", "allow"): 3,
    }


def test_plaintext_by_source_and_destination(core: FakeCore) -> None:
    names = ("source_workload", "destination_workload", "verdict")
    found = {
        tuple(each.labels[name] for name in names): each.value
        for each in samples(core)["ztunnel_plaintext_connections_total"]
    }
    assert found == {
        ("unknown", "httpbin", "allow"): 8,
        ("legacy", "httpbin", "deny"): 9,
        ("other", "other", "allow"): 10,
    }


def test_workloads_called_as_what_stands_for_many_are_no_second_sample(core: FakeCore) -> None:
    callers = ("", "unknown/unknown", "other", "unknown/other")
    counted = {Plaintext(caller, HTTPBIN.uid, allow=True): 1 for caller in callers}
    text = ztunnel_text(msgspec.structs.replace(picture(core), plaintext=counted))
    lines = [line for line in text.splitlines() if line.startswith("ztunnel_plaintext_conn")]
    assert sorted(line.rpartition(" ")[2] for line in lines) == ["2.0", "2.0"]
    check_metrics(text)


@pytest.mark.parametrize(
    "name",
    ['a"b\nc\\d', "\r\x00\x1b[31m", "x" * 10_240, "\u202e", '{a="b"} 1\n# EOF\n', "a\\"],
)
@pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
def test_any_name_comes_through_as_it_is(core: FakeCore, name: str, accept: str) -> None:
    """In Istio's text, which is our own, and in the library's."""
    evil = msgspec.structs.replace(workload("a", "10.1.0.1"), name=name)
    shown = msgspec.structs.replace(
        picture(core),
        rows=rows((labels.make("source", "none", evil, None, None), Counters(1))),
        plaintext={Plaintext(f"default/{name}", "", allow=True): 1},
    )
    text = ztunnel_text(shown, accept)
    parse = openmetrics_families if accept else text_string_to_metric_families
    named = {
        sample.name
        for family in parse(text)
        for sample in family.samples
        if sample.labels.get("source_workload") == name
    }
    assert {"istio_tcp_sent_bytes_total", "ztunnel_plaintext_connections_total"} <= named


def test_what_found_no_room_and_what_has_expired(core: FakeCore) -> None:
    found = samples(core)
    istio = {"metric": "istio_tcp_connections"}
    assert [(e.labels, e.value) for e in found["ztunnel_metric_overflow_total"]] == [(istio, 11)]
    assert [(e.labels, e.value) for e in found["ztunnel_metric_expired_total"]] == [(istio, 12)]


def test_a_label_set_is_spelled_once(core: FakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = picture(core)
    first = ztunnel_text(shown)

    def spell(_labels: Labels) -> str:
        raise AssertionError("spelled again")

    monkeypatch.setattr(istio_text, "_spell", spell)
    again = ztunnel_text(shown)
    istio = [line for line in first.splitlines() if line.startswith("istio_")]
    assert istio == [line for line in again.splitlines() if line.startswith("istio_")]


def test_no_portion_of_the_text_holds_the_interpreter_for_long(core: FakeCore) -> None:
    many = rows(
        *(
            (
                labels.make("source", "none", workload(f"w{number}", "10.1.0.1"), None, None),
                Counters(1, 0, by_reason(CONNECT_REFUSED=1), 0, 0),
            )
            for number in range(1000)
        )
    )
    made = list(istio_text.portions(many, openmetrics=True))
    assert max(portion.count(b"\n") for portion in made) <= istio_text.LINES
    assert sum(portion.count(b"\n") for portion in made) == 5 * (1000 + 2)


def test_openmetrics_shows_the_last_traced_connection_of_a_label_set(core: FakeCore) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    shown = picture(core)
    traced = shown.rows.series[0].labels
    shown = msgspec.structs.replace(
        shown, exemplars={traced: Exemplar(trace, 0.25, 1700000000.1234)}
    )
    said = b"".join(render(shown, "application/openmetrics-text")[1]).decode()
    found = [
        (sample.labels["source_workload"], sample.value, sample.exemplar)
        for family in openmetrics_families(said)  # type: ignore[no-untyped-call]  # theirs
        for sample in family.samples
        if sample.name == "istio_tcp_connections_closed_total"
    ]
    name, value, exemplar = found[0]
    assert (name, value) == ("sleep", 6)
    assert (exemplar.labels, exemplar.value) == ({"trace_id": trace}, 1)
    assert float(exemplar.timestamp) == 1700000000.123
    assert [exemplar for _, _, exemplar in found[1:]] == [None] * (len(found) - 1)
    assert trace not in ztunnel_text(shown)
