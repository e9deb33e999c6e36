"""The Prometheus series of `nodeagent`.

This module owns every metric name of this daemon. It promises that labels come from the node's own
configuration and from closed sets, never from a peer, that series of a workload or identity that is
gone are gone with it, and that a scrape costs one pass over a status, on whatever thread. Counters
are handed out as handles; there is no global registry.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.exposition import generate_latest as encode_text
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_TYPE
from prometheus_client.openmetrics.exposition import generate_latest as encode_openmetrics
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from nodeagent.admin.model import Status, pods_by_state

if TYPE_CHECKING:
    from datetime import datetime

__all__ = ["CONTENT_TYPE", "OPENMETRICS_TYPE", "Metrics"]

_CHANGE_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30)
"""Seconds. An edit is to be live within one; 30 is the deadline of an acknowledgement."""


class Metrics:
    """Handles for what happens; what is comes with each scrape as a status."""

    def __init__(self, version: str) -> None:
        # A second series for each, with the time of its birth, that no dashboard reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # not annotated there
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Gauge(
            "nodeagent_build_info",
            "Always 1; the labels say what runs.",
            ("version", "python"),
            registry=self.registry,
        )
        build.labels(version, platform.python_version()).set(1)
        self.change_seconds = Histogram(
            "nodeagent_ztunnel_change_seconds",
            "Time from a change's first part to ztunnel's acknowledgement.",
            buckets=_CHANGE_BUCKETS,
            registry=self.registry,
        )
        self.repairs = Counter(
            "nodeagent_capture_repairs",
            "Deviations of a pod's capture that an audit put right, by kind.",
            ("workload", "kind"),
            registry=self.registry,
        )
        self.enrol_failures = Counter(
            "nodeagent_enrolment_failures",
            "Attempts to enrol, audit or remove a pod that failed.",
            ("workload",),
            registry=self.registry,
        )
        self._drains = Counter(
            "nodeagent_ztunnel_drains",
            "Replaced ztunnels that have ended by themselves.",
            registry=self.registry,
        )
        self._drain_cuts = Counter(
            "nodeagent_ztunnel_drain_cuts",
            "Connections that a replaced ztunnel still carried at its deadline, and cut.",
            registry=self.registry,
        )

    def forget(self, workload: str) -> None:
        """Drop the series of a workload that is gone."""
        for counter in (self.repairs, self.enrol_failures):
            counter.remove_by_labels({"workload": workload})

    def drained(self, cut: int) -> None:
        """A replaced ztunnel has ended, and had to cut so many connections."""
        self._drains.inc()
        self._drain_cuts.inc(cut)

    def render(self, status: Status, *, openmetrics: bool) -> bytes:
        """Return the text of all metrics, those that `status` tells among them. On any thread."""
        encode = encode_openmetrics if openmetrics else encode_text
        return encode(_Both(self.registry, status))


class _Both(Collector):
    """What has happened, and what is."""

    def __init__(self, happened: CollectorRegistry, status: Status) -> None:
        self._happened = happened
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield from self._happened.collect()
        status = self._status
        yield _gauge(
            "nodeagent_ready", "1 when traffic of every bound pod would pass.", status.ready
        )
        yield _gauge(
            "nodeagent_start_time_seconds", "When this process started.", status.started.timestamp()
        )
        yield from _seam(status)
        yield from _config(status)
        yield from _pods(status)
        yield from _certificates(status)
        yield from _workload_certificates(status)
        yield from _recording(status)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))


def _seam(status: Status) -> Iterable[Metric]:
    ztunnel = status.ztunnel
    yield _gauge("nodeagent_ztunnel_connected", "1 while ztunnel is connected.", ztunnel.connected)
    yield _gauge(
        "nodeagent_ztunnel_in_sync",
        "1 while ztunnel has the newest state in force.",
        ztunnel.connected and ztunnel.acknowledged_version >= ztunnel.wanted_version,
    )
    yield CounterMetricFamily(
        "nodeagent_ztunnel_rejections", "Changes that ztunnel refused.", value=ztunnel.rejections
    )
    yield _gauge(
        "nodeagent_ztunnel_draining", "Replaced ztunnels that still end.", len(ztunnel.draining)
    )


def _config(status: Status) -> Iterable[Metric]:
    config = status.config
    yield _gauge("nodeagent_config_loaded", "1 once a configuration is in force.", config.loaded)
    yield _gauge("nodeagent_config_documents", "Documents in force.", config.documents)
    yield _gauge("nodeagent_config_problems", "Documents refused.", len(config.problems))
    yield _gauge(
        "nodeagent_config_warnings", "Warnings on documents in force.", len(config.warnings)
    )
    yield _gauge(
        "nodeagent_config_unresolved",
        "References of documents in force that lead nowhere: what depends on them is closed.",
        len(config.unresolved),
    )
    yield _gauge(
        "nodeagent_config_unenforced",
        "Policies that are in force otherwise than they are written.",
        len(config.unenforced),
    )


def _pods(status: Status) -> Iterable[Metric]:
    states = GaugeMetricFamily("nodeagent_pods", "Bound pods by state.", labels=("state",))
    for state, count in pods_by_state(status.pods).items():
        states.add_metric((state.value,), count)
    yield states
    present = GaugeMetricFamily(
        "nodeagent_pod_state",
        "1 for the state that the capture of a bound workload's pod is in.",
        labels=("workload", "state"),
    )
    mode = GaugeMetricFamily(
        "nodeagent_workload_mtls_mode",
        "1 for the mode of mutual TLS that is in force for a workload, exceptions of ports apart.",
        labels=("workload", "mode"),
    )
    for pod in status.pods:
        present.add_metric((pod.workload, pod.state.value), 1)
        if pod.mode:
            mode.add_metric((pod.workload, pod.mode), 1)
    yield present
    yield mode
    drops = CounterMetricFamily(
        "nodeagent_capture_dropped",
        "What the capture refused: packets at a pod's device, connections without a listener.",
        labels=("workload", "reason"),
    )
    for pod in status.pods:
        for reason, count in sorted(pod.drops.items()):
            drops.add_metric((pod.workload, reason), count)
    yield drops


def _certificates(status: Status) -> Iterable[Metric]:
    labels = ("spiffe_id",)
    begin = GaugeMetricFamily(
        "nodeagent_svid_not_before_timestamp_seconds",
        "Begin of the SVID in use, 0 without one.",
        labels=labels,
    )
    expiry = GaugeMetricFamily(
        "nodeagent_svid_expiry_timestamp_seconds",
        "End of the SVID in use, 0 without one.",
        labels=labels,
    )
    renewals = CounterMetricFamily("nodeagent_svid_renewals", "SVIDs obtained.", labels=labels)
    failures = CounterMetricFamily(
        "nodeagent_svid_renewal_failures", "Failed attempts to obtain an SVID.", labels=labels
    )
    failing = GaugeMetricFamily(
        "nodeagent_svid_renewal_failing",
        "Failed attempts to obtain an SVID since the last that succeeded.",
        labels=labels,
    )
    for certificate in status.certificates:
        identity = (certificate.identity,)
        begin.add_metric(identity, _seconds(certificate.not_before))
        expiry.add_metric(identity, _seconds(certificate.not_after))
        renewals.add_metric(identity, certificate.renewals)
        failures.add_metric(identity, certificate.failed)
        failing.add_metric(identity, certificate.failures)
    yield from (begin, expiry, renewals, failures, failing)


def _workload_certificates(status: Status) -> Iterable[Metric]:
    labels = ("workload", "spiffe_id")
    begin = GaugeMetricFamily(
        "nodeagent_workload_svid_not_before_timestamp_seconds",
        "Begin of the SVID that a workload's pod uses, 0 without one.",
        labels=labels,
    )
    expiry = GaugeMetricFamily(
        "nodeagent_workload_svid_expiry_timestamp_seconds",
        "End of the SVID that a workload's pod uses, 0 without one.",
        labels=labels,
    )
    for pod in status.pods:
        if pod.certificate is not None:
            named = (pod.workload, pod.identity)
            begin.add_metric(named, _seconds(pod.certificate.not_before))
            expiry.add_metric(named, _seconds(pod.certificate.not_after))
    yield begin
    yield expiry


def _recording(status: Status) -> Iterable[Metric]:
    recording = status.recording
    if recording is None:
        return
    yield CounterMetricFamily(
        "nodeagent_flows_recorded", "Reports of callers written.", value=recording.recorded
    )
    yield CounterMetricFamily(
        "nodeagent_flows_lost",
        "Reports of callers not written: no room on the disk, or it is too slow.",
        value=recording.lost,
    )
    yield _gauge("nodeagent_flows_bytes", "Size of the recorded flows.", recording.bytes)
    yield _gauge(
        "nodeagent_flows_failing", "1 while callers cannot be recorded.", bool(recording.problem)
    )


def _seconds(moment: datetime | None) -> float:
    # 0 lies in the past: an alert on "expires soon" covers "was never there".
    return moment.timestamp() if moment is not None else 0.0
