"""The tunnel's own metrics: their names, types, labels and help texts.

This module owns those names. It promises seconds and bytes as units, labels from closed sets or of
bounded number, and no sample for what is nothing where there may be many. It may not count
anything itself: it is given a picture.
"""

from __future__ import annotations

import functools
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector as CollectorBase

from ztunnel import tls
from ztunnel.audit.entry import Policy, policy_of
from ztunnel.observe.counted import OTHER
from ztunnel.observe.labels import UNKNOWN
from ztunnel.reasons import Reason
from ztunnel.release import release

if TYPE_CHECKING:
    from ztunnel._core import PodCounters
    from ztunnel.observe.counted import Judged
    from ztunnel.observe.stats import Picture

__all__ = ["OWN_HELP", "Collector"]

_REASONS: Final = tuple(Reason)
_MICROSECONDS: Final = 1_000_000

OWN_HELP: Final[Mapping[str, str]] = {
    "pods": "Pods in service.",
    "workloads": "Workloads of the mesh that are known.",
    "services": "Services of the mesh that are known.",
    "authorizations": "Authorization policies in force, those of a dry run among them.",
    "decisions": "Decisions that the core or a connection may still use.",
    "peers": "Pools of HBONE connections, one for each pod and workload that it calls.",
    "series": "Label sets with counters of their own.",
    "flows": "Callers, ports and verdicts that are counted to be reported to nodeagent.",
    "identities": "Verified certificate chains that are remembered.",
    "waiting_decisions": "Connections of young pods that wait for the pod's own state.",
    "control_connected": "1 while the connection to nodeagent stands.",
    "same_node_direct": "1 while pods of this node are joined directly, without encryption.",
    "control_version": "Version of the state in force.",
    "flows_folded_total": "Times that a caller found no room there and was counted with others.",
    "series_evicted_total": "Label sets dropped to make room; their counters start anew.",
    "connections_cut_total": "Decisions whose live connections a change of state has cut.",
    "waits_expired_total": "Connections refused because a young pod's state did not come in time.",
    "internal_errors_total": "Errors of the tunnel's own; each has a stack trace in the log.",
    "capture_probes_total": "Probes of a pod's capture (nodeagent doctor) that were answered.",
    "access_log_lines_total": "Access log lines written.",
    "access_log_left_out_total": "Lines of failures left out, for there were too many of a kind.",
    "access_log_dropped_total": "Access log lines lost: queue full, or the file not writable.",
    "traces_exported_total": "Spans that the receiver of traces has taken.",
    "traces_dropped_total": "Spans lost: queue full, the receiver not reachable, or refused by it.",
}


class Collector(CollectorBase):
    """Gives everything but Istio's series."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture

    def describe(self) -> Iterable[Metric]:
        # Nothing is collected at registration: a picture is rendered once.
        return ()

    def collect(self) -> Iterator[Metric]:
        picture = self._picture
        yield from _handshakes(picture)
        yield from _core(picture)
        yield from _pods(picture)
        yield from _judged(picture)
        yield from _by_policy(picture)
        yield _plaintext(picture)
        yield from _bounds(picture)
        yield from _audit(picture)
        yield from _own(picture)


def _histogram(
    metric: HistogramMetricFamily,
    labels: list[str],
    bounds_us: tuple[int, ...],
    counts: tuple[int, ...],
    sum_us: int,
) -> None:
    buckets: list[tuple[str, float]] = []
    total = 0
    limits = [*(repr(bound / _MICROSECONDS) for bound in bounds_us), "+Inf"]
    for limit, count in zip(limits, counts, strict=True):
        total += count
        buckets.append((limit, total))
    metric.add_metric(labels, buckets, sum_us / _MICROSECONDS)


def _handshakes(picture: Picture) -> Iterator[Metric]:
    core = picture.core
    latency = HistogramMetricFamily(
        "ztunnel_tls_handshake_duration_seconds",
        "Complete TLS and HTTP/2 handshakes of HBONE, by our side in them.",
        labels=["side"],
    )
    for side, counts, sum_us in (
        ("client", core.handshakes_client, core.handshakes_client_sum_us),
        ("server", core.handshakes_server, core.handshakes_server_sum_us),
    ):
        _histogram(latency, [side], picture.bounds_us, counts, sum_us)
    yield latency
    failures = CounterMetricFamily(
        "ztunnel_tls_handshake_failures",
        "HBONE handshakes that failed, both sides, by reason (the core's own count).",
        labels=["reason"],
    )
    for reason, count in zip(_REASONS, core.handshake_failures, strict=True):
        if count:
            failures.add_metric([reason.value], count)
    yield failures
    reported = CounterMetricFamily(
        "ztunnel_tls_handshake_failures_reported",
        "HBONE handshakes that failed and were reported, by our side and reason.",
        labels=["side", "reason"],
    )
    for (side, reason), count in picture.handshake_failures.items():
        reported.add_metric([side, reason.value], count)
    yield reported
    begin = GaugeMetricFamily(
        "ztunnel_svid_not_before_timestamp_seconds",
        "Begin of the certificate that a local identity shows.",
        labels=["identity"],
    )
    expiry = GaugeMetricFamily(
        "ztunnel_svid_expiry_timestamp_seconds",
        "End of the certificate that a local identity shows.",
        labels=["identity"],
    )
    for uid, (not_before, not_after) in picture.certificates.items():
        begin.add_metric([uid], not_before)
        expiry.add_metric([uid], not_after)
    yield begin
    yield expiry


def _core(picture: Picture) -> Iterator[Metric]:
    core = picture.core
    yield GaugeMetricFamily(
        "ztunnel_connections", "Application connections open now.", value=core.connections
    )
    yield GaugeMetricFamily(
        "ztunnel_hbone_connections",
        "HBONE connections open now, both sides.",
        value=core.tls_connections,
    )
    yield GaugeMetricFamily(
        "ztunnel_held_bytes",
        "Bytes that wait in this process for applications which do not read.",
        value=core.held_bytes,
    )
    latency = HistogramMetricFamily(
        "ztunnel_decision_duration_seconds",
        "From the core's question to the answer in force.",
        labels=[],
    )
    _histogram(latency, [], picture.bounds_us, core.upcall_latency, core.upcall_latency_sum_us)
    yield latency
    yield CounterMetricFamily(
        "ztunnel_decisions_asked", "Questions that the core has asked.", value=core.upcalls
    )
    yield CounterMetricFamily(
        "ztunnel_decisions_cached",
        "Connections decided by the core's table.",
        value=core.table_hits,
    )
    yield CounterMetricFamily(
        "ztunnel_traces_left_out",
        "Connections that were to be traced, beyond what a worker begins in a second.",
        value=core.traces_left_out,
    )
    yield CounterMetricFamily(
        "ztunnel_events_lost",
        "Reports of the core that found no room: log lines that are missing.",
        value=core.events_lost,
    )
    failed = CounterMetricFamily(
        "ztunnel_connections_failed",
        "Connections that were refused, failed or cut, by the reason that the access log has.",
        labels=["reason"],
    )
    for reason, ended in picture.failed.items():
        failed.add_metric([reason.value], ended)
    yield failed
    expired = CounterMetricFamily(
        "ztunnel_deadlines_expired",
        "Connections and waits that a deadline has ended, by its name in the settings.",
        labels=["deadline"],
    )
    for name, count in zip(picture.deadlines, core.expired, strict=True):
        expired.add_metric([name], count)
    yield expired
    connections = GaugeMetricFamily(
        "ztunnel_worker_connections", "Connections open now, by worker.", labels=["worker"]
    )
    accepted = CounterMetricFamily(
        "ztunnel_worker_accepted", "Connections accepted, by worker.", labels=["worker"]
    )
    for number, (connected, taken) in enumerate(core.workers):
        connections.add_metric([str(number)], connected)
        accepted.add_metric([str(number)], taken)
    yield connections
    yield accepted
    turned = GaugeMetricFamily(
        "ztunnel_worker_last_turn_seconds",
        "How long ago a worker's loop last turned; it does every second at least.",
        labels=["worker"],
    )
    for number, last_us in enumerate(core.last_loop_us):
        ago = max(0, picture.now_us - last_us) / _MICROSECONDS
        turned.add_metric([str(number)], ago)
    yield turned


def _pods(picture: Picture) -> Iterator[Metric]:
    """What each pod takes of what runs out. Pods that take nothing are left out."""
    core = picture.core
    yield GaugeMetricFamily(
        "ztunnel_descriptors", "Descriptors that connections hold now.", value=core.descriptors
    )
    yield GaugeMetricFamily(
        "ztunnel_descriptors_limit",
        "Descriptors that connections may hold, one or two each (LimitNOFILE, less a reserve).",
        value=core.descriptors_most,
    )
    families: tuple[tuple[str, str, Callable[[PodCounters], int]], ...] = (
        ("connections", "Connections of a pod open now.", lambda c: c.connections),
        ("descriptors", "Descriptors that a pod's connections hold now.", lambda c: c.descriptors),
        ("dials", "TCP connects of a pod under way.", lambda c: c.dials),
        ("questions", "Connections of a pod that wait for a decision.", lambda c: c.questions),
        ("handshakes", "Handshakes under way with a pod as server.", lambda c: c.handshakes),
        ("held_bytes", "Bytes that a pod's applications have not read.", lambda c: c.held_bytes),
    )
    for name, text, value in families:
        gauge = GaugeMetricFamily(f"ztunnel_pod_{name}", text, labels=["pod"])
        for uid, counters in picture.pods:
            if value(counters):
                gauge.add_metric([uid], value(counters))
        yield gauge
    refused = CounterMetricFamily(
        "ztunnel_pod_refusals",
        "Connections and handshakes that a limit has ended, by pod and reason.",
        labels=["pod", "reason"],
    )
    for uid, counters in picture.pods:
        for reason, count in zip(_REASONS, counters.refused, strict=True):
            if count:
                refused.add_metric([uid, reason.value], count)
    yield refused


def _judged(picture: Picture) -> Iterator[Metric]:
    yield _verdicts(
        "ztunnel_verdicts",
        "Judgements who may come in; one serves all connections of the same question.",
        picture.judged,
    )
    yield _verdicts(
        "ztunnel_verdicts_audited",
        "Of these, those that an AUDIT rule matched.",
        {judged: count for judged, count in picture.judged.items() if judged.audited},
    )
    yield _verdicts(
        "ztunnel_verdicts_dry_run_differs",
        "Of these, those that policies of a dry run would have turned.",
        {judged: count for judged, count in picture.judged.items() if judged.would != judged.allow},
    )


def _verdicts(name: str, text: str, counts: Mapping[Judged, int]) -> Metric:
    metric = CounterMetricFamily(name, text, labels=["client", "verdict"])
    totals: Counter[tuple[str, str]] = Counter()
    for judged, count in counts.items():
        totals[judged.client.value, "allow" if judged.allow else "deny"] += count
    for labels, count in totals.items():
        metric.add_metric(list(labels), count)
    return metric


def _by_policy(picture: Picture) -> Iterator[Metric]:
    metric = CounterMetricFamily(
        "ztunnel_policy_verdicts",
        "Connections that came in or were refused, by the rule that decided.",
        labels=["policy", "policy_namespace", "rule", "verdict"],
    )
    for (rule, reason, allow), count in picture.by_policy.items():
        policy = policy_of(rule, Reason(reason) if reason else None)
        if rule == OTHER:
            policy = Policy(OTHER, "", "")
        metric.add_metric([*policy, "allow" if allow else "deny"], count)
    yield metric


def _plaintext(picture: Picture) -> Metric:
    metric = CounterMetricFamily(
        "ztunnel_plaintext_connections",
        "Connections that came in plaintext, by workloads and whether policy let them in.",
        labels=[
            "source_workload_namespace",
            "source_workload",
            "destination_workload_namespace",
            "destination_workload",
            "verdict",
        ],
    )
    # A workload may be called as what stands for many: two samples of one name would be refused.
    totals: Counter[tuple[str, ...]] = Counter()
    for (source, destination, allow), count in picture.plaintext.items():
        totals[*_named(source), *_named(destination), "allow" if allow else "deny"] += count
    for labels, count in totals.items():
        metric.add_metric(list(labels), count)
    return metric


def _named(uid: str) -> tuple[str, str]:
    namespace, slash, name = uid.partition("/")
    return (namespace, name) if slash else (UNKNOWN, uid or UNKNOWN)


def _bounds(picture: Picture) -> Iterator[Metric]:
    for name, text, counts in (
        (
            "ztunnel_metric_overflow",
            "What was counted under unknown or other labels, for a metric's limit was reached.",
            picture.overflowed,
        ),
        (
            "ztunnel_metric_expired",
            "Label sets dropped some minutes after what they named had left the mesh.",
            picture.expired,
        ),
    ):
        family = CounterMetricFamily(name, text, labels=["metric"])
        for metric, count in counts.items():
            family.add_metric([metric], count)
        yield family


def _audit(picture: Picture) -> Iterator[Metric]:
    written = CounterMetricFamily(
        "ztunnel_audit_lines", "Audit lines written, by sink.", labels=["sink"]
    )
    for sink, lines in picture.audit.written.items():
        written.add_metric([sink], lines)
    yield written
    left_out = CounterMetricFamily(
        "ztunnel_audit_left_out",
        "Audit lines not written: beyond the rate (sink all), or lost by a sink.",
        labels=["sink", "cause"],
    )
    for (sink, cause), lines in picture.audit.left_out.items():
        left_out.add_metric([sink, cause], lines)
    yield left_out
    working = GaugeMetricFamily(
        "ztunnel_audit_sink_up", "1 while a sink takes audit lines.", labels=["sink"]
    )
    for sink, problem in picture.audit.problems.items():
        working.add_metric([sink], float(not problem))
    yield working


def _own(picture: Picture) -> Iterator[Metric]:
    for name, value in picture.own.items():
        text = OWN_HELP[name]
        if name.endswith("_total"):
            yield CounterMetricFamily(f"ztunnel_{name.removesuffix('_total')}", text, value=value)
        else:
            yield GaugeMetricFamily(f"ztunnel_{name}", text, value=value)
    yield InfoMetricFamily("ztunnel_build", "What runs.", value=_build())


@functools.cache
def _build() -> dict[str, str]:
    return {
        "version": release(),
        "python": platform.python_version(),
        "openssl": tls.version(),
    }
