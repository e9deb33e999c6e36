"""The table's rows: every figure that is reported, with its target.

This module owns names, units, order and targets, and nothing else: it is data. A target is a bound
on the ratio to the subject named by `against`, or with `absolute` on our own median.
"""

from __future__ import annotations

from typing import Final

from meshbench.decisions import COUNTS
from meshbench.figures import Metric

__all__ = ["METRICS"]

_MICRO: Final = 1e-3
"""Nanoseconds to microseconds."""

BULK: Final = 1.75
BULK_8: Final = 1.7
BULK_CPU: Final = 0.5
ADDED: Final = 0.5
REQUESTS: Final = 1.2
REQUEST_CPU: Final = 0.6
CONNECTIONS: Final = 1.7
CONNECTION_CPU: Final = 0.5
SAME_NODE_BULK: Final = 0.75
SAME_NODE_REQUESTS: Final = 0.6
OUTSIDE: Final = 0.95
IDLE_MB: Final = 45.0
CONNECTION_KB: Final = 2.5
AFTER_CLOSING: Final = 1.1
ENROL_SECONDS: Final = 10.0
POD_KB: Final = 100.0
EFFECT_MS: Final = 1000.0

OBSERVED: Final = 0.95
"""Of throughput and rate, with everything on: what two windows of one subject differ by."""
OBSERVED_DELAY: Final = 1.05
SCRAPE_MS: Final = 300.0

STALLED_PERCENT: Final = 0.1
"""No stall after churn: peers with a NAT in the way stall 4 to 29 % of new connections. One in a
thousand is what a scheduler with two processors for six busy programs may do to anybody."""
CROWDED: Final = 1.1
"""Unchanged cost of a connection: rounds of one machine differ by more than a tenth."""
POD_THREADS: Final = 0.01
"""No thread for each pod: ten for a thousand are pools of a fixed size that first had work."""


def _bulk(name: str, scenario: str, target: float) -> list[Metric]:
    return [
        Metric(
            name=f"bulk, {name}",
            unit="Gbit/s",
            scenario=scenario,
            key="gbit_per_second",
            better="higher",
            target=target,
        ),
        Metric(
            name=f"both tunnels' CPU, {name}",
            unit="CPU-s/GB",
            scenario=scenario,
            key="tunnels_per_gb",
            better="lower",
            target=BULK_CPU,
        ),
    ]


def _bulk_details() -> list[Metric]:
    keys = {
        "client_tunnel_per_gb": "client's tunnel's CPU",
        "server_tunnel_per_gb": "server's tunnel's CPU",
        "agents_per_gb": "both nodeagents' CPU",
        "system_per_gb": "whole system's CPU",
    }
    ways = {"bulk_send": "client sends", "bulk_receive": "server sends"}
    return [
        Metric(
            name=f"{name}, 1 stream, {way}",
            unit="CPU-s/GB",
            scenario=scenario,
            key=key,
            better="lower",
        )
        for scenario, way in ways.items()
        for key, name in keys.items()
    ]


def _delays(
    name: str, scenario: str, *, added: bool = False, target: float | None = None
) -> list[Metric]:
    return [
        Metric(
            name=f"{name}, {'added ' if added else ''}{share}",
            unit="µs",
            scenario=scenario,
            key=f"{share}_ns",
            better="lower",
            added=added,
            scale=_MICRO,
            target=target,
        )
        for share in ("p50", "p99")
    ]


def _rate(name: str, scenario: str, per: str, target: float, cpu: float) -> list[Metric]:
    return [
        Metric(
            name=name,
            unit="/s",
            scenario=scenario,
            key="per_second",
            better="higher",
            target=target,
        ),
        Metric(
            name=f"both tunnels' CPU per {per}",
            unit="µs",
            scenario=scenario,
            key="tunnels_each_us",
            better="lower",
            target=cpu,
        ),
    ]


def _own(name: str, unit: str, scenario: str, key: str, target: float | None = None) -> Metric:
    """Return a figure where less is better and the target, if any, is a number of our own."""
    return Metric(
        name=name,
        unit=unit,
        scenario=scenario,
        key=key,
        better="lower",
        target=target,
        absolute=target is not None,
    )


def _share(name: str, unit: str, scenario: str, key: str, against: str, target: float) -> Metric:
    """Return a figure where more is better, against another subject than Envoy."""
    return Metric(
        name=name,
        unit=unit,
        scenario=scenario,
        key=key,
        better="higher",
        against=against,
        target=target,
    )


_TARGETED: Final = (
    *_bulk("1 stream, client sends", "bulk_send", BULK),
    *_bulk("1 stream, server sends", "bulk_receive", BULK),
    *_bulk("8 streams", "bulk_8", BULK_8),
    *_delays("1 KB request", "latency", added=True, target=ADDED),
    *_rate("requests, 64 kept-alive connections", "requests", "request", REQUESTS, REQUEST_CPU),
    *_rate(
        "new connections, 32 at a time", "connections", "connection", CONNECTIONS, CONNECTION_CPU
    ),
    *_delays("first byte of a new connection", "first_byte", added=True, target=ADDED),
    _own("new connections over 5 ms", "%", "first_byte", "stalled_percent", STALLED_PERCENT),
    _share(
        "same node, bulk, 1 stream", "Gbit/s", "same_node_bulk", "gbit_per_second", "direct",
        SAME_NODE_BULK,
    ),
    _share(
        "same node, requests, 64 connections", "/s", "same_node_requests", "per_second", "direct",
        SAME_NODE_REQUESTS,
    ),
    _share(
        "outside the mesh, bulk, 1 stream", "Gbit/s", "outside_bulk", "gbit_per_second", "relay",
        OUTSIDE,
    ),
    _own("memory of one tunnel, idle", "MB", "memory", "idle_mb", IDLE_MB),
    _own(
        "memory per idle connection, client's side", "KB", "memory", "client_connection_kb",
        CONNECTION_KB,
    ),
    _own(
        "memory per idle connection, server's side", "KB", "memory", "server_connection_kb",
        CONNECTION_KB,
    ),
    _own("9,000 connections, 2,000 busy: errors", "", "many", "errors", 0.0),
    _own(
        "9,000 connections, 10 s after closing: memory", "× idle", "many", "after_closing",
        AFTER_CLOSING,
    ),
    _own("1,000 pods: enrolled in", "s", "enrolment", "seconds", ENROL_SECONDS),
    _own("1,000 pods: both daemons' memory per pod", "KB", "enrolment", "kilobytes_each", POD_KB),
    _own("1,000 pods: threads per pod", "", "enrolment", "threads_each", POD_THREADS),
    _own("1,000 pods: CPU per connection", "× few pods", "enrolment", "crowded", CROWDED),
    _own(
        "100,000 workloads, 10,000 policies: edit to effect, p50", "ms", "policy", "effect_p50_ms",
        EFFECT_MS,
    ),
    *(
        Metric(
            name=f"observed: {name}", unit="× off", scenario="observe", key=key, better="higher",
            target=OBSERVED, absolute=True,
        )
        for name, key in (("bulk", "bulk"), ("new connections", "connections"))
    ),
    _own("observed: 1 KB request, p50", "× off", "observe", "latency_p50", OBSERVED_DELAY),
    _own("50,000 series, 1,000 pods: CPU of a scrape", "ms", "scrape", "full_cpu_ms", SCRAPE_MS),
    _own(
        "15,000 open connections: CPU of a scrape", "ms", "scrape", "open_cpu_ms", SCRAPE_MS,
    ),
)  # fmt: skip

_DETAILS: Final = (
    *_bulk_details(),
    *_delays("1 KB request", "latency"),
    *_delays("1 KB request beside a bulk stream", "beside_bulk"),
    Metric(
        name="bulk beside the requests", unit="Gbit/s", scenario="beside_bulk",
        key="gbit_per_second", better="higher",
    ),
    _own("both nodeagents' CPU per connection", "µs", "connections", "agents_each_us"),
    *_delays("first byte of a new connection", "first_byte"),
    Metric(
        name="first byte of a new connection, slowest", unit="µs", scenario="first_byte",
        key="max_ns", better="lower", scale=_MICRO,
    ),
    _own("memory of one nodeagent", "MB", "memory", "agent_mb"),
    _own("9,000 connections, open: memory per connection", "KB", "many", "connection_kb"),
    Metric(
        name="9,000 connections, 2,000 busy: messages", unit="/s", scenario="many",
        key="per_second", better="higher",
    ),
    _own("1,000 pods: CPU of both daemons per pod", "ms", "enrolment", "cpu_milliseconds_each"),
    *(
        _own(f"{count:,} policies: decision, {share}", "µs", "policy", f"{share}_us_{count}")
        for count in COUNTS
        for share in ("p50", "p99")
    ),
    *(
        _own(f"{count:,} policies: memory of each", "B", "policy", f"bytes_each_{count}")
        for count in COUNTS[1:]
    ),
    _own(
        "100,000 workloads, 10,000 policies: edit to effect, slowest", "ms", "policy",
        "effect_max_ms",
    ),
    _own(
        "100,000 workloads, 10,000 policies: nodeagent's CPU per edit", "ms", "policy",
        "nodeagent_cpu_ms",
    ),
    _own(
        "100,000 workloads, 10,000 policies: in force after", "s", "policy", "loaded_seconds"
    ),
    _own("100,000 workloads, 10,000 policies: nodeagent", "MB", "policy", "nodeagent_mb"),
    _own("100,000 workloads, 10,000 policies: ztunnel", "MB", "policy", "ztunnel_mb"),
    _own("observed: 1 KB request, p99", "× off", "observe", "latency_p99"),
    _own("observed: first byte of a new connection, p50", "× off", "observe", "first_p50"),
    _own("observed: first byte of a new connection, p99", "× off", "observe", "first_p99"),
    _own("observed: both tunnels' CPU per connection", "× off", "observe", "connection_cpu"),
    _own(
        "50,000 series, 1,000 pods: longest delay of the event loop", "ms", "scrape",
        "full_delay_ms",
    ),
    _own("first byte beside one scrape after the other, p99", "× none", "scrape", "scraped_p99"),
)  # fmt: skip

METRICS: Final = (*_TARGETED, *_DETAILS)
