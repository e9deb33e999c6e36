"""From samples to the table's figures.

This module owns how rounds become one number, and the lower bound. It is pure; `rows` says what is
reported. It promises that a ratio is only ever taken between two subjects of the same round: what
disturbs a shared machine for a minute disturbs neighbours in time alike.

The lower bound of bulk is the chain of plaintext relays, three TCP hops with every byte copied in
and out twice, plus the cipher once on each side, measured in the same round. Its CPU is the sum.
Its rate is the relays', less what the cipher takes of the processors that the relays kept busy:
rate × system / (system + cipher), both in CPU-seconds per GB.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

import msgspec

from meshbench.model import BOUND, SUBJECTS, Figure, Sample, Spread

__all__ = ["CIPHER", "Metric", "bounds", "figure", "figures", "spread", "unmeasured"]

CIPHER = "cipher"
"""The scenario with what the cipher takes: `seal_per_gb` and `open_per_gb`, in CPU-seconds."""


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
    series: dict[str, dict[int, float]] = {subject: {} for subject in (*SUBJECTS, BOUND)}
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


def bounds(samples: Iterable[Sample]) -> list[Sample]:
    """Return the lower bound of each round's bulk scenarios, as samples of the subject BOUND."""
    known = list(samples)
    cipher = {
        sample.round: sample.values["seal_per_gb"] + sample.values["open_per_gb"]
        for sample in known
        if sample.scenario == CIPHER
    }
    found: list[Sample] = []
    for sample in known:
        values = sample.values
        if (
            sample.subject != "relay"
            or sample.round not in cipher
            or not {"gbit_per_second", "system_per_gb", "tunnels_per_gb"} <= values.keys()
        ):
            continue
        system, extra = values["system_per_gb"], cipher[sample.round]
        bound = {
            "gbit_per_second": values["gbit_per_second"] * system / (system + extra),
            "tunnels_per_gb": values["tunnels_per_gb"] + extra,
            "system_per_gb": system + extra,
        }
        found.append(msgspec.structs.replace(sample, subject=BOUND, values=bound))
    return found


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
        bound=medians.get(BOUND),
        against=metric.against,
        ratio=medians.get("ratio"),
        target=metric.target,
        target_of=None if metric.target is None else "ours" if metric.absolute else "ratio",
        met=_met(metric, medians["ours"], medians.get("ratio")),
        spreads=spreads,
    )


def figures(samples: Iterable[Sample], metrics: Iterable[Metric]) -> list[Figure]:
    """Return every figure that was measured, in the order of `metrics`."""
    measured = list(samples)
    known = measured + bounds(measured)
    found = (figure(metric, known) for metric in metrics)
    return [one for one in found if one is not None]


def unmeasured(
    figures: Iterable[Figure], metrics: Iterable[Metric], scenarios: Iterable[str]
) -> list[str]:
    """Return the targeted figures of these scenarios that nothing can be said about: a scenario
    that failed must not look like a target that was reached.
    """
    judged = {one.name for one in figures if one.met is not None}
    wanted = set(scenarios)
    return [
        metric.name
        for metric in metrics
        if metric.target is not None and metric.scenario in wanted and metric.name not in judged
    ]
