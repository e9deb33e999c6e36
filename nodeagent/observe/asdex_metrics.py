"""The Prometheus series of ASDEX.

This module owns its two metric names. It promises that labels are names of this node's workloads,
that a workload without connections has no series (a score of nothing is none), and that what is
shown is rounded down: 1 is exactly 1. It may not compute a score.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from nodeagent.observe.asdex_model import AsdexReport

__all__ = ["AsdexSeries"]


class AsdexSeries(Collector):
    """The scores that were shown last. `show` and `collect` may be called by different threads."""

    def __init__(self) -> None:
        self._report: AsdexReport | None = None

    def show(self, report: AsdexReport | None) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        score = GaugeMetricFamily(
            "nodeagent_asdex",
            "Part of a workload's inbound connections of the last hour that is well protected.",
            labels=("workload", "namespace"),
        )
        node = GaugeMetricFamily("nodeagent_asdex_node", "The same of all workloads of the node.")
        report = self._report
        if report is not None:
            for each in report.workloads:
                if each.score is not None:
                    score.add_metric((each.workload, each.namespace), each.score)
            if report.score is not None:
                node.add_metric((), report.score)
        yield score
        yield node
