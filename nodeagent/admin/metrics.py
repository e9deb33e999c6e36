"""The Prometheus series of `nodeagent`.

This module owns one registry and every metric name of this daemon. It promises that labels come
from the node's own configuration and from closed sets, never from a peer, and that a scrape costs
one pass over the status. Counters are handed out as handles; there is no global registry.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from nodeagent.admin.model import Status, pods_by_state

if TYPE_CHECKING:
    from datetime import datetime

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_CHANGE_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30)
"""Seconds. An edit is to be live within one; 30 is the deadline of an acknowledgement."""


class Metrics:
    """Handles for what happens, and a collector for what is."""

    def __init__(self, version: str, status: Callable[[], Status]) -> None:
        """`status` returns the present picture without waiting for anybody."""
        # A second series for each, with the time of its birth, that no dashboard reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # not annotated there
        self.registry = CollectorRegistry()
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
        self._status = status
        self.registry.register(self)

    def forget(self, workload: str) -> None:
        """Drop the series of a workload that is gone."""
        for counter in (self.repairs, self.enrol_failures):
            counter.remove_by_labels({"workload": workload})

    def drained(self, cut: int) -> None:
        """A replaced ztunnel has ended, and had to cut so many connections."""
        self._drains.inc()
        self._drain_cuts.inc(cut)

    def render(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self.registry)

    def describe(self) -> Iterable[Metric]:
        """Name nothing at registration: `collect` needs an agent that runs."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield what can be read off the status."""
        status = self._status()
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


def _pods(status: Status) -> Iterable[Metric]:
    states = GaugeMetricFamily("nodeagent_pods", "Bound pods by state.", labels=("state",))
    for state, count in pods_by_state(status.pods).items():
        states.add_metric((state.value,), count)
    yield states
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
    expiry = GaugeMetricFamily(
        "nodeagent_svid_not_after_seconds", "Expiry of the SVID in use.", labels=("spiffe_id",)
    )
    renewals = CounterMetricFamily(
        "nodeagent_svid_renewals", "SVIDs obtained.", labels=("spiffe_id",)
    )
    failures = CounterMetricFamily(
        "nodeagent_svid_failures", "Failed attempts to obtain an SVID.", labels=("spiffe_id",)
    )
    for certificate in status.certificates:
        labels = (certificate.identity,)
        expiry.add_metric(labels, _seconds(certificate.not_after))
        renewals.add_metric(labels, certificate.renewals)
        failures.add_metric(labels, certificate.failures)
    yield expiry
    yield renewals
    yield failures


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
