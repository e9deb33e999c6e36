"""ASDEX: each point that is lost is explained, and 1.00 is said of nothing less."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.admin.model import CertificateReport, PodReport, PodState
from nodeagent.flows import SCHEMA, Recorded, Recording
from nodeagent.observe import asdex
from nodeagent.observe.asdex_metrics import AsdexSeries
from nodeagent.observe.asdex_model import WEIGHTS, AsdexReport, AsdexWorkload, Check
from support.whatif import ONLY_WEB, configuration, mesh, policy, strict, web
from support.whatif import flow as recorded_flow

NOW = datetime(2026, 1, 20, 12, tzinfo=UTC)
SINCE = NOW - timedelta(hours=1)


def flow(**changes: Any) -> Recorded:  # noqa: ANN401 - fields of a flow
    return recorded_flow(SINCE, NOW, **changes)


def clear(**changes: Any) -> Recorded:  # noqa: ANN401 - as above
    values = {"identity": "", "workload": "", "source": "10.9.9.9", "arrival": "plaintext"}
    return flow(**(values | changes))


def pod(uid: str, hours: int = 1) -> PodReport:
    certificate = CertificateReport(
        identity="x", not_before=SINCE, not_after=SINCE + timedelta(hours=hours)
    )
    return PodReport(
        workload=uid,
        identity="x",
        netns="x",
        state=PodState.ENROLLED,
        since=SINCE,
        certificate=certificate,
    )


def build(
    documents: list[str],
    *flows: Recorded,
    hours: int = 1,
    **changes: Any,  # noqa: ANN401 - fields of a recording
) -> AsdexReport:
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "node": "n1",
        "time": NOW,
        "since": SINCE,
        "oldest": SINCE,
        "complete": SINCE,
        "flows": flows,
    }
    recording = Recording(**(values | changes))
    pods = [pod("shop/pay", hours), pod("shop/web")]
    return asdex.build(recording, pods, configuration(*documents))


def pay(report: AsdexReport) -> AsdexWorkload:
    return next(each for each in report.workloads if each.workload == "shop/pay")


BEST = [*mesh(), strict(), policy(ONLY_WEB)]


def test_the_best_has_every_point_and_lost_none() -> None:
    found = build(BEST, flow(connections=1000), flow(allowed=False, identity=web("other")))
    assert (pay(found).score, pay(found).losses, found.score) == (1.0, (), 1.0)
    assert sum(WEIGHTS.values()) == 100


@pytest.mark.parametrize(
    "changes, complete",
    [
        ({}, True),
        # Nothing is kept of a time in which nobody called.
        ({"oldest": None}, True),
        ({"complete": SINCE + timedelta(seconds=1)}, False),
        ({"complete": None}, False),
        ({"truncated": True}, False),
        ({"problem": "no room"}, False),
    ],
)
def test_a_score_says_whether_all_of_the_time_is_in_it(
    changes: dict[str, Any], complete: bool
) -> None:
    assert build(BEST, **changes).complete is complete


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", web(), web("other")]),
            st.sampled_from(["hbone", "direct"]),
            st.integers(0, 5000),
            st.integers(0, 3),
        ),
        max_size=6,
    ),
    st.sampled_from([mesh(), BEST, [*mesh(), strict()], [*mesh(), policy(ONLY_WEB)]]),
    st.sampled_from([1, 25]),
)
def test_every_point_lost_is_explained_and_nothing_is_rounded_up(
    calls: list[tuple[str, str, int, int]], documents: list[str], hours: int
) -> None:
    flows = [
        flow(identity=who, arrival=way, connections=count, carried=carried)
        if who
        else clear(connections=count, carried=carried)
        for who, way, count, carried in calls
    ]
    found = pay(build(documents, *flows, hours=hours))
    assert found.connections == sum(count + carried for _, _, count, carried in calls)
    if not found.connections:
        assert (found.score, found.losses) == (None, ())
        return
    exact = found.points / (100 * found.connections)
    assert found.score is not None
    assert found.score <= exact + 1e-12
    assert exact < found.score + 0.01 + 1e-12
    assert (found.score == 1.0) == (not found.losses)
    assert exact + sum(each.cost for each in found.losses) == pytest.approx(1.0)


def test_without_connections_there_is_no_score() -> None:
    found = build(BEST)
    assert (pay(found).score, found.score, found.connections) == (None, None, 0)


@pytest.mark.parametrize(
    "documents, changes, hours, lost",
    [
        (BEST, {"arrival": "direct"}, 1, {Check.ENCRYPTED: 5}),
        (BEST, {}, 25, {Check.SHORT_LIVED: 5}),
        ([*mesh(), policy(ONLY_WEB)], {}, 1, {Check.STRICT: 5}),
        ([*mesh(), strict()], {}, 1, {Check.POLICY: 30, Check.EXACT: 5}),
        (
            [*mesh(), strict(), policy('[{from: [{source: {principals: ["*"]}}]}]')],
            {},
            1,
            {Check.POLICY: 30, Check.EXACT: 5},
        ),
        (
            [*mesh(), strict(), policy('[{from: [{source: {principals: ["*/ns/shop/sa/web"]}}]}]')],
            {},
            1,
            {Check.EXACT: 5},
        ),
        (
            [*mesh(), strict(), policy('[{from: [{source: {namespaces: ["shop"]}}]}]')],
            {},
            1,
            {},
        ),
        (
            [*mesh(), strict(), policy('[{to: [{operation: {ports: ["8080"]}}]}]')],
            {},
            1,
            {Check.POLICY: 30, Check.EXACT: 5},
        ),
        (
            # Who is not named may come by the other source.
            [
                *mesh(),
                strict(),
                policy(
                    '[{from: [{source: {namespaces: ["shop"]}},'
                    ' {source: {ipBlocks: ["10.0.0.0/8"]}}]}]'
                ),
            ],
            {},
            1,
            {Check.POLICY: 30, Check.EXACT: 5},
        ),
        (
            BEST,
            {"identity": "", "source": "", "address": "", "port": 0, "workload": ""},
            1,
            {Check.POLICY: 30, Check.EXACT: 5},
        ),
        # What let it in is not in force any more.
        (BEST, {"identity": web("other")}, 1, {Check.POLICY: 30, Check.EXACT: 5}),
    ],
)
def test_each_check_costs_what_it_weighs(
    documents: list[str], changes: dict[str, Any], hours: int, lost: dict[Check, int]
) -> None:
    found = pay(build(documents, flow(**changes), hours=hours))
    assert {each.check: round(100 * each.cost) for each in found.losses} == lost
    assert found.points == 100 - sum(lost.values())
    assert all(each.reason for each in found.losses)


def test_who_has_no_identity_has_no_point_whatever_else_is_well() -> None:
    (loss,) = (found := pay(build(mesh(), clear()))).losses
    assert (found.score, loss.check, loss.cost) == (0.0, Check.IDENTITY, 1.0)
    assert loss.caller == "10.9.9.9"


def test_a_score_is_rounded_down_and_no_rounding_makes_it_one() -> None:
    found = pay(build(BEST, flow(connections=99_999), clear(connections=1)))
    assert (found.score, len(found.losses)) == (0.99, 1)
    assert f"{found.score:.2f}" == "0.99"


def test_costs_and_score_add_up_to_one() -> None:
    chance = random.Random(7)  # noqa: S311 - the same ones each time
    kinds = [flow(), clear(), flow(arrival="direct"), flow(identity=web("other"))]
    for _ in range(50):
        flows = [flow_with(kind, chance.randrange(0, 50), chance.randrange(1, 4)) for kind in kinds]
        found = pay(build([*mesh(), policy(ONLY_WEB)], *flows))
        costs = sum(each.cost for each in found.losses) + found.left_out
        assert abs(found.points / (100 * found.connections) + costs - 1) < 1e-9


def flow_with(kind: Recorded, connections: int, carried: int) -> Recorded:
    values = {name: getattr(kind, name) for name in kind.__struct_fields__}
    return Recorded(**(values | {"connections": connections, "carried": carried}))


def test_namespace_and_node_are_the_mean_over_connections() -> None:
    found = build(BEST, flow(connections=3), clear(destination="shop/web", connections=1))
    (shop,) = found.namespaces
    assert (shop.score, shop.connections, found.score) == (0.75, 4, 0.75)


def test_many_losses_are_told_in_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asdex, "MAX_LOSSES", 2)
    found = pay(build(mesh(), *(clear(source=f"10.9.9.{n}") for n in range(1, 6))))
    assert (len(found.losses), round(found.left_out, 9)) == (2, 0.6)


def test_the_metric_has_no_series_where_there_is_no_score() -> None:
    series = AsdexSeries()
    assert [len(family.samples) for family in series.collect()] == [0, 0]
    series.show(build(BEST, flow()))
    workloads, node = series.collect()
    assert [(each.labels, each.value) for each in workloads.samples] == [
        ({"workload": "shop/pay", "namespace": "shop"}, 1.0)
    ]
    assert [each.value for each in node.samples] == [1.0]
