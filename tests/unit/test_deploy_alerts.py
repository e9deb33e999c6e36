"""The alert rules for Prometheus: each is provoked, alone, and a healthy node provokes none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml

from support.expositions import every_series
from support.prometheus import DEPLOY, promtool

ALERTS: Final = DEPLOY / "prometheus" / "alerts.yml"
AT: Final = "20m"
"""When it is looked: every rule's window and patience are over."""

AGENT: Final = 'instance="n:15000",job="nodeagent"'
TUNNEL: Final = 'instance="n:15020",job="ztunnel"'
ID: Final = 'spiffe_id="spiffe://cluster.local/ns/shop/sa/a"'
PAIR: Final = (
    'source_workload_namespace="shop",source_workload="old",'
    'destination_workload_namespace="shop",destination_workload="pay"'
)


def mode(name: str) -> str:
    return f'nodeagent_workload_mtls_mode{{{AGENT},workload="shop/pay",mode="{name}"}}'


def handshakes(side: str, reason: str) -> str:
    name = "ztunnel_tls_handshake_failures_reported_total"
    return f'{name}{{{TUNNEL},side="{side}",reason="{reason}"}}'


# By series, a value in promtool's notation. Time begins at 0.
HEALTHY: Final = {
    f"up{{{AGENT}}}": "1x60",
    f"up{{{TUNNEL}}}": "1x60",
    f"process_start_time_seconds{{{AGENT}}}": "-86400x60",
    f"process_start_time_seconds{{{TUNNEL}}}": "-86400x60",
    f"nodeagent_ready{{{AGENT}}}": "1x60",
    f"nodeagent_ztunnel_in_sync{{{AGENT}}}": "1x60",
    f"nodeagent_config_problems{{{AGENT}}}": "0x60",
    f"nodeagent_config_unresolved{{{AGENT}}}": "0x60",
    f'nodeagent_pod_state{{{AGENT},workload="shop/a",state="Enrolled"}}': "1x60",
    mode("STRICT"): "1x60",
    f"nodeagent_svid_not_before_timestamp_seconds{{{AGENT},{ID}}}": "0x60",
    f"nodeagent_svid_expiry_timestamp_seconds{{{AGENT},{ID}}}": "3600x60",
    f"nodeagent_svid_renewal_failing{{{AGENT},{ID}}}": "0x60",
    f"nodeagent_flows_failing{{{AGENT}}}": "0x60",
    f'nodeagent_capture_repairs_total{{{AGENT},workload="shop/a",kind="rules"}}': "3x60",
    handshakes("server", "tls_failed"): "7x60",
    f'ztunnel_plaintext_connections_total{{{TUNNEL},{PAIR},verdict="allow"}}': "9x60",
    f'ztunnel_plaintext_connections_total{{{TUNNEL},{PAIR},verdict="deny"}}': "9x60",
    f'ztunnel_connections_failed_total{{{TUNNEL},reason="policy_denied"}}': "0+3x60",
    f'ztunnel_audit_sink_up{{{TUNNEL},sink="file"}}': "1x60",
    f'ztunnel_audit_left_out_total{{{TUNNEL},sink="all",cause="rate"}}': "4x60",
    f'ztunnel_decision_duration_seconds_bucket{{{TUNNEL},le="0.01"}}': "0+100x60",
    f'ztunnel_decision_duration_seconds_bucket{{{TUNNEL},le="0.1"}}': "0+100x60",
    f'ztunnel_decision_duration_seconds_bucket{{{TUNNEL},le="1.0"}}': "0+100x60",
    f'ztunnel_decision_duration_seconds_bucket{{{TUNNEL},le="+Inf"}}': "0+100x60",
    f"ztunnel_decision_duration_seconds_count{{{TUNNEL}}}": "0+100x60",
    f'ztunnel_worker_last_turn_seconds{{{TUNNEL},worker="0"}}': "0.5x60",
    f"ztunnel_descriptors{{{TUNNEL}}}": "500x60",
    f"ztunnel_descriptors_limit{{{TUNNEL}}}": "1000x60",
    f'ztunnel_pod_refusals_total{{{TUNNEL},pod="shop/a",reason="pod_dial_limit"}}': "2x60",
    f"ztunnel_internal_errors_total{{{TUNNEL}}}": "0x60",
    f"ztunnel_access_log_dropped_total{{{TUNNEL}}}": "0x60",
    f"ztunnel_events_lost_total{{{TUNNEL}}}": "0x60",
    f'ztunnel_metric_overflow_total{{{TUNNEL},metric="istio_tcp_connections"}}': "0x60",
}

NEW: Final = "_x30 1x30"
"""A counter that is not there until its first event."""


class Case(NamedTuple):
    alert: str
    series: dict[str, str]
    also: frozenset[str] = frozenset()
    """What is true besides: the one cannot be without the other."""


CASES: Final = (
    Case("NodeAgentDown", {f"up{{{AGENT}}}": "0x60"}),
    Case("ZtunnelDown", {f"up{{{TUNNEL}}}": "0x60"}),
    Case("NodeNotReady", {f"nodeagent_ready{{{AGENT}}}": "0x60"}),
    Case("ZtunnelNotInSync", {f"nodeagent_ztunnel_in_sync{{{AGENT}}}": "0x60"}),
    Case("ConfigurationRefused", {f"nodeagent_config_problems{{{AGENT}}}": "1x60"}),
    Case("ConfigurationRefused", {f"nodeagent_config_unresolved{{{AGENT}}}": "1x60"}),
    Case(
        "PodNotCaptured",
        {f'nodeagent_pod_state{{{AGENT},workload="shop/b",state="Degraded"}}': "1x60"},
    ),
    Case(
        "CaptureTamperedWith",
        {f'nodeagent_capture_repairs_total{{{AGENT},workload="shop/b",kind="rules"}}': NEW},
    ),
    Case(
        "CaptureTamperedWith",
        {f'nodeagent_capture_repairs_total{{{AGENT},workload="shop/a",kind="rules"}}': "3x30 4x30"},
    ),
    Case("SvidExpiring", {f"nodeagent_svid_expiry_timestamp_seconds{{{AGENT},{ID}}}": "1500x60"}),
    Case("SvidMissing", {f"nodeagent_svid_expiry_timestamp_seconds{{{AGENT},{ID}}}": "0x60"}),
    Case("SvidMissing", {f"nodeagent_svid_expiry_timestamp_seconds{{{AGENT},{ID}}}": "600x60"}),
    Case("SvidRenewalFailing", {f"nodeagent_svid_renewal_failing{{{AGENT},{ID}}}": "2x60"}),
    Case(
        "HandshakeFailures",
        {handshakes("server", "tls_failed"): "0+6x60"},
    ),
    Case("HandshakeFailures", {handshakes("client", "peer_connection_lost"): "0+6x60"}),
    Case(
        "NetworkBlocksHbone",
        {
            f'istio_tcp_connections_failed_total{{{TUNNEL},reporter="source",'
            'response_flags="NETWORK_POLICY",destination_workload_namespace="shop",'
            'destination_workload="pay"}': "0+1x60"
        },
    ),
    Case(
        "PlaintextToStrict",
        {f'ztunnel_plaintext_connections_total{{{TUNNEL},{PAIR},verdict="deny"}}': NEW},
    ),
    Case(
        "PlaintextToStrict",
        {f'ztunnel_plaintext_connections_total{{{TUNNEL},{PAIR},verdict="deny"}}': "_x36 2x24"}
        | {f"up{{{TUNNEL}}}": "_x36 1x24"}
        | {f"process_start_time_seconds{{{TUNNEL}}}": "_x36 1080x24"},
    ),
    Case(
        "PlaintextIntoStrict",
        {f'ztunnel_plaintext_connections_total{{{TUNNEL},{PAIR},verdict="allow"}}': "9x30 10x30"},
    ),
    Case(
        "PlaintextWouldBreak",
        {
            f'ztunnel_plaintext_connections_total{{{TUNNEL},{PAIR},verdict="allow"}}': NEW,
            mode("STRICT"): "_x60",
            mode("PERMISSIVE"): "1x60",
        },
    ),
    Case(
        "PolicyDenials",
        {f'ztunnel_connections_failed_total{{{TUNNEL},reason="policy_denied"}}': "0+60x60"},
    ),
    Case("AuditLogFailing", {f'ztunnel_audit_sink_up{{{TUNNEL},sink="file"}}': "0x60"}),
    Case(
        "AuditLinesLost",
        {f'ztunnel_audit_left_out_total{{{TUNNEL},sink="file",cause="slow"}}': NEW},
    ),
    Case("CallersNotRecorded", {f"nodeagent_flows_failing{{{AGENT}}}": "1x60"}),
    Case(
        "DecisionsSlow",
        {
            f'ztunnel_decision_duration_seconds_bucket{{{TUNNEL},le="{bound}"}}': "0+90x60"
            for bound in ("0.01", "0.1")
        },
    ),
    Case("WorkerStalled", {f'ztunnel_worker_last_turn_seconds{{{TUNNEL},worker="0"}}': "9x60"}),
    Case("DescriptorsRunningOut", {f"ztunnel_descriptors{{{TUNNEL}}}": "900x60"}),
    Case(
        "PodAtItsLimit",
        {f'ztunnel_pod_refusals_total{{{TUNNEL},pod="shop/a",reason="pod_dial_limit"}}': "0+1x60"},
    ),
    Case("ZtunnelInternalErrors", {f"ztunnel_internal_errors_total{{{TUNNEL}}}": "0+1x60"}),
    Case("LogLinesLost", {f"ztunnel_access_log_dropped_total{{{TUNNEL}}}": "0+1x60"}),
    Case("LogLinesLost", {f"ztunnel_events_lost_total{{{TUNNEL}}}": "0+1x60"}),
    Case(
        "MetricsFolded",
        {f'ztunnel_metric_overflow_total{{{TUNNEL},metric="istio_tcp_connections"}}': "0+1x60"},
    ),
)


EVENTS: Final = {key: "3x60" for key in HEALTHY if "_total{" in key}
"""What has happened a while ago."""


def since(series: dict[str, str], silent: int) -> dict[str, str]:
    """Return series without their first `silent` samples, every half minute."""
    return {key: f"_x{silent - 1} {value}" for key, value in series.items()}


BLOCKED: Final = (
    f'istio_tcp_connections_failed_total{{{TUNNEL},reporter="source",'
    'response_flags="NETWORK_POLICY",destination_workload_namespace="shop",'
    'destination_workload="pay"}'
)
STARTED: Final = {f"process_start_time_seconds{{{each}}}": "1080x60" for each in (AGENT, TUNNEL)}
"""Two minutes before it is looked."""

QUIET: Final[dict[str, dict[str, str]]] = {
    "healthy": {},
    "idle, with nothing counted yet": dict.fromkeys(EVENTS, "0x60"),
    "just started": since(HEALTHY | dict.fromkeys(EVENTS, "0x60") | STARTED, 37),
    "just found by Prometheus, with old events": since(HEALTHY | EVENTS, 37),
    "upgraded: counters begin anew": dict.fromkeys(EVENTS, "9x36 0x24"),
    "restarted a while after Prometheus last saw it": dict.fromkeys(EVENTS, "9x5 _x30 0x24"),
    "draining": {f"nodeagent_ztunnel_draining{{{AGENT}}}": "1x60"},
    "probes of the HBONE port": {handshakes("server", "peer_connection_lost"): "0+6x60"},
    "a peer that went, and its callers waited": {BLOCKED: "0x30 2x30"},
    "now and then a young pod that waits for its state": {
        f'ztunnel_decision_duration_seconds_bucket{{{TUNNEL},le="{bound}"}}': value
        for bound, value in (
            ("0.01", "0x60"),
            ("0.1", "0x60"),
            ("1.0", "0+0.2x60"),
            ("+Inf", "0+0.2x60"),
        )
    }
    | {f"ztunnel_decision_duration_seconds_count{{{TUNNEL}}}": "0+0.2x60"},
}
"""Nodes that nobody is to be told of."""


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def case(name: str, series: dict[str, str], alerts: frozenset[str]) -> dict[str, Any]:
    """Return a test in promtool's form: exactly these alerts fire."""
    return {
        "name": name,
        "interval": "30s",
        "input_series": [
            {"series": key, "values": value} for key, value in (HEALTHY | series).items()
        ],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": AT,
                "exp_samples": [
                    {"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(alerts)
                ],
            }
        ],
    }


def test_each_alert_is_provoked_alone_and_a_healthy_node_provokes_none(tmp_path: Path) -> None:
    tests = [case(name, series, frozenset()) for name, series in QUIET.items()]
    tests += [case(each.alert, each.series, each.also | {each.alert}) for each in CASES]
    file = tmp_path / "alerts_test.yml"
    file.write_text(
        yaml.safe_dump(
            {"rule_files": [str(ALERTS)], "evaluation_interval": "30s", "tests": tests},
            sort_keys=False,
        )
    )
    found = promtool("test", "rules", str(file))
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_rule_has_a_case_and_every_case_a_rule() -> None:
    assert {rule["alert"] for rule in rules()} == {each.alert for each in CASES}


def test_promtool_has_nothing_to_say() -> None:
    for arguments in (
        ("check", "rules", str(ALERTS)),
        ("check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")),
    ):
        found = promtool(*arguments)
        assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
def test_a_rule_speaks_of_series_and_labels_that_exist(rule: dict[str, Any]) -> None:
    series = every_series()
    named = set(re.findall(r"\b(?:istio|nodeagent|ztunnel|process)_\w+", rule["expr"]))
    assert named <= series.keys()
    known = set().union(*(series[name] for name in named)) | {"instance", "job", "workload"}
    text = "".join(rule["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= known
    assert set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", rule["expr"])) <= known


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
def test_a_rule_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(rule["annotations"]) == {"summary", "description"}
