"""How rounds become figures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbench.figures import CIPHER, Metric, bounds, figure, figures, spread, unmeasured
from meshbench.model import BOUND, Sample, Spread
from meshbench.rows import METRICS
from meshbench.scenarios import SCENARIOS

RATE = Metric(name="rate", unit="/s", scenario="s", key="per_second", better="higher")
DELAY = Metric(name="delay", unit="µs", scenario="s", key="ns", better="lower", scale=1e-3)


def sample(number: int, subject: str, **values: float) -> Sample:
    return Sample(round=number, subject=subject, scenario="s", values=values, busy=0.0)


def changed(metric: Metric, **fields: object) -> Metric:
    return Metric(**{name: getattr(metric, name) for name in metric.__struct_fields__} | fields)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([3.0], Spread(3.0, 3.0, 3.0)),
        ([3.0, 1.0], Spread(1.0, 2.0, 3.0)),
        ([5.0, 1.0, 2.0], Spread(1.0, 2.0, 5.0)),
    ],
)
def test_spread(values: list[float], expected: Spread) -> None:
    assert spread(values) == expected


def test_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        spread([])


@given(st.lists(st.floats(0, 1e12), min_size=1))
def test_spread_is_in_order(values: list[float]) -> None:
    found = spread(values)
    assert found.min <= found.median <= found.max
    assert found.min in values
    assert found.max in values


def test_ratio_is_taken_within_each_round() -> None:
    """The machine is three times slower in the second round: the ratio does not notice."""
    samples = [
        sample(1, "ours", per_second=20.0),
        sample(1, "envoy", per_second=10.0),
        sample(2, "ours", per_second=6.0),
        sample(2, "envoy", per_second=3.0),
    ]
    found = figure(RATE, samples)
    assert found is not None
    assert found.spreads["ratio"] == Spread(2.0, 2.0, 2.0)
    assert (found.ours, found.envoy, found.direct) == (13.0, 6.5, None)


def test_a_round_without_the_other_gives_no_ratio() -> None:
    samples = [
        sample(1, "ours", per_second=20.0),
        sample(2, "ours", per_second=6.0),
        sample(2, "envoy", per_second=3.0),
    ]
    found = figure(RATE, samples)
    assert found is not None
    assert found.spreads["ratio"] == Spread(2.0, 2.0, 2.0)
    assert found.spreads["ours"] == Spread(6.0, 13.0, 20.0)


def test_a_ratio_to_nothing_is_none() -> None:
    samples = [sample(1, "ours", per_second=20.0), sample(1, "envoy", per_second=0.0)]
    found = figure(RATE, samples)
    assert found is not None
    assert found.ratio is None
    assert found.met is None


def test_what_a_subject_adds_is_counted_from_no_mesh_of_the_same_round() -> None:
    samples = [
        sample(1, "direct", ns=70e3),
        sample(1, "ours", ns=100e3),
        sample(1, "envoy", ns=130e3),
        sample(2, "direct", ns=170e3),
        sample(2, "ours", ns=200e3),
        sample(2, "envoy", ns=230e3),
        sample(3, "ours", ns=999e3),
    ]
    found = figure(changed(DELAY, added=True), samples)
    assert found is not None
    assert found.direct is None
    assert found.ours == pytest.approx(30.0)
    assert found.envoy == pytest.approx(60.0)
    assert found.ratio == pytest.approx(0.5)


def test_an_added_cost_that_drowns_in_noise_gives_no_ratio() -> None:
    samples = [sample(1, "direct", ns=70e3), sample(1, "ours", ns=90e3), sample(1, "envoy", ns=6e4)]
    found = figure(changed(DELAY, added=True), samples)
    assert found is not None
    assert found.ratio is None


@pytest.mark.parametrize(
    "better, target, absolute, met",
    [
        ("higher", 2.0, False, True),
        ("higher", 2.1, False, False),
        ("lower", 2.0, False, True),
        ("lower", 1.9, False, False),
        ("lower", 20.0, True, True),
        ("lower", 19.0, True, False),
        ("higher", None, False, None),
    ],
)
def test_targets(better: str, target: float | None, absolute: bool, met: bool | None) -> None:
    metric = changed(RATE, better=better, target=target, absolute=absolute)
    samples = [sample(1, "ours", per_second=20.0), sample(1, "envoy", per_second=10.0)]
    found = figure(metric, samples)
    assert found is not None
    assert found.met is met
    assert found.target_of == (None if target is None else "ours" if absolute else "ratio")


@pytest.mark.parametrize("met, ours, envoy", [(True, 10.0, 5.0), (False, 9.99, 5.0)])
def test_a_target_is_reached_by_the_median_of_the_ratios(
    met: bool, ours: float, envoy: float
) -> None:
    """One good round of three does not make it, one bad does not spoil it."""
    rounds = [(1.0, 5.0), (ours, envoy), (20.0, 5.0)]
    samples = [
        sample(number, subject, per_second=value)
        for number, pair in enumerate(rounds, 1)
        for subject, value in zip(("ours", "envoy"), pair, strict=True)
    ]
    found = figure(changed(RATE, target=2.0), samples)
    assert found is not None
    assert found.met is met


def test_a_target_without_the_other_subject_is_neither_met_nor_missed_but_not_measured() -> None:
    metric = changed(RATE, target=2.0)
    found = figures([sample(1, "ours", per_second=20.0)], [metric])
    assert [one.met for one in found] == [None]
    assert unmeasured(found, [metric], ["s"]) == ["rate"]
    assert unmeasured([], [metric, DELAY], ["s"]) == ["rate"]
    assert unmeasured([], [metric], ["another"]) == []


def test_the_lower_bound_is_the_relays_and_the_cipher() -> None:
    """Relays that keep two processors busy at 16 Gbit/s, and a cipher that takes half as much
    again of what the whole system takes.
    """
    bulk = {"gbit_per_second": 16.0, "system_per_gb": 1.0, "tunnels_per_gb": 0.6}
    cipher = Sample(
        round=1,
        subject="relay",
        scenario=CIPHER,
        values={"seal_per_gb": 0.3, "open_per_gb": 0.2},
        busy=0.0,
    )
    samples = [sample(1, "relay", **bulk), sample(1, "ours", **bulk), cipher]
    (bound,) = bounds(samples)
    assert (bound.subject, bound.round, bound.scenario) == (BOUND, 1, "s")
    assert bound.values["tunnels_per_gb"] == pytest.approx(1.1)
    assert bound.values["system_per_gb"] == pytest.approx(1.5)
    assert bound.values["gbit_per_second"] == pytest.approx(16 / 1.5)
    rate = changed(RATE, key="gbit_per_second")
    (found,) = figures(samples, [rate])
    assert found.bound == pytest.approx(16 / 1.5)


def test_there_is_no_lower_bound_without_the_cipher_of_the_same_round() -> None:
    bulk = {"gbit_per_second": 16.0, "system_per_gb": 1.0, "tunnels_per_gb": 0.6}
    assert bounds([sample(2, "relay", **bulk)]) == []


def test_what_was_not_measured_of_ours_is_no_figure() -> None:
    assert figures([sample(1, "envoy", per_second=1.0)], [RATE]) == []
    assert figures([sample(1, "ours", other=1.0)], [RATE]) == []


def test_every_row_is_of_a_scenario_that_is_measured() -> None:
    known = {one.name for one in SCENARIOS} | {"enrolment", "policy", "observe", "scrape"}
    assert {metric.scenario for metric in METRICS} <= known


def test_every_row_of_the_goals_has_a_target() -> None:
    """By scenario: how many figures are judged, and by what."""
    judged: dict[str, list[float]] = {}
    for metric in METRICS:
        if metric.target is not None:
            judged.setdefault(metric.scenario, []).append(metric.target)
    assert judged == {
        "bulk_send": [1.75, 0.5],
        "bulk_receive": [1.75, 0.5],
        "bulk_8": [1.7, 0.5],
        "latency": [0.5, 0.5],
        "requests": [1.2, 0.6],
        "connections": [1.7, 0.5],
        "first_byte": [0.5, 0.5, 0.1],
        "same_node_bulk": [0.75],
        "same_node_requests": [0.6],
        "outside_bulk": [0.95],
        "memory": [45.0, 2.5, 2.5],
        "many": [0.0, 1.1],
        "enrolment": [10.0, 100.0, 0.01, 1.1],
        "policy": [1000.0],
        "observe": [0.95, 0.95, 1.05],
        "scrape": [300.0, 300.0],
    }


def test_a_scenario_of_some_rounds_is_due_in_those_alone() -> None:
    due = {one.name: [number for number in range(1, 6) if one.due(number)] for one in SCENARIOS}
    assert due["memory"] == [1, 3]
    assert due["many"] == [2]
    assert due["bulk_send"] == [1, 2, 3, 4, 5]


def test_names_of_figures_are_unique_and_their_terms_known() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert {metric.better for metric in METRICS} == {"higher", "lower"}
    assert {metric.against for metric in METRICS} <= {"direct", "envoy", "relay"}
    assert all(math.isfinite(metric.scale) for metric in METRICS)
