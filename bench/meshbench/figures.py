"""From samples to the table's figures.

This module owns what is reported and how rounds become one number. It is pure. It promises that a
ratio is only ever taken between two subjects of the same round: what disturbs a shared machine for
a minute disturbs neighbours in time alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from meshbench.model import SUBJECTS, Figure, Sample, Spread

__all__ = ["METRICS", "Metric", "figure", "figures", "spread"]


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """What one figure is. `key` is a value of the scenario's samples.

    With `added` the figure is what a subject adds to no mesh in the same round. `scale` turns the
    sample's unit into the figure's. `target` is a bound for the ratio, or with `absolute` for our
    median itself, to be reached or exceeded when higher is `better`, else not exceeded.
    """

    name: str
    unit: str
    scenario: str
    key: str
    better: str
    against: str = "envoy"
    added: bool = False
    scale: float = 1.0
    target: float | None = None
    absolute: bool = False


def spread(values: Iterable[float]) -> Spread:
    """Return minimum, median and maximum. Raises ValueError when there are no values."""
    known = sorted(values)
    if not known:
        raise ValueError("no values: minimum, median and maximum of nothing")
    return Spread(known[0], statistics.median(known), known[-1])


def _series(metric: Metric, samples: Iterable[Sample]) -> dict[str, dict[int, float]]:
    """Return subject → round → value, in the figure's unit."""
    series: dict[str, dict[int, float]] = {subject: {} for subject in SUBJECTS}
    for sample in samples:
        if sample.scenario == metric.scenario and metric.key in sample.values:
            series[sample.subject][sample.round] = sample.values[metric.key] * metric.scale
    if not metric.added:
        return series
    base = series.pop("direct")
    return {
        subject: {
            number: value - base[number] for number, value in rounds.items() if number in base
        }
        for subject, rounds in series.items()
    }


def _ratios(series: Mapping[str, Mapping[int, float]], against: str) -> list[float]:
    """Return ours over the other for each round that has both; none where the other is not above 0,
    as what it adds may drown in noise.
    """
    other = series.get(against, {})
    return [
        value / other[number]
        for number, value in series["ours"].items()
        if other.get(number, 0.0) > 0.0
    ]


def _met(metric: Metric, ours: float | None, ratio: float | None) -> bool | None:
    reached = ours if metric.absolute else ratio
    if metric.target is None or reached is None:
        return None
    return reached >= metric.target if metric.better == "higher" else reached <= metric.target


def figure(metric: Metric, samples: Iterable[Sample]) -> Figure | None:
    """Return a metric's figure, or None when ours was not measured."""
    series = _series(metric, samples)
    if not series["ours"]:
        return None
    spreads = {name: spread(rounds.values()) for name, rounds in series.items() if rounds}
    ratios = _ratios(series, metric.against)
    if ratios:
        spreads["ratio"] = spread(ratios)
    medians = {name: found.median for name, found in spreads.items()}
    return Figure(
        name=metric.name,
        unit=metric.unit,
        better=metric.better,
        ours=medians["ours"],
        envoy=medians.get("envoy"),
        direct=medians.get("direct"),
        relay=medians.get("relay"),
        against=metric.against,
        ratio=medians.get("ratio"),
        target=metric.target,
        met=_met(metric, medians["ours"], medians.get("ratio")),
        spreads=spreads,
    )


def figures(samples: Iterable[Sample], metrics: Iterable[Metric] | None = None) -> list[Figure]:
    """Return every figure that was measured, in the table's order."""
    known = list(samples)
    found = (figure(metric, known) for metric in (METRICS if metrics is None else metrics))
    return [one for one in found if one is not None]


_MICRO: Final = 1e-3
"""Nanoseconds to microseconds."""


def _bulk(name: str, scenario: str) -> list[Metric]:
    return [
        Metric(
            name=f"bulk, {name}",
            unit="Gbit/s",
            scenario=scenario,
            key="gbit_per_second",
            better="higher",
        ),
        Metric(
            name=f"both tunnels' CPU, {name}",
            unit="CPU-s/GB",
            scenario=scenario,
            key="tunnels_per_gb",
            better="lower",
        ),
    ]


def _bulk_details() -> list[Metric]:
    keys = {
        "client_tunnel_per_gb": "client's tunnel's CPU, 1 stream",
        "server_tunnel_per_gb": "server's tunnel's CPU, 1 stream",
        "agents_per_gb": "both nodeagents' CPU, 1 stream",
        "system_per_gb": "whole system's CPU, 1 stream",
    }
    return [
        Metric(name=name, unit="CPU-s/GB", scenario="bulk_send", key=key, better="lower")
        for key, name in keys.items()
    ]


def _latency(name: str, scenario: str, *, added: bool) -> list[Metric]:
    return [
        Metric(
            name=f"{name}, {'added ' if added else ''}{share}",
            unit="µs",
            scenario=scenario,
            key=f"{share}_ns",
            better="lower",
            added=added,
            scale=_MICRO,
        )
        for share in ("p50", "p99")
    ]


def _rate(name: str, scenario: str, per: str) -> list[Metric]:
    return [
        Metric(name=name, unit="/s", scenario=scenario, key="per_second", better="higher"),
        Metric(
            name=f"both tunnels' CPU per {per}",
            unit="µs",
            scenario=scenario,
            key="tunnels_each_us",
            better="lower",
        ),
    ]


def _other(
    name: str, unit: str, scenario: str, key: str, *, better: str = "lower", against: str = "envoy"
) -> Metric:
    return Metric(name=name, unit=unit, scenario=scenario, key=key, better=better, against=against)


METRICS: Final = (
    *_bulk("1 stream, client sends", "bulk_send"),
    *_bulk("1 stream, server sends", "bulk_receive"),
    *_bulk("8 streams", "bulk_8"),
    *_bulk_details(),
    *_latency("1 KB request", "latency", added=False),
    *_latency("1 KB request", "latency", added=True),
    *_rate("requests, 64 kept-alive connections", "requests", "request"),
    *_rate("new connections, 32 at a time", "connections", "connection"),
    _other(
        "both nodeagents' CPU per connection", "µs", "connections", "agents_each_us"
    ),
    *_latency("first byte of a new connection", "first_byte", added=False),
    *_latency("first byte of a new connection", "first_byte", added=True),
    _other("new connections over 5 ms", "%", "first_byte", "stalled_percent"),
    _other("memory of one tunnel, idle", "MB", "memory", "idle_mb"),
    _other("memory per idle connection, client's side", "KB", "memory", "client_connection_kb"),
    _other("memory per idle connection, server's side", "KB", "memory", "server_connection_kb"),
    _other("memory of one nodeagent", "MB", "memory", "agent_mb"),
    _other(
        "same node, bulk, 1 stream", "Gbit/s", "same_node_bulk", "gbit_per_second",
        better="higher", against="direct",
    ),
    _other(
        "same node, requests, 64 connections", "/s", "same_node_requests", "per_second",
        better="higher", against="direct",
    ),
    _other(
        "outside the mesh, bulk, 1 stream", "Gbit/s", "outside_bulk", "gbit_per_second",
        better="higher", against="relay",
    ),
    _other("enrolling a pod", "ms", "enrolment", "milliseconds_each"),
    _other("both daemons' memory per pod", "KB", "enrolment", "kilobytes_each"),
    _other("threads per pod", "", "enrolment", "threads_each"),
)  # fmt: skip
